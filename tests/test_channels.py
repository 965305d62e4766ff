"""Channel tokens (ChannelViT) against loops over channels, and the choice of channels against counts.

Mutations that these tests caught when they were tried: the first embeddings for any channels, the first channels for any
choice, channels twice, none or from beyond, patches of all channels, one channel too many or none, the number drawn with the
rest, an order that is drawn, all channels in training, a choice in evaluation, with every seed the same, or of each rank
its own, unturned or small views with all channels, an embedding of other channels kept, micro-batches left to chance.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from selfsight.assemble import assemble
from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, build_encoder, preprocessing_of, take
from selfsight.errors import UsageError
from selfsight.objectives import build_objective, parse_objective
from selfsight.objectives.across import Parts, first_position
from selfsight.objectives.base import Objective
from selfsight.recipe import DataConfig, EncoderConfig, load
from selfsight.stem import sample_channels
from selfsight.weights import load_weights

CHANNELS: dict[str, Any] = {
    "image_size": 8, "patch": 4, "width": 24, "depth": 2, "heads": 2, "channels": 5, "channel_tokens": True,
}  # fmt: skip
VICREG = {"expander_width": 12}


def make(seed: int = 0, **fields: Any) -> Encoder:
    config = EncoderConfig(**CHANNELS | fields)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed).eval()


def images(count: int = 2, channels: int = 5) -> Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def objective(name: str, encoder: dict[str, Any] | None = None, **fields: Any) -> Any:
    built = make(**(encoder or {}))
    torch.manual_seed(0)
    return build_objective(parse_objective({"name": name, **fields}), built).train()


def batch_of(made: Objective, first: int = 100, count: int = 4) -> Batch:
    drawn = torch.Generator().manual_seed(3)
    views = tuple(torch.randn(count, 5, view.size or 8, view.size or 8, generator=drawn) for view in made.views)
    return Batch(views, torch.arange(first, first + count), seed=7)


def loop(encoder: Encoder, x: Tensor, channels: tuple[int, ...]) -> Tensor:
    """All tokens, channel by channel, through timm's own parts."""
    model, table = encoder.backbone, encoder.backbone.pos_embed
    assert encoder.channel_embed is not None
    tokens = [(model.cls_token + table[:, :1]).expand(len(x), -1, -1)]
    for place, channel in enumerate(channels):
        embedded = model.patch_embed(x[:, place : place + 1])
        tokens.append(embedded + table[:, 1:] + encoder.channel_embed[:, channel])
    return model.norm(model.blocks(torch.cat(tokens, 1)))


@pytest.mark.parametrize("channels", [None, (0, 1, 2, 3, 4), (0, 2), (3, 1), (4,)])
@torch.inference_mode()
def test_tokens_are_those_of_a_loop_over_channels(channels: tuple[int, ...] | None) -> None:
    encoder = make()
    assert (encoder.grid, encoder.patches, encoder.patch_values) == ((5, 2, 2), 20, 16)
    x = images()[:, list(channels or range(5))]
    expected = loop(encoder, x, channels or tuple(range(5)))
    assert torch.allclose(torch.cat(encoder(x, channels=channels), 1), expected, atol=1e-5)
    assert torch.allclose(encoder.embed(x, channels=channels), expected[:, 1:].mean(1), atol=1e-5)
    assert encoder.embed_pools(x, ("cls", "mean"), channels=channels)["cls"].shape == (2, 24)


@torch.inference_mode()
def test_channels_have_no_order_but_their_embeddings() -> None:
    encoder = make()
    x, order = images(), [3, 0, 4, 1, 2]
    features = encoder.embed(x)
    assert torch.allclose(encoder.embed(x[:, order], channels=order), features, atol=1e-5)
    assert not torch.allclose(encoder.embed(x[:, order]), features, atol=1e-3)
    assert encoder.channel_embed is not None
    encoder.channel_embed.copy_(encoder.channel_embed[:, order])
    assert torch.allclose(encoder.embed(x[:, order]), features, atol=1e-5)


@torch.inference_mode()
def test_patches_are_dropped_channel_by_channel() -> None:
    encoder = make()
    x = images()
    keep = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.allclose(encoder(x, keep=keep).patches, take(encoder(x).patches, keep), atol=1e-5)
    assert torch.equal(encoder.unpatchify(encoder.patchify(x)), x)
    assert torch.equal(encoder.patchify(x)[:, 4 * 3 + 2], x[:, 3, 4:, :4].flatten(1))


@pytest.mark.parametrize("channels", [(), (0, 0), (0, 5), (-1, 2)])
def test_impossible_channels_are_refused(channels: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"are not different channels of 0\.\.4"):
        make().embed(images(channels=len(channels)), channels=channels)


def test_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"images of shape \(3, 8, 8\); the encoder takes \(2, 8, 8\)"):
        make().embed(images(channels=3), channels=(0, 1))
    with pytest.raises(UsageError, match=r"images of shape \(3, 8, 8\); the encoder takes \(5, 8, 8\)"):
        make().embed(images(channels=3))
    with pytest.raises(UsageError, match=r"only an encoder with encoder\.channel_tokens"):
        make(channel_tokens=False).embed(images(channels=2), channels=(0, 1))
    with pytest.raises(ValueError, match=r"channel_tokens and frames: .*choose one"):
        make(frames=2)
    with pytest.raises(UsageError, match=r"encoder\.channel_tokens: vit_small_patch16_dinov3 takes plain images only"):
        make(name="vit_small_patch16_dinov3", depth=1)


# -- which channels are shown in training


def test_first_the_number_of_channels_is_drawn_then_which() -> None:
    """Every number equally likely, and of one number every choice; by 4 deviations of the counts."""
    draws = torch.rand(8000, 1 + 4, generator=torch.Generator().manual_seed(0))
    found = Counter(sample_channels(row) for row in draws)
    assert len(found) == 15
    for size in range(1, 5):
        of_size = {choice: count for choice, count in found.items() if len(choice) == size}
        assert all(list(choice) == sorted(set(choice)) for choice in of_size)
        assert abs(sum(of_size.values()) - 2000) < 4 * 2000**0.5
        expected = 2000 / len(of_size)
        assert all(abs(count - expected) < 4 * expected**0.5 for count in of_size.values())
    assert sample_channels(torch.tensor([0.999, 0.3, 0.1, 0.2])) == (0, 1, 2)
    assert sample_channels(torch.tensor([0.334, 0.3, 0.1, 0.2])) == (1, 2)
    assert sample_channels(torch.tensor([0.0, 0.3, 0.1, 0.2])) == (1,)


def shown(made: Objective, batch: Batch) -> set[int]:
    """How many patch tokens its student was given, in every pass."""
    counts: set[int] = set()
    hook = made.encoder.blocks[0].register_forward_pre_hook(lambda _, args: counts.add(args[0].shape[1] - 1))
    made(replace(batch, shared={}))
    hook.remove()
    return counts


def test_a_step_shows_some_channels_and_scoring_shows_all() -> None:
    made = objective("vicreg", **VICREG)
    batches = [batch_of(made, 4 * number) for number in range(12)]
    numbers = [shown(made, batch) for batch in batches]
    assert all(len(number) == 1 for number in numbers)  # both views of a step
    assert {n for number in numbers for n in number} == {4, 8, 12, 16, 20}
    assert [shown(made, replayed) for replayed in batches] == numbers
    other = [shown(made, Batch(batch.views, batch.positions, seed=8)) for batch in batches]
    assert other != numbers
    assert all(shown(made.eval(), batch) == {20} for batch in batches)
    fixed = objective("vicreg", {"channel_sampling": False}, **VICREG)
    assert all(shown(fixed, batch) == {20} for batch in batches)


def test_the_choice_is_that_of_the_images() -> None:
    made = objective("vicreg", **VICREG)
    batch = next(b for b in (batch_of(made, 4 * n) for n in range(12)) if shown(made, b) == {8})
    given, channels = made.shown(batch, batch.views[0])
    assert torch.equal(given, batch.views[0][:, list(channels)])
    feature = made.feature(batch, 0)
    assert torch.allclose(feature, made.encoder.embed(given, channels=channels), atol=1e-6)
    made(batch).total.backward()
    gradient = made.encoder.channel_embed.grad.abs().sum((0, 2))
    assert [i for i, value in enumerate(gradient.tolist()) if value] == list(channels)


def test_the_parts_of_a_batch_show_the_same_channels() -> None:
    """As ranks do (tests/test_across.py): each knows its own images, and its place among the parts."""
    positions = torch.arange(40, 48)
    found = Parts(4).run([lambda own=part: first_position(own) for part in positions.chunk(4)])
    assert found == [40] * 4
    assert first_position(positions) == 40


def test_micro_batches_draw_their_own_channels_and_a_resumed_run_keeps_them(small_fields: dict[str, Any]) -> None:
    fields = {name: value for name, value in small_fields.items() if "decoder" not in name}
    given = [
        assemble(load("digits/rotation", fields | more), torch.device("cpu")).fingerprint()["train"]
        for more in (
            {},
            {"encoder.channel_tokens": True},
            {"encoder.channel_tokens": True, "encoder.channel_sampling": False},
        )
    ]
    assert ["accumulate" in train for train in given] == [False, True, False]


ALL: dict[str, dict[str, Any]] = {
    "vicreg": VICREG,
    "rotation": {"turns": "all"},
    "dino": {"outputs": 16, "head_width": 16, "bottleneck": 8, "local_views": 2, "local_view": {"size": 4}},
    "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "masking": "tube"},
    "simmim": {"mask_size": 4},
    "data2vec": {"mask_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_objective_learns_from_channel_tokens(name: str) -> None:
    made = objective(name, {"registers": 0}, **ALL[name])
    counts = [shown(made, batch_of(made, 4 * number)) for number in range(6)]
    if name in ("vicreg", "rotation", "dino"):
        assert len(set(map(frozenset, counts))) > 1
        assert name != "dino" or all(max(few) == 4 * min(few) for few in counts)  # small views have one patch a channel
    else:
        assert counts == [{5 if name == "mae" else 20}] * 6
    for number in range(3):
        made.zero_grad(set_to_none=True)
        loss = made(batch_of(made, 4 * number))
        loss.total.backward()
        assert loss.total.isfinite()
        assert [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_teacher_sees_every_channel() -> None:
    made = objective("dino", **ALL["dino"])
    counts: list[int] = []
    made.teacher.blocks[0].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1] - 1))
    for number in range(6):
        made(batch_of(made, 4 * number))
    assert set(counts) == {20}


def test_hidden_places_are_hidden_in_every_channel() -> None:
    made = objective("mae", **ALL["mae"], mask_ratio=0.5)
    batch = batch_of(made)
    keep, hidden = made.mask(batch)
    for index in (keep, hidden):
        places = index.view(4, 5, 2) % 4
        assert torch.equal(places, places[:, :1].expand(4, 5, 2))
    predicted = made.decode(made.encoder(batch.views[0], keep=keep), keep, hidden)
    errors = []
    for image in range(4):
        for place, patch in enumerate(hidden[image].tolist()):
            row, column = patch % 4 // 2 * 4, patch % 2 * 4
            cut = batch.views[0][image, patch // 4, row : row + 4, column : column + 4].flatten().double()
            cut = (cut - cut.mean()) / (cut.var() + 1e-6).sqrt()
            errors.append((predicted[image, place].double() - cut).square().mean())
    assert made(batch).total.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_masked_squares_are_masked_in_every_channel() -> None:
    made = objective("simmim", mask_size=4, mask_ratio=0.5)
    batch = batch_of(made)
    rebuilt, cells = made.rebuild(batch, made.cells(batch)), made.cells(batch)
    where = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(4, 5, 8, 8)
    expected = (rebuilt - batch.views[0]).double()[where].abs().mean()
    assert made(batch).total.item() == pytest.approx(expected.item(), rel=1e-5)
    spoilt = Batch((torch.where(where, 9.0, batch.views[0]),), batch.positions, batch.seed)
    assert torch.equal(made.rebuild(spoilt, cells), rebuilt)


# -- weights


@torch.inference_mode()
def test_each_channel_looks_as_a_grey_image_did_in_rgb(tmp_path: Path) -> None:
    plain, encoder = make(1, channels=3, channel_tokens=False), make()
    save_file(plain.backbone.state_dict(), tmp_path / "w.safetensors")
    assert load_weights(encoder, str(tmp_path / "w.safetensors"), "x")[1:] == [
        "patch_embed.proj.weight: 24x3x4x4 resampled to 24x1x4x4",
        "channel_embed 1x5x24: fresh, the weights have none",
    ]
    x = images()
    for channel in range(5):
        expected = plain._embed_patches(x[:, channel : channel + 1].expand(-1, 3, -1, -1), None)
        assert torch.allclose(encoder._embed_patches(x, None)[:, 4 * channel : 4 * channel + 4], expected, atol=1e-5)


@torch.inference_mode()
def test_embeddings_of_channels_are_kept_or_fresh_and_said(tmp_path: Path) -> None:
    source, path = make(1), str(tmp_path / "w.safetensors")
    save_file({f"encoder.{name}": tensor for name, tensor in source.state_dict().items()}, path)
    same, fewer = make(), make(channels=4)
    assert len(load_weights(same, path, "x")) == 1
    assert torch.equal(same.embed(images()), source.embed(images()))
    before = fewer.channel_embed.clone() if fewer.channel_embed is not None else None
    told = "channel_embed 1x4x24: fresh, that of the weights is 1x5x24"
    assert load_weights(fewer, path, "x")[1:] == [told]
    assert before is not None
    assert torch.equal(before, fewer.channel_embed)  # type: ignore[arg-type]
