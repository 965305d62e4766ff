"""What a step keeps, against counting by hand and at other batch sizes, and how many blocks that makes recomputed."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from selfsight.data.placer import Batch
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.memory import SHARE, Kept, blocks_to_recompute, measure, recomputable, saved_bytes, state_bytes
from selfsight.objectives import build_objective
from selfsight.objectives.base import Objective
from selfsight.objectives.configs import DINOConfig, JointConfig, MAEConfig, ObjectiveConfig, SimMIMConfig, VICRegConfig
from selfsight.recipe import DataConfig, EncoderConfig, load
from selfsight.switches import fit, switch

CPU = torch.device("cpu")
DINO: dict[str, Any] = {"local_view": {"size": 16}, "outputs": 32, "head_width": 16, "bottleneck": 8}
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "mae": MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2),
    "simmim": SimMIMConfig(mask_size=8),
    "vicreg": VICRegConfig(),
    "dino": DINOConfig(local_views=3, **DINO),
}


def make(config: ObjectiveConfig, **encoder: Any) -> Objective:
    fields = {"image_size": 32, "channels": 1, "patch": 4, "width": 24, "depth": 3, "heads": 2, "drop_path": 0.3}
    built = EncoderConfig(**(fields | encoder))
    torch.manual_seed(0)
    encoder_ = build_encoder(built, preprocessing_of(DataConfig(train="x"), built), 0)
    torch.manual_seed(1)
    return build_objective(config, encoder_).train()


def make_batch(objective: Objective, count: int, start: int = 0) -> Batch:
    made, draw = objective.encoder.preprocessing, torch.Generator().manual_seed(count)
    sides = [view.size or made.image_size for view in objective.views]
    views = tuple(torch.randn(count, made.channels, side, side, generator=draw) for side in sides)
    return Batch(views, torch.arange(start, start + count), seed=7)


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def count(objective: Objective, images: int, recomputed: int, autocast: Any = no_autocast) -> int:
    """What a step keeps, counted by another way than the product's: its views, and the storages that autograd's nodes hold."""
    objective.encoder.checkpoint_blocks = recomputed
    own = {tensor.untyped_storage().data_ptr() for tensor in (*objective.parameters(), *objective.buffers())}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = make_batch(objective, images)
    held |= {view.untyped_storage().data_ptr(): view for view in batch.views}  # the loop holds them
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        objective(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_what_is_kept_is_counted_once_and_weights_are_not() -> None:
    x, weight = torch.randn(10, 8), nn.Parameter(torch.randn(8, 8))
    own = [weight.untyped_storage().data_ptr()]
    # The product keeps x; the exponential its own result; the square that same result once more, as a view.
    assert saved_bytes(lambda: (x @ weight).exp().view(-1).square().sum(), own) == 4 * (10 * 8 + 10 * 8)
    assert saved_bytes(lambda: (x @ weight).sum()) == 4 * 10 * 8
    with torch.no_grad():
        assert saved_bytes(lambda: (x @ weight).exp(), own) == 0


@pytest.mark.parametrize("autocast", [no_autocast, bf16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_estimate_is_what_a_step_keeps(name: str, autocast: Any) -> None:
    objective = make(OBJECTIVES[name])
    kept = measure(objective, None, 0, autocast)
    fixed = kept.fixed - state_bytes(objective)
    # A recomputed block does not keep the one weight in autocast's type either that others do, which the estimate leaves
    # out of account.
    weights = objective.encoder.blocks[0].attn.proj.weight.numel()
    casts = 2 * weights if autocast is bf16 else 0
    for images, recomputed in ((7, 0), (7, 3), (12, 1), (12, 2)):
        estimate = kept.needed(images, 3, recomputed) - kept.fixed + fixed - images * kept.block
        estimate -= recomputed * casts
        assert estimate == pytest.approx(count(objective, images, recomputed, autocast), rel=0.04), (images, recomputed)


def test_batches_that_wait_and_a_late_average_count() -> None:
    """Stored pixels are bytes: a quarter of the views that they become, or half of them."""
    objective = make(OBJECTIVES["dino"])
    average = copy.deepcopy(objective.encoder).requires_grad_(False)
    none, some = (measure(objective, average, 0, no_autocast, waiting) for waiting in (0, 6))
    assert (some.block, some.fixed) == (none.block, none.fixed)
    assert some.rest - none.rest == 6 * (2 * 32 * 32 + 3 * 16 * 16)
    without = measure(objective, None, 0, no_autocast)
    assert none.fixed - without.fixed == 2 * state_bytes(average)
    objective.encoder.preprocessing = objective.encoder.preprocessing._replace(depth=16)
    assert measure(objective, None, 0, no_autocast, 1).rest - without.rest == 2 * (2 * 32 * 32 + 3 * 16 * 16)


def test_views_count_each() -> None:
    """A block keeps of two views twice what it keeps of one, and of local views their share."""
    blocks = {name: measure(make(OBJECTIVES[name]), None, 0, no_autocast).block for name in OBJECTIVES}
    one = make(OBJECTIVES["simmim"]).encoder.blocks[1]
    x = torch.randn(1, 1 + 64, 24, requires_grad=True)
    own = [parameter.untyped_storage().data_ptr() for parameter in one.parameters()]
    alone = saved_bytes(lambda: one(x), own) - x.nbytes  # its input is kept when it is recomputed, too
    assert blocks["simmim"] == pytest.approx(alone, rel=0.05)
    assert blocks["vicreg"] == pytest.approx(2 * alone, rel=0.05)
    assert blocks["dino"] == pytest.approx((2 + 3 * 17 / 65) * alone, rel=0.08)  # attention keeps no square of tokens
    assert blocks["mae"] == pytest.approx(17 / 65 * alone, rel=0.08)
    parts = {name: {"objective": OBJECTIVES[name].model_dump()} for name in ("mae", "vicreg")}
    joint = make(JointConfig(parts=parts))  # type: ignore[arg-type]
    assert measure(joint, None, 0, no_autocast).block == pytest.approx(blocks["mae"] + blocks["vicreg"], rel=0.02)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_measuring_leaves_everything_as_it_was(name: str) -> None:
    objective = make(OBJECTIVES[name]).eval()
    objective.encoder.checkpoint_blocks = 2
    before = copy.deepcopy(objective.state_dict())
    measure(objective, None, 0, no_autocast)
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    assert not objective.training and objective.encoder.checkpoint_blocks == 2
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert not getattr(objective, "seen", {})


def test_channels_that_are_drawn_count_as_all_shown() -> None:
    fields: dict[str, Any] = {"channels": 3, "channel_tokens": True}
    whole = measure(make(OBJECTIVES["vicreg"], channel_sampling=False, **fields), None, 0, no_autocast)
    objective = make(OBJECTIVES["vicreg"], **fields)
    for seed in range(4):
        drawn = measure(objective, None, seed, no_autocast)
        assert drawn.block == whole.block and drawn.rest == whole.rest


def test_weights_gradients_and_moments() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).requires_grad_(False))
    trained, frozen, buffers = 4 * (3 * 5 + 5 + 5 + 5), 4 * (5 * 2 + 2), 4 * (5 + 5) + 8
    assert state_bytes(model) == 4 * trained + frozen + buffers
    average = copy.deepcopy(model).requires_grad_(False)
    assert state_bytes(model, average) == 4 * trained + frozen + buffers + trained + frozen + buffers


SIZES = st.floats(0, 1e9)


@given(SIZES, SIZES, SIZES, st.floats(0, 1e13), st.integers(1, 4096), st.integers(0, 48))
def test_as_few_blocks_as_fit(block: float, rest: float, fixed: float, free: float, images: int, depth: int) -> None:
    kept = Kept(block, rest, fixed)
    found = blocks_to_recompute(free, kept, images, depth)
    assert 0 <= found <= depth
    assert found == depth or kept.needed(images, depth, found) <= SHARE * free
    assert found == 0 or kept.needed(images, depth, found - 1) > SHARE * free
    assert blocks_to_recompute(free / 2, kept, images, depth) >= found
    assert blocks_to_recompute(free, kept, images + 1, depth) >= found


def test_the_numbers_of_one_case() -> None:
    kept = Kept(block=10.0, rest=5.0, fixed=100.0)
    assert kept.needed(4, 12, 0) == 100 + 4 * (5 + 130)
    assert kept.needed(4, 12, 12) == 100 + 4 * (5 + 10)
    found = [blocks_to_recompute(free / SHARE, kept, 4, 12) for free in (641, 639, 601, 599, 161, 159, 0)]
    assert found == [0, 1, 1, 2, 12, 12, 12]


def test_what_is_said_of_it() -> None:
    kept, gib = Kept(block=2.0**30, rest=2.0**29, fixed=2.0**30), 2**30
    assert fit(kept, 100 * gib, 4, 12, CPU) == (0, [])
    assert fit(kept, 40 * gib, 4, 12, CPU) == (5, ["recomputes 5 of 12 blocks: 35.0 of 40.0 GiB"])
    count, told = fit(kept, 4 * gib, 4, 12, CPU)
    assert count == 12 and "needs about 7.0 GiB with every block recomputed, and 4.0 are free" in told[0]


def gradients(objective: Objective, recomputed: int) -> list[Tensor]:
    objective.encoder.checkpoint_blocks = recomputed
    objective.zero_grad()
    objective(make_batch(objective, 4)).total.backward()
    objective.forget_step()
    return [parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_recomputing_any_number_of_blocks_gives_the_same_gradients(name: str) -> None:
    objective = make(OBJECTIVES[name])
    plain = gradients(objective, 0)
    for recomputed in (1, 2, 3):
        found = gradients(objective, recomputed)
        assert len(found) == len(plain) and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize(("asked", "blocks"), [("auto", 0), ("true", 3), ("false", 0)])
def test_a_recipe_says_how_many(asked: str, blocks: int, small_fields: dict[str, Any]) -> None:
    objective = make(OBJECTIVES["mae"])
    recipe = load("digits/mae", small_fields | {"train.checkpoint_blocks": asked})
    assert switch(recipe, objective, None, CPU) == []
    assert objective.encoder.checkpoint_blocks == blocks


def test_a_hierarchical_backbone_has_none_to_recompute() -> None:
    built = EncoderConfig(name="swin_tiny_patch4_window7_224", image_size=224)
    with torch.device("meta"):
        encoder = build_encoder(built, preprocessing_of(DataConfig(train="x"), built), 0)
    assert recomputable(encoder) == 0 and len(encoder.blocks) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_peak_is_below_the_estimate_and_not_far() -> None:
    objective = make(OBJECTIVES["vicreg"], width=384, heads=6, depth=6).cuda()
    kept = measure(objective, None, 0, lambda: torch.autocast("cuda", torch.bfloat16))
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    for recomputed in (0, 3, 6):
        objective.encoder.checkpoint_blocks = recomputed
        host = make_batch(objective, 64)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                loss = objective(Batch(tuple(view.cuda() for view in host.views), host.positions, host.seed)).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peak = torch.cuda.max_memory_allocated()
        assert 0.7 * kept.needed(64, 6, recomputed) < peak < kept.needed(64, 6, recomputed) / SHARE
