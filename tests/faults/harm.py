"""A plugin that harms the shards below $HARM_STEP steps of rank $HARM_RANK: they are gone for it, or replaced for all."""

import os
from pathlib import Path

from poison import OBJECTIVES  # noqa: F401 - a plugin must have some

from selfsight.data.loader import Batches
from selfsight.data.shards import Shards

_getitem = Batches.__getitem__
Shards.patience = 0.2


def getitem(self, number):  # type: ignore[no-untyped-def]
    here = number == int(os.environ.get("HARM_STEP", "-1")) and self.rank == int(os.environ["HARM_RANK"])
    for path in self.shards.paths if here else []:
        if os.environ["HARM_KIND"] == "replaced":
            path.write_bytes(bytes(path.stat().st_size))
        else:
            self.shards.close()
            self.shards.paths = [Path("/nowhere") / path.name for path in self.shards.paths]
    return _getitem(self, number)


Batches.__getitem__ = getitem
