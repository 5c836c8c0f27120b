"""train.py, as a user types it, on short runs."""

import math
import os
import re
import shutil
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import repvgg
from repvgg.contract import to_float
from tests.support import foreign
from tests.support.commands import (
    ROOT,
    SHORT,
    make,
    run,
    run_fresh,
    run_process,
    tree,
    wait_for,
)
from tests.support.networks import settle
from tests.support.processes import Process


@pytest.fixture(scope="module")
def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_training_ends_with_accuracy_checkpoint_and_the_next_commands(trained, folder, home):
    path = (folder / "checkpoints" / "best.ckpt").relative_to(home)

    took, best, *rest = trained.stdout.splitlines()[-7:]
    assert re.fullmatch(r"trained for   [\d.]+ s, [\d,]+ images per second", took)
    assert re.fullmatch(r"best epoch    [012] \(of 0 to 2\), validation accuracy 0\.\d{4}", best)
    assert rest == [
        re.search(r"test accuracy 0\.\d{4}, top-5 [01]\.\d{4}, loss \d\.\d{4}", trained.stdout)[0],
        f"folder        {path.parents[1]}",
        "files in it   checkpoints/best.ckpt, checkpoints/last.ckpt, results.json, metrics.csv",
        f"deploy it     python {ROOT / 'deploy.py'} ckpt={path}",
        "watch it      tensorboard --logdir runs",
    ]


def test_training_shows_its_progress(trained):
    lines = [line for line in trained.stdout.splitlines() if line.startswith("Epoch")]
    number = r"\d+\.\d+"
    assert len(lines) == 3
    assert re.fullmatch(
        rf"Epoch 2: {number} s, train/loss {number}, val/accuracy {number}", lines[2]
    )
    assert trained.stderr == ""


def test_a_run_keeps_configuration_events_and_two_checkpoints(folder):
    names = {re.sub(r"events\..*", "events", path) for path in tree(folder)}

    assert names >= {
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "events",
    }
    assert not [path for path in names if path.endswith(".log")]


def test_tensorboard_shows_what_training_is_about(events):
    assert set(events.Tags()["scalars"]) >= {
        "train/loss",
        "train/cross_entropy",
        "train/kl",
        "train/kl_to_cross_entropy",
        "train/agreement",
        "train/alpha",
        "train/accuracy",
        "train/learning_rate",
        "train/images_per_second",
        "val/loss",
        "val/accuracy",
        "val/calibration_error",
        "test/accuracy",
        "test/accuracy_top5",
    }


def test_tensorboard_has_the_divergence_above_zero_and_the_rate_falling(events):
    kl = [event.value for event in events.Scalars("train/kl")]
    rate = [event.value for event in events.Scalars("train/learning_rate")]

    assert min(kl) > 0
    assert rate[-1] < max(rate) / 10


def test_tensorboard_shows_hyperparameters_with_the_final_metric(events, trained):
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams

    assert settings["rdrop"].number_value == 1.0
    assert settings["model"].string_value == "repvgg_tiny"
    accuracy = events.Scalars("test/accuracy")[-1].value
    assert f"test accuracy {accuracy:.4f}" in trained.stdout


def test_a_checkpoint_holds_plain_types_and_no_more(folder):
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)

    assert content["repvgg"]["model"]["name"] == "repvgg_tiny"


def test_the_checkpoint_opens_without_lightning(folder):
    restored = repvgg.checkpoint.load(folder / "checkpoints" / "best.ckpt")

    logits = restored.predictor(to_float(restored.probe.images))
    assert restored.data.classes == [str(digit) for digit in range(10)]
    torch.testing.assert_close(logits, restored.probe.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_ctrl_c_saves_and_resuming_ends_with_the_weights_of_an_undisturbed_run(
    trained, folder, tmp_path
):
    process = Process(ROOT / "train.py", *SHORT, "hydra.run.dir=run", cwd=tmp_path)
    wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    command = said.splitlines()[-1].partition(f"resume with: python {ROOT / 'train.py'} ")[2]

    resumed = run("train.py", command, cwd=tmp_path)

    assert process.returncode == 128 + signal.SIGINT
    assert command == "resume=run/checkpoints/last.ckpt"
    assert resumed.returncode == 0, resumed.stderr
    assert os.listdir(tmp_path) == ["run"]
    assert same_weights(folder, tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_with_the_same_command_without_a_warning(
    trained, folder, tmp_path
):
    command = [*SHORT, "hydra.run.dir=job", "resume=auto"]
    process = Process(ROOT / "train.py", *command, cwd=tmp_path, strict=True)
    wait_for(tmp_path / "job" / "checkpoints" / "last.ckpt", process)
    process.kill()
    _, said = process.communicate()

    resumed = run_fresh("train.py", *command, cwd=tmp_path)

    assert said == ""
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert same_weights(folder, tmp_path / "job")


@pytest.mark.slow
def test_two_devices_stopped_and_resumed_train_as_one_that_accumulates(tmp_path):
    settings = [
        "model=repvgg_tiny",
        "rdrop=true",
        "trainer.max_epochs=2",
        "trainer.accelerator=cpu",
        "ema=0.9",
    ]
    devices = [*settings, "data.batch_size=32", "trainer.devices=2", "hydra.run.dir=two"]
    accumulating = ["data.batch_size=32", "trainer.accumulate_grad_batches=2", "hydra.run.dir=one"]
    process = Process(ROOT / "train.py", *devices, cwd=tmp_path, forks=1)
    wait_for(tmp_path / "two" / "checkpoints" / "last.ckpt", process)
    process.terminate()
    _, said = process.communicate()

    # The launcher of a cluster resumes what the command started.
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2")
    command = [*torchrun, ROOT / "train.py", *devices, "resume=auto"]
    resumed = Process(*command, cwd=tmp_path, forks=2).completed()
    alone = run("train.py", *settings, *accumulating, cwd=tmp_path)

    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM; saved two/checkpoints/last.ckpt" in said
    assert resumed.returncode == 0, resumed.stderr
    assert alone.returncode == 0, alone.stderr
    assert resumed.stdout.count("test accuracy") == 1
    expected, given = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("one", "two")
    )
    for key, value in expected["current_model_state"].items():
        if not key.endswith(("running_mean", "running_var", "tracked")):  # of the first device
            torch.testing.assert_close(
                given["current_model_state"][key], value, rtol=1e-5, atol=1e-6
            )


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path):
    done = run("train.py", *SHORT, "optim.lr=1e30", "hydra.run.dir=run", cwd=tmp_path)

    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.match(
        r"train.py: the loss is NaN or infinite at step \d+, with a learning rate", last
    )
    assert "nothing was saved yet" in last
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_folder_of_images_is_trained_on_and_deployed(tmp_path):
    make(tmp_path / "my images" / "train", count=24)
    make(tmp_path / "my images" / "test", count=4)
    data = ["data=imagefolder", "data.root=my images", "data.image_size=16", "data.batch_size=16"]

    trained = run(
        "train.py",
        *data,
        "model=repvgg_tiny",
        "trainer.max_epochs=2",
        "hydra.run.dir=run",
        "deployed_validation=true",
        cwd=tmp_path,
    )
    deployed = run(
        "deploy.py",
        "ckpt=run/checkpoints/best.ckpt",
        *data,
        "formats=[safetensors]",
        "benchmark=false",
        cwd=tmp_path,
    )

    assert trained.returncode == 0, trained.stderr
    assert deployed.returncode == 0, deployed.stderr
    contract = repvgg.checkpoint.load(tmp_path / "run" / "checkpoints" / "best.ckpt").data
    assert (contract.classes, contract.resize_size) == (["cat", "dog"], 256)


def test_a_damaged_image_ends_in_one_line_and_not_in_a_trace_of_a_worker(tmp_path):
    make(tmp_path / "images" / "train", count=8)
    make(tmp_path / "images" / "val", count=2)
    damaged = tmp_path / "images" / "train" / "dog" / "5.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])

    done = run(
        "train.py",
        "data=imagefolder",
        "data.root=images",
        "data.image_size=16",
        "data.batch_size=16",
        "data.num_workers=1",
        "model=repvgg_tiny",
        "trainer.enable_progress_bar=false",
        cwd=tmp_path,
    )

    assert done.returncode == 1
    assert "images/train/dog/5.jpg: cannot be read as an image" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def same_weights(*folders) -> bool:
    expected, given = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in folders
    )
    return all(torch.equal(expected[key], given[key]) for key in expected)


@pytest.mark.slow
def test_a_sweep_makes_one_run_folder_a_job_and_names_the_job_that_failed(tmp_path):
    done = run(
        "train.py", "-m", "model=repvgg_tiny", "trainer.max_epochs=1", "rdrop=-1,0.5", cwd=tmp_path
    )

    assert done.returncode == 1
    assert "rdrop=-1: must be a number of at least 0" in done.stderr
    assert done.stderr.splitlines()[-1] == "train.py: 1 of the sweep's jobs failed"
    (folder,) = tmp_path.glob("runs/*-sweep/*/")
    assert folder.name == "2-rdrop=0.5"
    assert (folder / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.slow
def test_another_run_is_not_started_in_a_folder_that_has_one(trained, folder, home):
    before = tree(folder)

    done = run("train.py", "model=repvgg_a0", f"hydra.run.dir={folder}", cwd=home)

    assert done.returncode == 1
    assert "belongs to another run: pass resume=" in done.stderr
    assert tree(folder) == before


def test_a_resumed_run_keeps_what_it_was_started_with(trained, folder, home):
    before = tree(folder)

    done = run("train.py", f"resume={folder / 'checkpoints' / 'last.ckpt'}", "seed=4", cwd=home)

    assert done.returncode == 1
    assert "seed=4: the run was started with seed=" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert tree(folder) == before


@pytest.mark.slow
def test_callbacks_and_loggers_are_the_users_own(tmp_path):
    rates, logger = "+callbacks.rates", "+logger.mine"
    done = run(
        "train.py",
        *SHORT,
        "trainer.max_epochs=1",
        f"{rates}._target_=lightning.pytorch.callbacks.LearningRateMonitor",
        *("logger=csv", f"{logger}._target_=lightning.pytorch.loggers.CSVLogger"),
        f"{logger}.save_dir=csv",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert "watch it" not in done.stdout
    (metrics,) = (tmp_path / "csv").rglob("metrics.csv")
    header = metrics.read_text().splitlines()[0]
    assert "lr-SGD/decay" in header
    assert "val/accuracy" in header
    assert not list((tmp_path / "run").glob("events*"))


def test_a_sweep_over_several_devices_is_rejected_before_it_trains(tmp_path):
    devices = ["trainer.accelerator=cpu", "trainer.devices=2"]
    done = run("train.py", *SHORT, "-m", "seed=0,1", *devices, cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr.count("trainer.devices=2: a sweep trains on one device") == 2
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_run_of_the_users_own_configs_is_resumed_without_them(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(
        "defaults: [train, _self_]\nseed: 7\nrdrop: 0.5\noptim: {lr: 0.03}\n"
    )
    own = ["--config-dir", "conf", "--config-name", "mine"]
    short = ["model=repvgg_tiny", "trainer.max_epochs=1", "data.batch_size=128"]
    begun = run("train.py", *short, *own, "hydra.run.dir=run", cwd=tmp_path)
    shutil.rmtree(tmp_path / "conf")

    resumed = run(
        "train.py", "resume=run/checkpoints/last.ckpt", "trainer.max_epochs=2", cwd=tmp_path
    )

    assert begun.returncode == 0, begun.stderr
    assert resumed.returncode == 0, resumed.stderr
    assert "R-Drop 0.5 in one forward" in resumed.stdout
    assert "learning rate 0.03," in resumed.stdout


@pytest.mark.slow
def test_a_resumed_run_takes_another_rate_and_as_many_images_in_a_step_on_two_devices(
    trained, folder, tmp_path
):
    shutil.copytree(folder, tmp_path / "run")
    typed = ["resume=run/checkpoints/last.ckpt", "trainer.max_epochs=4", "optim.lr=0.01"]

    refused = run("train.py", *typed, "trainer.devices=2", cwd=tmp_path)
    devices = ["trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=64"]
    steps = "trainer.log_every_n_steps=1"
    command = (*typed, *devices, steps)
    resumed = run_process("train.py", *command, cwd=tmp_path, forks=1)

    assert "a step had 128 images and an epoch 10 steps" in refused.stderr
    assert resumed.returncode == 0, resumed.stderr
    listed = [line for line in resumed.stdout.splitlines() if ", before " in line]
    assert sorted(listed) == [
        "data.batch_size=64, before 128",
        "optim.lr=0.01, before 0.02",
        "trainer.accelerator=cpu, before auto",
        "trainer.devices=2, before 1",
        "trainer.log_every_n_steps=1, before None",
        "trainer.max_epochs=4, before 3",
    ]
    accumulator = EventAccumulator(str(tmp_path / "run"))
    accumulator.Reload()
    rates = {event.step: event.value for event in accumulator.Scalars("train/learning_rate")}
    for step in range(30, 40):  # of 40, the first 10 to warm up
        expected = 0.01 * (1 + math.cos(math.pi * (step - 10) / 30)) / 2
        assert rates[step] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_classes_that_were_renamed_are_an_error_when_a_run_is_resumed(tmp_path):
    make(tmp_path / "images" / "train", count=24)
    make(tmp_path / "images" / "val", count=4)
    data = ["data=imagefolder", "data.root=images", "data.image_size=16", "data.batch_size=16"]
    small = ["model=repvgg_tiny", "trainer.max_epochs=1", "data.num_workers=0"]
    done = run("train.py", *data, *small, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("train", "val"):
        (tmp_path / "images" / part / "cat").rename(tmp_path / "images" / part / "zebra")

    last = "run/checkpoints/last.ckpt"
    resumed = run("train.py", f"resume={last}", "trainer.max_epochs=2", cwd=tmp_path)
    begun = run("train.py", *data, *small, f"init={last}", cwd=tmp_path)

    assert resumed.returncode == 1
    assert "its classes are cat, dog, those of the data are dog, zebra;" in resumed.stderr
    assert "new: linear.weight of zebra, linear.bias of zebra" in begun.stdout


@pytest.mark.slow
@pytest.mark.slow
def test_a_finished_run_that_is_resumed_says_so(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mine")

    where = run("train.py", "resume=mine", cwd=tmp_path)
    done = run("train.py", "resume=mine/checkpoints/last.ckpt", cwd=tmp_path)

    assert "there is no such file; pass resume=mine/checkpoints/last.ckpt" in where.stderr
    assert done.returncode == 0, done.stderr
    assert "nothing is left to train: 30 of 30 steps are done; trainer.max_epochs=N" in done.stdout


def test_a_finished_run_can_be_made_longer(trained, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "it's moved")

    done = run(
        "train.py",
        "resume=it's moved/checkpoints/last.ckpt",
        "trainer.max_epochs=4",
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    last = torch.load(tmp_path / "it's moved" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rdrop=true",), "resnet18 has no stochastic layer"),
        (("model.name=vit_b_16",), "model.name=vit_b_16: does not run on images of 8x8"),
    ],
)
def test_a_network_that_does_not_fit_is_rejected_before_training(tmp_path, arguments, message):
    done = run("train.py", "model=torchvision", *arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_is_initialized_from_a_third_party_file(tmp_path):
    """Deployed, with other classes than the digits have."""
    network = settle(repvgg.create_model("repvgg_tiny", num_classes=4, in_channels=1))
    network.switch_to_deploy()
    torch.save({"model": foreign.renamed(network, foreign.timm)}, tmp_path / "weights.pth")

    done = run("train.py", *SHORT, "trainer.max_epochs=1", "init=weights.pth", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    said = "initialized from repvgg_tiny in timm's layout, folded, 4 classes, at 'model'; new: "
    assert done.stdout.partition(said)[2].splitlines()[0] == "linear.weight, linear.bias"


def test_a_run_is_not_initialized_from_another_network(tmp_path):
    network = repvgg.create_model("repvgg_tiny", in_channels=3)
    torch.save(foreign.renamed(network, foreign.authors), tmp_path / "weights.pth")

    done = run("train.py", *SHORT, "init=weights.pth", cwd=tmp_path)

    assert done.returncode == 1
    said = "init=weights.pth: it holds repvgg_tiny, which does not fit this network: stem."
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "weights.pth"]
