import subprocess
import sys

import pytest

TOUCH = """
import resource
import sys
import torch
from repvgg.memory import keep_memory

if sys.argv[1] == "kept":
    assert keep_memory()
torch.set_num_threads(1)
for _ in range(2):
    torch.ones(2**26)  # 256 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is asked")
def test_memory_that_was_kept_needs_no_new_pages():
    fresh, kept = (
        int(subprocess.check_output([sys.executable, "-c", TOUCH, how])) for how in ("", "kept")
    )

    assert kept < fresh / 10
