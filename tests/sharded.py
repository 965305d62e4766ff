"""Runs of two gloo ranks, one after the other in the same two processes: `both(jobs, folder)` returns what each rank noted.

A job has a `recipe` and its `fields`; `poison`, a step (from 1) whose loss is not a number on rank 1; `late`, to take
steps before the host knows whether they are good, as on a GPU; and `copy`, a run folder whose checkpoint of step 3 it
goes on from.
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from launch import free_port
from torch._dynamo.utils import counters

from selfsight.assemble import Parts, assemble, unsharded
from selfsight.compiled import compile_blocks
from selfsight.errors import UsageError
from selfsight.processes import join
from selfsight.recipe import load
from selfsight.sharding import bytes_of
from selfsight.train import train

Job = Mapping[str, Any]


def both(jobs: Sequence[Job], folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank noted of every job, by rank."""
    (folder / "jobs.json").write_text(json.dumps(list(jobs)))
    shared = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, **shared, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def go_on(folder: Path, copied: Path) -> None:
    """A run folder as it was after step 3 of another."""
    shutil.copytree(copied, folder, ignore=shutil.ignore_patterns("step-00000006"))


def _learn(job: Job, rank: int) -> dict[str, Any]:
    recipe = load(job["recipe"], job["fields"])
    if rank == 0 and "copy" in job:
        go_on(recipe.run_dir, Path(job["copy"]))
    AcceleratorState._reset_state()  # a job may have another precision than the one before
    accelerator = join(recipe)
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with patch("selfsight.switches.compile_blocks", partial(compile_blocks, backend="eager")):  # needs no compiler
            parts = assemble(recipe, accelerator.device, (), 2)
    except UsageError as error:
        return {"refused": str(error)}
    counters.clear()
    seen: set[str] = set()
    parts.encoder.blocks[0].register_forward_pre_hook(
        lambda block, _: seen.update(str(p.dtype) for p in block.parameters())
    )
    if "poison" in job:
        _poison(parts, job["poison"], rank)
    with patch("selfsight.train.may_be_late", lambda *_: "late" in job):
        train(parts, accelerator)
    trained, moments = list(parts.objective.parameters()), parts.optimizer.state.values()
    noted = {
        "sharded": parts.sharded,
        "computed in": sorted(seen),
        "kept in": sorted({str(p.dtype) for p in trained}),
        "weights": bytes_of(trained),
        "moments": bytes_of(v for moment in moments for v in moment.values() if v.ndim),
        "left out": parts.past.left_out,
        "graphs": counters["stats"]["unique_graphs"],
    }
    scored = parts.scored_whole(rank == 0)
    plain = unsharded(parts, accelerator.device)
    noted["scored"] = scored is not None
    if scored:
        noted["scored is exported"] = _same(scored.state_dict(), plain.scored.state_dict())
    return noted


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _poison(parts: Parts, step: int, rank: int) -> None:
    """Make the loss of a step no number on rank 1."""
    forward, micros, calls = parts.objective.forward, parts.recipe.train.accumulate, [0]

    def poisoned(batch: Any) -> Any:
        loss, calls[0] = forward(batch), calls[0] + 1
        return loss._replace(total=loss.total * float("nan")) if rank and calls[0] == step * micros else loss

    parts.objective.forward = poisoned  # type: ignore[method-assign]


def _rank(folder: Path, rank: int) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        found = [_learn(job, rank) for job in json.loads((folder / "jobs.json").read_text())]
        (folder / f"rank-{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it and fails
        traceback.print_exc()
        return 1
    return 0


def main(folder: Path) -> int:
    """Fork both ranks; 1 if one failed."""
    torch.set_num_threads(1)  # before the first operation: a fork does not copy threads
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            code = _rank(folder, rank)
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    failed = False
    for _ in children:
        child, status = os.wait()
        if status and not failed:  # the other one would wait for it
            failed = True
            for other in children:
                if other != child:
                    os.kill(other, 9)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
