"""Worker processes: they live from epoch to epoch; a dead one ends the run with one line."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from repvgg import targets
from repvgg.data import workers
from repvgg.data.batches import WorkersDied
from repvgg.data.folders import imagefolder
from repvgg.data.images import open_image
from repvgg.targets import is_from_user_code
from tests.support.commands import ROOT, make

READ = """
import functools, multiprocessing, os, pathlib, signal, sys, threading
from repvgg.data.batches import Batches
from repvgg.data.files import Files
from repvgg.data.images import fit
from repvgg.data.scan import find

def read():
    paths, labels, _ = find(pathlib.Path(sys.argv[1]))
    files = Files(paths, labels, evaluate=functools.partial(fit, size=(16, 16)), num_workers=2)
    return files, iter(Batches(files, batch_size=2, shuffle_seed=0))

def signal_group(stop):
    while not stop.wait(0.002):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.killpg(0, number)

def interrupted():
    noted, main = set(), os.getpid()

    def note(number, _):
        noted.add(number) if os.getpid() == main else os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, note)
    stop = threading.Event()
    thread = threading.Thread(target=signal_group, args=(stop,))
    thread.start()
    try:
        for _ in range(5 if sys.argv[3] == "fork" else 1):
            files, reader = read()
            assert [len(images) for images, _ in reader] == [2] * 6
            files.close()
    finally:
        stop.set()
        thread.join()
    print(len(noted), "signals noted")

def killed():
    _, reader = read()
    next(reader)
    os.kill(os.getpid(), signal.SIGKILL)

def left_open():
    _, reader = read()
    next(reader)
    print("left open")

def without_memory():
    try:
        list(read()[1])
    except ChildProcessError as error:
        print(error)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[3])
    globals()[sys.argv[2]]()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make(folder / "train")
    make(folder / "val", count=2)
    return folder


@pytest.fixture
def read(root, tmp_path):
    """Run a part of READ in a separate process group; ends with the last of its processes."""

    def run(part: str, method: str = "fork", *before: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "read.py"
        script.write_text(READ)
        return subprocess.run(
            [*before, sys.executable, "-W", "error", script, root / "train", part, method],
            capture_output=True,
            text=True,
            timeout=240,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    return run


@pytest.fixture
def start_method(request):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def open_data(root, **options):
    return imagefolder(
        root=str(root), **{"batch_size": 4, "image_size": 16, "num_workers": 2, **options}
    )


def pids(source) -> list[int]:
    return [process.pid for process, _ in source._workers._processes]


@pytest.mark.parametrize(
    "start_method",
    [
        "fork",
        pytest.param("forkserver", marks=pytest.mark.slow),
        # "spawn" sends the same; a program below reads with workers that were spawned.
    ],
    indirect=True,
)
def test_workers_live_from_epoch_to_epoch_and_give_its_order(start_method, root):
    def read(data, epoch: int) -> torch.Tensor:
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        return torch.cat([images for images, _ in loader])

    data = open_data(root)
    first = read(data, 0)
    started = pids(data.train)

    assert torch.equal(first, read(open_data(root, num_workers=0), 0))
    assert torch.equal(read(data, 1), read(open_data(root, num_workers=0), 1))
    assert (pids(data.train), len(started)) == (started, 2)
    data.teardown("fit")


@pytest.mark.parametrize("transforms", [None, [], [v2.RandAugment(), v2.RandomErasing(p=0.5)]])
def test_every_augmentation_can_be_sent_to_a_process(transforms, root):
    data = open_data(root, augment=transforms)

    augment = pickle.loads(pickle.dumps(data.augment))

    assert (augment is None) == (transforms is None)
    assert augment is None or augment(open_image(data.train.paths[0])).shape == (3, 16, 16)


def test_readers_can_take_turns_and_leave_before_the_end(root):
    data = open_data(root, batch_size=1, num_workers=2)
    expected = [
        images for images, _ in open_data(root, num_workers=0, batch_size=1).train_dataloader()
    ]

    one = iter(data.train_dataloader())
    given = [next(one)[0]]
    other = iter(data.train_dataloader())
    assert torch.equal(next(other)[0], expected[0])
    other.close()
    given += [images for images, _ in one]

    assert all(map(torch.equal, given, expected))
    assert len(given) == len(expected)
    data.teardown("fit")


def test_a_killed_worker_is_reported_in_one_line(root):
    data = open_data(root, batch_size=1)
    reader = iter(data.train_dataloader())
    next(reader)
    for pid in pids(data.train):
        os.kill(pid, signal.SIGKILL)

    with pytest.raises(WorkersDied, match=r"killed by SIGKILL, .*; reduce num_workers") as died:
        list(reader)

    assert "\n" not in str(died.value)
    assert len(list(data.train_dataloader())) == 12  # by new workers
    data.teardown("fit")


def test_a_silent_worker_is_reported(root, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.5)
    monkeypatch.setattr(workers, "GRACE", 0)
    data = open_data(root)
    data.augment = stuck

    with pytest.raises(WorkersDied, match="has sent no batch for"):
        list(data.train_dataloader())

    assert pids(data.train) == []


def stuck(image):
    threading.Event().wait()


def test_an_error_of_a_worker_is_raised_with_where_it_was(root, monkeypatch):
    monkeypatch.setattr(targets, "NOT_THE_USERS", [ROOT / "repvgg"])  # but the tests are
    data = open_data(root)
    data.augment = broken

    with pytest.raises(ZeroDivisionError) as raised:
        list(data.train_dataloader())

    assert "in broken" in raised.value.__notes__[0]
    assert is_from_user_code(raised.value)


def test_an_error_of_ours_in_a_worker_stays_a_mistake_of_the_user(tmp_path):
    make(tmp_path / "train")
    make(tmp_path / "val", count=2)
    data = open_data(tmp_path)
    Path(data.train.paths[0]).write_bytes(b"")

    with pytest.raises(ValueError, match="cannot be read") as raised:
        list(data.train_dataloader())

    assert not is_from_user_code(raised.value)


def broken(image):
    return 1 / 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_signals_to_the_process_group_do_not_reach_workers(method, read):
    done = read("interrupted", method)

    assert (done.returncode, done.stdout) == (0, "4 signals noted\n"), done.stderr
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_main_process_that_is_killed(method, read):
    assert read("killed", method).returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_are_left_open_do_not_keep_a_program_from_ending(method, read):
    done = read("left_open", method)

    assert (done.returncode, done.stdout, done.stderr) == (0, "left open\n", "")


@pytest.mark.slow
def test_full_shared_memory_is_reported_in_one_line(read):
    small = 'mount -t tmpfs -o size=4k none /dev/shm && exec "$@"'
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", small, "sh"]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a file system")

    done = read("without_memory", "fork", *mount)

    assert "/dev/shm" in done.stdout
    assert "No space left" in done.stdout
    assert done.stdout.endswith("or set num_workers to 0\n")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
