"""What an evaluation measures: means over images, whatever the batches and the devices."""

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class ImageMean(Metric):
    """Mean of one value per image, over all batches of all devices.

    Every image weighs the same. The values are summed in float64, so that the mean of ones and
    zeros is the same to the last digit however the images are split.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add values (N,), one per image."""
        self.values.append(values.detach().float())

    def compute(self) -> Tensor:
        values = dim_zero_cat(self.values)
        # On the CPU: not every accelerator has float64.
        return values.cpu().double().mean().float().to(values.device)
