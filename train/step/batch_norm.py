"""Batch norm over the global batch: the statistics are those of all ranks' rows together, on any device.

Shapes: B rows of this rank, C channels, W ranks. A suffix says a tensor's shape: `mean_C`.

Outputs and gradients are computed in the statistics' type, float32, and rounded once to the input's. Tested on the CPU
over gloo (`_cuda_input_gradient` with a substitute for its kernel), and in float32 on one GPU with two ranks, over gloo
and NCCL (`benchmarks/gpu.py`); not tested on several GPUs, nor in bf16 on several ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`nn.BatchNorm1d` and `nn.BatchNorm2d` in one, for rows (B, C) or (B, C, H, W), with the statistics of all ranks.

    Output type and memory format are the input's. The gradients of weight and bias are this rank's sums, which
    data-parallel training then averages as all others. While training, all ranks must call forward and backward equally
    often. A global batch with fewer than two values per channel is normalised by the running statistics and does not
    change them. Eval mode and a single process are as in `nn.BatchNorm2d`.
    """

    num_counting_rows: int | None = None  # None: all; see `counting_rows`

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        """The rows normalised per channel."""
        rows = len(input) if self.num_counting_rows is None else min(len(input), self.num_counting_rows)
        counting = input.detach()[:rows]
        if not self.training or (_num_ranks() == 1 and rows == len(input) and _num_values(counting) > 1):
            return super().forward(input)
        return _Normalise.apply(input, self.weight, self.bias, *self._statistics(counting), rows, self.eps)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError(f"expected rows with channels, (B, C) or (B, C, H, W), got {input.dim()} dimension(s)")

    @torch.no_grad()
    def _statistics(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance to normalise with, and the values per channel; updates the running statistics.

        Without synchronising with the device; a single value per channel changes nothing.
        """
        running_mean_C, running_var_C = self.get_buffer("running_mean"), self.get_buffer("running_var")
        num_batches = self.get_buffer("num_batches_tracked")
        total, mean_C, squares_C = _gather_moments(rows, like=running_mean_C)
        enough = total > 1
        num_batches += enough
        momentum = 1 / num_batches.clamp(min=1) if self.momentum is None else self.momentum
        mean_C = torch.where(enough, mean_C, running_mean_C)
        var_C = torch.where(enough, squares_C / total, running_var_C)
        unbiased_C = torch.where(enough, squares_C / (total - 1), running_var_C)
        running_mean_C += momentum * (mean_C - running_mean_C)
        running_var_C += momentum * (unbiased_C - running_var_C)
        return mean_C, var_C, total


class GlobalBatchNormAct(GlobalBatchNorm):
    """A `BatchNormAct2d` of timm, which applies its submodules `drop` and `act` to the normalised rows."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The rows normalised per channel, after the activation."""
        return self.get_submodule("act")(self.get_submodule("drop")(super().forward(input)))


class _Normalise(torch.autograd.Function):
    """The rows normalised by given statistics, with the gradient that passes through those of the global batch."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight_C, bias_C, mean_C, var_C, total, ctx.num_counting_rows, ctx.eps = arguments
        ctx.save_for_backward(x, weight_C, mean_C, var_C, total)
        return batch_norm(x, mean_C, var_C, weight_C, bias_C, training=False, eps=ctx.eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight_C, mean_C, var_C, total = ctx.saved_tensors
        rows, eps = ctx.num_counting_rows, ctx.eps
        if rows < len(dy):
            dy = dy.clone()
            dy[rows:] = 0
        scale_C = torch.rsqrt(var_C + eps)  # used by CUDA's kernels; the CPU's compute it again
        _, dweight_C, dbias_C = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight_C, mean_C, var_C, mean_C, scale_C, False, eps, [False, True, True]
        )
        dx = None
        if ctx.needs_input_grad[0]:
            # Running statistics, used where there is a single value per channel, have no gradient.
            sums_2C = _sum_over_ranks(torch.stack((dweight_C, dbias_C))) * (total > 1)
            input_gradient = _cuda_input_gradient if x.is_cuda else _input_gradient
            dx = input_gradient(
                dy, x, weight_C=weight_C, mean_C=mean_C, scale_C=scale_C, sums_2C=sums_2C, total=total.clamp(min=1)
            )
            dx[rows:] = 0
        return dx, dweight_C, dbias_C, None, None, None, None, None


def _input_gradient(
    dy: Tensor, x: Tensor, *, weight_C: Tensor, mean_C: Tensor, scale_C: Tensor, sums_2C: Tensor, total: Tensor
) -> Tensor:
    """The gradient of the rows, through the statistics too, from the gradients of weight and bias of all ranks."""
    shape = (-1, *[1] * (x.dim() - 2))
    slope_C, offset_C = sums_2C / total
    gradient = (x - mean_C.view(shape)).mul_((-slope_C * scale_C).view(shape))
    gradient.add_(dy).sub_(offset_C.view(shape)).mul_((weight_C * scale_C).view(shape))
    return gradient.to(x.dtype)


def _cuda_input_gradient(
    dy: Tensor, x: Tensor, *, weight_C: Tensor, mean_C: Tensor, scale_C: Tensor, sums_2C: Tensor, total: Tensor
) -> Tensor:
    """`_input_gradient` by the kernel of `nn.SyncBatchNorm`: in one pass, in any memory format."""
    sum_dy_C, sum_dy_x_C = sums_2C[1], sums_2C[0] / scale_C  # the second is that of dy * (x - mean)
    return torch.batch_norm_backward_elemt(dy, x, mean_C, scale_C, weight_C, sum_dy_C, sum_dy_x_C, total.int())


def synchronise_batch_norm(model: nn.Module) -> None:
    """Make every batch norm in `model` a `GlobalBatchNorm`, in place: parameters, buffers and their names stay.

    Raises ValueError for one without weights or without running statistics, and for one that computes more.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, GlobalBatchNorm):
            if not (module.affine and module.track_running_stats):
                raise ValueError(f"the batch norm {name} has no weights or no running statistics")
            has_activation = type(module).__name__ == "BatchNormAct2d"
            if not has_activation and type(module).forward is not nn.modules.batchnorm._BatchNorm.forward:
                raise ValueError(f"the batch norm {name} is a {type(module).__name__}, which computes more than one")
            # The same object, so that optimizers and hooks stay attached.
            module.__class__ = GlobalBatchNormAct if has_activation else GlobalBatchNorm


@contextmanager
def counting_rows(model: nn.Module, num_rows: int | None) -> Iterator[None]:
    """Within, only the first `num_rows` rows (None: all) of this rank's batch count in batch norm.

    The other rows are padding: normalised like them, but excluded from statistics and gradients.
    """
    norms = [module for module in model.modules() if isinstance(module, GlobalBatchNorm)]
    for norm in norms:
        norm.num_counting_rows = num_rows
    try:
        yield
    finally:
        for norm in norms:
            norm.num_counting_rows = None


def _gather_moments(rows: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values per channel (0-d), mean (C) and sum of squared distances from it (C), over all ranks, in `like`'s type.

    Each rank's moments are computed around its own mean and then combined (Chan et al. 1979): stable at any offset.
    """
    count_1 = like.new_full((1,), _num_values(rows))
    mean_C, var_C = torch.zeros_like(like), torch.zeros_like(like)
    if len(rows):
        # The two last tensors would be updated as running statistics; these are not used.
        mean_C, var_C = torch.batch_norm_update_stats(rows, mean_C, var_C, 0.0)
    moments_WM = _gather(torch.cat((count_1, mean_C, var_C)))
    count_W1, mean_WC, var_WC = moments_WM.split((1, len(like), len(like)), dim=1)
    total = count_W1.sum()
    mean_C = (count_W1 * mean_WC).sum(0) / total.clamp(min=1)
    return total, mean_C, (count_W1 * (var_WC + (mean_WC - mean_C) ** 2)).sum(0)


def _num_values(rows: Tensor) -> int:
    """Values per channel."""
    return rows.numel() // rows.shape[1]


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(tensor: Tensor) -> Tensor:
    """All ranks' vectors, stacked."""
    if _num_ranks() == 1:
        return tensor[None]
    gathered = tensor.new_empty(_num_ranks() * len(tensor))
    dist.all_gather_into_tensor(gathered, tensor)
    return gathered.view(-1, len(tensor))


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if _num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor
