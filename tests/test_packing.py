"""Several views in one pass are what they are one by one, and no objective waits for the device in a step.

Mutations that these tests caught when they were tried: the first view's draws for all, masked patches found on the device,
a norm over all views, views of a batch norm packed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from selfsight.data.placer import Batch
from selfsight.data.transfer import without_waiting
from selfsight.encoder import Tokens, build_encoder, preprocessing_of
from selfsight.objectives import OBJECTIVES, build_objective, dino, parse_objective, vicreg
from selfsight.objectives.across import GlobalBatchNorm
from selfsight.objectives.base import Objective
from selfsight.recipe import DataConfig, EncoderConfig

TINY: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2, "drop_path": 0.4}
DINO: dict[str, Any] = {
    "name": "dino", "outputs": 12, "head_width": 8, "bottleneck": 4, "local_views": 2, "local_view": {"size": 8},
    "freeze_prototypes": 0.0, "mask_probability": 0.6,
}  # fmt: skip
IBOT = DINO | {"ibot": 1.0, "koleo": 0.1, "balance": "sinkhorn", "head_norm": True}
VICREG = {"name": "vicreg", "expander_width": 8}
MAE = {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
SWIN = {"name": "swin_tiny_patch4_window7_224", "image_size": 64, "pool": "head", "patch": None, "width": None, "depth": None, "heads": None}  # fmt: skip
JOINT = {"name": "joint", "parts": {name: {"objective": fields} for name, fields in (("a", VICREG), ("b", DINO))}}


def make(fields: dict[str, Any], **encoder: Any) -> Objective:
    config = EncoderConfig(**(TINY | encoder))
    torch.manual_seed(0)
    built = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    return build_objective(parse_objective(fields), built)


def make_batch(objective: Objective, count: int = 6) -> Batch:
    drawn, own = torch.Generator().manual_seed(3), objective.encoder.preprocessing
    sizes = [view.size or own.image_size for view in objective.views]
    views = tuple(torch.randn(count, *own.shape[:-2], size, size, generator=drawn) for size in sizes)
    return Batch(views, torch.arange(100, 100 + count), seed=7, progress=0.25)


# --- several views in one pass ---


def one_by_one(objective: Objective) -> None:
    """Have the encoders of an objective take a view at a time, each with its own draws."""
    for encoder in {id(module): module for module in (objective.encoder, objective.scored)}.values():
        forward = encoder.forward

        def apart(images: Tensor, forward: Callable[..., Any] = forward, count: int = 6, **given: Any) -> Any:
            draw, mask, made = given.pop("draw", None), given.pop("mask", None), []
            for first in range(0, len(images), count):
                rows = slice(first, first + count)
                own = None if draw is None else lambda purpose, n, rows=rows: draw(purpose, n)[rows]
                made.append(forward(images[rows], draw=own, mask=mask if mask is None else mask[rows], **given))
            return Tokens(*(torch.cat(parts) for parts in zip(*made, strict=True)))

        encoder.forward = apart  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("fields", [VICREG, DINO, IBOT, JOINT], ids=["vicreg", "dino", "ibot", "joint"])
def test_packed_views_are_those_one_by_one(fields: dict[str, Any]) -> None:
    packed, apart = make(fields).train(), make(fields).train()
    one_by_one(apart)
    batch = make_batch(packed)
    found, expected = packed(batch), apart(make_batch(apart))
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    found.total.backward()
    expected.total.backward()
    for (name, ours), theirs in zip(packed.named_parameters(), apart.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad is not None and theirs.grad is not None, name
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


def test_each_view_keeps_the_draws_that_it_has_alone() -> None:
    objective = make(VICREG | {"order": 1.0}).train()
    batch, alone = make_batch(objective), make_batch(objective)
    objective.encode_together(batch, 0, 1, 2)
    for view in range(3):
        tokens, feature = objective.encoded(alone, view)
        assert torch.allclose(objective.feature(batch, view), feature, atol=1e-6)
        assert torch.allclose(objective.tokens(batch, view).patches, tokens.patches, atol=1e-6)
    assert not torch.allclose(objective.feature(batch, 0), objective.feature(batch, 1))


def test_only_views_of_one_shape_that_are_not_yet_encoded_share_a_pass() -> None:
    objective = make(DINO)
    batch = make_batch(objective)
    objective.encoded(batch, 1)
    seen: list[Tensor] = []
    objective.encoder.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    objective.encode_together(batch, 0, 1)
    objective.encode_together(batch, 0, 1)
    assert [images.shape for images in seen] == [(6, 3, 16, 16)]
    assert torch.equal(seen[0], batch.views[0])


def test_a_batch_norm_keeps_the_statistics_of_a_view() -> None:
    objective = make(VICREG, name="resnet18", image_size=32, pool="head", drop_path=0.0, patch=None, width=None, depth=None, heads=None)  # fmt: skip
    assert not objective.packs and make(VICREG).packs
    batch = make_batch(objective)
    objective.train().encode_together(batch, 0, 1)
    for view in (1, 0):
        alone = objective.encoder.embed(batch.views[view])
        assert torch.allclose(objective.feature(batch, view), alone, atol=1e-5)


def test_a_norm_of_heads_takes_each_views_own_statistics() -> None:
    norm, x = GlobalBatchNorm(5), torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    nn.init.normal_(norm.weight)
    assert torch.allclose(norm(x), torch.stack([norm(view) for view in x]), atol=1e-6)
    expected = nn.functional.batch_norm(x[1], None, None, norm.weight, norm.bias, training=True)
    assert torch.allclose(norm(x)[1], expected, atol=1e-5)


# --- no step waits for the device ---

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "is_nonzero", "item"}


class NoWaiting(TorchDispatchMode):
    """Tensors on `meta` stand for the device's: they have no values to wait for, and what is sent there is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.allowed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.overloadpacket.__name__, [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]  # fmt: skip
        away = [x for x in given if x.is_meta]
        assert not (away and name in WAITS), name
        assert not (away and name in ("index", "index_put") and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])), name  # fmt: skip
        made = func(*args, **(kwargs or {}))
        home = [x for x in given if not x.is_meta and x.ndim]
        home += given if name == "lift_fresh" else []  # of `torch.tensor(values, device=...)`, which come from the host
        if home and not self.allowed and any(x.is_meta for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, Tensor)):  # fmt: skip
            self.sent.append(name)
        return made

    def pinned(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function that sends to the device from pinned memory."""

        def run(*given: Any) -> Tensor:
            self.allowed += 1
            try:
                return function(*given)
            finally:
                self.allowed -= 1

        return run


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> NoWaiting:
    mode = NoWaiting()
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: nullcontext())  # which there is none of on meta
    monkeypatch.setattr(Batch, "uniform", mode.pinned(Batch.uniform))
    for module in (dino, vicreg):
        monkeypatch.setattr(module, "without_waiting", mode.pinned(without_waiting))
    return mode


def a_step(objective: Objective, mode: TorchDispatchMode) -> None:
    """Two steps on the meta device, under the mode: forward, backward, after_step."""
    batch = make_batch(objective)
    away = Batch(tuple(view.to("meta") for view in batch.views), batch.positions, batch.seed, progress=0.25)
    objective.train().to("meta")
    with mode:
        for step in (1, 2):
            objective(away).total.backward()
            objective.took = torch.ones((), device="meta")
            objective.after_step(step, 10)
            away.shared.clear()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mae": (MAE, {}),
    "mae-edges": (MAE | {"edges": 0.5}, {}),
    "vicreg-channels": (VICREG, {"channels": 2, "channel_tokens": True}),
    "vicreg": (VICREG, {}),
    "vicreg-order": (VICREG | {"order": 1.0}, {}),
    "dino": (DINO, {}),
    "dino-ibot": (IBOT, {}),
    "simmim": ({"name": "simmim", "mask_size": 4}, {}),
    "simmim-swin": ({"name": "simmim", "mask_size": 32, "mask_ratio": 0.5}, SWIN),
    "data2vec": ({"name": "data2vec", "mask_size": 4}, {}),
    "rotation": ({"name": "rotation"}, {}),
    "rotation-all": ({"name": "rotation", "turns": "all"}, {}),
    "joint": (JOINT, {}),
}


def test_every_built_in_objective_is_tried() -> None:
    """But distill: its teacher comes from outside, and is one more forward of an encoder."""
    assert {fields["name"] for fields, _ in CASES.values()} == set(OBJECTIVES) - {"distill"}


@pytest.mark.parametrize("case", CASES)
def test_a_step_does_not_wait_for_the_device(case: str, no_waiting: NoWaiting) -> None:
    fields, encoder = CASES[case]
    a_step(make(fields, **encoder), no_waiting)
    assert no_waiting.sent == []


def test_the_watch_sees_who_waits_or_sends(no_waiting: NoWaiting) -> None:
    device_mask, host = torch.ones(3, dtype=torch.bool, device="meta"), torch.ones(3)
    for waits in (
        lambda: host.to("meta")[device_mask],
        lambda: device_mask.nonzero(),
        lambda: device_mask.sum().item(),
    ):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), no_waiting:
            waits()
    no_waiting.sent.clear()
    with no_waiting:
        torch.tensor([0, 1], device="meta")
        host.to("meta")
    assert no_waiting.sent == ["lift_fresh", "_to_copy"]
