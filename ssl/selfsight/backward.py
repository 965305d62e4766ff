"""From the batches of a step to the gradients of its parameters, the mean over micro-batches, ranks and parts."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from selfsight.data.loader import HostBatch
from selfsight.data.placer import Batch
from selfsight.objectives.across import Parts, sum_of_parts
from selfsight.objectives.base import Loss, Objective

Place = Callable[[HostBatch], Batch]
BUILT_IN = "selfsight.objectives."  # modules of the objectives whose buffers are known


class Averaged:
    """Gradients summed as it is fastest: one pass a micro-batch, all-reduced by DDP beside the backward pass.

    Gradients lie in DDP's buckets and are not copied out of them. Buckets are of DDP's own size, and no graph is declared
    static: which parameters a pass uses may change, as weights of a joint do.
    """

    def __init__(self, objective: Objective, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        accelerator.ddp_handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        # Not by DDP's argument for it: torch has renamed that one, and warns of the old name, which Accelerate passes.
        unsent = [] if buffers_may_differ(objective) else [name for name, _ in objective.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, unsent)
        self.model: Any = accelerator.prepare_model(objective)

    def __call__(self, hosts: list[HostBatch], place: Place) -> list[Loss]:
        """Add this step's gradients; the losses of the micro-batches."""
        losses: list[Loss] = []
        for micro, host in enumerate(hosts):
            last = micro == len(hosts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                losses.append(self._learn(place(host), len(hosts)))
        return losses

    def forget(self) -> None:
        """Nothing is kept from step to step."""

    def _learn(self, batch: Batch, micros: int) -> Loss:
        loss: Loss = self.model(batch)
        self.accelerator.backward(loss.total / micros)
        return loss._replace(total=loss.total.detach())  # or its graph would lie beside that of the next one


def buffers_may_differ(objective: Objective) -> bool:
    """Whether rank 0 sends its buffers round before every step.

    Running statistics are each rank's own until it does. All other buffers of this package's objectives are the same by
    construction (fixed tables, or a centre made of all ranks' outputs). Of a plugin's nothing is known.
    """
    modules = [*objective.modules()]
    foreign = any(isinstance(own, Objective) and not type(own).__module__.startswith(BUILT_IN) for own in modules)
    return foreign or any(isinstance(module, _BatchNorm) for module in modules)


class Sharded:
    """Gradients of an objective that FSDP has sharded: each rank ends with its share of their mean over ranks.

    They are reduced after every micro-batch: to wait for the last one would keep all of them whole on every rank, which
    is what sharding is there to avoid; the gathering of weights in every micro-batch would remain.
    """

    def __init__(self, objective: Objective, accelerator: Accelerator) -> None:
        self.objective, self.accelerator = objective, accelerator

    def __call__(self, hosts: list[HostBatch], place: Place) -> list[Loss]:
        """Add this step's gradients; the losses of the micro-batches."""
        losses: list[Loss] = []
        for host in hosts:
            with self.accelerator.autocast():
                loss: Loss = self.objective(place(host))
            (loss.total / len(hosts)).backward()
            losses.append(
                loss._replace(total=loss.total.detach())
            )  # or its graph would lie beside that of the next one
        return losses

    def forget(self) -> None:
        """Nothing is kept from step to step."""


class Canonical:
    """Gradients whose bits are the same on any number of ranks that divides `parts`.

    Every micro-batch is cut into `parts` equal parts, whoever computes them. Each part goes through its own copy of the
    objective, which shares the weights and has its own gradients; losses that look at the whole batch find it as ranks
    do. Gradients of parts are summed along one binary tree.

    Args:
        parts: a power of two, a multiple of the number of ranks.
    """

    def __init__(self, objective: Objective, accelerator: Accelerator, parts: int) -> None:
        self.accelerator, self.parts, self.mine = accelerator, parts, parts // accelerator.num_processes
        self.objective = objective
        self.copies = [objective, *(with_same_weights(objective) for _ in range(self.mine - 1))]
        self.names = [name for name, p in objective.named_parameters() if p.requires_grad]

    def __call__(self, hosts: list[HostBatch], place: Place) -> list[Loss]:
        """Set this step's gradients; the losses of every part of the micro-batches."""
        losses: list[Loss] = []
        summed: dict[str, Tensor] = {}
        for host in hosts:
            losses += self._learn(host, place, len(hosts))
            for name, gradient in self._gradients().items():
                summed[name] = summed[name] + gradient if name in summed else gradient
        for name, parameter in self.objective.named_parameters():
            if name in summed:
                parameter.grad = summed[name]
        return losses

    def forget(self) -> None:
        """Drop what the copies have noted for the end of the step; the objective itself was told."""
        for other in self.copies[1:]:
            other.forget_step()

    def _learn(self, host: HostBatch, place: Place, micros: int) -> list[Loss]:
        def learn(number: int) -> Loss:
            with self.accelerator.autocast():
                loss = self.copies[number](place(part_of(host, number, self.mine)))
            # In this thread, on a GPU too: a part that waits for the others must not hold up their backward pass.
            with torch.autograd.set_multithreading_enabled(False):
                (loss.total / micros).backward()
            return loss._replace(total=loss.total.detach())

        with deterministic():
            return Parts(self.mine).run([partial(learn, number) for number in range(self.mine)])

    def _gradients(self) -> dict[str, Tensor]:
        """Mean over all parts of all ranks; what the copies hold is taken from them."""
        of_copies = [dict(module.named_parameters()) for module in self.copies]
        found: dict[str, Tensor] = {}
        for name in self.names:
            gradients = [parameters[name].grad for parameters in of_copies]
            present = [gradient for gradient in gradients if gradient is not None]
            if present:  # on every part, or on none: the objectives are the same
                found[name] = sum_of_parts(present) / self.parts
            for parameters in of_copies:
                parameters[name].grad = None
        return found


def with_same_weights(objective: Objective) -> Objective:
    """A copy whose parameters are leaves of their own over the same memory, and whose buffers are the same."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in objective.parameters()
    }
    memo |= {id(buffer): buffer for buffer in objective.buffers()}
    return copy.deepcopy(objective, memo)


def part_of(host: HostBatch, number: int, parts: int) -> HostBatch:
    """One of so many equal parts of a batch."""
    size = len(host.ids) // parts
    rows = slice(number * size, (number + 1) * size)
    views = tuple(view[rows] for view in host.views)
    encoded = [one._replace(slot=one.slot - rows.start) for one in host.encoded if rows.start <= one.slot < rows.stop]
    return HostBatch(views, host.positions[rows], host.keys[rows], host.ids[rows], [], encoded)


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels whose results repeat; an operation that has none raises."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
