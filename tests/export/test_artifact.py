import json

import pytest

from repvgg.contract import DataContract, Description
from repvgg.export import artifact

CONTRACT = DataContract(["a", "b", "c"], 3, [32, 32], [0.4, 0.5, 0.6], [0.2, 0.3, 0.2], "bilinear")


def test_a_damaged_description_is_rejected():
    with pytest.raises(ValueError, match="damaged description"):
        artifact.described("model.onnx", json.dumps({"model": {}}))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"input": "int8"}, "input='int8': must be one of"), ({"output": "label"}, "output='label'")],
)
def test_an_unknown_input_or_output_is_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        Description({}, CONTRACT, **options)
