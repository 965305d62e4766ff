"""The decoder's blocks against torch.nn.MultiheadAttention and explicit steps, in loss and gradients.

Mutations that these tests caught when they were tried: keys and values swapped, no scale, the residual dropped, the norms
swapped, queries that attend to themselves too, queries of the wrong places, the last norm left out; sums of the encoder's
blocks in another order or without the last norm.
"""

from typing import Any

import pytest
import torch
from test_mae import make, make_batch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.data.placer import Batch
from selfsight.errors import UsageError
from selfsight.objectives.decoder import CrossBlock
from selfsight.objectives.mae import MAE


def shake(module: nn.Module) -> None:
    """Initial biases of zero and scales of one would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def reference(block: Any, x: Tensor, memory: Tensor) -> Tensor:
    """A cross-attention block by torch's own multi-head attention, whose weights are the block's."""
    width, attn, seen_by = x.shape[-1], block.attn, block.norm_memory
    memory = F.layer_norm(memory, memory.shape[-1:], seen_by.weight, seen_by.bias, 1e-6)
    queries = F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-6)
    seen, _ = F.multi_head_attention_forward(
        queries.transpose(0, 1), memory.transpose(0, 1), memory.transpose(0, 1), width, attn.heads,
        None, torch.cat([attn.q.bias, attn.kv.bias]),
        None, None, False, 0.0, attn.proj.weight, attn.proj.bias, need_weights=True, use_separate_proj_weight=True,
        q_proj_weight=attn.q.weight, k_proj_weight=attn.kv.weight[:width], v_proj_weight=attn.kv.weight[width:],
    )  # fmt: skip
    x = x + seen.transpose(0, 1)
    normed = F.layer_norm(x, (width,), block.norm2.weight, block.norm2.bias, 1e-6)
    inner = normed @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    return x + inner @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def test_a_cross_block_is_torchs_multi_head_attention() -> None:
    block = CrossBlock(16, 4, 24)
    shake(block)
    generator = torch.Generator().manual_seed(1)
    x, memory = (torch.randn(3, *n, generator=generator, requires_grad=True) for n in ((5, 16), (7, 24)))
    outputs, gradients = [], []
    for run in (block, lambda x, memory: reference(block, x, memory)):
        out = run(x, memory)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out.pow(3).sum(), [x, memory, *block.parameters()]))
    assert torch.allclose(*outputs, atol=1e-5)
    for ours, expected in zip(*gradients, strict=True):
        assert expected.any()
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


def rebuilt(objective: MAE, images: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
    """What a cross-attention decoder predicts of these hidden patches, patch by patch, from the encoder's tokens."""
    given: list[Tensor] = []
    first, *_ = objective.encoder.blocks
    hooks = [first.register_forward_pre_hook(lambda _, x: given.append(x[0]))]
    hooks += [block.register_forward_hook(lambda _, __, x: given.append(x)) for block in objective.encoder.blocks]
    tokens = objective.encoder(images, keep=keep)
    for hook in hooks:
        hook.remove()
    given[-1] = torch.cat([tokens.prefix, tokens.patches], dim=1)
    prefix, rows = tokens.prefix.shape[1], []
    for image in range(len(images)):
        for patch in hidden[image].tolist():
            query = (objective.mask_token + objective.positions[prefix + patch])[None, None]
            for block, weights in zip(objective.blocks, objective.sums.weight, strict=True):
                memory = sum(weight * x[image] for weight, x in zip(weights, given, strict=True))
                query = reference(block, query, memory[None])  # type: ignore[index]
            rows.append(objective.predict(objective.norm(query))[0, 0])
    return torch.stack(rows).view(*hidden.shape, -1)


@pytest.mark.parametrize("encoder", [{}, {"registers": 2}, {"class_token": False}])
def test_a_cross_decoder_rebuilds_each_patch_by_itself(encoder: dict[str, Any]) -> None:
    objective, batch = make(encoder, decoder="cross", predict_ratio=0.34, decoder_depth=3), make_batch(2)
    shake(objective)
    keep, hidden = objective.mask(batch)
    assert hidden.shape == (2, 4)
    images = batch.views[0]
    expected = rebuilt(objective, images, keep, hidden)
    target = objective.target(images, hidden)
    loss = objective(batch).total
    assert loss.item() == pytest.approx((expected - target).square().mean().item(), rel=1e-5)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(loss, trained)
    theirs = torch.autograd.grad((expected - target).square().mean(), trained)
    for gradient, other in zip(ours, theirs, strict=True):
        assert other.any()
        assert torch.allclose(gradient, other, rtol=1e-3, atol=1e-5)


def test_all_hidden_patches_can_be_rebuilt_and_a_part_is_the_same() -> None:
    objective, batch = make(decoder="cross"), make_batch(2)
    keep, hidden = objective.mask(batch)
    assert hidden.shape == (2, 12)
    with torch.no_grad():
        given = objective.encode(batch.views[0], keep)
        whole = objective.decode(given, keep, hidden)
        part = objective.decode(given, keep, hidden[:, 3:7])
    assert torch.allclose(whole[:, 3:7], part, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [({"frames": 4, "tube": 2}, (3, 4, 16, 16)), ({"channel_tokens": True}, (3, 16, 16))],
)
def test_planes_go_through_a_cross_decoder(encoder: dict[str, Any], shape: tuple[int, ...]) -> None:
    objective = make(encoder, decoder="cross", masking="tube", predict_ratio=0.5)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    batch = Batch((images,), torch.arange(2), seed=7)
    shake(objective)
    keep, hidden = objective.mask(batch)
    expected = (rebuilt(objective, images, keep, hidden) - objective.target(images, hidden)).square().mean()
    assert objective(batch).total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.pictures(batch)["reconstruction"].shape == images.shape


@pytest.mark.parametrize("fields", [{}, {"predict_ratio": 0.5, "edges": 1.0}, {"loss": "ms-ssim"}])
def test_a_cross_decoder_trains_all_that_it_has(fields: dict[str, Any]) -> None:
    objective = make({"registers": 1}, decoder="cross", **fields)
    objective(make_batch()).total.backward()
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    assert [name for name, p in named if p.grad is None or not p.grad.any()] == []
    for module in (objective.blocks[0].attn.q, objective.blocks[1].attn.kv):  # type: ignore[union-attr]
        assert not module.bias.any()  # type: ignore[union-attr,operator]
        bound = (6 / sum(module.weight.shape)) ** 0.5  # type: ignore[union-attr,arg-type]
        assert 0.9 * bound < module.weight.abs().max() <= bound  # type: ignore[union-attr,operator]


def test_the_last_of_what_a_cross_decoder_sees_is_what_is_exported() -> None:
    """Under drop paths and recomputed blocks, too: the same draws as a forward pass of the encoder."""
    objective, batch = make({"drop_path": 0.5, "depth": 3}, decoder="cross"), make_batch(4)
    keep, _ = objective.mask(batch)
    plain = objective.encoder(batch.views[0], keep=keep, draw=batch.uniform)
    for blocks in (0, 2):
        objective.encoder.checkpoint_blocks = blocks
        given = objective.encode(batch.views[0], keep, batch.uniform)
        assert len(given) == 4
        assert torch.equal(given[-1], torch.cat([plain.prefix, plain.patches], dim=1))


def test_a_cross_decoder_in_bfloat16() -> None:
    objective, batch = make(decoder="cross"), make_batch(4)
    exact = objective(batch).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective(batch).total
    rounded.backward()
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2) and rounded.item() != exact.item()
    assert objective.sums.weight.grad is not None and objective.sums.weight.grad.isfinite().all()


def test_a_cross_decoder_needs_positions() -> None:
    with pytest.raises(
        UsageError, match=r"decoder: cross needs position embeddings .* rotary ones alone; use decoder self"
    ):
        make({"name": "vit_small_patch16_dinov3", "positions": "learned"}, decoder="cross")
