"""The record of samples that could not be used, and the budget that says when the data are to blame."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from selfsight.console import say
from selfsight.data.loader import Bad, HostBatch
from selfsight.errors import DataError
from selfsight.run_folder import read_lines

LEAST = 10  # bad samples that are always borne
NAMED = 3  # reasons and shards that the message lists
_BYTES, _NUMBER = re.compile(r"""b'[^']*'|b"[^"]*\""""), re.compile(r"\d[\d,]*")  # what differs from sample to sample


class Quarantine:
    """Appends each bad sample to quarantine.jsonl, once a start of the run and rank.

    Args:
        folder: the run folder.
        rank: of this process.
        share: of the samples read that may be bad; 10 always may.
    """

    def __init__(self, folder: Path, rank: int, share: float = 0.001) -> None:
        self.path, self.rank, self.share = folder / "quarantine.jsonl", rank, share
        self.known: dict[int, Bad] = {}
        self.seen = 0
        self._mute = False

    def record(self, batch: HostBatch) -> None:
        """Note the bad samples of a batch.

        Raises:
            DataError: more than 10 and more than `share` of the samples that this rank has read are bad.
        """
        self.seen += len(batch.ids)
        fresh = {bad.sample: bad for bad in reversed(batch.bad) if bad.sample not in self.known}
        if not fresh:
            return
        self.known |= fresh
        self._write(sorted(fresh.values()))
        if len(self.known) > max(LEAST, self.share * self.seen):
            raise DataError(
                f"{len(self.known)} bad samples among {self.seen:,} read; reasons: "
                f"{_most(_kind(bad.reason) for bad in self.known.values())}; shards: "
                f"{_most(bad.where.rpartition('@')[0] for bad in self.known.values())}; "
                f"all are in {self.path}; look closer with: selfsight shards check"
            )

    def _write(self, fresh: list[Bad]) -> None:
        lines = [
            {
                "position": bad.position,
                "sample": bad.sample,
                "where": bad.where,
                "rank": self.rank,
                "reason": bad.reason,
            }
            for bad in fresh
        ]
        try:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:  # the budget needs the count, not the file
            if not self._mute:
                say(f"{self.path}: cannot be written ({error.strerror}); training goes on, bad samples are counted")
            self._mute = True


def replaced(folder: Path) -> str:
    """What quarantine.jsonl of a run folder says, in a line; empty if no sample was replaced."""
    lines = read_lines(folder / "quarantine.jsonl")
    reasons = {line["sample"]: str(line["reason"]) for line in lines if "sample" in line and "reason" in line}
    if not reasons:
        return ""
    return f"{len(reasons):,} samples could not be used and were replaced: {_most(map(_kind, reasons.values()))}"


def _kind(reason: str) -> str:
    return _NUMBER.sub("N", _BYTES.sub("...", reason))


def _most(names: Iterable[str]) -> str:
    """The commonest names with their counts, and how many others there are."""
    counts = Counter(names)
    others = f" and {len(counts) - NAMED} more" if len(counts) > NAMED else ""
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(NAMED)) + others
