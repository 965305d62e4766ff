"""Blocks that keep less, against timm's own forward pass: the same bits, and as many bytes less as was worked out.

Mutations that these tests caught when they were tried: no rounding of what is made again, the bias's gradient of other rows,
no gradient to the norm, the result kept after all, timm's fast norm overlooked, the form of the backward pass where there is
none, or where dynamo traces.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.norm import RmsNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfsight import blocks, kept
from selfsight.blocks import QuickBlock, quicken
from selfsight.memory import saved_bytes

IMAGES, TOKENS, WIDTH = 3, 7, 24
Run = Callable[[Tensor], Tensor]


def pair(**options: Any) -> tuple[Any, Any]:
    """Ours, and one with the same attention and weights whose forward pass is timm's."""
    torch.manual_seed(0)
    ours = Block(WIDTH, 3, qkv_bias=True, **options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    quicken(nn.ModuleList([ours]))
    theirs = copy.deepcopy(ours)
    assert type(ours) is QuickBlock
    theirs.__class__ = Block
    return ours, theirs


def tokens() -> Tensor:
    return torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def passed(block: nn.Module, half: bool, run: Run | None = None) -> list[Tensor]:
    """What comes out, and all gradients; drop paths draw the same."""
    x = tokens()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = (run or block)(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    return [out, x.grad, *(parameter.grad for parameter in block.parameters() if parameter.grad is not None)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.3, "drop_path": 0.5}, {"norm_layer": RmsNorm}, {"act_layer": nn.Tanh}, {"qk_norm": True},
     {"scale_mlp_norm": True}, {"proj_drop": 0.5}, {"proj_bias": False}],
    ids=lambda options: "+".join(options) or "plain",
)  # fmt: skip
def test_outputs_and_gradients_are_timms_bit_by_bit(options: dict[str, Any], half: bool) -> None:
    ours, theirs = pair(**options)
    assert same(passed(ours, half), passed(theirs, half))


@pytest.mark.parametrize("half", [False, True])
def test_a_frozen_weight_has_no_gradient_and_the_others_theirs(half: bool) -> None:
    ours, theirs = pair()
    for block in (ours, theirs):
        block.norm1.requires_grad_(False)
        block.mlp.fc1.weight.requires_grad_(False)
        block.mlp.fc2.bias.requires_grad_(False)
    assert same(passed(ours, half), passed(theirs, half))
    assert ours.mlp.fc1.weight.grad is None


def held(block: nn.Module, half: bool, run: Run | None = None) -> int:
    own = [parameter.untyped_storage().data_ptr() for parameter in block.parameters()]

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return (run or block)(tokens())

    return saved_bytes(forward, own)


@pytest.mark.parametrize("half", [False, True])
def test_two_norms_a_gelu_and_rounded_weights_are_not_kept(half: bool) -> None:
    ours, theirs = pair()
    results, weights = (1 + 1 + 4) * IMAGES * TOKENS * WIDTH, (3 + 4 + 4) * WIDTH**2
    assert held(theirs, half) - held(ours, half) == (2 * (results + weights) if half else 4 * results)


def test_a_recomputed_block_keeps_its_input_alone_and_gives_the_same() -> None:
    ours, _ = pair()

    def again(x: Tensor) -> Tensor:
        return checkpoint(ours, x, use_reentrant=False)

    assert held(ours, True, again) <= 4 * IMAGES * TOKENS * WIDTH
    plain = [value.clone() for value in passed(ours, True)]
    ours.zero_grad()
    assert same(passed(ours, True, again), plain)


def test_where_nothing_is_kept_or_a_compiler_decides_it_is_the_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair()
    expected = theirs(tokens())
    monkeypatch.setattr(kept, "_Linear", None)
    with pytest.raises(AttributeError):
        ours(tokens())
    with torch.no_grad():
        assert torch.equal(ours(tokens()), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(ours(tokens()), expected)


@pytest.mark.parametrize("path", ["norm1", "norm2", "mlp.act", "mlp.fc1", "mlp.fc2", "attn.qkv", "attn.k_norm"])
def test_hooks_see_what_they_would_and_may_change_it(path: str) -> None:
    results = []
    for block in pair():
        seen: list[Tensor] = []
        block.get_submodule(path).register_forward_pre_hook(lambda module, given: (given[0] * 2,))
        block.get_submodule(path).register_forward_hook(lambda module, given, out, seen=seen: seen.append(out))
        results.append(passed(block, False) + seen)
        assert seen
    assert same(*results)


def test_timms_fast_norm_is_its_own() -> None:
    ours, _ = pair()
    ours.norm1._fast_norm = True
    made = blocks.linear_of_norm(ours.attn.qkv, ours.norm1, tokens())
    assert type(made.grad_fn).__name__ != "_LinearBackward"
    assert type(blocks.linear_of_norm(ours.mlp.fc1, ours.norm2, tokens()).grad_fn).__name__ == "_LinearBackward"


def test_what_was_changed_in_between_is_an_error_and_not_another_gradient() -> None:
    layer, act = nn.Linear(4, 2), nn.GELU()
    x = torch.randn(3, 4, requires_grad=True) * 1
    made = kept.linear_of_gelu(layer, act, x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()
