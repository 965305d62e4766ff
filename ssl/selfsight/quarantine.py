"""The record of samples that could not be used, and the budget that says when the data are to blame."""

import json
from pathlib import Path

from selfsight.data.loader import HostBatch
from selfsight.errors import DataError, StorageError

BUDGET_SHARE, BUDGET_LEAST = 0.001, 10


class Quarantine:
    """Appends each bad sample to quarantine.jsonl, once a start of the run and rank.

    Args:
        folder: the run folder.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self.rank = folder / "quarantine.jsonl", rank
        self.known: set[int] = set()
        self.seen = 0

    def record(self, batch: HostBatch) -> None:
        """Note the bad samples of a batch.

        Raises:
            DataError: more than 0.1 % of the samples that this rank has read (and more than 10) are bad.
        """
        self.seen += len(batch.ids)
        fresh = [bad for bad in batch.bad if bad[1] not in self.known]
        if not fresh:
            return
        self.known |= {sample for _, sample, _ in fresh}
        lines = [{"position": p, "sample": s, "rank": self.rank, "reason": why} for p, s, why in fresh]
        try:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from None
        if len(self.known) > max(BUDGET_LEAST, BUDGET_SHARE * self.seen):
            raise DataError(
                f"{len(self.known)} bad samples among {self.seen:,} read, last: {fresh[-1][2]}; "
                f"all are in {self.path}; look closer with: selfsight shards check"
            )
