"""Steps whose loss or gradient is not finite: agreed by all ranks before the update, left out, recorded, and counted."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from selfsight import console
from selfsight.data.loader import HostBatch
from selfsight.data.mixture import Samples
from selfsight.objectives.base import Loss, Objective
from selfsight.past import Past
from selfsight.sharding import whole

MOST, WINDOW = 3, 100  # so many bad steps in so many are left out; one more ends the run
BUNDLES = 20  # records that are written in one start of a run


def gradient_norm(trained: list[nn.Parameter]) -> Tensor:
    """Norm of the gradient, which is summed over the ranks by now."""
    return whole(get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None]))


def all_finite(losses: list[Loss], norm: Tensor) -> bool:
    """Whether this rank's losses and the gradient are."""
    return bool(torch.stack([norm, *[loss.total.detach() for loss in losses]]).isfinite().all())


class BadSteps:
    """Counts steps that were left out, and writes what is needed to see them again.

    Args:
        folder: the run folder; records go into `bad-steps/`.
        stop: end the run at the first one.
        past: where they are counted.
        objective: what must stay as it was before such a step.
    """

    def __init__(self, folder: Path, stop: bool, past: Past, objective: Objective) -> None:
        self.folder, self.stop, self.past, self.objective = folder / "bad-steps", stop, past, objective
        self.written = 0
        # Running statistics of a backbone's batch norms change in the forward pass, before anybody knows.
        norms = [module for module in objective.modules() if isinstance(module, _BatchNorm)]
        self.running = [buffer for module in norms for buffer in module.buffers(recurse=False)]
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        """Before a forward pass: remember what it may change."""
        self.kept = [buffer.clone() for buffer in self.running]

    def leave_out(self, step: int, quiet: bool) -> str:
        """Undo and count step `step` (from 1); the answer is a reason to end the run, or empty."""
        self.objective.forget_step()
        for buffer, kept in zip(self.running, self.kept, strict=True):
            buffer.copy_(kept)
        self.past.left_out.append(step)
        recent = [other for other in self.past.left_out if step - WINDOW < other]
        what = f"step {step}: the loss or the gradient is not finite, on one rank at least; the weights are those of step {step - 1}"
        advice = (
            f"a lower optim.lr, longer optim.warmup, or optim.clip 1.0 usually helps; its samples are in {self.folder}"
        )
        if self.stop:
            return f"{what} (train.on_nonfinite: stop); {advice}"
        if len(recent) > MOST:
            return f"{what}, as those of {len(recent)} of the last {WINDOW} steps; {advice}"
        if not quiet:
            console.say(f"warning: {what}; it is left out ({len(recent)} of {MOST} in {WINDOW} steps); {advice}")
        return ""

    def record(
        self,
        step: int,
        rank: int,
        seed: int,
        hosts: list[HostBatch],
        losses: list[Loss],
        norm: Tensor,
        shards: Samples,
    ) -> None:
        """Write this rank's samples, seeds and scalars of a bad step. A disk that is full does not end the run."""
        if self.written >= BUNDLES:
            return
        self.written += 1
        samples = [
            {"position": int(p), "key": int(k), "id": int(i), "where": shards.describe(int(i))}
            for host in hosts
            for p, k, i in zip(host.positions, host.keys, host.ids, strict=True)
        ]
        scalars = [
            {"loss": repr(loss.total.item())}
            | {name: repr(term.float().mean().item()) for name, term in loss.terms.items()}
            for loss in losses
        ]
        facts: dict[str, Any] = {"step": step, "seed": seed, "norm": repr(norm.item())}
        path = self.folder / f"step-{step:08d}-rank-{rank}.json"
        try:
            self.folder.mkdir(exist_ok=True)
            path.write_text(json.dumps(facts | {"losses": scalars, "samples": samples}, indent=1))
        except OSError as error:
            console.say(f"warning: {path}: cannot be written ({error.strerror})")
