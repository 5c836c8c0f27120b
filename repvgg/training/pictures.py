"""The callback that draws for TensorBoard: predictions, branches, graph.

All of it together takes at most 2 % of the time that a run has trained so far, plus one set of
pictures at the end: half for drawing and measuring, half for collecting the predictions, which
takes 1 % for the smallest network and a tenth of that for RepVGG-A0. It changes no network.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from tensorboard.compat.proto.event_pb2 import Event
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from repvgg import figures
from repvgg.contract import DataContract
from repvgg.figures import Draw
from repvgg.fusion.errors import in_a_line
from repvgg.models.forms import switch_to_deploy
from repvgg.signals import Interrupted
from repvgg.training import anatomy, predictions, report, tensorboard
from repvgg.training.callbacks import is_foldable, network_to_keep
from repvgg.training.classifier import Classifier
from repvgg.training.predictions import Predictions
from repvgg.training.tensorboard import Start

SHARE = 0.005  # of the training time, for pictures, and again for what is measured of the branches
MOST = 30  # sets of pictures in a run, of about 0.5 MB each
SHORTEST = 3.0  # seconds of training; after less, as in a debug run, nothing is drawn
PROBE = 4  # images on which the fold is measured
MOST_ROWS = 100  # blocks in a picture; above it their stages are shown


class Budget:
    """Seconds that may be spent: a share of the time since the start.

    Args:
        share: of the time.
        guess: seconds that the first time will take; later the last time counts.
        clock: seconds.
    """

    def __init__(
        self, share: float, guess: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.share, self.next, self.clock = share, guess, clock
        self.spent = 0.0
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self._begin = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._begin

    def allows(self) -> bool:
        """Whether once more fits into the share."""
        return self.spent + self.next <= self.share * self.elapsed

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Measure what is done inside."""
        begin = self.clock()
        try:
            yield
        finally:
            self.next = self.clock() - begin
            self.spent += self.next


class Pictures(Callback):
    """Writes texts and hyper-parameters at the start, pictures and measurements at validations.

    Only in the first process, and only if a logger of the run is TensorBoard's. With several
    devices the predictions are those of the first.

    Attributes:
        start: what is known before the first step; None in the other processes.
    """

    def __init__(self) -> None:
        self.start: Start | None = None
        self.drawing = Budget(SHARE, guess=1.5)
        self.measuring = Budget(SHARE, guess=0.2)
        self._writers: list[SummaryWriter] = []  # that take pictures
        self._predictions: Predictions | None = None
        self._probe: Tensor | None = None  # images of the first validation batch
        self._first: Draw | None = None  # the first training batch, until it is drawn
        self._has_graph = False
        self._broken: set[str] = set()  # what failed once, and is not tried again
        self._step = 0  # of the last validation
        self._drawn = self._measured = -1  # steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._writers = []
        if self.start is None or not trainer.is_global_zero:
            return
        for writer in tensorboard.writers(trainer.loggers):
            tensorboard.log_start(
                writer, self.start, cast(Classifier, pl_module), trainer.global_step
            )
        self._writers = tensorboard.writers(trainer.loggers, pictures=True)
        self.drawing.start()
        self.measuring.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self._writers and self._first is None and self._drawn < 0:
            images, targets = cast(tuple[Tensor, Tensor], batch)
            shown = images[: predictions.SHOWN], targets[: predictions.SHOWN]
            self._first = predictions.draw_batch(*shown, self._contract())

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._predictions = None
        if self._writers and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._predictions = Predictions()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._predictions is None or not isinstance(outputs, Tensor):
            return
        images, targets = cast(tuple[Tensor, Tensor], batch)
        self._predictions.add(images, outputs, targets)
        if batch_idx == 0:
            self._probe = images[:PROBE]

    # EMA has exchanged the weights back by now; Clock counts this as validation.
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._predictions is None:
            return
        self._step = max(0, trainer.global_step - 1)  # as Lightning counts what it logs
        if self.measuring.allows():
            self._measure(network_to_keep(trainer, pl_module))
        rare = self._step - max(0, self._drawn) >= cast(Classifier, pl_module).num_steps / MOST
        if rare and self.drawing.allows():
            self._draw(network_to_keep(trainer, pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._predictions is None or self.drawing.elapsed < SHORTEST:
            return
        if self._measured < self._step:
            self._measure(network_to_keep(trainer, pl_module))
        if self._drawn < self._step:
            self._draw(network_to_keep(trainer, pl_module))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.start is not None:
            for writer in tensorboard.writers(trainer.loggers):
                tensorboard.log_end(writer)

    def _contract(self) -> DataContract:
        assert self.start is not None
        return self.start.contract

    def _measure(self, network: nn.Module) -> None:
        self._measured = self._step
        with self.measuring.spending():
            self._try("measurements of the branches", lambda: self._add_scalars(network))

    def _draw(self, network: nn.Module) -> None:
        self._drawn = self._step
        with self.drawing.spending():
            self._try("pictures", lambda: self._add_images(network))
            if not self._has_graph:
                self._has_graph = True
                self._try("graph", lambda: self._add_graph(network))
            for writer in self._writers:
                writer.flush()

    def _try(self, what: str, write: Callable[[], None]) -> None:
        """Say in one line what cannot be written: a picture must not end a run of days."""
        if what in self._broken:
            return
        try:
            write()
        except Interrupted:
            raise
        except Exception as error:
            self._broken.add(what)
            report.warn_of_pictures(what, in_a_line(error))

    def _add_scalars(self, network: nn.Module) -> None:
        for name, value in measure(network, self._probe).items():
            for writer in self._writers:
                writer.add_scalar(name, value, self._step)

    def _add_images(self, network: nn.Module) -> None:
        for name, draw in self._charts(network):
            pixels = figures.rasterize(draw).numpy()
            for writer in self._writers:
                writer.add_image(name, pixels, self._step, dataformats="HWC")

    def _charts(self, network: nn.Module) -> Iterator[tuple[str, Draw]]:
        if self._first is not None:
            yield "train/batch", self._first
            self._first = None
        if self._predictions is not None and len(self._predictions):
            for name, draw in predictions.draw_predictions(self._predictions, self._contract()):
                yield f"val/{name}", draw
        yield from draw_anatomy(network)

    def _add_graph(self, network: nn.Module) -> None:
        if self._probe is None or not is_foldable(network):
            return
        forms = {"multi-branch": network, "folded": switch_to_deploy(network)}
        graph = anatomy.draw_graph(forms, self._probe[:1])
        if graph is not None:
            for writer in self._writers:
                event = Event(graph_def=graph.SerializeToString())
                tensorboard.add_event(writer, event, self._step)


def measure(network: nn.Module, images: Tensor | None) -> dict[str, float]:
    """Scalars of a network with branches, by tag; nothing for other networks.

    Args:
        images: (N, C, H, W), for the error of the fold.
    """
    blocks = anatomy.dissect(network)
    if not blocks:
        return {}
    values: dict[str, float] = {}
    for stage, block in anatomy.stage_means(blocks).items():
        values |= {f"branches/{stage}/{branch}": share for branch, share in block.shares.items()}
        values[f"outliers/{stage}"] = block.outliers
    values["outliers/largest"] = max(block.largest_outlier for block in blocks.values())
    if images is not None:
        values["fold/error"] = anatomy.fold_error(network, images)
    return values


def draw_anatomy(network: nn.Module) -> Iterator[tuple[str, Draw]]:
    """Names and charts of a network with branches: shares, outliers, kernels."""
    blocks = anatomy.dissect(network)
    if not blocks:
        return
    shown = blocks if len(blocks) <= MOST_ROWS else anatomy.stage_means(blocks)
    shares = {part: [block.shares[part] for block in shown.values()] for part in anatomy.BRANCHES}
    yield (
        "branches/shares",
        lambda theme: figures.stacked_bars(
            theme,
            shares,
            [*shown],
            unit="share of the squared weights",
            title="what the folded kernels are made of",
        ),
    )
    ratios = {
        "mean of the channels": {name: block.outliers for name, block in shown.items()},
        "largest channel": {name: block.largest_outlier for name, block in shown.items()},
    }
    yield (
        "branches/outliers",
        lambda theme: figures.dots(
            theme, ratios, ylabel="max |w| / rms(w)", title="outlier ratio of the folded kernels"
        ),
    )
    kernels = anatomy.pick_kernels(network)
    if kernels is not None:
        yield (
            "branches/kernels",
            (lambda theme: figures.kernels(theme, *kernels, title="kernels of single channels")),
        )
