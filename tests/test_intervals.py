"""Intervals against scipy and closed forms, and scores of several seeds, sets and encoders put together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score

from selfsight.eval.features import Features
from selfsight.eval.intervals import draws_of, interval
from selfsight.eval.majority import of_bags, of_samples
from selfsight.eval.scores import Row, differences, of_twins, over_sets, row_of, with_intervals
from selfsight.eval.subject import Outcome

ALONE = torch.full((400,), -1)


def hits(share: float, count: int = 400, seed: int = 0) -> torch.Tensor:
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share).double()


def row(encoder: str, each: torch.Tensor | None, dataset: str = "a", unit: str = "%", **more: object) -> Row:
    scale = 100.0 if unit == "%" else 1.0
    value = scale * each.mean().item() if each is not None else 50.0
    made = row_of("knn", encoder, Outcome((value,), "how", unit=unit, each=each))
    return Row(made.score | {"dataset": dataset, "train": "t", "test": dataset, "samples": 400} | more, made.each)


def test_the_interval_is_scipys_bootstrap() -> None:
    each = hits(0.7)
    low, high = interval(draws_of(each[:, None], ALONE)[:, 0])
    rng = np.random.default_rng(0)
    theirs = stats.bootstrap((each.numpy(),), np.mean, method="percentile", n_resamples=4000, rng=rng)
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.006)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.006)


def test_groups_are_drawn_whole() -> None:
    """Twenty patients of twenty equal images are twenty pieces of evidence, not four hundred."""
    patients = hits(0.5, 20).repeat_interleave(20)
    groups = torch.arange(20).repeat_interleave(20) * 7
    alone = draws_of(patients[:, None], ALONE).std()
    together = draws_of(patients[:, None], groups).std()
    assert together / alone == pytest.approx(20**0.5, rel=0.1)
    assert together == pytest.approx(patients.view(20, 20)[:, 0].std(correction=0).item() / 20**0.5, rel=0.06)


def test_samples_without_a_group_are_their_own_beside_groups() -> None:
    each = hits(0.5)
    none = draws_of(each[:, None], ALONE)
    assert np.array_equal(none, draws_of(each[:, None], torch.arange(400)))  # groups of one, in the same order
    half = torch.where(torch.arange(400) < 200, torch.arange(400) // 50, -1)
    assert draws_of(each[:, None], half).std() > none.std()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 3))
def test_draws_are_the_same_for_all_scores_and_every_time(count: int, scores: int, seed: int) -> None:
    each = torch.rand(count, scores, generator=torch.Generator().manual_seed(seed))
    groups = torch.arange(count) // 2 - 1
    together = draws_of(each, groups, 50, seed)
    for column in range(scores):
        alone = draws_of(each[:, [column]], groups, 50, seed)[:, 0]
        assert np.allclose(together[:, column], alone)
    assert ((together >= each.min().item() - 1e-9) & (together <= each.max().item() + 1e-9)).all()


def test_memory_is_bounded_without_another_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    each = hits(0.3)[:, None]
    whole = draws_of(each, ALONE, 100)
    monkeypatch.setattr("selfsight.eval.intervals._VALUES", 401)
    assert np.array_equal(draws_of(each, ALONE, 100), whole)


def test_a_constant_is_sure_whatever_the_groups() -> None:
    groups = torch.tensor([3] * 90 + [5] * 9 + [-1])
    assert np.allclose(draws_of(torch.full((100, 1), 0.4), groups), 0.4)


def test_a_handful_of_units_has_no_interval() -> None:
    """Of one patient every draw is the same test set: an interval of no width, which is no certainty."""
    one, nine, ten = (torch.arange(400) % count for count in (1, 9, 10))
    for groups, told in ((one, False), (nine, False), (ten, True), (ALONE, True)):
        (found,) = with_intervals([row("p", hits(0.6))], groups, 0)
        assert ("interval" in found.score) == (found.draws is not None) == told
    (few,) = with_intervals([row("p", hits(0.6, 9))], ALONE[:9], 0)
    assert "interval" not in few.score


def test_sets_are_drawn_independently() -> None:
    each = hits(0.5)[:, None]
    first, second = (draws_of(each, ALONE, 500, seed)[:, 0] for seed in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_differences_are_paired() -> None:
    """An encoder that is right wherever the floor is, and 40 times more: the difference is surer than either score."""
    floor = hits(0.5)
    better = floor.clone()
    better[(floor == 0).nonzero()[:40, 0]] = 1
    rows = with_intervals([row("p", better), row("random-init", floor, floor=True)], ALONE, 0)
    (found,) = differences(rows, {"p": ["random-init"]})
    assert found["value"] == pytest.approx(10)
    assert found["over"] == "random-init"
    low, high = found["interval"]
    assert 6.5 < low < 8 < 12 < high < 13.5  # 10 +- 1.96 * 100 * sqrt(0.1 * 0.9 / 400)
    score_low, score_high = rows[0].score["interval"]
    assert score_high - score_low > 1.4 * (high - low)
    swapped = differences(
        with_intervals([row("p", floor), row("random-init", better)], ALONE, 0), {"p": ["random-init"]}
    )
    assert swapped[0]["interval"] == pytest.approx([-high, -low])


def test_an_encoder_stands_against_the_pixels_too() -> None:
    """Where raw pixels are better than the encoder, the line says so with its sign."""
    rows = with_intervals([row("p", hits(0.6)), row("random-init", hits(0.3)), row("pixels", hits(0.9))], ALONE, 0)
    over_random, over_pixels = differences(rows, {"p": ["random-init", "pixels"]})
    assert (over_random["over"], over_pixels["over"]) == ("random-init", "pixels")
    assert over_random["value"] > 20 and over_pixels["value"] < -20
    assert over_pixels["interval"][1] < 0


def test_other_encoders_stand_against_the_first_too() -> None:
    rows = with_intervals([row("p", hits(0.6)), row("q", hits(0.7)), row("r", hits(0.5))], ALONE, 0)
    found = differences(rows, {"p": ["r"], "q": ["r"]})
    assert [(d["encoder"], d["over"]) for d in found] == [("p", "r"), ("q", "r"), ("q", "p")]


def test_what_is_no_mean_over_samples_has_no_interval() -> None:
    liar = row("p", hits(0.6))
    liar = Row(liar.score | {"value": 99.0}, liar.each)
    bare, short = row("p", None), row("p", hits(0.5, 30))
    for one in (liar, bare, short):
        (found,) = with_intervals([one], ALONE, 0)
        assert "interval" not in found.score
    rows = with_intervals([bare, row("random-init", hits(0.4))], ALONE, 0)
    assert differences(rows, {"p": ["random-init"]})[0]["interval"] is None


def test_bare_numbers_keep_their_scale() -> None:
    each = torch.linspace(0, 1, 400)
    (found,) = with_intervals([row("p", each, unit="")], ALONE, 0)
    assert found.score["interval"][0] < 0.5 < found.score["interval"][1] < 0.6


def test_twins_are_averaged_sample_by_sample() -> None:
    parts = [row("random-init", hits(share, seed=seed)) for seed, share in enumerate((0.2, 0.4, 0.6))]
    made = of_twins(parts)
    assert made.each is not None
    assert torch.allclose(made.each, torch.stack([part.each for part in parts if part.each is not None]).mean(0))
    values = [part.score["value"] for part in parts]
    assert made.score["value"] == pytest.approx(np.mean(values))
    assert made.score["std"] == pytest.approx(np.std(values, ddof=1))
    assert made.score["n"] == 3
    assert of_twins([parts[0], row("random-init", None)]).each is None


def test_the_mean_over_sets_is_of_what_all_have() -> None:
    sets = {
        name: with_intervals(
            [row("p", hits(0.5 + 0.1 * i, seed=i), name, std=3.0), row("q", hits(0.5), name)], ALONE, i
        )
        for i, name in enumerate(("a", "b"))
    }
    sets["b"] = sets["b"][:1]
    (mean,) = over_sets(sets, "mean")
    parts = [sets["a"][0].score, sets["b"][0].score]
    assert mean.score["value"] == pytest.approx(np.mean([part["value"] for part in parts]))
    assert mean.score["std"] == pytest.approx(3 / 2**0.5)
    assert (mean.score["dataset"], mean.score["samples"], mean.score["mean_of"]) == ("mean", 800, ["a", "b"])
    width = lambda score: score["interval"][1] - score["interval"][0]  # noqa: E731 - of a mean of two independent ones
    assert width(mean.score) == pytest.approx((width(parts[0]) ** 2 + width(parts[1]) ** 2) ** 0.5 / 2, rel=0.1)


def test_a_test_set_is_counted_once_whatever_it_was_trained_on() -> None:
    """Two training sets and one test set: no more evidence than one."""
    each = hits(0.5)
    sets = {name: with_intervals([row("p", each, name, test="t")], ALONE, 5) for name in ("a", "b")}
    (mean,) = over_sets(sets, "mean")
    assert mean.score["samples"] == 400
    assert mean.score["interval"] == pytest.approx(sets["a"][0].score["interval"])


def test_the_majority_of_bags_counts_each_once() -> None:
    train = Features({}, torch.tensor([1, 1, 1, 1, 0, 0]), torch.tensor([5, 5, 5, 5, 6, 7]))
    test = Features({}, torch.tensor([0, 1, 1, 1]), torch.tensor([1, 2, 2, 2]))
    found = {one.metric: one.values[0] for one in of_bags(train, test)}
    assert found == {"accuracy": 50.0, "accuracy, means": 50.0, "AUC": 50.0, "AUC, means": 50.0}
    assert "class of train, 0, by bags" in of_bags(train, test)[0].protocol


def test_the_majority_of_labels_and_of_lists_of_labels() -> None:
    none = torch.full((5,), -1)
    fit = Features({}, torch.tensor([7, 7, 3, 3, 3]), none)
    held = Features({}, torch.tensor([3, 7, 7, 7, 3]), none)
    (made,) = of_samples(fit, held)
    assert (made.values, made.protocol) == ((pytest.approx(40),), "the commonest class of train, 3")
    assert made.each is not None and made.each.tolist() == [1, 0, 0, 0, 1]
    lists = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1]]).bool()
    found = {one.metric: one.values[0] for one in of_samples(fit, Features({}, lists, none))}
    prevalence = np.mean([average_precision_score(lists[:, c], np.zeros(5)) for c in (0, 1)])
    assert found == {"mAP": pytest.approx(100 * prevalence), "AUC": 50.0}
