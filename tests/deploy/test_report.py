import json
from dataclasses import replace

import pytest

from repvgg.deploy.report import Report
from repvgg.verify import Verdict
from tests.support.commands import ROOT
from tests.support.reports import report, whole_report

VERSION_0_1 = ROOT / "tests" / "support" / "version_0_1" / "deployed" / "report.json"


@pytest.mark.parametrize("written", [report(), whole_report()], ids=["least", "whole"])
def test_a_report_survives_the_round_trip_through_json(written):
    assert Report.from_json(written.to_json()) == written


def test_a_report_of_version_0_1_is_read_completely():
    text = VERSION_0_1.read_text()

    again = json.loads(Report.from_json(text).to_json())

    bound = again.pop("float32_bound")  # version 0.1 had this bound for all networks
    assert (again, bound) == (json.loads(text), 1e-5)


def test_the_keys_are_those_of_version_0_1_in_their_order():
    keys, old = json.loads(whole_report().to_json()), json.loads(VERSION_0_1.read_text())

    optional = {"int8", "accuracy_on_validation", "agreement_on_validation", "training"}
    assert [key for key in keys if key in old] == list(old)
    assert keys.keys() - old.keys() == optional | {
        "float32_bound",
        "validation_images",
        "created",
    }


def test_keys_of_a_later_version_are_ignored():
    content = json.loads(report().to_json())
    content["energy"] = content["probe"]["energy"] = 3

    assert Report.from_json(json.dumps(content)) == report()


def remove(key):
    return lambda content: content.pop(key)


def put(value, *keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("files"), "files is missing"),
        (put(3, "files", "model.bin"), r"files\.model\.bin=3: must be DeployedFile"),
        (put("1", "files", "model.bin", "bytes"), r"files\.model\.bin\.bytes=1: must be int"),
        (put(True, "images"), "images=True: must be int"),
        (put(3, "files", "model.xml", "verified"), r"files\.model\.xml\.verified=3: must be str"),
        (put([1], "verdicts"), r"verdicts=\[1\]: must be Mapping"),
        (put("minmax", "int8", "trials"), r"int8\.trials=minmax: must be Sequence"),
        (put([], "data", "mean"), r"mean=\[\]"),
    ],
)
def test_a_damaged_report_is_an_error_that_names_the_key(damage, message):
    content = json.loads(whole_report().to_json())
    damage(content)

    with pytest.raises(ValueError, match=message):
        Report.from_json(json.dumps(content))


def test_text_that_is_no_json_is_an_error():
    with pytest.raises(ValueError, match="Expecting"):
        Report.from_json("{")


def test_a_number_without_fraction_is_read_as_a_float():
    content = json.loads(report().to_json())
    content["probe"]["error"] = 0

    assert isinstance(Report.from_json(json.dumps(content)).probe.error, float)


def test_markdown_holds_the_verdict_the_files_and_the_model_card():
    page = whole_report().to_markdown()

    for row in (
        "# repvgg_tiny: passed",
        "The largest error of model.xml against the multi-branch network in float64 is 2.0e-07",
        "| model.xml | OpenVINO | 8.0 MB | 2.0e-07 | 1e-05 | 100.00 % | 75.00 % | 0.50 | 3.0 |",
        "| model-int8.onnx | onnxruntime, int8 | 0.1 kB | 0.00 % lost | 25.00 % | 75.00 % |",
        "[report.html](report.html) has figures",
        "| classes | 3: a, b, c |",
        "| data | digits |",
        "| accuracy in training | test 98.00 % |",
        "`python deploy.py ckpt=best.ckpt`",
    ):
        assert row in page


def test_the_sentence_of_verdict_leaves_out_what_was_not_measured():
    assert report(accuracy_on_probe={}).summary().splitlines()[0] == (
        "repvgg_tiny was folded without changing its results. The largest error of model.onnx "
        "against the multi-branch network in float64 is 2.0e-07 of the largest output "
        "(1e-05 allowed)."
    )


def test_the_sentence_of_verdict_names_every_result():
    assert whole_report().summary().splitlines()[0] == (
        "repvgg_tiny was folded without changing its results. The largest error of model.xml "
        "against the multi-branch network in float64 is 2.0e-07 of the largest output "
        "(1e-05 allowed). int8 loses 0.00 % accuracy (25.00 % allowed). The folded network runs "
        "1.5 times as fast in PyTorch and 3.0 times in OpenVINO (model.xml). Accuracy on the test "
        "set: 98.00 %."
    )


def test_the_summary_has_a_row_for_each_file_and_no_empty_column():
    assert report(accuracy_on_probe={}).summary().splitlines()[2:] == [
        "file        engine         size    error  same top-1",
        "model.onnx  onnxruntime  8.0 MB  2.0e-07    100.00 %",
    ]


def test_a_table_wider_than_the_terminal_becomes_a_line_for_each_file():
    assert report(accuracy_on_probe={}).summary(40).splitlines()[2:] == [
        "model.onnx: engine onnxruntime, size 8.0 MB, error 2.0e-07, same top-1 100.00 %",
    ]


def test_no_speed_is_named_when_the_control_differs():
    noisy = replace(whole_report().latency, noisy=True)

    text = replace(whole_report(), latency=noisy).summary()

    assert "speedup" not in text
    assert "times as fast" not in text
    assert "0.50" in text


def test_a_verdict_says_in_json_whether_it_passed():
    verdicts = {"good": Verdict(1e-6, 1e-5), "bad": Verdict(1e-4, 1e-5)}

    content = json.loads(report(verdicts=verdicts).to_json())["verdicts"]

    assert [entry["passed"] for entry in content.values()] == [True, False]
