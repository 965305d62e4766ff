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


def sum_of_all(x: Tensor) -> Tensor:
    """The sum over processes, in whatever order the backend likes."""
    if world() == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


def sum_of_parts(parts: Sequence[Tensor]) -> Tensor:
    """The sum of this process's parts and of every other's, along the tree."""
    return tree_sum(of_all(tree_sum(parts)))


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
        self.device: int | None = None

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """What each function returns; the first exception of any, if there was one."""
        results: list[Any] = [None] * self.count
        if torch.cuda.is_initialized():
            self.device = torch.cuda.current_device()
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
        if self.device is not None:
            torch.cuda.set_device(self.device)  # each thread has its own, the first one unless told
        try:
            if self.broken is None:
                results[part] = function()
        except BaseException as error:  # noqa: BLE001 - a thread's error is raised again by `run`
            self.broken = self.broken or error
        self.turns[(part + 1) % self.count].release()

    def meet(self, together: Callable[[list[Tensor]], Tensor], x: Tensor) -> Tensor:
        """What `together` makes of all parts, for each part in memory of its own."""
        part = _part.number
        self.brought[part] = x
        if part == self.count - 1:
            made = together(self.brought)
            self.brought = [made.clone() for _ in self.brought]
        self.turns[(part + 1) % self.count].release()
        self.turns[part].acquire()
        if self.broken:
            raise RuntimeError("another part of the batch failed")
        return self.brought[part]


def _group() -> "Parts | None":
    return getattr(_part, "group", None)


def ranks() -> int:
    """Ranks that share the batch, those included that a process only stands for."""
    group = _group()
    return world() * (group.count if group else 1)


def _joined(x: Tensor) -> Tensor:
    group = _group()
    if group is None:
        return torch.cat(of_all(x))
    return group.meet(lambda parts: torch.cat(of_all(torch.cat(parts))), x)


def _summed(x: Tensor) -> Tensor:
    group = _group()
    if group is None:
        return sum_of_all(x)
    return group.meet(sum_of_parts, x)


def _number() -> int:
    """The place of this rank, or of the part that stands for one."""
    group, rank = _group(), dist.get_rank() if world() > 1 else 0
    return rank * group.count + _part.number if group else rank


def first_position(positions: Tensor) -> int:
    """The first position of the whole micro-batch, of which this rank, or part, has its equal share (B,) in order."""
    return int(positions[0]) - _number() * len(positions)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _joined(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0].contiguous()).chunk(ranks())[_number()]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank, in the order of the ranks: (ranks x B, ...), with gradient."""
    return _Gather.apply(x.contiguous()) if ranks() > 1 else x


def total(x: Tensor) -> Tensor:
    """The sum over ranks, with gradient."""
    return _Total.apply(x) if ranks() > 1 else x


def largest(x: Tensor) -> Tensor:
    """The maximum over ranks, without gradient."""
    if ranks() == 1:
        return x
    x = x.detach()
    group = _group()
    if group is None:
        return torch.stack(of_all(x)).amax(0)
    return group.meet(lambda parts: torch.stack(of_all(torch.stack(parts).amax(0))).amax(0), x)


class GlobalBatchNorm(nn.Module):
    """Batch normalisation by the statistics of the global batch, on any device. For heads that are thrown away after
    training: it keeps no running statistics."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D), or (V, B, D) -> (V, B, D) of several views, each by its own statistics."""
        x = x.float()
        count = total(x.new_full((), float(x.shape[-2]))).clamp(min=1)
        centred = x - total(x.sum(-2, keepdim=True)) / count
        variance = total(centred.square().sum(-2, keepdim=True)) / count
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias
