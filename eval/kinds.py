"""Which encoders share a floor: those with the same untrained twin, and those that read images alike."""

from collections.abc import Mapping
from dataclasses import dataclass

from selfsight.encoder import Encoder
from selfsight.eval.asked import Source, pools_of
from selfsight.eval.subject import Options
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


def described(source: Source, options: Options) -> Described:
    """Look at an encoder, so that one that cannot be scored is known before hours are spent on others.

    Raises:
        UsageError, StorageError: as `load_encoder` and `pools_of`.
    """
    live = loaded(source)
    pools_of(live, options)
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
