"""Processes that train together: set-up, collectives with right gradients, synchronised batch norm.

Convention for gradients, the same for every objective: each rank computes the same global loss, the backward of a collective
sums over the ranks, and DistributedDataParallel averages parameter gradients. The W sums and the mean over W cancel, so the
result is the gradient of one process that holds the whole batch. (`torch.distributed.nn` is deprecated, and an all-reduce
without backward, as in the Barlow Twins authors' code, leaves 1/W of the gradient.)

With one process, with or without a process group, every call is the identity and batch norm is torch's own.

Shapes: B rows of this rank, W processes, C channels (features), H, W height and width.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.errors import RecipeError


@dataclass(frozen=True)
class Process:
    """One of `world` processes that train together."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def single(cls, device: torch.device | str | None = None) -> Process:
        """A process on its own; on the first accelerator if there is one and no device is named."""
        return cls(0, 1, torch.device(device) if device is not None else _default_device())

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.rank == 0


def _default_device(local_rank: int = 0) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def join_process_group(
    *,
    rank: int | None = None,
    world: int | None = None,
    init_method: str = "env://",
    device: torch.device | str | None = None,
    timeout_seconds: float = 1800,
) -> Process:
    """Joins the default process group (nccl on GPU, gloo on CPU) and says who this process is.

    Rank and world size come from RANK and WORLD_SIZE where not given (`torchrun` sets them); without them, or with a world
    of one, no group is made. `init_method` is `env://` (MASTER_ADDR, MASTER_PORT) or a `tcp://` or `file://` rendezvous.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
    chosen = torch.device(device) if device is not None else _default_device(local_rank)
    if world <= 1:
        return Process(0, 1, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    return Process(rank, world, chosen)


def current_process(device: torch.device | str | None = None) -> Process:
    """This process in a group that somebody else initialised (Ray Train does); a single one when there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return Process.single(device)
    chosen = torch.device(device) if device is not None else _default_device(int(os.environ.get("LOCAL_RANK", "0")))
    return Process(dist.get_rank(), dist.get_world_size(), chosen)


def leave_process_group() -> None:
    """Leaves the default process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def peer_lost(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, as opposed to an error of this rank's own.

    gloo reports it as a plain RuntimeError, so that its text has to be read.
    """
    names = ("DistBackendError", "DistNetworkError", "DistStoreError")
    known = tuple(getattr(dist, name) for name in names if hasattr(dist, name))
    text = str(error)
    return isinstance(error, known) or any(sign in text for sign in ("gloo", "NCCL", "Connection closed by peer"))


def world_size() -> int:
    """Processes in the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_index() -> int:
    """This process's rank in the default group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Waits until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def agree_largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' integers, on every rank."""
    if world_size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())


def largest_over_ranks(value: Tensor) -> Tensor:
    """Elementwise maximum over the ranks, on every rank; without a gradient."""
    if world_size() == 1:
        return value.detach()
    largest = value.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        world = dist.get_world_size()
        ctx.first, ctx.rows = dist.get_rank() * tensor.shape[0], tensor.shape[0]
        whole = tensor.new_empty((world * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather(list(whole.chunk(world)), tensor.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # gloo has no reduce-scatter: sum everywhere, keep this rank's rows.
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.rows]


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over the ranks, on every rank; its backward sums the gradients over the ranks."""
    return tensor if world_size() == 1 else _AllReduce.apply(tensor)


def all_gather(tensor: Tensor) -> Tensor:
    """(B, ...) of each rank -> (W*B, ...) in rank order, on every rank; its backward sums the gradients over the ranks.

    Every rank must bring the same number of rows.
    """
    return tensor if world_size() == 1 else _AllGather.apply(tensor)


def _gather_moments(mean_C: Tensor, variance_C: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks from each rank's own, in one collective; every rank holds as many rows.

    Variances are combined by Chan's formula: sums of squares would lose the variance where the mean is large.
    """
    world, channels = dist.get_world_size(), mean_C.numel()
    local = torch.cat([mean_C, variance_C])
    gathered = local.new_empty(world * local.numel())
    dist.all_gather(list(gathered.chunk(world)), local)
    means_WC, variances_WC = gathered.view(world, 2, channels).unbind(1)
    mean_global_C = means_WC.mean(0)
    return mean_global_C, (variances_WC + (means_WC - mean_global_C).square()).mean(0)


class _SyncBatchNorm(torch.autograd.Function):
    """Batch norm with statistics over all ranks. Forward and backward use one collective each and torch's fused kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        channels = x.shape[1]
        accurate = torch.promote_types(x.dtype, torch.float32)
        if x.device.type == "cpu":
            # Buffers in float32 make the kernel return float32 statistics of a bfloat16 input; momentum 0 leaves them.
            dummy = torch.zeros(2, channels, dtype=accurate)
            mean_C, variance_C = torch.batch_norm_update_stats(x, dummy[0], dummy[1], 0.0)
        else:
            variance_C, mean_C = torch.var_mean(x.to(accurate), _reduced(x), correction=0)
        mean_C, variance_C = _gather_moments(mean_C, variance_C)
        count = x.numel() // channels * dist.get_world_size()
        ctx.save_for_backward(x, weight, mean_C, variance_C)
        ctx.eps, ctx.count = eps, count
        out = F.batch_norm(x, mean_C, variance_C, weight, bias, training=False, eps=eps)
        ctx.mark_non_differentiable(mean_C, variance_C)
        return out, mean_C, variance_C, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean_C, variance_C = ctx.saved_tensors
        grad = grads[0]
        inverse_std_C = torch.rsqrt(variance_C + ctx.eps)
        # Sums of grad and of grad * normalised x over this rank's rows.
        if x.device.type == "cpu":
            ones = torch.ones_like(mean_C)
            _, dot_C, sum_C = torch.ops.aten.native_batch_norm_backward(
                grad, x, ones, mean_C, variance_C, None, None, False, ctx.eps, [False, True, True]
            )
        else:
            wide, shape = grad.to(mean_C.dtype), _per_channel(x)
            sum_C = wide.sum(_reduced(x))
            dot_C = (wide * (x.to(mean_C.dtype) - mean_C.view(shape))).sum(_reduced(x)) * inverse_std_C
        grad_weight, grad_bias = (dot_C, sum_C) if weight is not None else (None, None)
        total = torch.stack([dot_C, sum_C])
        dist.all_reduce(total)
        dot_mean_C, grad_mean_C = (total / ctx.count).unbind()
        # dx = scale * (grad - mean(grad) - xhat * mean(grad * xhat)), as one fused affine map of x plus scale * grad.
        scale_C = inverse_std_C if weight is None else inverse_std_C * weight
        grad_x = F.batch_norm(x, mean_C, variance_C, -scale_C * dot_mean_C, -scale_C * grad_mean_C, training=False, eps=ctx.eps)
        grad_x = grad_x.addcmul_(grad.to(grad_x.dtype), scale_C.view(_per_channel(x)).to(grad_x.dtype))
        return grad_x, grad_weight, grad_bias, None


def _reduced(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _per_channel(x: Tensor) -> list[int]:
    return [1, -1, *([1] * (x.ndim - 2))]


def batch_normalise(x: Tensor, eps: float = 1e-5) -> Tensor:
    """(B, C, ...) with each channel's mean removed and variance made one over the global batch; no affine, no memory."""
    if world_size() == 1:
        return F.batch_norm(x, None, None, training=True, eps=eps)
    normalised: Tensor = _SyncBatchNorm.apply(x, None, None, eps)[0]
    return normalised


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over (B, C) or (B, C, H, W) whose training statistics span all ranks, on CPU as well as on GPU.

    torch's own refuses CPU tensors. Names of parameters and buffers are those of `nn.BatchNorm2d`, so weights are
    interchangeable; with one process it is `nn.BatchNorm2d`. Each rank must bring as many rows.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs (B, C, ...), got {input.ndim} dimension(s)")

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if world_size() == 1 or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        outcome: tuple[Tensor, Tensor, Tensor, int] = _SyncBatchNorm.apply(input, self.weight, self.bias, self.eps)
        normalised, mean_C, variance_C, count = outcome
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._remember(mean_C, variance_C, count)
        return normalised

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((variance_C * (count / (count - 1))).to(self.running_var.dtype), momentum)


class _SyncBatchNormAct(SyncBatchNorm):
    """timm's batch norm with its activation in one layer."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """The module with every batch norm in it replaced by :class:`SyncBatchNorm` (parameters and buffers shared).

    timm's layers of batch norm and activation in one are known; RecipeError for any other kind of batch norm.
    """
    if isinstance(module, SyncBatchNorm):
        return module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _converted(module)
    for name, child in module.named_children():
        replaced = convert_batch_norm(child)
        if replaced is not child:
            setattr(module, name, replaced)
    return module


def _converted(module: nn.modules.batchnorm._BatchNorm) -> SyncBatchNorm:
    fused = hasattr(module, "drop") and hasattr(module, "act")
    if not fused and type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        raise RecipeError(
            f"batch norm of kind {type(module).__name__} cannot be synchronised over workers; use one worker or another encoder"
        )
    kind = _SyncBatchNormAct if fused else SyncBatchNorm
    new = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta")
    new.training = module.training
    for name, value in [*module._parameters.items(), *module._buffers.items(), *module.named_children()]:
        setattr(new, name, value)
    return new
