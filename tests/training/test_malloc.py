import subprocess
import sys

import pytest

STEPS = """
import resource
import sys
import torch
from repvgg.training.malloc import keep_memory

if sys.argv[1] == "kept":
    assert keep_memory()
torch.set_num_threads(1)
weight = torch.ones(1, requires_grad=True)
for step in range(6):
    if step == 4:  # blocks have found their places
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(46, 3, 250, 250)  # 34.5 MB, above the 32 that malloc may keep by itself
    for _ in range(3):
        x = (x * weight).relu()
    x.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is asked")
def test_a_step_needs_no_new_pages_where_memory_is_kept():
    given, kept = (
        int(subprocess.check_output([sys.executable, "-c", STEPS, how]))
        for how in ("given", "kept")
    )

    assert kept < given / 2
