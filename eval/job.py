"""The work behind `evaluate`: encoder after encoder, set after set, then the floors, then what is told of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder
from selfsight.errors import UsageError
from selfsight.eval import leaks
from selfsight.eval.asked import MEAN, Scored, Source, pools_of
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.extracted import Extractor
from selfsight.eval.features import Features, labels_only
from selfsight.eval.scores import Row, differences, majority, of_twins, over_sets, row_of, with_intervals
from selfsight.eval.stored import Stored
from selfsight.eval.subject import Options, Subject
from selfsight.preprocessing import Preprocessing

STORED = "stored"  # the row of features that come without a model


@dataclass
class Job:
    """One call of `evaluate`: what it was asked, and the rows so far."""

    evaluators: tuple[str, ...]
    options: Options
    sets: dict[str, Scored]
    extractor: Extractor
    say: Callable[[str], None]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    groups: dict[str, torch.Tensor] = field(default_factory=dict)
    floors: dict[str, str] = field(default_factory=dict)
    """Of every encoder, the name of its random-init row."""
    warnings: list[str] = field(default_factory=list)

    @property
    def main(self) -> bool:
        return self.extractor.ranks.main

    def warn(self, told: str) -> None:
        """A warning, said now and kept."""
        if told not in self.warnings:
            self.warnings.append(told)
            self.say(f"warning: {told}")

    def warn_of_equals(self) -> None:
        """Of test images that are in train; which is known before any image is read."""
        for data in self.sets.values():
            if data.train is not None:
                for told in leaks.same_in_train(_prints(data.train), _prints(data.test)):
                    self.warn(self._of(data, told))

    def warn_of_alike(self, data: Scored, train: Features, test: Features) -> None:
        """Of test images that look like one of train, once their hashes are there."""
        if data.train is not None:
            prints = _prints(data.train), _prints(data.test)
            for told in leaks.alike_in_train(*prints, train.hashes, test.hashes):
                self.warn(self._of(data, told))

    def _of(self, data: Scored, told: str) -> str:
        return f"{data.name}: {told}" if len(self.sets) > 1 else told

    def score_encoders(self, encoders: Mapping[str, Source]) -> None:
        """Rows of all encoders, one at a time: the features of several would not fit beside each other."""
        several = len(encoders) > 1
        described = {name: _described(source, self.options) for name, source in encoders.items()} if several else {}
        for name, source in encoders.items():
            live = _loaded(source)
            self.warn_of_equals()
            self.say(f"scoring {name}" if several else "scoring the pretrained encoder")
            described[name] = _describe(live, self.options)
            if self.main and not isinstance(source, Encoder):
                for told in leaks.pretraining_warnings(
                    source, [own for d in self.sets.values() for own in d.shards[1:]]
                ):
                    self.warn(f"{name}: {told}" if several else told)
            self._score(name, live, self.options, self.evaluators)
        self._score_twins(described)
        self._score_pixels(described)
        self._score_majority()

    def _score(self, name: str, encoder: Encoder, options: Options, evaluators: Sequence[str]) -> None:
        for row, data in self._rows(name, encoder, options, evaluators):
            self._add(data, row)

    def _rows(
        self, name: str, encoder: Encoder, options: Options, evaluators: Sequence[str]
    ) -> Iterator[tuple[Row, Scored]]:
        encoder = encoder.to(self.extractor.device)
        for data in self.sets.values():
            subject = self._subject(name, encoder, options, data)
            if self.main:
                self.warn_of_alike(data, subject.train, subject.test)
                self.groups.setdefault(data.name, subject.test.groups)
                yield from ((row, data) for row in _scored(evaluators, subject))

    def _subject(self, name: str, encoder: Encoder, options: Options, data: Scored) -> Subject:
        pools, weights = pools_of(encoder, options), self.extractor.weights(encoder)
        own = [data.shards[1]] if data.train is None else list(data.shards)
        found = [self.extractor.features(encoder, pools, shards, options.extraction, weights) for shards in own]
        made, device = encoder.preprocessing, self.extractor.device
        fit, held = found[0], found[-1]
        return Subject(
            name, pools[0], fit, held, options, device, self.extractor.workers, encoder, made, data.shards, self.say
        )

    def _score_twins(self, described: Mapping[str, "_Described"]) -> None:
        """Untrained encoders: one floor for each different architecture, named after the first encoder that has it."""
        kinds = _kinds({name: own.kind for name, own in described.items()}, "random-init")
        self.floors = {name: kinds[own.kind][0] for name, own in described.items()}
        for floor, first in kinds.values():
            own = described[first]
            count = max(EVALUATORS[name].twins for name in self.evaluators)
            self.say(f"scoring the floors: {floor}, {count} untrained twins")
            found: dict[tuple[str, str, str], list[Row]] = {}
            for seed in range(count):
                twin = build_encoder(own.config, own.preprocessing, seed)
                now = [name for name in self.evaluators if EVALUATORS[name].twins > seed]
                for row, data in self._rows(floor, twin, replace(self.options, seeds=1), now):
                    found.setdefault((data.name, *row.key), []).append(row)
            for (dataset, *_), parts in found.items():
                self._add(self.sets[dataset], of_twins(parts))

    def _score_pixels(self, described: Mapping[str, "_Described"]) -> None:
        """Raw pixels: one floor for each different way to read images."""
        self.say("scoring the floors: raw pixels")
        kinds = _kinds({name: own.pixels for name, own in described.items()}, "pixels")
        for floor, first in kinds.values():
            made = described[first].preprocessing
            for data in self.sets.values():
                own = [data.shards[1]] if data.train is None else list(data.shards)
                found = [self.extractor.pixels(made, shards) for shards in own]
                if not self.main:
                    continue
                device, workers = self.extractor.device, self.extractor.workers
                subject = Subject(
                    floor,
                    "pixels",
                    found[0],
                    found[-1],
                    self.options,
                    device,
                    workers,
                    None,
                    made,
                    data.shards,
                    self.say,
                )
                for row in _scored(self.evaluators, subject):
                    self._add(data, replace(row, score=row.score | {"floor": True}))

    def _score_majority(self) -> None:
        if not self.main or not any(EVALUATORS[name].labels and EVALUATORS[name].train for name in self.evaluators):
            return
        for data in self.sets.values():
            fit, held = (_targets(own) for own in (data.train, data.test) if own is not None)
            for row in majority(fit, held):
                self._add(data, row)

    def score_stored(self) -> None:
        """Rows of features that come without a model: of floors only the majority class is left."""
        if not self.main:
            return
        self.warn_of_equals()
        self.say("scoring stored features; random-init and pixels would need the model and the images")
        for data in self.sets.values():
            assert isinstance(data.test, Stored) and not isinstance(data.train, Shards)
            fit, held = (data.train or data.test).features, data.test.features
            self.warn_of_alike(data, fit, held)
            self.groups[data.name] = held.groups
            subject = Subject(STORED, data.test.pool, fit, held, self.options, self.extractor.device, say=self.say)
            rows = _scored(self.evaluators, subject)
            if not rows:
                raise UsageError(f"{', '.join(self.evaluators)}: need images and an encoder; stored features have none")
            for row in rows:
                self._add(data, row)
        self._score_majority()

    def _add(self, data: Scored, row: Row) -> None:
        told = {
            "train": data.train_spec,
            "test": data.test_spec,
            "dataset": data.name,
            "samples": len(_targets(data.test).labels),
        }
        self.rows.setdefault(data.name, []).append(replace(row, score=row.score | told))

    def answer(self) -> dict[str, Any]:
        """All rows with their intervals, set after set, and what is told of them."""
        if not self.main:
            return {"scores": [], "differences": [], "warnings": []}
        done = {
            name: with_intervals(self.rows.get(name, []), self.groups[name], seed)
            for seed, name in enumerate(self.sets)
        }
        if len(done) > 1:
            done[MEAN] = over_sets(done, MEAN)
        rows = [row for own in done.values() for row in own]
        return {
            "scores": [row.score for row in rows],
            "differences": differences(rows, self.floors),
            "warnings": self.warnings,
        }


@dataclass(frozen=True)
class _Described:
    """What the floors of an encoder depend on."""

    config: Any
    preprocessing: Preprocessing

    @property
    def kind(self) -> str:
        """The same for encoders with the same untrained twin."""
        config = self.config.model_dump_json(exclude={"weights"})
        return f"{config} {self.preprocessing!r}"

    @property
    def pixels(self) -> str:
        """The same for encoders that read images alike."""
        return repr(self.preprocessing._replace(mean=(), std=()))


def _describe(live: Encoder, options: Options) -> _Described:
    pools_of(live, options)
    return _Described(live.config, live.preprocessing)


def _described(source: Source, options: Options) -> _Described:
    """Look at an encoder before hours are spent on those before it."""
    return _describe(_loaded(source), options)


def _loaded(source: Source) -> Encoder:
    from selfsight.export import load_encoder

    return source if isinstance(source, Encoder) else load_encoder(source)


def _kinds(by_name: Mapping[str, str], floor: str) -> dict[str, tuple[str, str]]:
    """For every kind of encoder the name of its floor, and the first encoder of the kind."""
    first: dict[str, str] = {}
    for name, kind in by_name.items():
        first.setdefault(kind, name)
    return {kind: (floor if len(first) == 1 else f"{floor} of {name}", name) for kind, name in first.items()}


def _scored(evaluators: Sequence[str], subject: Subject) -> list[Row]:
    return [row_of(name, subject.name, outcome) for name in evaluators for outcome in EVALUATORS[name].run(subject)]


def _prints(own: Shards | Stored) -> Any:
    return own.prints if isinstance(own, Stored) else leaks.prints_of(own)


def _targets(own: Shards | Stored) -> Features:
    return own.features if isinstance(own, Stored) else labels_only(own)
