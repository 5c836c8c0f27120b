"""How far a run is: a bar on a terminal, lines in a file or a pipe.

Neither touches a random state, so a run ends with the same weights under both.
"""

import math
import sys
import time
from collections.abc import Iterable
from datetime import timedelta

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.columns import Columns
from rich.console import RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from repvgg import terminal
from repvgg.training.checkpoints import BestCheckpoint

LOSS = "train/loss"
SHOWN = {"loss": LOSS, "val loss": "val/loss", "accuracy": "val/accuracy"}
SPEED = "train/images_per_second"
ROOM = 4  # columns at the right of the last line, where a terminal echoes ^C
LINE_EVERY = 60.0  # seconds, at least, between two lines of an epoch
LINES = 10  # of an epoch, at most, and one more


class _Pace(ProgressBar):
    """Measures how long the rest of a run takes.

    Args:
        num_steps: optimizer steps of the whole run; 0 if that is not known.
    """

    def __init__(self, num_steps: int = 0) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.enabled = True
        self.start, self.first_step = 0.0, 0  # of this process: a resumed run has earlier steps

    def disable(self) -> None:
        """Print nothing: Lightning calls this in all processes but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Print again."""
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start, self.first_step = time.perf_counter(), trainer.global_step

    def left(self) -> str:
        """The time that the rest of the run takes at the mean pace so far; "" before a step."""
        step = self.trainer.global_step
        done, left = step - self.first_step, self.num_steps - step
        if done <= 0 or left < 0:
            return ""
        return f"{_clock((time.perf_counter() - self.start) / done * left)} left"


class EpochLines(_Pace):
    """Prints one line an epoch, and more in an epoch of minutes, into a file or a pipe."""

    def __init__(self, num_steps: int = 0) -> None:
        super().__init__(num_steps)
        self._begin = self._printed = 0.0
        self._next = 0.0  # share of the epoch

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.on_train_epoch_start()  # a resumed run starts within an epoch

    def on_train_epoch_start(self, *_: object) -> None:
        self._begin = self._printed = time.perf_counter()
        self._next = 0.0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if not self.enabled or time.perf_counter() - self._printed < LINE_EVERY:
            return
        share = (batch_idx + 1) / trainer.num_training_batches
        if self._next <= share < 1:
            metrics = trainer.callback_metrics
            shown = [f"{LOSS} {float(metrics[LOSS]):.4f}"] if LOSS in metrics else []
            if SPEED in metrics:
                shown.append(f"{float(metrics[SPEED]):,.0f} images per second")
            self._printed = time.perf_counter()
            seconds = f"{self._printed - self._begin:.1f} s"
            parts = ", ".join(filter(None, [seconds, *shown, self.left()]))
            self.print(f"Epoch {trainer.current_epoch}, {share:.0%}: {parts}", flush=True)
            self._next = share + 1 / LINES

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.enabled and trainer.is_global_zero:
            metrics = self.get_metrics(trainer, pl_module)
            shown = ", ".join(
                f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)
            )
            seconds = time.perf_counter() - self._begin
            self.print(f"Epoch {trainer.current_epoch}: {seconds:.1f} s, {shown}", flush=True)


class RunBar(_Pace):
    """Shows a run on a terminal: epoch, time left, losses, accuracy, the best so far, speed.

    It draws a few times in a second, from the thread that trains: a thread of its own would take
    the interpreter from that, and could hold a lock while worker processes are forked.
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps)
        self._display: _Display | None = None
        self._drawn = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._open("", self.num_steps)
        self._show()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show()

    def on_train_batch_end(self, *_: object) -> None:
        if time.perf_counter() - self._drawn >= terminal.REDRAW_EVERY:
            self._show()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if time.perf_counter() - self._drawn >= terminal.REDRAW_EVERY and self._display:
            self._show(f"validating {batch_idx + 1:,}/{_total(trainer.num_val_batches):,}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(ended=True)
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open("Testing", _total(trainer.num_test_batches), transient=True)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if time.perf_counter() - self._drawn >= terminal.REDRAW_EVERY:
            self._draw("Testing", batch_idx + 1, "", [])

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def _show(self, doing: str = "", *, ended: bool = False) -> None:
        trainer = self.trainer
        step, metrics = trainer.global_step, trainer.callback_metrics
        parts = [f"{name} {float(metrics[k]):.4f}" for name, k in SHOWN.items() if k in metrics]
        kept = (one for one in trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint))
        best = next((one.best_model_score for one in kept), None)
        if best is not None:
            parts.append(f"best {float(best):.4f}")
        if SPEED in metrics:
            parts.append(f"{float(metrics[SPEED]):,.0f} images/s")
        if doing:
            parts.append(doing)
        # Lightning counts an epoch as done before the run ends.
        last = (trainer.max_epochs or 1) - 1
        took = f"in {_clock(time.perf_counter() - self.start)}"
        self._draw(
            f"Epoch {min(trainer.current_epoch, last) + 1} of {last + 1}",
            step,
            f"{step / max(1, self.num_steps):4.0%} {took if ended else self.left()}",
            parts,
        )

    def _open(self, title: str, total: int, *, transient: bool = False) -> None:
        if self.enabled:
            self._close()
            self._display = _Display(title, total, transient=transient)
            self._display.start()

    def _draw(self, title: str, done: int, beside: str, below: list[str]) -> None:
        if self._display is not None:
            self._display.draw(title, done, beside, below)
            self._drawn = time.perf_counter()

    def _close(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None


class _Display(Progress):
    """A bar between two texts, and below it short texts, in as many lines as they need."""

    def __init__(self, title: str, total: int, *, transient: bool) -> None:
        self.below: list[str] = []
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[beside]}", markup=False),
            console=terminal.console(),
            auto_refresh=False,
            transient=transient,
            expand=True,
            redirect_stderr=sys.stderr.isatty(),  # what goes into a file stays there
        )
        self.task = self.add_task(title, total=total, beside="")

    def draw(self, title: str, done: int, beside: str, below: list[str]) -> None:
        self.below = below
        self.update(self.task, description=title, completed=done, beside=beside, refresh=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        texts = Columns([Text(text) for text in self.below], padding=(0, 2))
        yield Constrain(texts, self.console.width - ROOM) if self.below else Text()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _total(batches: int | float | list[int | float]) -> int:
    count = sum(batches) if isinstance(batches, list) else batches
    return int(count) if math.isfinite(count) else 0
