"""Whether a step is taken: all ranks' word on its numbers, and on whether the run is to go on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from selfsight.data.transfer import without_waiting
from selfsight.finite import BadSteps, Step
from selfsight.objectives.base import Objective


class Verdict(NamedTuple):
    """What all ranks agree on after a step."""

    bad: bool
    """Its loss or gradient is not finite: it changes nothing."""
    end: str
    """Why the run is to end for that, or empty."""
    endings: list[bool]
    """Of the reasons to end it that were asked about, which hold on any rank."""


class Verdicts:
    """One question to all ranks for each step, and one answer.

    The question is one small tensor on the device: whether a loss or the gradient's norm is not finite, and the host's own
    reasons to end the run. It is all-reduced, and its answer copied to the host, in the device's own time: nobody waits
    before `hear`. A step that is taken *late* does not: the optimizer, and all that follows the weights, obey the tensor
    on the device, and the host hears the answer when the next step's backward pass is queued behind it. The answer is then
    long there, the GPU is never without work, and the next step is not yet taken: so a run ends, and resumes, with the
    very bits of one that waits at every step; only what a last, dropped backward pass cost is lost.
    """

    def __init__(self, accelerator: Accelerator, bad: BadSteps) -> None:
        self.accelerator, self.bad = accelerator, bad
        self.open: Step | None = None
        """The step whose answer nobody has heard."""
        self.answer = torch.empty(0)
        self.arrived: torch.cuda.Event | None = None

    def ask(self, step: Step, reasons: Sequence[bool]) -> Tensor:
        """Ask all ranks; the answer is (), float32, on the device: 1.0 if the step is bad anywhere, 0.0 if it is not."""
        device = self.accelerator.device
        numbers = torch.stack([step.norm.float(), *(loss.total.detach().float() for loss in step.losses)])
        bad = numbers.isfinite().all().logical_not().float()
        flags = torch.cat([bad.view(1), without_waiting(torch.tensor(reasons, dtype=torch.float32), device)])
        if self.accelerator.num_processes > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)  # on a GPU its stream waits, not the host
        self.answer, self.open = flags, step
        if device.type == "cuda":
            self.answer = torch.empty(flags.shape, pin_memory=True).copy_(flags, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        return flags[0]

    def hear(self) -> Verdict:
        """Wait for the answer to the last question; a bad step is recorded and counted."""
        assert self.open is not None
        if self.arrived:
            self.arrived.synchronize()
        bad, *endings = (value > 0 for value in self.answer.tolist())
        step, self.open, self.arrived = self.open, None, None
        return Verdict(bad, self.bad.leave_out(step) if bad else "", endings)


def may_be_late(device: torch.device, objective: Objective, optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps may be taken before the host knows that they are good: where waiting costs, and all heed the device.

    An objective with an `after_step` of its own must say that it does (`heeds_took`); of the optimizers only fused ones do.
    """
    follows = objective.heeds_took or type(objective).after_step is Objective.after_step
    return device.type == "cuda" and follows and all(group.get("fused") for group in optimizer.param_groups)
