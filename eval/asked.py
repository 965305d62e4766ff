"""What a call asks to be scored: encoders and sets by name, looked through before any image is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from selfsight.data.classes import require_same_numbers
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder
from selfsight.errors import DataError, UsageError
from selfsight.eval import require_known
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.features import Features, groups_of, labels_of
from selfsight.eval.labels import held_out, same_classes
from selfsight.eval.masked import need_masks
from selfsight.eval.stored import Stored, is_stored, read
from selfsight.eval.subject import Options
from selfsight.eval.token_probe import TOKEN_POOLS
from selfsight.redact import redact

Spec = str | Sequence[str]
Source = Encoder | str | Path
MEAN = "mean"  # the row over several sets
ONE = "pretrained"  # the row of an encoder that is scored alone
FLOORS = ("random-init", "pixels", "majority")


@dataclass(frozen=True)
class Scored:
    """A training set and a test set, of shards or of stored features."""

    name: str
    train: Shards | Stored | None
    test: Shards | Stored
    train_spec: str
    test_spec: str

    @property
    def shards(self) -> tuple[Shards, Shards]:
        """Both sets; without a training set twice the test set."""
        assert isinstance(self.test, Shards) and not isinstance(self.train, Stored)
        return self.train or self.test, self.test

    @property
    def different(self) -> tuple[Shards, ...]:
        """What is to be extracted: train and test, or test alone."""
        return self.shards if self.train is not None else self.shards[1:]


def wanted(evaluators: Sequence[str], train: bool) -> tuple[str, ...]:
    """The evaluators' names, each once.

    Raises:
        UsageError: unknown ones, none, or ones that need a training set where there is none.
    """
    require_known(evaluators)
    if lacking := [name for name in evaluators if EVALUATORS[name].train and not train]:
        free = [name for name, known in EVALUATORS.items() if not known.train]
        told = f", or choose of those that need none (--with {','.join(free)})" if free else ""
        raise UsageError(f"{', '.join(lacking)}: need a training set; add --train{told}")
    return tuple(dict.fromkeys(evaluators))


def encoders_of(encoder: Source | Sequence[Source] | Mapping[str, Source] | None) -> dict[str, Source]:
    """Encoders by the name that their rows have: `pretrained` for a single one, else as they are called."""
    if encoder is None:
        return {}
    if isinstance(encoder, Mapping):
        names = [redact(str(name)) for name in encoder]
        if taken := sorted({*names} & {*_floors_of(names)}):
            raise UsageError(f"an encoder cannot be called {taken[0]!r}: that is a floor")
        return dict(zip(unique(names), encoder.values(), strict=True))
    if isinstance(encoder, Encoder | str | Path):
        return {ONE: encoder}
    given = list(encoder)
    if len(given) == 1:
        return {ONE: given[0]}
    names = [f"encoder {n}" if isinstance(one, Encoder) else redact(str(one)) for n, one in enumerate(given, 1)]
    taken = _floors_of(names)
    return dict(zip(unique([*taken, *names])[len(taken) :], given, strict=True))


def _floors_of(names: Sequence[str]) -> list[str]:
    """What rows of floors beside encoders of these names may be called."""
    return [*FLOORS, *(f"{floor} of {name}" for floor in FLOORS[:2] for name in names)]


def sets_of(train: Spec | Mapping[str, Spec] | None, test: Spec | Mapping[str, Spec] | None) -> dict[str, Scored]:
    """Pairs of sets by name.

    Raises:
        UsageError: no test set, or training sets that do not go with the test sets.
        DataError: what `Shards` and `stored.read` raise.
    """
    if test is None or not test:
        raise UsageError("name a test set: --test SPEC")
    tests: dict[str, Spec] = dict(test) if isinstance(test, Mapping) else {_told(test): test}
    trains: dict[str, Spec] | None = None
    if isinstance(train, Mapping):
        if set(train) != set(tests):
            raise UsageError(
                f"train has the sets {', '.join(train)}, test has {', '.join(tests)}; each test set needs its own"
            )
        trains = dict(train)
    elif train is not None:
        trains = dict.fromkeys(tests, train)  # one training set for all
    if MEAN in tests and len(tests) > 1:
        raise UsageError(f"a set cannot be called {MEAN!r}: that is the row over all sets")
    return {name: _pair(name, trains[name] if trains else None, spec) for name, spec in tests.items()}


def _pair(name: str, train: Spec | None, test: Spec | None) -> Scored:
    train, test = (str(spec) if isinstance(spec, Path) else spec for spec in (train, test))
    assert test is not None
    if train is not None and is_stored(train) != is_stored(test):
        raise UsageError(f"{_told(train)} and {_told(test)}: one holds features, the other images; give two of a kind")
    if not is_stored(test):
        own = None if train is None else Shards(train)
        return Scored(name, own, Shards(test), "" if train is None else _told(train), _told(test))
    held = read(str(test))
    fit = None if train is None else read(str(train))
    if fit:
        _same_encoder(fit, held, _told(train or ""), _told(test))
    return Scored(name, fit, held, "" if train is None else _told(train), _told(test))


def _same_encoder(fit: Stored, held: Stored, train: str, test: str) -> None:
    """Raise DataError unless both can be features of one encoder."""
    widths = [{pool: rows.shape[1] for pool, rows in own.features.vectors.items()} for own in (fit, held)]
    if widths[0] != widths[1]:
        told = [", ".join(f"{pool} {width}" for pool, width in own.items()) for own in widths]
        raise DataError(f"{train} has features of width {told[0]}, {test} of {told[1]}: not of one encoder")
    if fit.about.get("key") != held.about.get("key"):
        raise DataError(f"{train} and {test}: hold features of different encoders, or taken differently")


def require_scorable(data: Scored, evaluators: Sequence[str], options: Options) -> None:
    """Ask all that labels, masks and sizes can answer.

    Raises:
        UsageError: unlabelled samples, one class, classes of test that train lacks, no k that the bank can serve, images
            without masks, or what an evaluator asks of labels and groups.
    """
    if any(EVALUATORS[name].masks for name in evaluators):
        for own in (data.train, data.test):
            if isinstance(own, Shards):
                need_masks(own)
    scored = [name for name in evaluators if EVALUATORS[name].labels]
    if not scored:
        return
    held = _labels(data.test, data.test_spec)
    if held.ndim == 2 and (single := [name for name in scored if not EVALUATORS[name].lists]):
        able = ", ".join(name for name, known in EVALUATORS.items() if known.lists)
        raise UsageError(f"{data.test_spec}: has lists of labels, which {', '.join(single)} cannot score; {able} can")
    if data.train is None:
        return
    if isinstance(data.train, Shards) and isinstance(data.test, Shards):
        require_same_numbers(data.train, data.test)
    fit, held = same_classes(_labels(data.train, data.train_spec), held)
    groups = _groups(data.train)
    held_out(len(fit), groups=groups)  # raises where all are of one group
    for name in scored:
        EVALUATORS[name].ready(Features({}, fit, groups), Features({}, held, _groups(data.test)), options)


def _labels(own: Shards | Stored, spec: str) -> Tensor:
    if isinstance(own, Shards):
        return labels_of(own, np.arange(len(own)))
    labels = own.features.labels
    if labels.ndim == 2:
        return labels
    if (labels < 0).any():
        raise UsageError(
            f"{spec}: {int((labels < 0).sum()):,} of {len(labels):,} samples have no label; scores need labels"
        )
    if len(labels.unique()) < 2:
        raise UsageError(
            f"{spec}: all {len(labels):,} samples have the label {int(labels[0])}; scores need two classes"
        )
    return labels


def _groups(own: Shards | Stored) -> Tensor:
    return own.features.groups if isinstance(own, Stored) else groups_of(own, np.arange(len(own)))


def pools_of(encoder: Encoder, options: Options) -> tuple[str, ...]:
    """The vectors that are extracted, the one that stands for the encoder first.

    Raises:
        UsageError: pools that this encoder does not have.
    """
    if options.pools is None:
        return encoder.pools
    if unknown := [pool for pool in options.pools if pool not in (*encoder.pools, *TOKEN_POOLS)]:
        raise UsageError(f"no pool {', '.join(unknown)}; this encoder has {', '.join((*encoder.pools, *TOKEN_POOLS))}")
    vectors = [pool for pool in dict.fromkeys(options.pools) if pool in encoder.pools] or [encoder.pool]
    return tuple(sorted(vectors, key=lambda pool: pool != encoder.pool))


def unique(names: Sequence[str]) -> list[str]:
    """The same names, later ones of equals with a number."""
    made: list[str] = []
    for name in names:
        again = name
        count = 1
        while again in made:
            count += 1
            again = f"{name} ({count})"
        made.append(again)
    return made


def _told(spec: Spec) -> str:
    return redact(str(spec) if isinstance(spec, str | Path) else " ".join(spec))


def stored_pools(stored: Stored, options: Options) -> tuple[str, ...]:
    """The vectors of a file that are scored, the encoder's own first, if it is asked for.

    Raises:
        UsageError: pools that are not in the file.
    """
    known = tuple(stored.features.vectors)
    if unknown := [pool for pool in options.pools or () if pool not in known]:
        raise UsageError(f"no pool {', '.join(unknown)} in the file; it has {', '.join(known)}")
    return tuple(pool for pool in known if pool in (options.pools or known))
