"""Fine-tuning against its steps written out, torchvision's mixing against its formulas, and the honesty of its choices."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms import v2

from selfsight.data.build import write_shards
from selfsight.data.order import Ids
from selfsight.data.shards import Shards
from selfsight.drop_path import KeyedDropPath
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import DataError, NumericError, UsageError
from selfsight.eval import augmented
from selfsight.eval import finetune as module
from selfsight.eval.augmented import Drawn, ShardImages, TensorImages, changed, due, steps_of
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.features import Features, extract
from selfsight.eval.finetune import Classifier, answered, copied, finetune, mixed_up, run_finetune, train_classifier
from selfsight.eval.knn import held_out
from selfsight.eval.subject import Options, Subject
from selfsight.recipe import DataConfig, EncoderConfig

CPU = torch.device("cpu")


def make(seed: int = 0, **fields: Any) -> Encoder:
    config = EncoderConfig(
        **({"image_size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 2, "heads": 2} | fields)
    )
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed).eval()


def toy(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of three classes, told by where they are bright."""
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for i, label in enumerate(labels.tolist()):
        images[i, 0, :, 2 * label : 2 * label + 2] += 4
    return images, labels


def tune(encoder: Encoder, **more: Any) -> module.Tuned:
    (train, labels), (test, _) = toy(90), toy(30, 1)
    options = {"epochs": 8, "seeds": 1, "rates": (3e-3,)} | more
    return finetune(encoder, TensorImages(train), labels, lambda: iter(test.split(16)), **options)


# -- the order and the augmentation


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 5))
def test_every_sample_comes_once_an_epoch(size: int, epochs: int, seed: int) -> None:
    ids = np.arange(size) * 3 + 1
    steps = steps_of(ids, epochs)
    seen = np.concatenate([due(ids, step, seed)[0] for step in range(steps)])
    positions = np.concatenate([due(ids, step, seed)[1] for step in range(steps)])
    assert positions.tolist() == list(range(len(positions)))
    assert size * epochs <= len(seen) < size * epochs + min(size, augmented.batch_of(size))
    for epoch in range(epochs):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == ids.tolist()
    if size > 20:
        assert seen[:size].tolist() != ids.tolist()


def test_changes_belong_to_positions_and_leave_the_generator_alone() -> None:
    pixels = torch.randint(256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    change, positions = v2.RandAugment(2, 9), np.arange(10, 16)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    together = changed(pixels, change, 0, positions)
    assert torch.equal(torch.get_rng_state(), state)
    alone = changed(pixels[3:4], change, 0, positions[3:4])
    assert torch.equal(together[3:4], alone)
    assert not torch.equal(together, pixels)
    assert not torch.equal(together, changed(pixels, change, 1, positions))
    assert not torch.equal(changed(pixels[:1], change, 0, np.array([1])), changed(pixels[:1], change, 0, np.array([4])))


def test_views_are_crops_of_the_asked_samples(tmp_path: Any) -> None:
    write_shards(iter(pictures(40, (64, 64))), tmp_path, "s")
    encoder = make(image_size=32)
    own = ShardImages(Shards(str(tmp_path)), encoder.preprocessing, CPU)
    assert own.augments
    ids = np.arange(5, 35)
    drawn, again = list(own.drawn(ids, 3, 0)), list(own.drawn(ids, 3, 0))
    for step, (one, same) in enumerate(zip(drawn, again, strict=True)):
        assert torch.equal(one.images, same.images)
        assert one.ids.tolist() == due(ids, step, 0)[0].tolist()
    assert drawn[0].images.shape[1:] == (1, 32, 32)
    assert not torch.equal(drawn[0].images, next(own.drawn(ids, 1, 1)).images)
    shown = torch.cat(list(own.shown(ids)))
    assert shown.shape == (30, 1, 32, 32)


@pytest.mark.parametrize(
    ("fields", "data", "wanted"),
    [
        ({"image_size": 32}, {}, True),
        ({"image_size": 32, "channels": 3}, {}, True),
        ({"image_size": 32, "channels": 2}, {}, False),
        ({"image_size": 32, "frames": 2}, {}, False),
        ({"image_size": 32}, {"depth": 16}, False),
        ({"image_size": 8}, {}, False),  # its shears and turns leave nothing of so small an image
    ],
)
def test_only_images_that_it_knows_are_changed(fields: dict[str, Any], data: dict[str, Any], wanted: bool) -> None:
    config = EncoderConfig(**fields)
    made = preprocessing_of(DataConfig(train="x", **data), config)
    own = ShardImages(Shards("digits:test"), made, CPU)
    assert own.augments is wanted
    assert (own.view.flip == 0) == (made.image_size < 32)


def test_each_draw_is_its_own(tmp_path: Any) -> None:
    [(image, label)] = pictures(1, (64, 64))
    write_shards(iter([(image, label)] * 12), tmp_path, "s")
    own = ShardImages(Shards(str(tmp_path)), make(image_size=32).preprocessing, CPU)
    [drawn] = own.drawn(np.arange(12), 1, 0)
    assert len(drawn.images.flatten(1).unique(dim=0)) == 12
    assert (
        len({image[:, :2, :2].std().item() == 0 for image in drawn.images}) == 2
    )  # shears and turns leave a black corner


def test_a_score_never_rests_on_a_substitute(tmp_path: Any) -> None:
    write_shards(iter(pictures(30)), tmp_path, "s")
    shards = Shards(str(tmp_path))
    with shards.paths[0].open("r+b") as file:
        file.seek(int(shards._locate(3)[1]["offset"]) + 40)
        file.write(b"rot")
    own = ShardImages(Shards(str(tmp_path)), make().preprocessing, CPU)
    with pytest.raises(DataError, match=r"s-000000.tar@\d+: "):
        list(own.drawn(np.arange(30), 4, 0))


# -- mixing


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (6, 2, 3, 8, 8)])
def test_mixing_is_its_formula(shape: tuple[int, ...]) -> None:
    images, targets = torch.rand(shape, generator=torch.Generator().manual_seed(0)), torch.eye(6)
    torch.manual_seed(3)
    state, kinds = torch.get_rng_state(), set()
    for position in range(12):
        mixed, soft = mixed_up(images, targets, 0, position)
        assert type(mixed) is torch.Tensor
        assert mixed.shape == images.shape
        share = soft[0, 0].item()  # of the image itself; the rest is its neighbour's
        assert torch.allclose(soft, share * targets + (1 - share) * targets.roll(1, 0), atol=1e-6)
        own, other = mixed == images, mixed == images.roll(1, 0)
        if (own | other).all():
            kinds.add("cut")
            assert own.double().mean().item() == pytest.approx(share, abs=1e-6)
        else:
            kinds.add("mix")
            assert torch.allclose(mixed, share * images + (1 - share) * images.roll(1, 0), atol=1e-6)
        assert torch.equal(mixed, mixed_up(images, targets, 0, position)[0])
    assert kinds == {"cut", "mix"}
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(mixed_up(images, targets, 1, 3)[0], mixed_up(images, targets, 0, 3)[0])


# -- training


def test_a_copy_is_the_same_encoder_with_stochastic_depth() -> None:
    encoder = make(3, depth=3)
    other = copied(encoder).eval()
    x = toy(4)[0]
    assert torch.equal(encoder.embed(x), other.embed(x))
    rates = [part.rate for part in other.modules() if isinstance(part, KeyedDropPath)]
    assert rates == pytest.approx([0.05, 0.05, 0.1, 0.1])
    assert not any(a is b for a, b in zip(encoder.parameters(), other.parameters(), strict=True))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    tune(encoder, epochs=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert not encoder.training


def test_steps_are_adamw_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps with smoothed targets, a rate for each parameter by its depth, warmup of a tenth and half a cosine."""
    monkeypatch.setattr(module, "mixed_up", lambda images, targets, seed, position: (images, targets))
    encoder, (images, labels) = make(), toy(24)
    targets, steps, rate = F.one_hot(labels).float(), 4, 0.01
    model, theirs = Classifier(copied(encoder, 0.0), 3, 0), Classifier(copied(encoder, 0.0), 3, 0)
    batches = list(TensorImages(images).drawn(np.arange(24), steps, 0))
    train_classifier(model, iter(batches), targets, steps, rate, 0)
    groups = []
    for name, parameter in theirs.named_parameters():
        depth = {"blocks.0": 1, "blocks.1": 2, ".norm.": 3, "head": 3}
        level = next((level for part, level in depth.items() if part in name), 0)
        token = name.endswith(("cls_token", "pos_embed"))
        decay = 0.0 if parameter.ndim < 2 or token else 0.05
        if parameter.requires_grad:
            groups.append({"params": [parameter], "weight_decay": decay, "scale": 0.75 ** (3 - level)})
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999))
    for step, batch in enumerate(batches):
        shape = (step + 1) / 1.4 if step < 0.4 else 0.5 * (1 + np.cos(np.pi * (step - 0.4) / 3.6))
        for group in optimizer.param_groups:
            group["lr"] = rate * shape * group["scale"]
        log = theirs(batch.images).log_softmax(1)
        smooth = targets[batch.ids] * 0.9 + 0.1 / 3
        loss = -(smooth * log).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        if (
            "qkv.bias" not in name
        ):  # attention does not know the keys' bias: its gradient is rounding, which Adam enlarges
            assert torch.allclose(ours, other, atol=1e-5), name


def test_several_labels_are_questions_of_their_own() -> None:
    model = Classifier(make(), 4, 0, several=True)
    logits, targets = torch.randn(5, 4), (torch.rand(5, 4) < 0.5).float()
    smooth, p = targets * 0.8 + 0.1, logits.sigmoid()
    expected = -(smooth * p.log() + (1 - smooth) * (1 - p).log()).mean()
    assert model.loss(logits, targets, 0.2).item() == pytest.approx(expected.item(), rel=1e-5)
    one = Classifier(make(), 4, 0)
    assert one.loss(logits, targets.softmax(1)).item() == pytest.approx(
        -(targets.softmax(1) * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5
    )


def test_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "mixed_up", lambda images, targets, seed, position: (images, targets))
    [answers] = tune(make(), epochs=16, rates=(1e-2,)).answers
    assert (answers.argmax(1) == toy(30, 1)[1]).double().mean() > 0.7  # a third by chance


def test_it_is_a_function_of_the_seed() -> None:
    encoder = make()
    first, second = tune(encoder, seeds=2, epochs=1), tune(encoder, seeds=2, epochs=1)
    assert all(torch.equal(answers, again) for answers, again in zip(first.answers, second.answers, strict=True))
    assert not torch.equal(*first.answers)


def test_the_rate_is_chosen_before_test_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class Told(TensorImages):
        def drawn(self, ids: Ids, steps: int, seed: int) -> Iterator[Drawn]:
            asked.append(("drawn", ids.tolist(), steps))
            return super().drawn(ids, steps, seed)

        def shown(self, ids: Ids) -> Iterator[torch.Tensor]:
            asked.append(("shown", ids.tolist()))
            return super().shown(ids)

    (train, labels), (test, _) = toy(90), toy(30, 1)
    groups = torch.arange(90) // 6
    fit, choose = (part.tolist() for part in held_out(90, groups=groups))

    def seen() -> Iterator[torch.Tensor]:
        asked.append(("test", None))
        yield test

    tuned = finetune(make(), Told(train), labels, seen, 4, 2, groups, rates=(1e-9, 3e-3))
    tries = [("drawn", fit, steps_of(np.array(fit), 1)), ("shown", choose)] * 2  # a quarter of four epochs
    assert asked == tries + [("drawn", list(range(90)), steps_of(np.arange(90), 4)), ("test", None)] * 2
    assert tuned.rate == 3e-3
    goodness = iter([(0.5, -1.0), (0.5, -0.9)])
    monkeypatch.setattr(module, "_goodness", lambda *given_: next(goodness))
    assert finetune(make(), Told(train), labels, seen, 1, 1, groups, rates=(1e-3, 1e-4)).rate == 1e-4


def test_answers_drop_nothing() -> None:
    images = toy(8)[0]
    model = Classifier(copied(make(), 0.5), 3, 0)
    assert torch.equal(answered(model.train(), [images]), model.eval()(images).detach())


def test_goodness_is_accuracy_then_the_loss() -> None:
    model = Classifier(make(), 2, 0)
    logits, targets = torch.tensor([[2.0, 0], [2, 0], [0, 1]]), torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    hits, loss = module._goodness(model, logits, targets)
    assert hits == pytest.approx(2 / 3)
    assert -loss == pytest.approx(F.cross_entropy(logits, targets.argmax(1)).item())


def test_a_rate_that_diverges_is_not_chosen() -> None:
    assert tune(make(), rates=(float("inf"), 3e-3), epochs=1).rate == 3e-3
    for rates in ((float("inf"),), (float("inf"), float("inf"))):
        with pytest.raises(NumericError, match="fine-tuning at rate inf: the loss is not finite at step 1"):
            tune(make(), rates=rates, epochs=2)
    broken = Classifier(make(), 3, 0)
    broken.head.bias.data[0] = torch.nan
    with pytest.raises(NumericError, match="answers that are not finite"):
        answered(broken, [toy(4)[0]])
    with pytest.raises(UsageError, match="epochs: 0; fine-tuning takes at least one"):
        tune(make(), epochs=0)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_any_backbone_is_tuned(name: str) -> None:
    other = make(name=name, image_size=32, pool="head", patch=None, width=None, depth=None, heads=None)
    images = torch.randn(12, 1, 32, 32)
    tuned = finetune(other, TensorImages(images), torch.arange(12) % 2, lambda: [images], 1, 1, rates=(1e-3,))
    assert tuned.answers[0].shape == (12, 2)


@pytest.mark.parametrize("pool", ["cls", "cls+mean", "gem", "last4"])
def test_the_pool_that_is_asked_for_is_the_one_that_is_tuned(pool: str) -> None:
    encoder = make(class_token=True, depth=4)
    model = Classifier(copied(encoder), 3, 0, pool=pool)
    x = toy(4)[0]
    assert torch.equal(model.eval()(x), model.head(model.encoder.embed(x, pool)))
    model.train()
    model.encoder.backbone.blocks[1].drop_path1.rate = 0.999  # stochastic depth draws for every pool
    model(x, lambda purpose, count: torch.zeros(len(x), count))
    assert not model.encoder.backbone.blocks[1].drop_path1.kept.any()
    assert tune(encoder, epochs=1, pool=pool).answers[0].shape == (30, 3)
    assert len(tune(make(), epochs=1).answers) == 1


def test_the_evaluator_tunes_the_pool_that_it_cites(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, seen = subject_of(make(), folder, 1), []
    real = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", lambda self, *given_: seen.append(self.pool) or real(self, *given_))
    (row,) = run_finetune(Subject(**{**vars(subject), "pool": "gem"}))
    assert set(seen) == {"gem"}
    assert "gem, fp32" in row.protocol


# -- as an evaluator


def subject_of(
    encoder: Encoder, folder: Any, epochs: int, labels: tuple[torch.Tensor, torch.Tensor] | None = None
) -> Subject:
    sets = (Shards(str(folder / "a")), Shards(str(folder / "b")))
    fit, held = (extract(encoder, shards, CPU) for shards in sets)
    if labels:
        fit, held = (Features(own.vectors, given_, own.groups) for own, given_ in zip((fit, held), labels, strict=True))
    options = Options(seeds=2, epochs=epochs)
    return Subject("x", encoder.pool, fit, held, options, CPU, 0, encoder, encoder.preprocessing, sets)


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    """60 and 20 images of the classes 3 and 7."""
    for name, count in (("a", 60), ("b", 20)):
        (tmp_path / name).mkdir()
        made = [(image, 3 + 4 * label) for image, label in pictures(count, seed=count)]
        write_shards(iter(made), tmp_path / name, "s")
    return tmp_path


def test_outcomes_are_counts_of_the_answers(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(make(), folder, 2)
    truth = subject.test.labels
    answers = [torch.randn(20, 2, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    real = run_finetune(subject)
    assert len(real) == 1
    assert len(real[0].values) == 2
    monkeypatch.setattr(module, "finetune", lambda *given_, **more: module.Tuned(answers, 1e-3))
    [row] = run_finetune(subject)
    voted = [torch.tensor([3, 7])[answer.argmax(1)] for answer in answers]
    assert row.values == pytest.approx([100 * (vote == truth).double().mean().item() for vote in voted])
    assert row.each is not None
    assert row.each.tolist() == pytest.approx(sum((vote == truth).double() for vote in voted).div(2).tolist())  # type: ignore[union-attr]
    assert row.detail["classes"] == [3, 7]
    for i, true in enumerate((3, 7)):
        for j, said in enumerate((3, 7)):
            counts = [int(((truth == true) & (vote == said)).sum()) for vote in voted]
            assert row.detail["confusion"][i][j] == sum(counts) / 2  # the mean over seeds, as of every probe
    assert row.chosen == {"rate": 1e-3, "epochs": 2}
    for told in ("2 epochs, last one", "rate 0.001 of", "a held-out tenth of train", "drop path 0.1", "mean, fp32"):
        assert told in row.protocol
    assert "RandAugment" not in row.protocol  # 8 x 8
    assert EVALUATORS["finetune"].twins == 1


def test_several_labels_have_map_and_auc(folder: Any) -> None:
    drawn = torch.Generator().manual_seed(0)
    labels = (torch.rand(60, 3, generator=drawn) < 0.5, torch.rand(20, 3, generator=drawn) < 0.5)
    rows = run_finetune(subject_of(make(), folder, 1, labels))
    assert [row.metric for row in rows] == ["mAP", "AUC"]
    assert all(len(row.values) == 2 for row in rows)
    assert "chosen by cross-entropy on a held-out tenth" in rows[0].protocol


def test_vectors_cannot_be_tuned(folder: Any) -> None:
    subject = subject_of(make(), folder, 1)
    assert run_finetune(Subject(**{**vars(subject), "encoder": None})) == []
    assert run_finetune(Subject(**{**vars(subject), "sets": None})) == []
