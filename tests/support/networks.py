"""Networks for tests, with BatchNorm statistics far from the fresh ones, which hide fold errors."""

import torch
from torch import Tensor, nn


def settle(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and weights of a trained kind, and go to eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(tensor.shape, generator=generator).double()

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.copy_(0.5 * normal(module.running_mean))
                    module.running_var.copy_(uniform(module.running_var, 0.2, 4.0))
                    module.num_batches_tracked.fill_(7)
                if module.weight is not None:
                    sign = normal(module.weight).sign()
                    module.weight.copy_(sign * uniform(module.weight, 0.3, 1.5))
                    module.bias.copy_(0.5 * normal(module.bias))
    return network.eval()


def relative_error(expected: Tensor, given: Tensor) -> float:
    """Largest difference over the largest expected value. The tests' own, not the package's."""
    assert expected.shape == given.shape
    return ((expected - given).abs().max() / expected.abs().max()).item()
