"""Evaluators against outside references, and the honesty of the protocol.

Mutations that these tests caught when they were tried: temperature dropped from the vote, k chosen on test, the probe's bias
decayed, the mean of all tokens instead of the patches', labels read in shard order for features in another.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform
from webfault import Plan, Server

from selfsight import cli
from selfsight.data.build import write_shards
from selfsight.data.decode import Form, decode
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import DataError, NumericError, UsageError
from selfsight.eval.evaluate import evaluate
from selfsight.eval.features import extract, pixels_of
from selfsight.eval.health import rankme
from selfsight.eval.knn import held_out, knn, predict, search, unit, usable_k
from selfsight.eval.linear import Standardizer, fit_heads, linear, score
from selfsight.eval.online import OnlineKNN
from selfsight.recipe import DataConfig, EncoderConfig, EvalConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0).eval()


def blobs(
    count: int, classes: int = 4, width: int = 12, seed: int = 0, noise: float = 1.5
) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=made)
    return centres[labels] + noise * torch.randn(count, width, generator=made), labels


# -- kNN


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_are_scikit_learns(k: int) -> None:
    (train, train_labels), (test, _) = blobs(300), blobs(100, seed=1)
    weigh = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731 - cosine distance back to similarity
    theirs = KNeighborsClassifier(k, weights=weigh, metric="cosine", algorithm="brute").fit(train, train_labels)
    ours = predict(unit(train), train_labels, unit(test), (k,))[:, 0]
    assert ours.tolist() == theirs.predict(test).tolist()


def test_votes_are_dinos_for_every_k_at_once() -> None:
    """facebookresearch/dino's eval_knn.py, knn_classifier, for one k after another."""
    (train, train_labels), (test, _) = blobs(300), blobs(80, seed=1)
    bank, queries = unit(train), unit(test)
    together = predict(bank, train_labels, queries, (3, 10, 50))
    for column, k in enumerate((3, 10, 50)):
        distances, indices = torch.mm(queries, bank.t()).topk(k, largest=True, sorted=True)
        retrieved = train_labels.view(1, -1).expand(80, -1).gather(1, indices)
        one_hot = torch.zeros(80 * k, 4).scatter_(1, retrieved.view(-1, 1), 1)
        votes = (one_hot.view(80, k, 4) * distances.clone().div_(0.07).exp_().view(80, k, 1)).sum(1)
        assert together[:, column].tolist() == votes.argmax(1).tolist()


def test_search_is_exact() -> None:
    bank, queries = unit(torch.randn(500, 32)), unit(torch.randn(70, 32))
    similarity, neighbour = search(bank, queries, 9)
    exact = (queries.double() @ bank.double().T).sort(1, descending=True)
    assert neighbour.tolist() == exact.indices[:, :9].tolist()
    assert torch.allclose(similarity.double(), exact.values[:, :9], atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_k_is_chosen_without_the_test_set(seed: int) -> None:
    (train, train_labels), (test, labels) = blobs(200, seed=seed, noise=2.5), blobs(50, seed=10 + seed, noise=2.5)
    honest = knn(train, train_labels, test, labels)
    lying = knn(train, train_labels, test, (labels + 1) % 4)
    assert honest.k == lying.k
    fit, choose = held_out(200)
    bank, queries, candidates = unit(train)[fit], unit(train)[choose], (10, 20, 100)
    votes = {k: predict(bank, train_labels[fit], queries, (k,))[:, 0] for k in candidates}
    accuracies = {k: (vote == train_labels[choose]).double().mean() for k, vote in votes.items()}
    assert honest.k == max(accuracies, key=lambda k: (accuracies[k], -k))
    assert honest.candidates == candidates  # 200 is more than the 180 that are left to fit on
    hits = predict(unit(train), train_labels, unit(test), (honest.k,))[:, 0] == labels
    assert honest.accuracy == pytest.approx(100 * hits.double().mean().item())


@given(st.integers(10, 3000), st.integers(0, 5))
def test_a_tenth_is_held_out(size: int, seed: int) -> None:
    fit, choose = held_out(size, seed)
    assert len(choose) == size // 10
    assert sorted([*fit.tolist(), *choose.tolist()]) == list(range(size))


@given(st.lists(st.integers(-1, 12), min_size=4, max_size=300), st.integers(0, 3))
def test_whole_groups_are_held_out(groups: list[int], seed: int) -> None:
    own = torch.tensor(groups)
    if len(set(groups)) == 1 and groups[0] >= 0:
        with pytest.raises(UsageError, match=r"all .* samples are of one group"):
            held_out(len(groups), seed, own)
        return
    fit, choose = held_out(len(groups), seed, own)
    assert sorted([*fit.tolist(), *choose.tolist()]) == list(range(len(groups)))
    assert not {*own[fit].tolist()} & {*own[choose].tolist()} - {-1}
    largest = max(groups.count(group) for group in {*groups} - {-1}) if max(groups) >= 0 else 1
    assert 1 <= len(choose) < len(groups) // 10 + largest + 1
    assert len(fit) >= 1


def test_samples_of_no_group_are_split_as_ever() -> None:
    for split, same in zip(held_out(70), held_out(70, groups=torch.full((70,), -1)), strict=True):
        assert torch.equal(split, same)


def test_k_is_not_chosen_by_recognising_a_group() -> None:
    """Twins of one group, a third of them with a wrong label: split by sample, the twin makes k = 1 perfect."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(500, 4, generator=generator)
    labels = ((centres[:, 0] > 0) ^ (torch.rand(500, generator=generator) < 0.3)).long().repeat_interleave(2)
    train = centres.repeat_interleave(2, 0) + 0.01 * torch.randn(1000, 4, generator=generator)
    given_ = train, labels, torch.randn(10, 4, generator=generator), torch.arange(10) % 2, (1, 41)
    assert knn(*given_).k == 1
    assert knn(*given_, groups=torch.arange(500).repeat_interleave(2)).k == 41


def test_bad_banks_are_refused() -> None:
    (train, labels), (test, test_labels) = blobs(50), blobs(20, seed=1)
    with pytest.raises(UsageError, match=r"k = 200: the bank has only 45 samples; choose k of at most 45"):
        knn(train, labels, test, test_labels, k=(200,))
    with pytest.raises(UsageError, match="choose k of at most 5"):
        usable_k((10, 20), 5)
    with pytest.raises(
        UsageError, match=r"k = 5, 60: the bank has only 45"
    ):  # a list of one's own is not cut in silence
        knn(train, labels, test, test_labels, k=(5, 60))
    with pytest.raises(UsageError, match="test has 1 classes that train lacks: 9"):
        knn(train, labels, test, torch.where(test_labels == 0, 9, test_labels))
    with pytest.raises(UsageError, match="test has 1 classes that train lacks: 9"):
        linear({"x": train}, labels, {"x": test}, torch.where(test_labels == 0, 9, test_labels))
    for bad in (float("nan"), float("inf")):
        broken = test.clone()
        broken[3, 2] = bad
        with pytest.raises(NumericError, match="not finite"):
            knn(train, labels, broken, test_labels)
    with pytest.raises(NumericError, match="length zero"):
        knn(torch.zeros_like(train), labels, test, test_labels)


# -- linear


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


def test_heads_trained_together_are_heads_trained_alone() -> None:
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


def test_the_probe_chooses_the_pool_that_knows_without_the_test_set() -> None:
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


def test_labels_may_be_any_integers() -> None:
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


# -- features


def test_features_are_embed_of_timms_transform_in_order(encoder: Encoder) -> None:
    shards = Shards("digits:test")
    ids = np.array([300, 5, 17])
    features = extract(encoder, shards, CPU, ("mean", "cls", "cls+mean"), ids)
    made = encoder.preprocessing
    transform = create_transform((1, 8, 8), mean=made.mean, std=made.std, crop_pct=1.0, interpolation="bicubic")
    images = torch.stack([transform(Image.fromarray(decode(shards.read(i), Form(1))[0])) for i in ids.tolist()])  # type: ignore[misc]
    with torch.inference_mode():
        for pool, vectors in features.vectors.items():
            assert torch.allclose(vectors, encoder.embed(images, pool), atol=1e-5)
    assert features.labels.tolist() == shards.labels[ids].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_counted_once(encoder: Encoder, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.features.BATCH", 100)
    monkeypatch.setattr("selfsight.eval.features.FEW_BATCHES", 0)
    shards = Shards("digits:test")
    seen: list[int] = []
    features = extract(encoder, shards, CPU, workers=workers, advance=seen.append)
    assert seen == [100, 100, 100, 59] or workers
    assert len(features.labels) == sum(seen) == 359
    monkeypatch.setattr("selfsight.eval.features.BATCH", 359)
    assert torch.allclose(features.vectors["mean"], extract(encoder, shards, CPU).vectors["mean"], atol=1e-5)


def test_extraction_leaves_the_encoder_as_it_was(encoder: Encoder) -> None:
    encoder.train()
    extract(encoder, Shards("digits:test"), CPU, ids=np.arange(20))
    assert encoder.training
    encoder.eval()


def test_pixels_are_pixels(encoder: Encoder) -> None:
    shards = Shards("digits:test")
    found = pixels_of(shards, encoder.preprocessing).vectors["pixels"]
    assert torch.equal(
        (found[7, :-1].view(8, 8) * 255).round().byte(), torch.from_numpy(decode(shards.read(7), Form(1))[0].copy())
    )


def test_a_black_image_has_a_place_among_the_pixels(encoder: Encoder, tmp_path: Path) -> None:
    samples = pictures(40)
    samples[5] = (Image.new("L", (8, 8), 0), 1)
    write_shards(iter(samples), tmp_path, "s")
    found = evaluate(encoder, str(tmp_path), str(tmp_path), evaluators=("knn",), k=(5,))["scores"]
    assert len(found) == 4


def test_scores_name_their_sets_without_what_opens_them(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    write_shards(iter(pictures(40)), tmp_path, "s")
    with Server({f"/{file.name}": Plan(file.read_bytes()) for file in tmp_path.glob("*.tar*")}) as server:
        far = f"{server.address}/s-{{000000..000000}}.tar"
        signed = far.replace("://", "://me:hunter2@") + "?X-Sig=hunter2"
        found = evaluate(encoder, signed, [signed], evaluators=("knn",), k=(5,))
    assert "hunter2" not in json.dumps(found)
    assert {score["train"] for score in found["scores"]} == {far.replace("://", "://***@") + "?***"}


def test_unlabelled_one_class_and_broken_images_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    write_shards(((image, None) for image, _ in pictures(30)), tmp_path / _made(tmp_path, "none"), "s")
    write_shards(iter(pictures(30, classes=1)), tmp_path / _made(tmp_path, "one"), "s")
    write_shards(iter(pictures(30)), tmp_path / _made(tmp_path, "rot"), "s")
    with pytest.raises(UsageError, match="30 of 30 samples have no label; scores need labels"):
        evaluate(encoder, str(tmp_path / "none"), str(tmp_path / "rot"))
    with pytest.raises(UsageError, match="all 30 samples have the label 0; scores need two classes"):
        evaluate(encoder, str(tmp_path / "one"), str(tmp_path / "rot"))
    with pytest.raises(UsageError, match="have no label"):
        OnlineKNN(EvalConfig(train=str(tmp_path / "none")))
    shards = Shards(str(tmp_path / "rot"))
    with shards.paths[0].open("r+b") as file:
        file.seek(int(shards._locate(3)[1]["offset"]) + 40)
        file.write(b"rot")
    with pytest.raises(DataError, match=r"s-000000.tar@\d+: "):  # a score never rests on a substitute
        extract(encoder, shards, CPU)


def _made(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    return name


def test_features_that_are_not_finite_are_refused() -> None:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    broken = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    broken.backbone.norm.bias.data[0] = float("nan")
    with pytest.raises(NumericError, match="not finite"):
        extract(broken, Shards("digits:test"), CPU)


# -- the whole


def test_scores_stand_beside_their_floors(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 50)
    monkeypatch.setattr("selfsight.eval.linear.EPOCHS", 1)
    found = evaluate(encoder, "digits:train", "digits:test", k=(10, 20))["scores"]
    assert [(s["encoder"], s["evaluator"]) for s in found] == [
        ("pretrained", "knn"), ("pretrained", "linear"), ("random-init", "knn"), ("random-init", "linear"),
        ("pixels", "knn"), ("pixels", "linear"), ("majority", "majority"),
    ]  # fmt: skip
    assert all(set(s) >= {"encoder", "evaluator", "train", "test", "value", "std", "n", "protocol"} for s in found)
    assert all(0 <= s["value"] <= 100 for s in found)
    by = {(s["encoder"], s["evaluator"]): s for s in found}
    assert (by["pretrained", "linear"]["n"], by["random-init", "knn"]["n"], by["pixels", "knn"]["n"]) == (3, 3, 1)
    assert by["pixels", "knn"]["value"] > 95
    labels = Shards("digits:train").labels
    common = np.bincount(labels).argmax()
    assert by["majority", "majority"]["value"] == pytest.approx(100 * (Shards("digits:test").labels == common).mean())
    assert "chosen from (10, 20) on a held-out tenth of train" in by["pretrained", "knn"]["protocol"]
    json.dumps(found)
    with pytest.raises(UsageError, match="no evaluator knm; there are knn, linear"):
        evaluate(encoder, "digits:train", "digits:test", evaluators=("knm",))


def test_an_untrained_encoder_scores_like_its_twins(encoder: Encoder) -> None:
    """The encoder here is the twin of seed 0: its score is one of the three that the floor is the mean of."""
    twins = [build_encoder(encoder.config, encoder.preprocessing, seed) for seed in range(3)]
    sets = [Shards("digits:train"), Shards("digits:test")]
    values = []
    for twin in twins:
        fit, held = (extract(twin, shards, CPU) for shards in sets)
        values.append(knn(fit.vectors["mean"], fit.labels, held.vectors["mean"], held.labels).accuracy)
    found = evaluate(encoder, "digits:train", "digits:test", evaluators=("knn",))["scores"]
    assert found[0]["value"] == pytest.approx(values[0])
    assert found[1]["value"] == pytest.approx(np.mean(values))
    assert found[1]["std"] == pytest.approx(np.std(values, ddof=1))


def test_the_online_score_never_reads_the_test_set(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    online = OnlineKNN(EvalConfig(train="digits:train", test="/nowhere", online_samples=300))
    assert len(online.ids) <= 300
    assert not set(online.bank.tolist()) & set(online.queries.tolist())
    found = online(encoder, CPU)
    assert set(found) == {"knn", "rankme"}
    assert 0 < found["knn"] <= 100
    assert online(encoder, CPU) == found


@settings(max_examples=20)
@given(st.integers(2, 30), st.integers(2, 10), st.integers(0, 10))
def test_rankme_is_the_papers_formula(samples: int, width: int, seed: int) -> None:
    z = np.random.default_rng(seed).normal(size=(samples, width))
    singular = np.linalg.svd(z, compute_uv=False)
    p = singular / np.abs(singular).sum() + 1e-7
    assert rankme(torch.from_numpy(z)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_rankme_sees_collapse() -> None:
    line = torch.randn(50, 1) @ torch.randn(1, 8)
    assert rankme(line) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(8).repeat(10, 1)) == pytest.approx(8, abs=1e-3)


def test_eval_from_the_command_line(
    encoder: Encoder,
    tmp_path: Path,
    selfsight: Callable[..., Any],
    unchecked_export: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from selfsight.export import export

    export(encoder, tmp_path / "enc", {})
    done = selfsight(
        "eval", tmp_path / "enc", "--train", "digits:train", "--test", "digits:test", "--with", "knn", "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer == evaluate(tmp_path / "enc", "digits:train", "digits:test", evaluators=("knn",))
    sets = ["--train", "digits:train", "--test", "digits:test"]
    assert cli.main(["eval", str(tmp_path / "enc"), *sets, "--with", "knn"]) == 0
    shown = capsys.readouterr()
    assert "random-init" in shown.out
    assert "pixels" in shown.out
    assert "kNN: cosine" in shown.err


def test_test_images_in_train_are_told(encoder: Encoder) -> None:
    told: list[str] = []
    evaluate(encoder, "digits:test", "digits:test", evaluators=["knn"], say=told.append)
    assert "warning: 359 of the 359 test images are in train, too; their score is worth little" in told
    told.clear()
    evaluate(encoder, "digits:train", "digits:test", evaluators=["knn"], say=told.append)
    assert not any("warning" in line for line in told)
