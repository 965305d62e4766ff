"""The linear probe against scikit-learn, autograd and itself, one run after another."""

import numpy as np
import pytest
import torch
from conftest import blobs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, confusion_matrix, log_loss
from sklearn.preprocessing import StandardScaler

from selfsight.data.shards import Shards
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import NumericError, UsageError
from selfsight.eval.cluster import cluster
from selfsight.eval.features import Features, extract, pixels_of
from selfsight.eval.fewshot import fewshot
from selfsight.eval.health import mean_cosine, uniformity
from selfsight.eval.knn import knn
from selfsight.eval.labels import held_out
from selfsight.eval.lda import lda
from selfsight.eval.linear import DECAYS, HEADS, RATES, Standardizer, fit_heads, linear, score
from selfsight.eval.logistic import logistic
from selfsight.eval.protocol import run_linear
from selfsight.eval.quality import judged, moments
from selfsight.eval.retrieval import retrieval
from selfsight.eval.subject import Options, Subject
from selfsight.recipe import DataConfig, EncoderConfig


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps."""
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 60)
    monkeypatch.setattr("selfsight.eval.linear.EPOCHS", 1)


def test_the_probe_reaches_the_convex_optimum() -> None:
    """The objective value of scikit-learn's solver, with the same decay: 1 / (C n) on weights, none on the bias."""
    x, labels = blobs(400)
    decay = 0.01
    scaled = StandardScaler().fit_transform(x.numpy())
    best = LogisticRegression(C=1 / (decay * 400), tol=1e-8, max_iter=1000).fit(scaled, labels)
    ours = fit_heads(Standardizer(x)(x), labels, 4, [(0.1, decay), (0.3, decay)], seed=0)
    optimum = log_loss(labels, best.predict_proba(scaled)) + decay / 2 * (best.coef_**2).sum()
    losses = score(ours, Standardizer(x)(x), labels)[1]
    for head, loss in enumerate(losses):
        assert loss + decay / 2 * ours[:-1, head].square().sum().item() == pytest.approx(optimum, rel=2e-3)


def test_heads_trained_together_are_heads_trained_alone(short: None) -> None:
    x, labels = blobs(300)
    x = Standardizer(x)(x)
    heads = [(0.01, 0.0), (0.1, 1e-3), (1.0, 0.0)]
    together = fit_heads(x, labels, 4, heads, seed=0)
    for i, head in enumerate(heads):
        assert torch.allclose(together[:, i], fit_heads(x, labels, 4, [head], seed=0)[:, 0], atol=1e-4)


def test_the_gradient_is_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of the closed form against torch's cross-entropy and SGD with the same batches."""
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 2)
    monkeypatch.setattr("selfsight.eval.linear.EPOCHS", 0)
    x, labels = blobs(200)
    x = Standardizer(x)(x)
    ours = fit_heads(x, labels, 4, [(0.5, 0.1)], seed=3)[:, 0]
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 0)
    weights = torch.nn.Parameter(fit_heads(x, labels, 4, [(0.5, 0.1)], seed=3)[:-1, 0])
    bias = torch.nn.Parameter(fit_heads(x, labels, 4, [(0.5, 0.1)], seed=3)[-1, 0])
    optimizer = torch.optim.SGD([{"params": [weights], "weight_decay": 0.1}, {"params": [bias]}], lr=0.5, momentum=0.9)
    for step in range(2):
        loss = torch.nn.functional.cross_entropy(
            x[:, :-1] @ weights + bias, labels
        )  # 200 < 256: every batch is all of it
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * (0.5 + 0.5 * np.cos(np.pi * step / 2))
        optimizer.step()
    assert torch.allclose(ours[:-1], weights, atol=1e-5)
    assert torch.allclose(ours[-1], bias, atol=1e-5)


def test_the_probe_chooses_the_pool_that_knows_without_the_test_set(short: None) -> None:
    (x, labels), (y, test_labels) = blobs(600), blobs(200, seed=1)
    noise = {"noise": torch.randn(600, 12), "good": x}
    result = linear(noise, labels, {"noise": torch.randn(200, 12), "good": y}, test_labels)
    assert result.pool == "good"
    lying = linear(noise, labels, {"noise": torch.randn(200, 12), "good": y}, (test_labels + 1) % 4)
    assert (lying.pool, lying.rate, lying.decay) == (result.pool, result.rate, result.decay)
    assert len(result.accuracies) == 3
    # Enough noise to learn every training sample by heart: only the held-out tenth tells it from knowledge.
    by_heart = {"heart": torch.randn(600, 900), "good": x}
    assert linear(by_heart, labels, {"heart": torch.randn(200, 900), "good": y}, test_labels).pool == "good"
    reference = LogisticRegression(max_iter=1000).fit(x, labels).score(y, test_labels)
    assert np.mean(result.accuracies) == pytest.approx(100 * reference, abs=2)


def test_labels_may_be_any_integers(short: None) -> None:
    (x, labels), (y, test_labels) = blobs(300), blobs(100, seed=1)
    names = torch.tensor([7, 3, 2**31 - 1, 40_000])
    order = names.argsort().argsort()
    for probe in (lambda a, b: knn(x, a, y, b).accuracy, lambda a, b: linear({"x": x}, a, {"x": y}, b).accuracies):
        assert probe(names[labels], names[test_labels]) == probe(order[labels], order[test_labels])
    rare = labels.clone()
    rare[held_out(300)[1][0]] = 9  # a class that stands in the held-out tenth only
    assert linear({"x": x}, rare, {"x": y}, test_labels).accuracies
    assert knn(x, rare, y, test_labels).accuracy > 0


def test_constant_features_and_diverged_heads_do_no_harm() -> None:
    x = torch.cat([blobs(100)[0], torch.full((100, 1), 7.0)], 1)
    assert Standardizer(x)(x)[:, -2].abs().max() == 0
    weights = torch.tensor([[[1.0, 0.0], [float("nan"), 0.0]]])
    accuracies, losses = score(weights, torch.ones(4, 1), torch.zeros(4, dtype=torch.long))
    assert accuracies == [100.0, 0.0]
    assert losses[1] == float("inf")


def test_rates_span_four_decades_evenly() -> None:
    assert len(RATES) == 13
    assert (RATES[0], RATES[-1]) == (0.001, 10.0)
    assert np.allclose(np.diff(np.log10(RATES)), 1 / 3, atol=0.02)
    assert len(HEADS) == len(set(HEADS)) == 13 * len(DECAYS) == 39


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_sweep_is_one_run_after_another(multilabel: bool, short: None) -> None:
    """13 rates x 3 decays x 3 pools at once, against each trained alone; in float64, for large rates blow up what is rounded."""
    x, labels = blobs(300)
    answers = torch.nn.functional.one_hot(labels).bool() if multilabel else labels
    pools = torch.stack([Standardizer(f)(f) for f in (x, x.flip(1).tanh(), blobs(300, noise=9.0)[0])]).double()
    together = fit_heads(pools, answers, 4, HEADS, seed=0)
    assert together.shape == (3, 13, 39, 4)
    for pool in range(3):
        for head in range(0, 39, 4):
            alone = fit_heads(pools[pool], answers, 4, [HEADS[head]], seed=0)[:, 0]
            assert torch.allclose(together[pool, :, head], alone, atol=1e-11, rtol=1e-11)


@pytest.fixture(scope="module")
def digits() -> dict[str, list[Features]]:
    """Pixels, and an untrained encoder's features, whose dimensions are hard to fit: one of them has 20 times another's spread."""
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=48, depth=2, heads=2)
    encoder = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0).eval()
    sets = [Shards("digits:train"), Shards("digits:test")]
    return {
        "pixels": [pixels_of(shards, encoder.preprocessing) for shards in sets],
        "mean": [extract(encoder, shards, torch.device("cpu"), ("mean",)) for shards in sets],
    }


@pytest.mark.parametrize("pool", ["pixels", "mean"])
def test_probes_converge_on_digits(pool: str, digits: dict[str, list[Features]]) -> None:
    """The best rate's accuracy on all 1,797 samples is within 0.2 points of scikit-learn's optimum with the same decay."""
    fit, held = digits[pool]
    scale = Standardizer(fit.vectors[pool])
    x, y = scale(fit.vectors[pool]), torch.cat([scale(each.vectors[pool]) for each in (fit, held)])
    labels, classes = torch.cat([fit.labels, held.labels]), 10
    heads = [(rate, decay) for rate in RATES[7:] for decay in DECAYS[1:]]
    weights = fit_heads(x, fit.labels, classes, heads, seed=0)
    accuracies, losses = score(weights, y, labels)[0], score(weights, x, fit.labels)[1]
    for decay in DECAYS[1:]:
        best = LogisticRegression(C=1 / (decay * len(x)), tol=1e-6, max_iter=3000).fit(x[:, :-1], fit.labels)
        objective = {
            i: losses[i] + decay / 2 * weights[:-1, i].square().sum().item()
            for i, head in enumerate(heads)
            if head[1] == decay
        }
        reached = min(objective, key=lambda i: objective[i])
        assert accuracies[reached] == pytest.approx(100 * best.score(y[:, :-1], labels), abs=0.2)


def test_of_equal_accuracies_the_lowest_cross_entropy_is_chosen(short: None) -> None:
    (x, labels), (y, truth) = blobs(400, noise=1), blobs(100, seed=1, noise=1)
    found = linear({"x": x}, labels, {"x": y}, truth, seeds=1)
    fit, choose = held_out(400)
    scale = Standardizer(x[fit])
    accuracies, losses = score(fit_heads(scale(x[fit]), labels[fit], 4, HEADS, 0), scale(x[choose]), labels[choose])
    best = [i for i, accuracy in enumerate(accuracies) if accuracy == max(accuracies)]
    assert len(best) > 5
    assert (found.rate, found.decay) == HEADS[min(best, key=lambda i: losses[i])] != HEADS[best[-1]]


def test_probes_of_several_labels_reach_the_convex_optimum() -> None:
    x, labels = blobs(400)
    has = torch.stack([labels == 0, labels % 2 == 0, x[:, 0] > 0], 1)
    scaled, decay = StandardScaler().fit_transform(x.numpy()), 0.01
    weights = fit_heads(Standardizer(x)(x), has, 3, [(0.3, decay)], seed=0)[:, 0]
    for c in range(3):
        best = LogisticRegression(C=1 / (decay * 400), tol=1e-8, max_iter=1000).fit(scaled, has[:, c])
        assert np.allclose(weights[:-1, c], best.coef_[0], atol=0.01)
        assert weights[-1, c].item() == pytest.approx(best.intercept_[0], abs=0.01)


def test_the_pool_is_chosen_by_mean_average_precision_where_labels_are_several(short: None) -> None:
    (x, labels), (y, truth) = blobs(400), blobs(150, seed=1)
    fit, held = ({"noise": torch.randn(len(z), 12), "good": z, "wide": torch.randn(len(z), 15)} for z in (x, y))
    has, told = (torch.stack([z == 0, z > 1], 1) for z in (labels, truth))
    found = linear(fit, has, held, told, seeds=2)
    assert found.pool == "good"
    assert found.logits.shape == (2, 150, 2)
    assert average_precision_score(told, found.logits[0], average="macro") > 0.9
    assert linear(fit, has, held, ~told, seeds=1).rate == found.rate


def test_several_labels_are_judged_as_scikit_learn_does() -> None:
    torch.manual_seed(0)
    logits, has = torch.randn(40, 3, 5), torch.rand(40, 5) < 0.4
    logits[:, 1] = torch.nan
    precisions, losses = judged(lambda x: logits, torch.zeros(40, 1), has)
    assert (precisions[1], losses[1]) == (0, float("inf"))
    for head in (0, 2):
        each = [log_loss(has[:, c], logits[:, head, c].sigmoid().double()) for c in range(5)]
        assert losses[head] == pytest.approx(sum(each), rel=1e-5)
        expected = average_precision_score(has, logits[:, head], average="macro")
        assert precisions[head] == pytest.approx(100 * expected, rel=1e-6)


def test_features_that_are_not_finite_and_rates_that_all_diverge_are_refused(
    short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, labels), broken = blobs(50), blobs(50)[0]
    broken[7, 3] = torch.nan
    with pytest.raises(NumericError, match="x, test: 1 of 50 samples have features that are not finite"):
        linear({"x": x}, labels, {"x": broken}, labels)
    with pytest.raises(NumericError, match="x, train: 1 of 50 samples have features that are not finite"):
        linear({"x": broken}, labels, {"x": x}, labels)
    with pytest.raises(UsageError, match="no pools of features"):
        linear({}, labels, {}, labels)
    with pytest.raises(UsageError, match="test has no pool y"):
        linear({"y": x}, labels, {"x": x}, labels)
    monkeypatch.setattr("selfsight.eval.linear.HEADS", ((1e38, 1e38), (1e37, 1e38)))
    with pytest.raises(NumericError, match="diverges at every"):
        linear({"x": x}, labels, {"x": x}, labels)


def test_the_outcome_tells_the_mean_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 6)  # so few that seeds differ
    monkeypatch.setattr("selfsight.eval.linear.EPOCHS", 1)
    (x, labels), (y, truth) = blobs(200, noise=3), blobs(80, seed=1, noise=3)
    none = torch.full((200,), -1)
    fit, held = Features({"x": x}, labels + 5, none), Features({"x": y}, truth + 5, none[:80])
    [found] = run_linear(Subject("stored", "x", fit, held, Options(), torch.device("cpu")))
    assert len(found.values) == 3
    assert np.mean(found.values) == pytest.approx(100 * found.each.mean().item(), rel=1e-6)  # type: ignore[union-attr]
    probe = linear({"x": x}, labels, {"x": y}, truth)
    assert probe.accuracies == found.values
    correct = (probe.logits.argmax(2) == truth).float()
    assert not torch.equal(correct[0], correct[1])
    assert torch.allclose(found.each, correct.mean(0))  # type: ignore[arg-type]
    matrices = [confusion_matrix(truth, answer.argmax(1)) for answer in probe.logits]
    assert np.allclose(found.detail["confusion"], np.mean(matrices, 0), atol=0.006)
    assert found.detail["classes"] == [5, 6, 7, 8]
    assert "13 rates x 3 decays x 1 pools" in found.protocol
    has = Features({"x": x}, labels[:, None] == torch.arange(4), none)
    told = Features({"x": y}, truth[:, None] == torch.arange(4), none[:80])
    precision, area = run_linear(Subject("stored", "x", has, told, Options(seeds=2), torch.device("cpu")))
    assert (precision.metric, area.metric, len(area.values)) == ("mAP", "AUC", 2)
    assert "chosen by mAP" in precision.protocol


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_the_magnitude_of_features_is_nothing_to_the_probe(short: None, scale: float) -> None:
    (x, labels), (y, truth) = blobs(200), blobs(80, seed=1)
    plain = linear({"x": x}, labels, {"x": y}, truth, seeds=1)
    scaled = linear({"x": x * scale}, labels, {"x": y * scale}, truth, seeds=1)
    assert scaled.accuracies == pytest.approx(plain.accuracies, abs=1.3)
    mean, std = moments(x * scale)
    assert torch.allclose(mean.double(), x.double().mean(0) * scale, rtol=1e-4, atol=1e-6 * scale)
    assert torch.allclose(std.double(), x.double().std(0) * scale, rtol=1e-5, atol=0)


def test_what_does_not_vary_stays_nothing() -> None:
    x = torch.full((1000, 3), 0.1)
    x[:, 1] = 1e6 + torch.arange(1000) % 2 * 0.0625  # the rounding of a large constant
    x[0, 2] = 1  # one sample of many does vary
    scaled = Standardizer(x)(x)
    assert torch.equal(scaled[:, 0], torch.zeros(1000)) and scaled[:, 1].abs().max() < 1
    assert scaled[:, 2].std() == pytest.approx(1, abs=1e-5)
    assert torch.equal(scaled[:, 3], torch.ones(1000))
    assert Standardizer(x[:1])(x[:1]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_precision_and_with_a_gradient_are_probed(short: None, dtype: torch.dtype) -> None:
    (x, labels), (y, truth) = blobs(60), blobs(20, seed=1)
    given = x.to(dtype).requires_grad_(), labels, y.to(dtype), truth
    assert 0 <= linear({"x": given[0]}, labels, {"x": given[2]}, truth, seeds=1).accuracies[0] <= 100
    for probe in (logistic, lda, retrieval):
        probe(*given)
    assert fewshot(*given, shots=(1,))[1].shape == (10, 20)
    assert knn(*given, k=(1, 3)).predicted.shape == (20,)
    assert cluster(*given[:2], seeds=1).nmi[0] >= 0
    assert np.isfinite([uniformity(given[0]), mean_cosine(given[0])]).all()
