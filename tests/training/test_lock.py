import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg.training import lock

HOLD = """
import sys
from pathlib import Path
from repvgg.training import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
FORK = HOLD.replace(
    "    sys.stdin",
    """    import os
    if os.fork() == 0:
        print("forked", flush=True)
    sys.stdin""",
)


def holder(folder: Path, program: str = HOLD) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", program, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_folder_is_held_by_one_process(tmp_path):
    with holder(tmp_path / "run") as process:
        with pytest.raises(ValueError, match="run is in use by another run"):
            lock.hold(tmp_path / "run").__enter__()

        process.communicate()
    with lock.hold(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_a_folder_is_held_once_within_a_process(tmp_path):
    with lock.hold(tmp_path):
        with pytest.raises(ValueError, match="is in use by another run"):
            lock.hold(tmp_path).__enter__()
        process = subprocess.run(
            [sys.executable, "-c", HOLD, tmp_path], capture_output=True, text=True, check=False
        )

    assert "is in use by another run" in process.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_the_lock_ends_with_the_process_and_not_with_its_workers(tmp_path):
    with holder(tmp_path, FORK) as process:
        assert process.stdout.readline() == "forked\n"
        process.kill()
        process.wait()

        try:
            with lock.hold(tmp_path):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the worker


def test_a_folder_without_files_is_left_empty(tmp_path):
    with lock.hold(tmp_path / "empty"):
        pass
    with lock.hold(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()

    assert list((tmp_path / "empty").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "used").iterdir()) == [".lock", "file"]


def test_the_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), lock.hold(tmp_path):
        raise RuntimeError

    with lock.hold(tmp_path):
        pass
