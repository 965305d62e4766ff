"""Steps whose loss or gradient is not finite: agreed by all ranks before the update, left out, recorded, and counted."""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from selfsight import console
from selfsight.assemble import Parts
from selfsight.data.loader import HostBatch
from selfsight.objectives.base import Loss
from selfsight.sharding import whole

MOST, WINDOW = 3, 100  # so many bad steps in so many are left out; one more ends the run
BUNDLES = 20  # records that are written in one start of a run


class Step(NamedTuple):
    """What is kept of a step until its verdict is heard, to record it if it was bad."""

    done: int
    """Its number, from 1."""
    hosts: list[HostBatch]
    """Its samples, without their views."""
    losses: list[Loss]
    norm: Tensor


def gradient_norm(trained: list[nn.Parameter]) -> Tensor:
    """Norm of the gradient, which is summed over the ranks by now."""
    return whole(get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None]))


class BadSteps:
    """Counts steps that were left out, and writes what is needed to see them again.

    Args:
        parts: of the run; its `past` counts them, its objective must stay as it was before such a step.
        rank: of this process.
    """

    def __init__(self, parts: Parts, rank: int) -> None:
        self.parts, self.rank, self.objective = parts, rank, parts.objective
        self.folder = parts.recipe.run_dir / "bad-steps"
        self.written = 0
        # Running statistics of a backbone's batch norms change in the forward pass, before anybody knows.
        norms = [module for module in self.objective.modules() if isinstance(module, _BatchNorm)]
        self.running = [buffer for module in norms for buffer in module.buffers(recurse=False)]
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        """Before a forward pass: remember what it may change."""
        self.kept = [buffer.clone() for buffer in self.running]

    def put_back(self, bad: Tensor) -> None:
        """After a step that only the device knows to be good or bad (1.0): what `keep` remembers, if it is bad."""
        for buffer, kept in zip(self.running, self.kept, strict=True):
            buffer.copy_(torch.where(bad > 0, kept, buffer))

    def undo(self) -> None:
        """Everything that the step's forward pass has changed is as it was."""
        self.objective.forget_step()
        for buffer, kept in zip(self.running, self.kept, strict=True):
            buffer.copy_(kept)

    def leave_out(self, bad: Step) -> str:
        """Record and count a step that changes nothing; the answer is a reason to end the run, or empty."""
        self.record(bad)
        step, past = bad.done, self.parts.past
        past.left_out.append(step)
        recent = [other for other in past.left_out if step - WINDOW < other]
        what = f"step {step}: the loss or the gradient is not finite, on one rank at least; the weights are those of step {step - 1}"
        advice = (
            f"a lower optim.lr, longer optim.warmup, or optim.clip 1.0 usually helps; its samples are in {self.folder}"
        )
        if self.parts.recipe.train.on_nonfinite == "stop":
            return f"{what} (train.on_nonfinite: stop); {advice}"
        if len(recent) > MOST:
            return f"{what}, as those of {len(recent)} of the last {WINDOW} steps; {advice}"
        if self.rank == 0:
            console.say(f"warning: {what}; it is left out ({len(recent)} of {MOST} in {WINDOW} steps); {advice}")
        return ""

    def record(self, step: Step) -> None:
        """Write this rank's samples, seeds and scalars of a bad step. A disk that is full does not end the run."""
        if self.written >= BUNDLES:
            return
        self.written += 1
        samples = [
            {"position": int(p), "key": int(k), "id": int(i), "where": self.parts.shards.describe(int(i))}
            for host in step.hosts
            for p, k, i in zip(host.positions, host.keys, host.ids, strict=True)
        ]
        scalars = [
            {"loss": repr(loss.total.item())}
            | {name: repr(term.float().mean().item()) for name, term in loss.terms.items()}
            for loss in step.losses
        ]
        facts: dict[str, Any] = {"step": step.done, "seed": self.parts.recipe.seed, "norm": repr(step.norm.item())}
        path = self.folder / f"step-{step.done:08d}-rank-{self.rank}.json"
        try:
            self.folder.mkdir(exist_ok=True)
            path.write_text(json.dumps(facts | {"losses": scalars, "samples": samples}, indent=1))
        except OSError as error:
            console.say(f"warning: {path}: cannot be written ({error.strerror})")
