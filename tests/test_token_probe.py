"""Token probes against torch's attention, written-out formulas and the linear probe that they start as."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import NumericError, UsageError
from selfsight.eval import token_probe
from selfsight.eval.features import Extraction, Features, extract
from selfsight.eval.linear import LinearResult, fit_pools, initial, linear, schedule
from selfsight.eval.protocol import run_linear
from selfsight.eval.subject import Options, Subject
from selfsight.eval.token_probe import (
    TOKEN_HEADS,
    TOKEN_POOLS,
    Answer,
    TokenHeads,
    bounded,
    fit_tokens,
    generalised_mean,
    start,
    statistics,
    tokens_of,
)
from selfsight.recipe import DataConfig, EncoderConfig

CPU = torch.device("cpu")
PLAIN = Extraction()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 60)
    monkeypatch.setattr("selfsight.eval.linear.EPOCHS", 1)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0).eval()


def spots(count: int, seed: int = 0, tokens: int = 9, width: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens (N, T, D) of noise, one of which, marked by its first channel, tells the class by its second."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(count, tokens, width, generator=made)
    labels = torch.randint(2, (count,), generator=made)
    where = torch.randint(tokens, (count,), generator=made)
    x[torch.arange(count), where, 0] += 6
    x[torch.arange(count), where, 1] = 4.0 * labels - 2
    return x, labels


def fitted(kind: str, x: Tensor, labels: Tensor, heads: list[tuple[float, float]], frozen: bool = False) -> Answer:
    classes = labels.shape[1] if labels.ndim == 2 else 2
    begin = initial(x.shape[2] + 1, classes, 0)
    rows = torch.arange(len(x))
    return fit_tokens(kind, x, rows, labels, begin, heads, lambda: schedule(len(rows), 0), frozen)


def test_a_query_is_torchs_cross_attention_with_its_projections_folded() -> None:
    """nn.MultiheadAttention of one head, a learned query, then a linear layer: the probe of CAE and V-JEPA."""
    torch.manual_seed(0)
    x, width, classes = torch.randn(5, 7, 6), 6, 3
    attention, classifier = nn.MultiheadAttention(width, 1, batch_first=True), nn.Linear(width, classes)
    query = torch.randn(1, 1, width)
    theirs = classifier(attention(query.expand(5, -1, -1), x, x)[0][:, 0])
    q, k, v = attention.in_proj_weight.chunk(3)
    _, _, b = attention.in_proj_bias.chunk(3)
    value = classifier.weight @ attention.out_proj.weight
    folded = (q @ query[0, 0]) @ k
    weights = torch.cat(
        [(value @ v).T, (value @ b + classifier.weight @ attention.out_proj.bias + classifier.bias)[None]]
    )
    ours = TokenHeads("attentive", folded[None], weights[None], torch.zeros(width), torch.ones(width))
    assert torch.allclose(ours(x)[:, 0], theirs, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.floats(0.2, 30), st.floats(0.2, 30), st.integers(0, 5))
def test_groups_have_the_papers_mean(tokens: int, first: float, second: float, seed: int) -> None:
    x = torch.randn(3, tokens, 4, generator=torch.Generator().manual_seed(seed))
    logs = torch.tensor([[first, second]]).log()
    weights = torch.eye(5, 4)[None]
    ours = TokenHeads("ggem", logs, weights, torch.zeros(4), torch.ones(4))(x)[:, 0]
    clamped = x.double().clamp(min=1e-6)
    for channel, p in enumerate((first, first, second, second)):
        expected = (clamped[:, :, channel] ** p).mean(1) ** (1 / p)
        assert torch.allclose(ours[:, channel].double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_uniform_attention_is_the_mean_pool(several: bool) -> None:
    """Frozen at the start, the attentive probe is the linear probe of the mean of the patches, step by step."""
    x, labels = spots(300)
    answers = torch.stack([labels == 0, labels == 1], 1) if several else labels
    heads = [(0.1, 0.0), (0.3, 1e-2)]
    pooled = x.mean(1)
    theirs = fit_pools({"mean": pooled}, torch.arange(300), answers, 2, heads, 0, CPU)["mean"](pooled)
    assert torch.allclose(fitted("attentive", x, answers, heads, frozen=True)(x), theirs, atol=1e-4)
    assert not torch.allclose(fitted("attentive", x, answers, heads)(x), theirs, atol=1e-2)


def test_exponents_of_three_are_the_gem_pool() -> None:
    x, labels = spots(300)
    pooled = x.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
    theirs = fit_pools({"gem": pooled}, torch.arange(300), labels, 2, [(0.1, 0.0)], 0, CPU)["gem"](pooled)
    assert torch.allclose(fitted("ggem", x, labels, [(0.1, 0.0)], frozen=True)(x), theirs, atol=1e-3)
    assert not torch.allclose(fitted("ggem", x, labels, [(0.1, 0.0)])(x), theirs, atol=1e-2)


@pytest.mark.parametrize("kind", TOKEN_POOLS)
def test_heads_together_are_heads_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = spots(260, tokens=4)
    heads = [(0.01, 0.0), (0.1, 1e-3), (0.5, 0.0), (1e30, 0.0)]  # the last is lost, and takes nobody with it
    together = fitted(kind, x, labels, heads)(x)
    for i, head in enumerate(heads[:3]):
        assert torch.allclose(together[:, i], fitted(kind, x, labels, [head])(x)[:, 0], atol=1e-4)
    monkeypatch.setattr(token_probe, "_NUMBERS", 256 * 4 * (8 if kind == "ggem" else 1) * 2)
    assert torch.allclose(fitted(kind, x, labels, heads)(x)[:, :3], together[:, :3], atol=1e-4)


@pytest.mark.parametrize("kind", TOKEN_POOLS)
def test_training_is_torchs_sgd(kind: str) -> None:
    """Two steps against torch.optim on the same batches, a parameter group each for what is decayed and what is not."""
    x, labels = spots(100)
    rate, decay = 0.5, 0.1
    steps = [(torch.arange(60), 1.0), (torch.arange(40, 100), 0.5)]
    ours = fit_tokens(kind, x, torch.arange(100), labels, initial(9, 2, 0), [(rate, decay)], lambda: steps)(x)[:, 0]
    probe = start(kind, *statistics(kind, x, torch.arange(100)), initial(9, 2, 0), 1)
    shape, weight, bias = (
        nn.Parameter(values.clone()) for values in (probe.shape, probe.weights[:, :-1], probe.weights[:, -1:])
    )

    def logits(given: Tensor) -> Tensor:
        return TokenHeads(kind, shape, torch.cat([weight, bias], 1), probe.mean, probe.std)(given)[:, 0]

    groups = [{"params": [weight], "weight_decay": decay}, {"params": [shape, bias]}]
    optimizer = torch.optim.SGD(groups, rate, momentum=0.9)
    for batch, scale in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(x[batch]), labels[batch]).backward()
        optimizer.step()
    assert torch.allclose(ours, logits(x), atol=1e-5)


def choice(pools: dict[str, Tensor], labels: Tensor, held: dict[str, Tensor], truth: Tensor) -> LinearResult:
    return linear(pools, labels, held, truth, seeds=1, device=CPU)


def test_attention_wins_where_one_token_tells_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 120)
    (x, labels), (y, truth) = spots(400, tokens=6), spots(200, 1, tokens=6)
    fit, held = ({"mean": z.mean(1), "attentive": z.half()} for z in (x, y))
    found = choice(fit, labels, held, truth)
    assert found.pool == "attentive"
    assert (found.rate, found.decay) in TOKEN_HEADS
    assert found.accuracies[0] > choice({"mean": x.mean(1)}, labels, {"mean": y.mean(1)}, truth).accuracies[0] + 5
    lying = choice(fit, labels, held, 1 - truth)
    assert (lying.pool, lying.rate) == (found.pool, found.rate)
    assert lying.accuracies[0] == pytest.approx(100 - found.accuracies[0])


@pytest.mark.parametrize("pool", ["mean", *TOKEN_POOLS])
def test_only_the_rows_that_are_fitted_on_are_seen(pool: str) -> None:
    """Neither a weight nor a mean or deviation comes from what is held out."""
    x, labels = spots(200)
    x = x.mean(1) if pool == "mean" else x
    spoilt = x.clone()
    spoilt[:100] = 1e3
    rows = torch.arange(199, 99, -1)
    one, other = (fit_pools({pool: z}, rows, labels[rows], 2, [(0.1, 0.0)], 0, CPU)[pool] for z in (x, spoilt))
    assert torch.equal(one(x[:5]), other(x[:5]))


def test_a_constant_channel_does_no_harm() -> None:
    x, labels = spots(100)
    x[..., 3] = 7.0
    for kind in TOKEN_POOLS:
        assert fitted(kind, x, labels, [(0.1, 0.0)])(x).isfinite().all()


def test_generalised_means_of_large_exponents_do_not_overflow() -> None:
    x = torch.tensor([[[1e3], [10.0], [-5.0]]])
    assert generalised_mean(x, torch.tensor([[200.0]])).item() == pytest.approx(1e3, rel=0.01)
    assert generalised_mean(x, torch.tensor([[1.0]])).item() == pytest.approx(1010 / 3, rel=1e-4)


def test_tokens_are_the_encoders_patches_in_order(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.features.BATCH", 150)
    shards = Shards("digits:test")
    encoder.train()
    fit, held = tokens_of(encoder, (shards, shards), PLAIN, CPU)
    assert encoder.training
    encoder.eval()
    assert fit.dtype == torch.half
    assert fit.shape == (359, 16, 16)
    means = extract(encoder, shards, CPU, ("mean",)).vectors["mean"]
    assert torch.allclose(fit.float().mean(1), means, atol=2e-3)
    assert torch.equal(fit, held)


def test_what_memory_does_not_hold_is_refused_with_its_size(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded(50_000, 64, 384)
    with pytest.raises(UsageError, match=r"of 1,281,167 images, 196 x 768 in float16, are 359.2 GiB; 8 are kept"):
        bounded(1_281_167, 196, 768)
    with pytest.raises(UsageError, match=r"at most 28,532 images"):
        bounded(1_281_167, 196, 768)
    bounded(28_532, 196, 768)
    shards = Shards("digits:test")
    monkeypatch.setattr(token_probe, "TOKEN_GIB", 1e-4)
    with pytest.raises(UsageError, match="of 718 images, 16 x 16"):
        tokens_of(encoder, (shards, shards), PLAIN, CPU)
    with pytest.raises(UsageError, match="leave out scales and token merging"):
        tokens_of(encoder, (shards, shards), Extraction(scales=(1, 2)), CPU)


def test_tokens_that_float16_does_not_hold_are_refused(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards("digits:test")
    with torch.no_grad():
        weight = encoder.backbone.norm.weight.clone()
        encoder.backbone.norm.weight.mul_(1e6)
        with pytest.raises(NumericError, match="not finite in float16"):
            tokens_of(encoder, (shards, shards), PLAIN, CPU)
        encoder.backbone.norm.weight.copy_(weight)


def subject_of(encoder: Encoder | None, pools: tuple[str, ...] | None, stored: bool = False) -> Subject:
    shards = Shards("digits:test")
    vectors = torch.randn(359, 6, generator=torch.Generator().manual_seed(0))
    features = Features({"mean": vectors}, torch.from_numpy(shards.labels.astype(np.int64)), torch.full((359,), -1))
    options = Options(pools=pools, seeds=1)
    made = None if encoder is None else encoder.preprocessing
    return Subject(
        "x", "mean", features, features, options, CPU, 0, encoder, made, None if stored else (shards, shards)
    )


def test_token_pools_compete_with_the_others(encoder: Encoder) -> None:
    [found] = run_linear(subject_of(encoder, ("mean", *TOKEN_POOLS)))
    assert found.chosen["pool"] in TOKEN_POOLS  # against noise
    assert "13 rates x 3 decays x 1 pools, 7 rates of attentive, 7 rates of ggem" in found.protocol
    [plain] = run_linear(subject_of(encoder, None))
    assert plain.chosen["pool"] == "mean"
    [alone] = run_linear(subject_of(encoder, ("attentive",)))
    assert alone.protocol.startswith("linear: 7 rates of attentive; rate")
    [pixels] = run_linear(subject_of(None, ("mean", "attentive")))
    assert pixels.chosen["pool"] == "mean"
    assert "attentive" not in pixels.protocol
