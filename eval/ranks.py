"""Extraction over several processes: each encodes its own whole batches, the first one gets all of them in order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from selfsight.errors import PeerLost
from selfsight.peers import Peers
from selfsight.processes import found_each_other, world_size

PIECE = 2**24  # values sent at once
SILENCE = 120.0  # seconds after which a rank counts as frozen
START = 600.0  # seconds for all ranks to come
WAIT = timedelta(days=7)  # while rank 0 scores; who is lost is found by `Peers`


@dataclass(frozen=True)
class Ranks:
    """This process among those that extract together."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    """Over which tensors of the CPU go; None: there is one process."""

    @property
    def main(self) -> bool:
        """Whether this is the one that scores."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` batches are this rank's: neighbours, so that they come back in order; rank 0 has the first."""
        return range(self._start(self.rank, count), self._start(self.rank + 1, count))

    def _start(self, rank: int, count: int) -> int:
        return -(-rank * count // self.world)

    def joined(self, own: Tensor, total: int, batch: int) -> Tensor:
        """The rows of all ranks in order, on rank 0; on the others their own.

        Args:
            own: (n, ...), the rows of this rank's share of the batches; where there are none, of any shape.
            total: rows of all ranks.
            batch: rows of every batch but the last.
        """
        if self.group is None:
            return own
        count = -(-total // batch)
        if self.rank:
            for piece in own.flatten().split(PIECE) if len(own) else ():
                dist.send(piece.contiguous(), 0, group=self.group)
            return own
        whole = own.new_empty(total, *own.shape[1:])
        whole[: len(own)] = own
        for rank in range(1, self.world):
            rows = slice(self._start(rank, count) * batch, self._start(rank + 1, count) * batch)
            for piece in whole[rows].view(-1).split(PIECE) if len(whole[rows]) else ():
                dist.recv(piece, rank, group=self.group)
        return whole

    def told(self, flag: bool) -> bool:
        """What rank 0 says."""
        if self.group is None:
            return flag
        shared = torch.tensor([flag])
        dist.broadcast(shared, 0, group=self.group)
        return bool(shared.item())


ALONE = Ranks()


class _Here(NamedTuple):
    """What `Peers` asks of Accelerate."""

    process_index: int
    num_processes: int
    device: torch.device


@contextmanager
def started() -> Iterator[Ranks]:
    """The processes that torchrun started, for as long as it is entered; alone without torchrun.

    Raises:
        PeerLost: another rank died, failed or went silent; so it is raised on every rank when one of them fails.
    """
    world = world_size()
    if world == 1:
        yield ALONE
        return
    with found_each_other(START):
        dist.init_process_group("gloo", timeout=WAIT)
    try:
        here = _Here(dist.get_rank(), world, torch.device("cpu"))
        with Peers(here, SILENCE) as peers:
            try:
                yield of_run(here.process_index, world)
                dist.barrier()  # nobody leaves while another still fails
            except RuntimeError as error:  # a collective fails so when a rank is gone
                if lost := peers.who(error):
                    raise PeerLost(lost) from error
                raise
    finally:
        dist.destroy_process_group()


def of_run(rank: int, world: int) -> Ranks:
    """The processes of a training run, when it is over: over gloo, whatever the gradients went over."""
    if world == 1:
        return ALONE
    group = dist.new_group(backend="gloo", timeout=WAIT)
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return Ranks(rank, world, group)


def own_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
