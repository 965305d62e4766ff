"""Collapse: features that no longer tell one image from another. It can look like a loss that falls nicely."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from selfsight import console
from selfsight.errors import NumericError
from selfsight.eval.health import rankme
from selfsight.objectives.base import Loss
from selfsight.past import Past

EVERY = 10  # steps between looks
ROWS = 256  # images that are looked at
PATIENCE = 5  # looks in a row, each EVERY steps, before the alarm


class Limits(NamedTuple):
    """What healthy runs stay above (measured on the digits: docs/log.md)."""

    std: float = 0.02
    """Below it vectors are all the same: a mean cosine above 0.9996."""
    rank: float = 0.0
    """Below it a few answers serve all images."""


LIMITS = {"teacher": Limits(0.05, 4.0)}  # a teacher's distributions, which differ far more than features do


class CollapseWatch:
    """Looks at the vectors that an objective wants watched, and says when they are all the same.

    Args:
        stop: raise at the alarm, instead of a warning.
        past: what it remembers.
    """

    def __init__(self, stop: bool, past: Past) -> None:
        self.stop, self.past = stop, past

    def __call__(self, step: int, loss: Loss, accelerator: Accelerator) -> dict[str, float]:
        """Fields for metrics.jsonl: std, cosine and rank of each of the objective's watched vectors, mean over ranks.

        Raises:
            NumericError: collapse, on every rank at the same step, if the watch is told to stop.
        """
        line: dict[str, float] = {}
        for name, found in of_all_ranks(loss.watched, accelerator).items():
            line |= {f"watch/{name}/{key}": round(value, 5) for key, value in found.items()}
            if step % EVERY:  # a line is logged here; the count must not depend on how often
                continue
            limits = LIMITS.get(name.rpartition("/")[2], Limits())
            few = len(loss.watched[name]) >= 4 * limits.rank and found["rank"] < limits.rank
            flat = self.past.flat.get(name, 0) + 1 if few or found["std"] < limits.std else 0
            self.past.flat[name] = flat
            if flat >= PATIENCE and name not in self.past.told:
                self.past.told.append(name)
                what = (
                    "are a few for all images"
                    if found["std"] >= limits.std
                    else "of different images are nearly the same"
                )
                message = (
                    f"step {step}: collapse: the {name} vectors {what} (std {found['std']:.4f}, "
                    f"mean cosine {found['cosine']:.4f}, rank {found['rank']:.1f}) and have been for {PATIENCE * EVERY} steps; a lower "
                    "optim.lr, a larger batch, or the objective's own defaults usually help"
                )
                if self.stop:
                    accelerator.wait_for_everyone()  # as everyone comes here
                    raise NumericError(f"{message} (train.on_collapse: stop)")
                if accelerator.is_main_process:
                    console.say(f"warning: {message}")
        return line


@torch.no_grad()
def of_all_ranks(watched: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, dict[str, float]]:
    """`spread` of each of the vectors, mean over ranks: one copy from the device, and one reduction, for all of them.

    Singular values are found on the host: a GPU takes longer for so small a matrix, and asks the host again and again.
    """
    if not watched:
        return {}
    looked_at = [vectors[:ROWS].detach().float() for vectors in watched.values()]
    rows = torch.cat([vectors.flatten() for vectors in looked_at]).cpu().split([v.numel() for v in looked_at])
    found = [spread(own.view(vectors.shape)) for own, vectors in zip(rows, looked_at, strict=True)]
    table = torch.stack([torch.stack([*one.values()]) for one in found]).to(looked_at[0].device)
    values = accelerator.reduce(table, "mean").tolist()
    return {name: dict(zip(found[0], row, strict=True)) for name, row in zip(watched, values, strict=True)}


@torch.no_grad()
def spread(vectors: Tensor) -> dict[str, Tensor]:
    """How different the vectors (B, D) of a batch are, by direction.

    Returns:
        std: root mean square over dimensions of the unit vectors' standard deviation, times the root of D: 1 where they
            point everywhere, 0 where all are the same. cosine: mean over pairs. rank: RankMe.
    """
    unit = F.normalize(vectors[:ROWS].float(), dim=-1)
    count, mean = len(unit), unit.mean(0)
    std = (unit - mean).square().sum(1).mean().sqrt()
    cosine = (mean.square().sum() * count - 1) / max(1, count - 1)
    return {"std": std, "cosine": cosine, "rank": vectors.new_tensor(rankme(unit), dtype=torch.float32)}
