"""The certificate of a deployment in TensorBoard, beside the run that trained its checkpoint."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from repvgg import figures
from repvgg.deploy.report import Report
from repvgg.figures import Draw

EVENTS = "events.out.tfevents*"


def add_to_run(report: Report, checkpoint: Path) -> str:
    """Add the certificate as text, and its figures, to the event files of a run.

    Nothing happens if the checkpoint does not lie in the folder of a run that has event files.

    Returns:
        why something is missing, for the reader; empty if nothing is.
    """
    folder = checkpoint.absolute().parent.parent
    if checkpoint.absolute().parent.name != "checkpoints" or not any(folder.glob(EVENTS)):
        return ""
    from torch.utils.tensorboard import SummaryWriter

    try:
        with SummaryWriter(str(folder), filename_suffix=".deploy") as writer:
            writer.add_text("deploy/certificate", report.to_markdown())
            for name, draw in _charts(report):
                pixels = figures.rasterize(draw).numpy()
                writer.add_image(f"deploy/{name}", pixels, dataformats="HWC")
    except (OSError, ImportError) as error:  # a folder of somebody else, a full disk, no matplotlib
        return f"TensorBoard does not show all of the certificate: {error}"
    return ""


def _charts(report: Report) -> Iterator[tuple[str, Draw]]:
    if report.latency is not None:
        times = report.latency.milliseconds
        yield (
            "latency",
            partial(
                figures.bars,
                values={name: timing.median for name, timing in times.items()},
                intervals={name: (timing.lower, timing.upper) for name, timing in times.items()},
                unit="ms for one image, median and quartiles",
                number="{:.2f}",
                title="latency",
            ),
        )
    series = {name: errors for name, errors in report.blocks.items() if errors}
    if series:
        yield (
            "error_by_block",
            partial(
                figures.dots,
                series=series,
                ylabel="error / largest output",
                log=True,
                title="error of each folded block",
            ),
        )
