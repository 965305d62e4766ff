"""Schedules and groups against formulas written out."""

import copy
import math

import pytest
import torch
from torch import nn

from selfsight.data.views import View
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective
from selfsight.objectives.configs import MAEConfig
from selfsight.optim import build_optimizer, lr_at, make_moments, move_average, set_rates, weight_decay_at
from selfsight.recipe import DataConfig, EncoderConfig, OptimConfig

ENCODER = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=3, heads=2, registers=1)


def test_the_rate_is_warmup_and_cosine() -> None:
    config, steps = OptimConfig(lr=2.0, min_lr=0.5, warmup=0.1), 100
    for step in range(steps):
        cosine = 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        expected = 2.0 * (step + 1) / 11 if step < 10 else cosine
        assert lr_at(step, steps, config) == pytest.approx(expected)
    assert lr_at(10, steps, config) == 2.0
    assert lr_at(0, steps, OptimConfig(lr=1.0, warmup=0.0)) == 1.0
    assert max(lr_at(s, 1, OptimConfig(lr=1.0, warmup=1.0)) for s in range(1)) <= 1.0


def test_the_cosine_is_torchs() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.1)
    for step in range(50):
        assert lr_at(step, 50, OptimConfig(lr=3.0, min_lr=0.1, warmup=0.0)) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_weight_decay_goes_along_half_a_cosine() -> None:
    config = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    for step in range(100):
        expected = 0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * step / 100))
        assert weight_decay_at(step, 100, config) == pytest.approx(expected)
    assert {weight_decay_at(step, 100, OptimConfig(weight_decay=0.3)) for step in range(100)} == {0.3}
    decayed, spared = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [
        {"params": [decayed], "decayed": True, "scale": 0.5},
        {"params": [spared], "decayed": False, "scale": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_rates(optimizer, 0.1, 0.2)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.05, 0.2), (0.1, 0.0)]


def test_groups() -> None:
    encoder = build_encoder(ENCODER, preprocessing_of(DataConfig(train="x"), ENCODER), 0)
    objective = build_objective(MAEConfig(decoder_width=8, decoder_depth=1, decoder_heads=2, view=View()), encoder)
    optimizer = build_optimizer(objective, encoder, OptimConfig(layer_decay=0.5, weight_decay=0.3))
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = dict(objective.named_parameters())
    assert (
        len(of) == sum(p.requires_grad for p in named.values()) == sum(len(g["params"]) for g in optimizer.param_groups)
    )
    expected = {
        "encoder.backbone.patch_embed.proj.weight": (0.3, 0.5**4),
        "encoder.backbone.patch_embed.proj.bias": (0.0, 0.5**4),
        "encoder.backbone.cls_token": (0.0, 0.5**4),
        "encoder.backbone.reg_token": (0.0, 0.5**4),
        "encoder.backbone.blocks.0.attn.qkv.weight": (0.3, 0.5**3),
        "encoder.backbone.blocks.2.attn.qkv.weight": (0.3, 0.5),
        "encoder.backbone.blocks.2.norm1.weight": (0.0, 0.5),
        "encoder.backbone.norm.weight": (0.0, 1.0),
        "embed.weight": (0.3, 1.0),
        "mask_token": (0.0, 1.0),
        "predict.bias": (0.0, 1.0),
    }
    for name, (decay, scale) in expected.items():
        assert (of[id(named[name])]["weight_decay"], of[id(named[name])]["scale"]) == (decay, scale), name
    assert id(named["encoder.backbone.pos_embed"]) not in of  # fixed
    set_rates(optimizer, 2.0, 0.05)
    assert {group["lr"] for group in optimizer.param_groups} == {2.0 * 0.5**n for n in (0, 1, 2, 3, 4)}


def test_the_average_is_a_running_one() -> None:
    torch.manual_seed(0)
    live, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    expected = {name: value.clone() for name, value in average.state_dict().items()}
    for _ in range(5):
        for value in (live.weight, live.bias, live.running_mean):
            assert value is not None
            value.data.normal_()
        move_average(average, live, 0.9)
        for name, value in live.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * value
    for name, value in average.state_dict().items():
        assert torch.allclose(value, expected[name]), name


def test_an_average_follows_only_a_step_that_was_taken() -> None:
    torch.manual_seed(0)
    live, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(plain.weight)
    taken, left_out = copy.deepcopy(plain), copy.deepcopy(plain)
    before = copy.deepcopy(plain.state_dict())
    move_average(plain, live, 0.9)
    move_average(taken, live, 0.9, torch.tensor(1.0))
    move_average(left_out, live, 0.9, torch.tensor(0.0))
    for name, value in plain.state_dict().items():
        assert torch.equal(taken.state_dict()[name], value), name
        assert torch.equal(left_out.state_dict()[name], before[name]), name
    assert not torch.equal(plain.weight, before["weight"])


def test_an_average_that_stays_keeps_the_sign_of_zero() -> None:
    live, average = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    nn.init.ones_(live.weight)
    nn.init.constant_(average.weight, -0.0)
    move_average(average, live, 0.9, torch.tensor(0.0))
    assert average.weight.signbit().all() and not average.weight.any()


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_a_rate_falls_along_blocks_or_not_at_all(name: str) -> None:
    config = EncoderConfig(name=name, image_size=64, pool="head", patch=None, width=None, depth=None, heads=None)
    encoder = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    objective = nn.ModuleDict({"encoder": encoder})
    groups = build_optimizer(objective, encoder, OptimConfig()).param_groups
    assert {group["scale"] for group in groups} == {1.0}
    with pytest.raises(UsageError, match=f"optim.layer_decay: {name} has no plain sequence of blocks"):
        build_optimizer(objective, encoder, OptimConfig(layer_decay=0.75))


def test_adamw_is_fused_where_the_device_has_it() -> None:
    encoder = build_encoder(ENCODER, preprocessing_of(DataConfig(train="x"), ENCODER), 0)
    objective = build_objective(MAEConfig(decoder_width=8, decoder_depth=1, decoder_heads=2, view=View()), encoder)
    found = []
    for device in ("cpu", "meta"):  # the latter stands for a device without such a kernel
        optimizer = build_optimizer(objective.to(device), encoder, OptimConfig())
        found += [(group["fused"], group["foreach"]) for group in optimizer.param_groups]
    assert found == [(True, None)] * 2 + [(None, True)] * 2


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_moments_that_are_made_early_are_those_of_the_first_step(kernel: str) -> None:
    early, late = (nn.Linear(3, 2), nn.Linear(3, 2))
    late.load_state_dict(early.state_dict())
    first, second = (torch.optim.AdamW(module.parameters(), lr=0.1, **{kernel: True}) for module in (early, late))
    make_moments(first)
    assert all(not moment.any() for state in first.state.values() for moment in state.values())
    for _ in range(3):
        for module, optimizer in ((early, first), (late, second)):
            module(torch.arange(6.0).view(2, 3)).square().sum().backward()
            optimizer.step()
    for own, other in zip(early.parameters(), late.parameters(), strict=True):
        assert torch.equal(own, other)
        assert first.state[own].keys() == second.state[other].keys()
        for key, value in second.state[other].items():
            made = first.state[own][key]
            assert torch.equal(made, value) and (made.dtype, made.device) == (value.dtype, value.device)
