"""Multiple-instance learning against the paper's equations written out, and bags that must not be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from vectors import refuses_lists, subject_of

from selfsight.data.build import build
from selfsight.data.folders import Reading
from selfsight.data.packing import Sample, write_shards
from selfsight.data.shards import Shards
from selfsight.data.tiles import Cut
from selfsight.errors import NumericError, UsageError
from selfsight.eval import abmil
from selfsight.eval import bags as module
from selfsight.eval.abmil import Attention, attended, fit_attention, of_samples, scored, softmax_within
from selfsight.eval.bags import Bags, BagsResult, attention_of, bags, bags_of, macro_auc, mean_pooled, run
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.linear import Standardizer
from selfsight.eval.places import heat_map, heat_maps, places_of
from selfsight.eval.subject import Subject


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abmil, "LEAST_STEPS", 60)
    monkeypatch.setattr(abmil, "EPOCHS", 1)
    monkeypatch.setattr(abmil, "HIDDEN", 16)
    monkeypatch.setattr(module, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(module, "DECAYS", (1.0,))


def slides(count: int, tiles: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every other slide a tenth of the tiles, two at least, lie apart: features, labels, groups, and which they are."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(count * tiles, 16, generator=made)
    of, place = torch.arange(count).repeat_interleave(tiles), torch.arange(tiles).repeat(count)
    labels = of % 2
    apart = (labels == 1) & (place < max(2, tiles // 10))
    x[apart, 0] += 7
    shuffled = torch.randperm(len(x), generator=made)
    return x[shuffled], labels[shuffled], of[shuffled] * 7 + 3, apart[shuffled]


def random_heads(width: int, heads: int, classes: int, seed: int = 0) -> Attention:
    made = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=made, dtype=torch.float64)  # noqa: E731 - three shapes of one draw
    return Attention(draw(width, heads, 2, 5), draw(heads, 5), draw(width, heads, classes))


def test_bags_are_the_papers() -> None:
    """Equations 8 and 9, for one head and one bag after another, with z made and then classified."""
    heads, features = random_heads(6, 3, 4), torch.randn(20, 6, dtype=torch.float64)
    of = torch.arange(20) % 3
    logits, weights = attended(*of_samples(heads, features), of, 3)
    for h in range(3):
        v, u, w = heads.gates[:, h, 0], heads.gates[:, h, 1], heads.weights[h]
        for bag in range(3):
            own = features[of == bag]
            gated = torch.tanh(own @ v) * (1 / (1 + torch.exp(-(own @ u))))
            a = torch.exp(gated @ w) / torch.exp(gated @ w).sum()
            z = (a[:, None] * own).sum(0)
            assert torch.allclose(weights[of == bag, h], a)
            assert torch.allclose(logits[bag, h], z @ heads.classifier[:, h])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-2000, 2000)), min_size=1, max_size=30))
def test_the_softmax_is_torchs_within_each_bag(pairs: list[tuple[int, float]]) -> None:
    of, scores = (
        torch.tensor([bag for bag, _ in pairs]),
        torch.tensor([[score] for _, score in pairs], dtype=torch.float64),
    )
    ours = softmax_within(scores, of, 4)
    for bag in of.unique():
        assert torch.allclose(ours[of == bag], scores[of == bag].softmax(0))


def test_training_is_adamws_on_each_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of one head by autograd through z, with torch's AdamW; all bags are in every batch."""
    monkeypatch.setattr(abmil, "LEAST_STEPS", 3)
    monkeypatch.setattr(abmil, "EPOCHS", 0)
    x, labels, groups, _ = slides(8)
    single = abmil._initial

    def initial(*given: Any) -> list[Tensor]:
        return [part.detach().double().requires_grad_() for part in single(*given)]

    monkeypatch.setattr(abmil, "_initial", initial)  # Adam divides by gradients that are hardly more than rounding
    x, of = Standardizer(x.double())(x.double()), bags_of(labels, groups).of
    targets = bags_of(labels, groups).labels
    together = fit_attention(x, of, targets, 2, [(0.01, 0.5), (0.1, 0.0)], [3, 4])
    for head, (rate, decay) in enumerate([(0.01, 0.5), (0.1, 0.0)]):
        gates, weights, classifier = abmil._initial(x.shape[1], 2, 3 + head, torch.device("cpu"))
        solver = torch.optim.AdamW([gates, weights, classifier], weight_decay=decay)
        for step in range(3):
            z = []
            for bag in range(8):
                own = x[of == bag]
                a = ((own @ gates[:, 0]).tanh() * (own @ gates[:, 1]).sigmoid() @ weights).softmax(0)
                z.append(a @ own)
            solver.zero_grad()
            F.cross_entropy(torch.stack(z) @ classifier, targets).backward()
            solver.param_groups[0]["lr"] = rate * (0.5 + 0.5 * np.cos(np.pi * step / 3))
            solver.step()
        assert torch.allclose(together.gates[:, head], gates, atol=1e-9)
        assert torch.allclose(together.weights[head], weights, atol=1e-9)
        assert torch.allclose(together.classifier[:, head], classifier, atol=1e-9)


def test_attention_finds_the_tiles_that_tell(quick: None) -> None:
    fit, held = slides(60), slides(40, seed=1)
    found = bags(*fit[:3], *held[:3], seeds=2)
    assert min(found.auc) > 90
    assert found.attention[held[3]].mean() > 3 * found.attention[~held[3] & (held[1] == 1)].mean()
    assert torch.allclose(torch.zeros(40).index_add(0, found.bags.of, found.attention), torch.ones(40), atol=1e-5)
    lying = bags(*fit[:3], held[0], 1 - held[1], held[2], seeds=2)
    assert (lying.rate, lying.decay) == (found.rate, found.decay)
    assert lying.auc == pytest.approx([100 - auc for auc in found.auc])
    assert not torch.allclose(bags(*fit[:3], *held[:3], seeds=1).attention, found.attention)  # a mean over seeds
    back = torch.arange(len(held[0])).flip(0)  # the order of samples is nothing to a bag
    again = bags(*fit[:3], *(own[back] for own in held[:3]), seeds=2)
    assert again.auc == pytest.approx(found.auc)
    assert torch.allclose(again.attention.flip(0), found.attention, atol=1e-5)


def test_the_baseline_is_logistic_regression_on_means() -> None:
    (x, labels, groups, _), (y, truth, of, _) = slides(60, seed=2), slides(40, seed=1)
    uneven = torch.arange(len(x)) % 3 > groups % 2  # bags of other sizes
    x, labels, groups = x[uneven], labels[uneven], groups[uneven]
    auc, accuracy, strength = mean_pooled(x, labels, groups, y, truth, of)
    means = [torch.stack([own[by == group].mean(0) for group in by.unique()]) for own, by in ((x, groups), (y, of))]
    told = [torch.stack([own[by == group][0] for group in by.unique()]) for own, by in ((labels, groups), (truth, of))]
    scale = Standardizer(means[0].double())
    theirs = LogisticRegression(C=strength, tol=1e-6).fit(scale(means[0].double())[:, :-1].numpy(), told[0])
    held = scale(means[1].double())[:, :-1].numpy()
    assert accuracy == pytest.approx(100 * theirs.score(held, told[1]), abs=2.6)  # one bag of 40
    assert auc == pytest.approx(100 * roc_auc_score(told[1], theirs.decision_function(held)), abs=0.3)


def test_large_bags_are_learned_from_some_of_their_samples(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abmil, "MOST_TRAINED", 5)
    monkeypatch.setattr(abmil, "_ROWS", 7)
    seen: list[int] = []

    def spy(heads: Attention, features: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(features))
        return of_samples(heads, features)

    x, labels, groups, _ = slides(10)
    own = bags_of(labels, groups)
    monkeypatch.setattr(abmil, "of_samples", spy)
    heads = fit_attention(Standardizer(x)(x), own.of, own.labels, 2, [(1e-3, 0.1)], [0])
    assert set(seen) == {50}
    rows = torch.arange(100, 200)
    first, second = abmil._some(rows, 0), abmil._some(rows, 1)
    assert len(set(first.tolist())) == 5 and set(first.tolist()) <= set(rows.tolist())
    assert first.tolist() != second.tolist()
    seen.clear()
    logits, weights = scored(heads, Standardizer(x)(x), own.of)
    assert max(seen) == 7
    monkeypatch.setattr(abmil, "_ROWS", 10_000)
    for part, whole in zip((logits, weights), scored(heads, Standardizer(x)(x), own.of), strict=True):
        assert torch.allclose(part, whole, atol=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=30).filter(lambda groups: max(groups) >= 0))
def test_bags_are_groups_in_the_order_of_their_first_samples(groups: list[int]) -> None:
    labels = torch.tensor([10 + group if group >= 0 else i for i, group in enumerate(groups)])
    found = bags_of(labels, torch.tensor(groups))
    firsts: list[Any] = []
    for i, (group, bag) in enumerate(zip(groups, found.of.tolist(), strict=True)):
        key = group if group >= 0 else ("own", i)
        if key not in firsts:
            firsts.append(key)
        assert bag == firsts.index(key)
    assert found.groups.tolist() == [key if isinstance(key, int) else -1 for key in firsts]
    assert torch.equal(found.labels[found.of], labels)


def test_auc_is_scikit_learns() -> None:
    shares = torch.rand(60, 3, dtype=torch.float64).softmax(1)
    truth = torch.arange(60) % 3
    assert macro_auc(shares, truth) == pytest.approx(100 * roc_auc_score(truth, shares, multi_class="ovr"))
    assert macro_auc(shares[:, :2], truth % 2) == pytest.approx(
        50 * (roc_auc_score(truth % 2, shares[:, 1]) + roc_auc_score(truth % 2 == 0, shares[:, 0]))
    )
    partly = truth % 2  # a class that test lacks has no AUC
    assert 0 < macro_auc(shares, partly) < 100


def test_outcomes_and_their_attention(quick: None) -> None:
    fit, held = slides(30), slides(25, seed=1)
    found = {
        outcome.metric: outcome
        for outcome in run(subject_of(fit[0], fit[1], held[0], held[1], fit[2], held[2], seeds=2))
    }
    assert list(found) == ["AUC", "accuracy", "AUC, means", "accuracy, means"]
    assert (len(found["AUC"].values), len(found["AUC, means"].values)) == (2, 1)
    assert "25 bags of test" in found["AUC"].protocol
    told = found["AUC"].detail["attention"]
    assert len(told) == 20
    for group, pairs in told.items():
        assert all(held[2][sample] == int(group) for sample, _ in pairs)
        assert sum(weight for _, weight in pairs) == pytest.approx(1, abs=1e-4)  # 12 tiles, all of them
        assert [weight for _, weight in pairs] == sorted((weight for _, weight in pairs), reverse=True)
    assert EVALUATORS["bags"].run is run
    assert EVALUATORS["bags"].twins == 3


def test_attention_is_told_of_the_largest_groups() -> None:
    of, groups = torch.tensor([0, 1, 1, 1, 2, 2, 3]), torch.tensor([-1, 8, 5, 6])
    weights = torch.tensor([1.0, 0.2, 0.5, 0.3, 0.4, 0.6, 1.0])
    found = BagsResult((), (), 0.1, 0.1, weights, Bags(of, groups, groups))
    assert attention_of(found, 2, 2) == {"8": [[2, 0.5], [3, 0.3]], "5": [[5, 0.6], [4, 0.4]]}
    assert list(attention_of(found)) == ["8", "5", "6"]  # a sample in no group has no heat map


def test_a_heat_map_has_a_pixel_a_tile() -> None:
    picture = heat_map(torch.tensor([0, 256, 512]), torch.tensor([0, 256, 0]), 256, torch.tensor([0.1, 0.5, 0.25]))
    expected = torch.tensor([[0.2, torch.nan, 0.5], [torch.nan, 1.0, torch.nan]])
    assert torch.allclose(picture, expected, equal_nan=True)


def test_heat_maps_lie_where_the_tiles_lay(tmp_path: Path, quick: None) -> None:
    """From slides on the disk to pictures: what `shards build --tile` writes is found again for every sample."""
    for folder in ("a", "b"):
        (tmp_path / "scans" / folder).mkdir(parents=True)
        Image.effect_noise((70 if folder == "a" else 40, 40), 90).save(tmp_path / "scans" / folder / f"{folder}.png")
    build(str(tmp_path / "scans"), tmp_path / "tiles", reading=Reading(cut=Cut(20, 10, 1.0)))
    shards = Shards(str(tmp_path / "tiles"))
    places = places_of(shards)
    assert places is not None
    of = torch.from_numpy(shards.groups.astype(np.int64))
    assert [places[of == group].amax(0).tolist() for group in of.unique()] == [[50, 20], [20, 20]]
    weights = places.sum(1) + 1.0
    found = BagsResult((), (), 0.1, 0.1, weights, bags_of(of, of))
    pictures = heat_maps(found, places)
    assert {group: tuple(picture.shape) for group, picture in pictures.items()} == {0: (3, 6), 1: (3, 3)}
    expected = (torch.arange(6)[None] * 10 + torch.arange(3)[:, None] * 10 + 1) / 71
    assert torch.allclose(pictures[0], expected)
    assert heat_maps(found, torch.full_like(places, -1)) == {}
    made = built_subject(shards)
    detail = module._details(made, found)
    for group, pairs in detail["attention"].items():
        assert detail["places"][group] == [places[row].tolist() for row, _ in pairs]
    assert "places" not in module._details(replace(made, encoder=None), found)


def built_subject(shards: Shards) -> Subject:
    """Only what is asked about images."""
    x, labels = torch.zeros(len(shards), 2), torch.zeros(len(shards), dtype=torch.long)
    return replace(subject_of(x, labels, x, labels), encoder=torch.nn.Identity(), sets=(shards, shards))  # type: ignore[arg-type]


def test_samples_without_a_place_have_no_picture(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8))
    notes = [{"left": 1}, {"left": "1", "top": 2}, {"left": -5, "top": 2}, [1], None, {"left": 8, "top": 16}]
    write_shards((Sample(image, 0, 0, note) for note in notes), tmp_path, "s")  # type: ignore[arg-type]
    found = places_of(Shards(str(tmp_path)))
    assert found is not None and found.tolist() == [[-1, -1]] * 5 + [[8, 16]]
    (tmp_path / "none").mkdir()
    write_shards((Sample(image, 0, 0) for _ in notes), tmp_path / "none", "s")
    assert places_of(Shards(str(tmp_path / "none"))) is None


def test_bad_input_is_refused() -> None:
    x, labels, groups, _ = slides(10)
    own = torch.full_like(groups, -1)
    mixed = labels.clone()
    row = int((groups == 10).nonzero()[3])
    mixed[row] = 5
    holed = x.clone()
    holed[2, 2] = torch.nan
    table: list[tuple[tuple[Tensor, Tensor, Tensor], type[Exception], str]] = [
        ((x, labels, own), UsageError, "train: no sample has a group, and a bag is a group"),
        ((x, mixed, groups), UsageError, "train: the samples of group 10 have the labels 1, 5; a bag has one"),
        ((x, labels, groups[:9]), UsageError, "train: 120 samples have 9 groups"),
        ((holed, labels, groups), NumericError, "train: 1 of 120 samples have features that are not finite"),
        ((x, labels * 0, groups), UsageError, "train: all 120 samples have the label 0"),
        ((x, labels, torch.where(labels == 1, 1, groups)), UsageError, r"train: \[5, 1\] bags a class"),
        ((x[:, :3], labels, groups), UsageError, "train has features of width 3, test of 16"),
    ]  # fmt: skip
    for broken, kind, message in table:
        for probe in (bags, mean_pooled):
            with pytest.raises(kind, match=message):
                probe(*broken, x, labels, groups)
    with pytest.raises(UsageError, match="test: no sample has a group"):
        bags(x, labels, groups, x, labels, own)
    with pytest.raises(UsageError, match="test: all 5 bags have the label 1; an AUC needs two classes"):
        one = labels == 1
        bags(x, labels, groups, x[one], labels[one], groups[one])
    with pytest.raises(UsageError, match="test has 1 classes that train lacks: 4"):
        bags(x, labels, groups, x, torch.where(labels == 1, 4, labels), groups)
    refuses_lists(lambda a, b, c, d: bags(a, b, groups[:20], c, d, groups[:20]))
