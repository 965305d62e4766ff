"""The same global batch on one process and spread over several gloo ranks: `spread(jobs, folder)` returns what each gave.

A job is a mapping with a `kind` that names a function here and whatever this function reads. One process imports torch,
then forks the ranks of every world in turn, so that a test pays for the import once.
"""

import copy
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.objectives import build_objective, parse_objective
from selfsight.objectives.across import GlobalBatchNorm, gather, largest, total
from selfsight.recipe import DataConfig, EncoderConfig

ENCODER: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}


def spread(jobs: Sequence[dict[str, Any]], folder: Path, worlds: Sequence[int] = (1, 2, 4)) -> dict[int, list[Any]]:
    """What every job returns on the first rank, by the number of ranks."""
    (folder / "jobs.json").write_text(json.dumps(list(jobs)))
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *map(str, worlds)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {world: torch.load(folder / f"{world}.pt", weights_only=True) for world in worlds}


def share(x: Tensor) -> Tensor:
    """This rank's part of a global batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else x


def mean(x: Tensor) -> Tensor:
    """The mean over ranks, as the metrics of a run are."""
    x = x.detach().double().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def whole(x: Tensor) -> Tensor:
    """The parts of all ranks, joined without the code under test."""
    if not dist.is_initialized():
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


@cache
def encoder_of(fields: str) -> Encoder:
    """A tiny encoder with these fields changed (JSON)."""
    config = EncoderConfig(**(ENCODER | json.loads(fields)))
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)


def objective(job: dict[str, Any]) -> dict[str, Any]:
    """Train an objective for some steps under DDP; every step's loss, terms and gradients, and the state at the end.

    A job has the fields `objective` and `encoder` of a recipe, `images` in the global batch (8), and `steps` (2).
    """
    encoder = copy.deepcopy(encoder_of(json.dumps(job.get("encoder", {}))))
    config, images, steps = encoder.config, job.get("images", 8), job.get("steps", 2)
    torch.manual_seed(1)
    made = build_objective(parse_objective(job["objective"]), encoder)
    model = DistributedDataParallel(made) if dist.is_initialized() else made
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.05)
    results = []
    for step in range(steps):
        drawn = torch.Generator().manual_seed(step)
        sizes = [view.size or config.image_size for view in made.views]
        views = tuple(share(torch.randn(images, config.channels, s, s, generator=drawn)) for s in sizes)
        positions = share(torch.arange(step * images, (step + 1) * images))
        loss = model(Batch(views, positions, seed=7, keys=positions, progress=step / steps))
        optimizer.zero_grad()
        loss.total.backward()
        results.append(
            {
                "loss": mean(loss.total),
                "terms": {name: mean(term) for name, term in loss.terms.items()},
                "gradients": {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None},
            }
        )
        optimizer.step()
        made.after_step(step + 1, steps)
    return {"steps": results, "state": made.state_dict()}


def batch_norm(job: dict[str, Any]) -> dict[str, Tensor]:
    """GlobalBatchNorm's output and gradients, of the sum of the outputs times `upstream`."""
    norm = GlobalBatchNorm(len(job["weight"]), job["eps"])
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(job["weight"]))
        norm.bias.copy_(torch.tensor(job["bias"]))
    x = share(torch.tensor(job["x"])).requires_grad_()
    y = norm(x)
    (y * share(torch.tensor(job["upstream"]))).sum().backward()
    parts = len(job["x"]) / len(x)
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    return {
        "y": whole(y),
        "x": whole(x.grad),
        "weight": mean(norm.weight.grad) * parts,
        "bias": mean(norm.bias.grad) * parts,
    }


def collectives(job: dict[str, Any]) -> dict[str, Tensor]:
    """What `gather`, `total` and `largest` give of `x`, and the gradients of a loss of them that all ranks share."""
    x = share(torch.tensor(job["x"])).requires_grad_()
    gathered, summed = gather(x), total(x.sum(0))
    upstream = torch.tensor(job["upstream"])
    (gathered.square() * upstream).sum().backward()
    assert x.grad is not None
    of_gather, x.grad = whole(x.grad), None
    summed = total(x.sum(0))
    (summed.square() * upstream[0]).sum().backward()
    return {
        "gather": gathered.detach(),
        "total": summed.detach(),
        "largest": largest(x.detach()),
        "gradient of gather": of_gather,
        "gradient of total": whole(x.grad),
        "x untouched": whole(x),
    }


def _rank(folder: Path, jobs: list[dict[str, Any]], rank: int, world: int) -> None:
    if world > 1:
        store = dist.FileStore(str(folder / f"store-{world}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    found = [
        {"objective": objective, "batch_norm": batch_norm, "collectives": collectives}[job["kind"]](job) for job in jobs
    ]
    if rank == 0:
        torch.save(found, folder / f"{world}.pt")
    if world > 1:
        dist.barrier()


def _forked(folder: Path, jobs: list[dict[str, Any]], rank: int, world: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        _rank(folder, jobs, rank, world)
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it and fails
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path, worlds: list[int]) -> int:
    """Fork the ranks of each world in turn; 1 if any rank failed."""
    torch.set_num_threads(1)  # before the first operation: a fork does not copy threads
    jobs = json.loads((folder / "jobs.json").read_text())
    for job in jobs:
        if job["kind"] == "objective":
            encoder_of(json.dumps(job.get("encoder", {})))
    for world in worlds:
        children = [_forked(folder, jobs, rank, world) for rank in range(world)]
        if any([os.waitpid(child, 0)[1] for child in children]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [int(world) for world in sys.argv[2:]]))
