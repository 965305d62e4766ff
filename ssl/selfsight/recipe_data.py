"""The data that a recipe asks for: its samples, and what only a mixture has."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from selfsight.data.decode import BadSample
from selfsight.data.mixture import Mixture, Samples
from selfsight.data.picture import Picture
from selfsight.data.shards import Shards
from selfsight.errors import NoShards, UsageError
from selfsight.preprocessing import Preprocessing
from selfsight.recipe import DataConfig, MixPart


def open_samples(data: DataConfig) -> Samples:
    """The one set of a recipe, or its mixture."""
    if data.train is not None:
        with asked_for("data.train", "say where yours are: --data.train PATH"):
            return Shards(data.train, data.block)
    with asked_for("data.mix", "say where yours are: --data.mix '[{train: PATH}, ...]'"):
        return Mixture([Shards(part.train, data.block) for part in data.mix], [part.weight for part in data.mix])


@contextmanager
def asked_for(field: str, advice: str) -> Iterator[None]:
    """Of shards that are not there, say which field asks for them and what to do."""
    try:
        yield
    except NoShards as error:
        raise NoShards(f"{field}: {error}; {advice}") from None


def has_planes(samples: Samples, made: Preprocessing) -> bool | None:
    """Whether the first sample has more planes than an input takes, of which views show different ones; None if it is bad."""
    try:
        return Picture(samples.read_images(0), made.form).planes > made.frames
    except BadSample:
        return None


def own_statistics(mix: Sequence[MixPart], made: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each set of a mixture (K, C, 1, 1); None where all have the same.

    Raises:
        UsageError: statistics of another number of channels.
    """
    if not any(part.mean or part.std for part in mix):
        return None
    for part in mix:
        for name, values in (("mean", part.mean), ("std", part.std)):
            if values is not None and len(values) != made.channels:
                raise UsageError(f"data.mix: {name} has {len(values)} values for {made.channels} channels")
        if part.std and min(part.std) <= 0:
            raise UsageError("data.mix: std must be above 0")
    stacked = [made._replace(mean=part.mean or made.mean, std=part.std or made.std).statistics(device) for part in mix]
    means, stds = zip(*stacked, strict=True)
    return torch.stack(means), torch.stack(stds)
