import os

import pytest

from repvgg import runs


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


def make(folder, *, saved: bool = True, seconds: int = 0):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("- model=repvgg_tiny\n- seed=3\n")
    if saved:
        (folder / runs.LAST).parent.mkdir()
        (folder / runs.LAST).touch()
        os.utime(folder / runs.LAST, (seconds, seconds))
    return folder


def test_resuming_repeats_what_the_run_was_given(here):
    folder = make(here / "runs" / "one")

    arguments = runs.continue_run([f"resume={folder / runs.LAST}", "trainer.max_epochs=9"])

    assert arguments == [
        "model=repvgg_tiny",
        "seed=3",
        f"resume={folder / runs.LAST}",
        "trainer.max_epochs=9",
        f"hydra.run.dir={folder}",
    ]


def test_auto_without_a_folder_takes_the_newest_run(here):
    make(here / "runs" / "a" / "old", seconds=100)
    newest = make(here / "runs" / "b" / "new", seconds=300)
    make(here / "runs" / "c" / "never saved", saved=False)

    assert f"hydra.run.dir={newest}" in runs.continue_run(["resume=auto"])


def test_auto_in_a_folder_goes_on_from_it_with_the_same_command(here):
    folder = make(here / "job")
    typed = ["model=repvgg_tiny", "seed=3", "hydra.run.dir=job", "resume=auto"]

    arguments = runs.continue_run(typed)

    assert f"resume=job/{runs.LAST}" in arguments
    assert f"hydra.run.dir={folder}" in arguments


@pytest.mark.parametrize("killed_early", [False, True])
def test_auto_in_a_folder_without_a_checkpoint_starts_the_run(killed_early, here):
    if killed_early:
        make(here / "job", saved=False)

    arguments = runs.continue_run(["seed=4", "hydra.run.dir=job", "resume=auto"])

    assert arguments == ["seed=4", "hydra.run.dir=job"]


def test_auto_with_nothing_to_resume_says_what_to_type():
    with pytest.raises(
        ValueError, match=r"resume=auto: there is no checkpoints/last.ckpt in runs/"
    ):
        runs.continue_run(["resume=auto"])


def test_auto_refuses_another_setting_as_any_resume_does(here):
    make(here / "job")

    with pytest.raises(ValueError, match="seed=4: a resumed run keeps what it was started with"):
        runs.continue_run(["seed=4", "hydra.run.dir=job", "resume=auto"])


def test_processes_that_were_started_together_need_a_folder(here, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    with pytest.raises(ValueError, match=r"type hydra\.run\.dir=runs/NAME"):
        runs.check_folder(here / "runs" / "now", resumed=False, chosen=False)
    runs.check_folder(here / "runs" / "chosen", resumed=False, chosen=True)


def test_the_first_process_alone_judges_the_folder(here, monkeypatch):
    folder = make(here / "runs" / "one")
    with pytest.raises(ValueError, match="belongs to another run: type resume=runs/one/"):
        runs.check_folder(folder, resumed=False, chosen=True)

    monkeypatch.setenv("LOCAL_RANK", "1")

    runs.check_folder(folder, resumed=False, chosen=True)


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(here):
    runs.write_whole(here / "a.yaml", "old")
    runs.write_whole(here / "a.yaml", "new")

    assert [(path.name, path.read_text()) for path in here.iterdir()] == [("a.yaml", "new")]
