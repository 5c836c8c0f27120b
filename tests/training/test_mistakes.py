"""Mistakes at the command line: one line, a status that is not 0, nothing written."""

import subprocess
import sys

import pytest

from tests.support.commands import ROOT, run, run_fresh


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("train.py", ["model=repvgg_a"], "did you mean repvgg_a"),
        ("train.py", ["trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
        ("train.py", ["rdrop=true", "model.dropout=0"], "for example model.dropout=0.2"),
        ("train.py", ["+losss=focal"], "losss: there is no such key; did you mean loss?"),
        ("train.py", ["+labelsmoothing=.1"], "did you mean label_smoothing?"),
        (
            "train.py",
            ["+optim.nesterov=false"],
            "optim.nesterov: there is no such key;",
        ),
        ("train.py", ["+optimizer.lr=1"], "optimizer.lr=1: pass optim.lr=RATE"),
        ("train.py", ["optimiser._target_=a.B"], "did you mean optimizer._target_?"),
        ("train.py", ["optimizer._target_=Lion"], "must be the dotted name of a class or function"),
        ("train.py", ["optimizer._target_=nothere.Lion"], "there is no module nothere, neither in"),
        ("train.py", ["optimizer._target_=torch.optim.LBFGS"], "its signature is LBFGS(params"),
        (
            "train.py",
            ["optimizer._target_=torch.optim.RMSprop", "optim.momentum=0.5"],
            "optim.momentum: has no effect with optimizer._target_=torch.optim.RMSprop",
        ),
        (
            "train.py",
            ["scheduler._target_=torch.optim.lr_scheduler.StepLR"],
            "missing a required argument: 'step_size'; its signature is StepLR(",
        ),
        (
            "train.py",
            ["loss._target_=torch.nn.functional.cross_entropy", "+loss.reduction=none"],
            "returns a tensor of shape (32,), must return a scalar tensor with a gradient",
        ),
        ("train.py", ["optim.layer_decay=2"], "optim.layer_decay=2: must be a number above 0"),
        ("train.py", ["optim.repopt=2"], "optim.repopt=2: must be true or false"),
        ("train.py", ["optim.repopt=true"], "the network has branches of its own; pass a plain"),
        ("train.py", ["optim.repopt=true", "optim.name=adamw"], "optim.repopt=True: needs SGD"),
        (
            "train.py",
            ["optim.repopt=true", "+trainer.gradient_clip_val=1"],
            "does not fit trainer.gradient_clip_val",
        ),
        (
            "train.py",
            ["logger=false"],
            "logger=false: must be one of csv, mlflow, tensorboard, wandb; ~logger leaves",
        ),
        ("train.py", ["freeze=[stm]"], "freeze=stm: there is no module of that name; did you mean"),
        ("train.py", ["logger=wandbb"], "logger=wandbb: there is no such choice; did you mean"),
        (
            "train.py",
            ["+logger.mine._target_=lightning.pytorch.loggers.CometLogger"],
            "needs comet-ml: pip install comet-ml",
        ),
        (
            "train.py",
            ["+callbacks.mine._target_=torch.nn.ReLU"],
            "returns ReLU, not a lightning.pytorch.callbacks.Callback",
        ),
        (
            "train.py",
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/acc"],
            "EarlyStopping watches monitor=val/acc, which is not measured; did you mean val",
        ),
        (
            "train.py",
            ["+callbacks.mine._target_=lightning.pytorch.callbacks.LearningRateFinder"],
            "the schedule would overwrite the rate that it finds",
        ),
        ("train.py", ["+trainer.max_step=3"], "did you mean max_steps? allowed are max_steps"),
        ("train.py", ["+trainer.max_time=3"], "planned by steps; pass +trainer.max_steps=N"),
        ("train.py", ["+trainer.barebones=true"], "trainer.barebones=True: it turns off"),
        (
            "train.py",
            ["+data.foo=3"],
            "data.foo: repvgg.data.digits takes no such argument; allowed are",
        ),
        (
            "train.py",
            ["+model.foo=3"],
            "model.foo: there is no such key; allowed are model.dr",
        ),
        ("train.py", ["+trainer.plugins=5"], "trainer.plugins=5: must name a class"),
        ("train.py", ["+trainer.callbacks=5"], "trainer.callbacks=5: pass callbacks=early_stopp"),
        ("train.py", ["+trainer.logger=wandb"], "trainer.logger=wandb: pass logger=csv, logger="),
        ("train.py", ["trainer.deterministic=maybe"], "deterministic='maybe': must be true or"),
        ("train.py", ["+trainer.profiler=fast"], "it can only be one of ['simple', 'advanced'"),
        ("train.py", ["optimizer=adamw"], "optimizer=adamw: pass optim.name=adamw"),
        ("train.py", ["scheduler=cosine"], "scheduler=cosine: leave it out: the default is"),
        ("train.py", ["model.name=repvgg_a9"], "model.name=repvgg_a9: there is no such model; "),
        ("train.py", ["optim.name=lion"], "optim.name='lion': must be one of sgd, adamw"),
        ("train.py", ["label_smoothing=1"], "label_smoothing=1: must be a number of at least 0"),
        ("train.py", ["~label_smoothing"], "label_smoothing is missing"),
        ("train.py", ["~optim.lr"], "optim.lr is missing: the configuration must set it"),
        ("train.py", ["~trainer.precision"], "trainer.precision is missing"),
        ("train.py", ["--fast"], "unrecognized arguments: --fast; pass key=value without"),
        ("train.py", ["rdrop=-1"], "rdrop=-1: must be a number of at least 0"),
        ("train.py", ["rdrop_warmup=2"], "rdrop_warmup=2: has no effect without rdrop"),
        ("train.py", ["rdrop_views=2"], "rdrop_views: there is no such key"),
        ("train.py", ["mixup=-1"], "mixup=-1: must be a number of at least 0"),
        ("train.py", ["cutmix=-1"], "cutmix=-1: must be a number of at least 0"),
        (
            "train.py",
            ["data=imagefolder", "model.strides=[1,1,1,1,1]"],
            "model.strides: these choices do not set it; +model.strides=... adds it",
        ),
        ("train.py", ["data.views=2"], "data.views: there is no such key"),
        ("train.py", ["model.num_classes=7"], "pass model.num_classes=10"),
        ("train.py", ["trainer.max_epochs=soon"], "trainer.max_epochs='soon': must be an integer"),
        ("train.py", ["trainer.devices=999"], "trainer.devices=999: this machine has"),
        ("train.py", ["trainer.strategy=fsdp"], "trainer.strategy='fsdp': must be auto or ddp"),
        ("train.py", ["ema=1"], "ema=1: must be a number of at least 0 and below 1"),
        ("train.py", ["compile=maybe"], "compile='maybe': must be true or false"),
        ("train.py", ["optim.base_batch_size=0"], "optim.base_batch_size=0: must be an integer"),
        (
            "train.py",
            ["model=repvgg_tiny", "data.batch_size=1", "model.strides=[2,2,2,2,2]"],
            "data.batch_size=1: BatchNorm cannot normalize one value for each channel",
        ),
        (
            "train.py",
            ["data._target_=collections.Counter"],
            "collections.Counter: returns a Counter with the keys batch_size, augment",
        ),
        ("train.py", ["data=imagefolder"], "data.root is missing: pass data.root=FOLDER"),
        (
            "train.py",
            ["data=imagefolder", "data.root=gone"],
            "data.root=gone: there is no such folder",
        ),
        (
            "train.py",
            ["-m", "optim.lr=interval(0.1, 0.2)"],
            "interval(...): a sweep takes values or range(...)",
        ),
        ("train.py", ["experiment=cifar11"], "experiment=cifar11: there is no such choice"),
        ("train.py", ["resume=auto"], "resume=auto: there is no checkpoints/last.ckpt in runs/"),
        ("train.py", ["trainer.precision=64-true"], "trainer.precision='64-true': must be one of"),
        ("train.py", ["trainer.accelerator=abacus"], "accelerator='abacus'"),
        ("train.py", ["optim=5"], "optim=5: must be keys"),
        ("train.py", ["resume=nowhere.ckpt"], "resume=nowhere.ckpt: there is no such file"),
        ("train.py", ["init=nowhere.pth"], "'nowhere.pth' does not exist; pass the path of a"),
        ("import", [], "path is missing: pass path=FILE"),
        ("import", ["path=."], "'.' is a folder; pass a file in it"),
        ("import", ["mean=3"], "mean='3': must be a list"),
        ("inspect", [], "path is missing: pass path=FILE"),
        ("inspect", ["path=x"], "'x' does not exist"),
        ("deploy.py", [], "ckpt is missing: run python "),
        ("deploy.py", ["ckpt=nowhere.ckpt"], "ckpt=nowhere.ckpt: there is no file of that name"),
        ("deploy.py", ["ckpt=x.ckpt", "formats=[onnxx]"], "must be a list of safetensors, onnx"),
        ("deploy.py", ["ckpt=x.ckpt", "formats=[onnx,onnx]"], "each once"),
        ("deploy.py", ["ckpt=x.ckpt", "benchmark=yess"], "benchmark='yess': must be true or false"),
        ("deploy.py", ["ckpt=x.ckpt", "int8=1"], "int8=1: must be true or false"),
        (
            "deploy.py",
            ["ckpt=x.ckpt", "int8_drop=1"],
            "int8_drop=1: must be a number of at least 0",
        ),
        ("deploy.py", ["ckpt=x.ckpt", "data=cifar11"], "data=cifar11: there is no such choice"),
        ("deploy.py", ["verify=nowhere"], "nowhere: no folder with SHA256SUMS"),
        ("deploy.py", ["verify=.", "ckpt=x.ckpt"], "verify: it stands alone"),
        ("deploy.py", ["chkpt=x.ckpt"], "did you mean ckpt?"),
        ("deploy.py", ["-m", "ckpt=x.ckpt"], "-m: one checkpoint at a time"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(
    program, arguments, message, tmp_path
):
    done = run(program, *arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments"),
    [("train.py", ["trainer.max_epoch=3"]), ("deploy.py", ["ckpt=nowhere.ckpt"])],
)
def test_a_mistake_ends_the_process_with_its_status(program, arguments, tmp_path):
    done = run_fresh(program, *arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train.py", "deploy.py"])
def test_help_shows_the_keys_and_writes_nothing(program, tmp_path):
    done = run_fresh(program, "--help", cwd=tmp_path)

    assert done.returncode == 0
    assert f"python {ROOT / program} " in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_help_may_be_piped_into_a_program_that_has_ended(tmp_path):
    command = f"{sys.executable} {ROOT / 'train.py'} --help | true"

    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)

    assert done.stderr == ""
