"""A record by which anybody can check that a resumed run is the uninterrupted one: SELFSIGHT_LEDGER=1 writes it.

`ledger/rank-0.jsonl` in the run folder, one object a step: positions and ids of the samples, CRC-32 of each sample's
input pixels, the bits of the loss and of the gradient's norm, and every 10 steps a hash of all weights. A step that is
done again after a crash stands there again, and must be the same.
"""

import json
import os
import struct
import zlib
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selfsight.console import say
from selfsight.data.loader import HostBatch
from selfsight.sharding import local

if TYPE_CHECKING:  # objectives keep a hash of a teacher's weights by this file
    from selfsight.objectives.base import Loss

VARIABLE = "SELFSIGHT_LEDGER"
WEIGHTS_EVERY = 10


class Ledger:
    """Writes the record of one rank; without the variable it writes nothing.

    Args:
        folder: the run folder.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / "ledger" / f"rank-{rank}.jsonl" if os.environ.get(VARIABLE) else None
        if self.path:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a") as file:
                file.write("\n")  # a crash may have left half a line

    def write(self, step: int, hosts: list[HostBatch], losses: "list[Loss]", norm: Tensor, model: nn.Module) -> None:
        """What went into step `step` (from 1) and what came out, after the update."""
        if not self.path:
            return
        line: dict[str, Any] = {
            "step": step,
            "positions": [int(p) for host in hosts for p in host.positions],
            "ids": [int(i) for host in hosts for i in host.ids],
            "inputs": [crc for host in hosts for crc in input_crcs(host)],
            "loss": bits(torch.stack([loss.total.detach().double() for loss in losses]).sum()),
            "norm": bits(norm),
        }
        if step % WEIGHTS_EVERY == 0:
            line["weights"] = weights_hash(model)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            say(f"warning: {self.path}: cannot be written ({error.strerror}); training goes on without it")
            self.path = None


def bits(value: Tensor) -> str:
    """The bits of a scalar, as float64, in hexadecimal."""
    return struct.pack(">d", value.item()).hex()


def input_crcs(host: HostBatch) -> list[int]:
    """CRC-32 of the pixels of each sample's views (uint8, before colour and normalisation)."""
    found = []
    for slot in range(len(host.ids)):
        crc = 0
        for view in host.views:
            crc = zlib.crc32(view[slot].cpu().contiguous().numpy().data, crc)
        found.append(crc)
    return found


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, in the order of their names; of sharded ones this rank's share."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(local(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
