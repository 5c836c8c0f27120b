"""The certificate of a deployment in TensorBoard, beside the run that trained its checkpoint."""

from pathlib import Path

from repvgg import figures
from repvgg.deploy.report import charts
from repvgg.deploy.report.content import Report

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
            for chart in charts.of_report(report):
                pixels = figures.rasterize(chart.draw).numpy()
                writer.add_image(f"deploy/{chart.name}", pixels, dataformats="HWC")
    except (OSError, ImportError) as error:  # a folder of somebody else, a full disk, no matplotlib
        return f"TensorBoard does not show all of the certificate: {error}"
    return ""
