"""Re-estimate the running statistics of BatchNorms ("precise BN")."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.fusion.errors import in_a_line
from repvgg.fusion.normalizations import is_normalization


@torch.no_grad()
def reestimate_bn(
    model: nn.Module, batches: Iterable[object], *, keep: Collection[nn.Module] = ()
) -> None:
    """Compute the running statistics of every BatchNorm from images, in place.

    All other layers are in eval mode meanwhile; torch's `update_bn` leaves dropout on. So these are
    the statistics without stochastic layers, to fold after training with `branch_drop` or
    `drop_path`. They are plain averages over the batches ("precise BN", Wu and Johnson, 2021,
    arXiv:2105.07576, section 3). Weights, modes and momenta stay. So do the statistics of a
    BatchNorm that does not run, as in an auxiliary classifier.

    Args:
        batches: of images (N, C, H, W), preprocessed; a few thousand images suffice. If a batch is
            a list or tuple, as from a DataLoader of images and labels, its first item is used, as
            in torch's `update_bn`.
        keep: modules of the model whose statistics stay, such as those of a frozen stem.

    Raises:
        ValueError: there is no batch; a batch is not a floating-point tensor of the network's
            precision; the network cannot run on one; the statistics are NaN or infinite; or every
            normalization is frozen. After any error the statistics are the old ones.
    """
    if isinstance(batches, Tensor):
        raise ValueError(
            f"batches is a tensor of shape {tuple(batches.shape)}: pass a list of batches, [images]"
        )
    kept = set(map(id, keep))
    estimated = [module for module in model.modules() if id(module) not in kept]
    norms = [
        module
        for module in estimated
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    kinds = {
        type(module).__name__
        for module in estimated
        if is_normalization(module) and module.running_mean is not None
    }
    if kinds and not norms:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm whose statistics can be estimated: all its "
            f"normalizations are {', '.join(sorted(kinds))}"
        )
    modes = {module: module.training for module in model.modules()}
    momenta = [bn.momentum for bn in norms]
    old = [[buffer.clone() for buffer in bn.buffers()] for bn in norms]
    model.eval()
    for bn in norms:
        bn.reset_running_stats()
        bn.train()
        bn.momentum = None  # a plain average
    done = False
    try:
        for number, batch in enumerate(batches):
            images = _images_of(batch, model, number)
            try:
                model(images)
            except (RuntimeError, TypeError, ValueError) as error:
                shape = tuple(images.shape)
                few = "Expected more than 1 value per channel" in str(error)
                advice = "; statistics need more than one value: use a larger batch" if few else ""
                raise ValueError(
                    f"{type(model).__name__} cannot run on batch {number} of shape {shape} with "
                    f"its BatchNorms in training mode: {in_a_line(error)}{advice}"
                ) from error
            done = True
        if not done:
            raise ValueError("batches is empty: statistics need at least one batch of images")
        if not all(buffer.isfinite().all() for bn in norms for buffer in bn.buffers()):
            raise ValueError("the statistics are NaN or infinite: an image or a weight is so too")
    except BaseException:
        done = False
        raise
    finally:
        for module, training in modes.items():
            module.training = training
        for bn, momentum, buffers in zip(norms, momenta, old, strict=True):
            bn.momentum = momentum
            if not done or bn.num_batches_tracked == 0:  # it did not run
                for buffer, before in zip(bn.buffers(), buffers, strict=True):
                    buffer.copy_(before)


def _images_of(batch: object, model: nn.Module, number: int) -> Tensor:
    """The images of a batch of `reestimate_bn`.

    Raises:
        ValueError: the batch is not a tensor, list or tuple, or its dtype is not the network's.
    """
    given = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(given, Tensor):
        kind = type(batch).__name__
        what = f"{kind} of {type(given).__name__}" if given is not batch else kind
        raise ValueError(
            f"batch {number} is a {what}: pass tensors (N, C, H, W), or lists or tuples whose "
            "first item is one"
        )
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes and given.dtype not in dtypes and not torch.is_autocast_enabled(given.device.type):
        wanted = ", ".join(sorted(str(dtype) for dtype in dtypes))
        advice = "scale the images as in training and " if given.dtype == torch.uint8 else ""
        raise ValueError(
            f"batch {number} has {given.dtype} and the network {wanted}: {advice}"
            f"call .to({wanted.split(', ')[0]}) on them"
        )
    return given
