"""The work behind `evaluate`: encoder after encoder, set after set, then the floors, then what is told of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import isfinite
from typing import Any

import torch

from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, evaluating
from selfsight.errors import UsageError
from selfsight.eval import leaks
from selfsight.eval.asked import MEAN, ONE, Scored, Source, pools_of, stored_pools
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.extracted import Extractor
from selfsight.eval.features import Features, labels_only
from selfsight.eval.kinds import Described, described, floors_of, loaded
from selfsight.eval.labels import same_width
from selfsight.eval.scores import Row, differences, of_twins, over_sets, row_of, with_intervals
from selfsight.eval.stored import Stored
from selfsight.eval.subject import Options, Subject
from selfsight.preprocessing import Preprocessing

COLLAPSED = 0.99  # mean cosine of different images
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
    floors: dict[str, list[str]] = field(default_factory=dict)
    """Of every encoder, the names of its floors' rows, random-init first."""
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
        """Of test images that look like one of train, once there are hashes; once a set."""
        if data.train is None or data.name in self.groups:
            return
        prints = _prints(data.train), _prints(data.test)
        for told in leaks.alike_in_train(*prints, train.hashes, test.hashes):
            self.warn(self._of(data, told))

    def warn_of_pretraining(self, name: str, source: Source) -> None:
        """Of test images that an encoder has seen."""
        if not self.main or isinstance(source, Encoder):
            return
        tests = [data.shards[1] for data in self.sets.values()]
        for told in leaks.pretraining_warnings(source, tests):
            self.warn(told if name == ONE else f"{name}: {told}")

    def _of(self, data: Scored, told: str) -> str:
        return f"{data.name}: {told}" if len(self.sets) > 1 else told

    def score_encoders(self, encoders: Mapping[str, Source]) -> None:
        """Rows of all encoders, one at a time: the features of several would not fit beside each other."""
        sets = [shards for data in self.sets.values() for shards in data.different]
        known = {name: described(source, self.options, sets) for name, source in encoders.items()}
        self.warn_of_equals()
        for name, source in encoders.items():
            self.say(f"scoring {'the pretrained encoder' if name == ONE else name}")
            self.warn_of_pretraining(name, source)
            for row, data in self._rows(name, loaded(source), self.options, self.evaluators):
                self._warn_of_collapse(name, row)
                self._add(data, row)
        self._score_twins(known)
        self._score_pixels(known)
        self._score_majority()

    def _rows(
        self, name: str, encoder: Encoder, options: Options, evaluators: Sequence[str]
    ) -> Iterator[tuple[Row, Scored]]:
        extractor = self.extractor
        pools, weights = pools_of(encoder, options), extractor.weights(encoder)
        for data in self.sets.values():
            with evaluating(encoder, extractor.device):  # the caller's own is as it was whenever the caller has a row
                found = [extractor.features(encoder, pools, own, options.extraction, weights) for own in data.different]
                rows = []
                if self.main:
                    self.warn_of_alike(data, found[0], found[-1])
                    subject = self._subject(name, pools[0], found, options, data, encoder.preprocessing, encoder)
                    rows = self._scored(evaluators, subject)
            yield from ((row, data) for row in rows)

    def _subject(
        self,
        name: str,
        pool: str,
        found: Sequence[Features],
        options: Options,
        data: Scored,
        made: Preprocessing | None = None,
        encoder: Encoder | None = None,
    ) -> Subject:
        fit, held = found[0], found[-1]
        labels = same_width(fit.labels, held.labels)
        fit, held = fit._replace(labels=labels[0]), held._replace(labels=labels[1])
        self.groups[data.name] = held.groups
        extractor, shards = self.extractor, None if isinstance(data.test, Stored) else data.shards
        return Subject(
            name, pool, fit, held, options, extractor.device, extractor.workers, encoder, made, shards, self.say
        )

    def _warn_of_collapse(self, name: str, row: Row) -> None:
        if row.key == ("health", "cosine") and row.score["value"] > COLLAPSED:
            told = f"features of different images are nearly the same (cosine {row.score['value']:.3f}): collapsed, or hardly trained"
            self.warn(told if name == ONE else f"{name}: {told}")

    def _score_twins(self, known: Mapping[str, Described]) -> None:
        """Untrained encoders: one floor for each different architecture, named after the first encoder that has it."""
        floors = floors_of({name: own.twin for name, own in known.items()}, "random-init")
        self.floors = {name: [floors[own.twin][0]] for name, own in known.items()}
        count = max(EVALUATORS[name].twins for name in self.evaluators)
        for floor, first in floors.values():
            own = known[first]
            self.say(f"scoring the floors: {floor}, {count} untrained twins")
            found: dict[tuple[str, str, str], list[Row]] = {}
            for seed in range(count):
                twin = build_encoder(own.config, own.preprocessing, seed)
                now = [name for name in self.evaluators if EVALUATORS[name].twins > seed]
                for row, data in self._rows(floor, twin, replace(self.options, seeds=1), now):
                    found.setdefault((data.name, *row.key), []).append(row)
            for (dataset, *_), parts in found.items():
                self._add(self.sets[dataset], of_twins(parts))

    def _score_pixels(self, known: Mapping[str, Described]) -> None:
        """Raw pixels: one floor for each different way to read images."""
        self.say("scoring the floors: raw pixels")
        floors = floors_of({name: own.pixels for name, own in known.items()}, "pixels")
        for name, own in known.items():
            self.floors[name].append(floors[own.pixels][0])
        for floor, first in floors.values():
            made = known[first].preprocessing
            for data in self.sets.values():
                found = [self.extractor.pixels(made, shards) for shards in data.different]
                if self.main:
                    subject = self._subject(floor, "pixels", found, self.options, data, made)
                    for row in self._scored(self.evaluators, subject):
                        self._add(data, replace(row, score=row.score | {"floor": True}))

    def _score_majority(self) -> None:
        if not self.main:
            return
        for data in self.sets.values():
            if data.train is None:
                continue
            fit, held = _targets(data.train), _targets(data.test)
            for name in self.evaluators:
                for outcome in EVALUATORS[name].floor(fit, held):
                    row = row_of(name, "majority", outcome)
                    self._add(data, replace(row, score=row.score | {"floor": True}))

    def score_stored(self) -> None:
        """Rows of features that come without a model: of floors only the majority class is left."""
        if not self.main:
            return
        self.warn_of_equals()
        self.say("scoring stored features; random-init and pixels would need the model and the images")
        for data in self.sets.values():
            assert isinstance(data.test, Stored) and not isinstance(data.train, Shards)
            found = [own.features for own in (data.train, data.test) if own]
            self.warn_of_alike(data, found[0], found[-1])
            pools = stored_pools(data.test, self.options)
            kept = [own._replace(vectors={pool: own.vectors[pool] for pool in pools}) for own in found]
            rows = self._scored(self.evaluators, self._subject(STORED, pools[0], kept, self.options, data))
            if not rows:
                raise UsageError(f"{', '.join(self.evaluators)}: need images and an encoder; stored features have none")
            for row in rows:
                self._add(data, row)
        self._score_majority()

    def _scored(self, evaluators: Sequence[str], subject: Subject) -> list[Row]:
        """What the evaluators say; what is no number is told and left out."""
        rows = []
        for name in evaluators:
            outcomes = EVALUATORS[name].run(subject)
            if not outcomes and subject.name == STORED:
                self.warn(f"{name} needs images and an encoder; stored features have none, so it is left out")
            for outcome in outcomes:
                if all(map(isfinite, outcome.values)):
                    rows.append(row_of(name, subject.name, outcome))
                else:
                    self.warn(f"{subject.name}: {name} {outcome.metric} is not a number; left out")
        return rows

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
            name: with_intervals(self.rows.get(name, []), self.groups[name], _seed(data.test))
            for name, data in self.sets.items()
        }
        if len(done) > 1:
            done[MEAN] = over_sets(done, MEAN)
        rows = [row for own in done.values() for row in own]
        return {
            "scores": [row.score for row in rows],
            "differences": differences(rows, self.floors),
            "warnings": self.warnings,
        }


def _prints(own: Shards | Stored) -> Any:
    return own.prints if isinstance(own, Stored) else leaks.prints_of(own)


def _seed(test: Shards | Stored) -> int:
    """Of what is drawn from a test set: of its images alone, whatever it is called and whatever stands beside it."""
    if (prints := _prints(test)) is not None:
        known: bytes = prints.tobytes()
    else:
        known = test.contents.encode() if isinstance(test, Shards) else _targets(test).labels.numpy().tobytes()
    return int.from_bytes(sha256(known).digest()[:6], "big")


def _targets(own: Shards | Stored) -> Features:
    return own.features if isinstance(own, Stored) else labels_only(own)
