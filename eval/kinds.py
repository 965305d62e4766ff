"""Which encoders share a floor: those with the same untrained twin, and those that read images alike."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from selfsight.data.shards import Shards
from selfsight.encoder import Encoder
from selfsight.eval.asked import Source, pools_of
from selfsight.eval.extraction import check_extraction
from selfsight.eval.features import CentralCrops
from selfsight.eval.subject import Options
from selfsight.eval.token_probe import TOKEN_POOLS, require_plain
from selfsight.preprocessing import Preprocessing
from selfsight.recipe import EncoderConfig


@dataclass(frozen=True)
class Described:
    """What the floors of an encoder depend on."""

    config: EncoderConfig
    preprocessing: Preprocessing

    @property
    def twin(self) -> str:
        """The same for encoders with the same untrained twin."""
        return f"{self.config.model_dump_json(exclude={'weights'})} {self.preprocessing!r}"

    @property
    def pixels(self) -> str:
        """The same for encoders that read images alike."""
        return repr(self.preprocessing._replace(mean=(), std=()))


def loaded(source: Source) -> Encoder:
    """The encoder in memory."""
    from selfsight.loading import load_encoder

    return source if isinstance(source, Encoder) else load_encoder(source)


def described(source: Source, options: Options, sets: Iterable[Shards] = ()) -> Described:
    """Look at an encoder, so that one that cannot be scored is known before hours are spent on others.

    Args:
        sets: whose first sample is read as this encoder would.

    Raises:
        UsageError, StorageError: as `load_encoder`, `pools_of` and `check_extraction`.
        DataError: a sample that cannot be read as the encoder takes it, of other channels for instance.
    """
    live = loaded(source)
    check_extraction(live, pools_of(live, options), options.extraction)
    if {*(options.pools or ())} & {*TOKEN_POOLS}:
        require_plain(options.extraction)
    for shards in sets:
        CentralCrops.of(shards, np.arange(1), live.preprocessing)[0]
    return Described(live.config, live.preprocessing)


def floors_of(kinds: Mapping[str, str], floor: str) -> dict[str, tuple[str, str]]:
    """For every kind the name of its floor's row, and the first encoder of the kind.

    Args:
        kinds: of encoders by name.
    """
    first: dict[str, str] = {}
    for name, kind in kinds.items():
        first.setdefault(kind, name)
    return {kind: (floor if len(first) == 1 else f"{floor} of {name}", name) for kind, name in first.items()}
