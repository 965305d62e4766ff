"""Statistics of the global batch: what a paper means by "the batch", whatever the number of ranks.

Every rank computes the same loss of the gathered batch. DDP takes the mean of the ranks' gradients, so the gradient that
comes back through `gather` and `total` is summed over ranks: together that is the gradient of one process.

A process may stand for several ranks (`Parts`): then sums go along one binary tree over all parts of the batch, so that
their bits do not depend on how many parts a process has.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of a power of two of tensors: neighbours first, then neighbouring sums."""
    parts = list(parts)
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def of_all(x: Tensor) -> list[Tensor]:
    """This tensor of every process."""
    if world() == 1:
        return [x]
    found = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(found, x.contiguous())
    return found


def sum_of_all(parts: Sequence[Tensor], along_tree: bool) -> Tensor:
    """The sum of the parts of every process, in whatever order the backend likes, or along the tree."""
    mine = tree_sum(parts)
    if along_tree:
        return tree_sum(of_all(mine))
    if world() > 1:
        mine = mine.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mine)
    return mine


class _Gather(torch.autograd.Function):
    """Parts (B, ...) of this process to the whole batch, once for each part."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.parts, ctx.along_tree = len(parts), _group() is not None
        whole = torch.cat(of_all(torch.cat(parts)))
        return tuple(whole.clone() for _ in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        summed = sum_of_all(gradients, ctx.along_tree)
        mine = summed.chunk(world())[dist.get_rank() if world() > 1 else 0]
        return mine.chunk(ctx.parts)


class _Total(torch.autograd.Function):
    """Parts of this process to the sum over all parts, once for each part."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.along_tree = _group() is not None
        summed = sum_of_all(parts, ctx.along_tree)
        return tuple(summed.clone() for _ in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        summed = sum_of_all(gradients, ctx.along_tree)
        return tuple(summed.clone() for _ in gradients)


def _maximum(*parts: Tensor) -> tuple[Tensor, ...]:
    most = torch.stack(of_all(torch.stack(parts).amax(0))).amax(0)
    return (most,) * len(parts)


_part = threading.local()


class Parts:
    """Runs the parts of a batch as if each were a rank: threads that take turns, and meet at every collective.

    One thread runs at a time, in the order of the parts, so that nothing depends on the scheduler. A collective is
    computed when the last part has come to it.

    Args:
        count: parts in this process, a power of two.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.turns = [threading.Semaphore(0) for _ in range(count)]
        self.brought: list[Any] = [None] * count
        self.broken: BaseException | None = None

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """What each function returns; the first exception of any, if there was one."""
        results: list[Any] = [None] * self.count
        threads = [threading.Thread(target=self._take_part, args=(i, functions[i], results)) for i in range(self.count)]
        for thread in threads:
            thread.start()
        self.turns[0].release()
        for thread in threads:
            thread.join()
        if self.broken:
            raise self.broken
        return results

    def _take_part(self, part: int, function: Callable[[], T], results: list[T]) -> None:
        self.turns[part].acquire()
        _part.group, _part.number = self, part
        try:
            if self.broken is None:
                results[part] = function()
        except BaseException as error:  # noqa: BLE001 - a thread's error is raised again by `run`
            self.broken = self.broken or error
        self.turns[(part + 1) % self.count].release()

    def meet(self, together: Callable[..., tuple[Tensor, ...]], x: Tensor) -> Tensor:
        """This part's share of `together` of all parts."""
        part = _part.number
        self.brought[part] = x
        if part == self.count - 1:
            self.brought = list(together(*self.brought))
        self.turns[(part + 1) % self.count].release()
        self.turns[part].acquire()
        if self.broken:
            raise RuntimeError("another part of the batch failed")
        return self.brought[part]


def _group() -> "Parts | None":
    return getattr(_part, "group", None)


def _meet(together: Callable[..., tuple[Tensor, ...]], x: Tensor) -> Tensor:
    group = _group()
    return group.meet(together, x) if group else together(x)[0]


def ranks() -> int:
    """Ranks that share the batch, those included that a process only stands for."""
    group = _group()
    return world() * (group.count if group else 1)


def gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank, in the order of the ranks: (ranks x B, ...), with gradient."""
    return _meet(_Gather.apply, x.contiguous()) if ranks() > 1 else x


def total(x: Tensor) -> Tensor:
    """The sum over ranks, with gradient."""
    return _meet(_Total.apply, x) if ranks() > 1 else x


def largest(x: Tensor) -> Tensor:
    """The maximum over ranks, without gradient."""
    return _meet(_maximum, x.detach()) if ranks() > 1 else x


class GlobalBatchNorm(nn.Module):
    """Batch normalisation by the statistics of the global batch, on any device. For heads that are thrown away after
    training: it keeps no running statistics."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        x = x.float()
        count = total(x.new_full((), float(len(x)))).clamp(min=1)
        centred = x - total(x.sum(0)) / count
        variance = total(centred.square().sum(0)) / count
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias
