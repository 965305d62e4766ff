"""Arithmetic: what each name sets, what a loss keeps exact of it, and how far rounding takes a step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from selfsight import switches
from selfsight.data.placer import Batch
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.fp8 import BACKWARD, FORWARD, Float8Linear, fits, quantize, to_float8
from selfsight.objectives import build_objective
from selfsight.objectives.base import Objective, blocks_of
from selfsight.objectives.configs import Data2VecConfig, MAEConfig
from selfsight.objectives.dino import cross_view_entropy
from selfsight.objectives.vicreg import loss_terms
from selfsight.precision import ARITHMETIC, exact, resolve, set_products
from selfsight.processes import join
from selfsight.recipe import DataConfig, EncoderConfig, load

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CUDA, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


@pytest.fixture(autouse=True)
def _as_they_were() -> Iterator[None]:
    before = CUDA.allow_tf32, CUDNN.allow_tf32
    yield
    CUDA.allow_tf32, CUDNN.allow_tf32 = before


# -- which arithmetic


def test_auto_is_bf16_on_a_gpu_and_fp32_on_a_cpu() -> None:
    assert (resolve("auto", GPU), resolve("auto", CPU)) == ("bf16", "fp32")
    assert [resolve(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert [resolve(name, GPU) for name in ("fp32", "tf32", "bf16")] == ["fp32", "tf32", "bf16"]


@pytest.mark.parametrize("name", ["tf32", "fp8"])
def test_a_cpu_refuses_what_it_does_not_have(name: str, small_fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"train\.precision: {name} is a GPU's; on a CPU use fp32 or bf16"):
        join(load("digits/mae", small_fields | {"train.precision": name, "train.device": "cpu"}))


@pytest.mark.parametrize("found", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
def test_fp8_needs_a_gpu_that_has_it(found: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    if found >= (8, 9):
        assert resolve("fp8", GPU) == "fp8"
        return
    with pytest.raises(UsageError, match=rf"compute capability 8\.9, this one has {found[0]}\.{found[1]}; use bf16"):
        resolve("fp8", GPU)


def test_only_tf32_lets_fp32_products_be_rounded() -> None:
    for name in (*ARITHMETIC, *reversed(ARITHMETIC)):
        set_products(name)
        assert (CUDA.allow_tf32, CUDA.fp32_precision == "tf32") == (name == "tf32", name == "tf32")
        assert CUDNN.allow_tf32 == (name != "fp32")  # torch's own default
    assert {name: accelerate for name, (accelerate, _, _) in ARITHMETIC.items()} == {
        "fp32": "no", "tf32": "no", "bf16": "bf16", "fp8": "bf16",
    }  # fmt: skip


PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "bmm", "addmm", "addmm_", "baddbmm")}


class Products(TorchDispatchMode):
    """Whether each matrix product might have been rounded to TF32."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in PRODUCTS:
            self.rounded.append(CUDA.allow_tf32)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tf32", [True, False])
def test_exact_products_are_exact_backward_too(tf32: bool) -> None:
    set_products("tf32" if tf32 else "bf16")
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(4, 4, generator=draw, requires_grad=True) for _ in range(3))
    with Products() as seen:
        before = a @ b
        with exact(before):
            inner = torch.einsum("ik,jk->ij", before, before) + F.linear(before, b)
        after = inner @ c
        forward = list(seen.rounded)
        seen.rounded.clear()
        after.square().sum().backward()
    assert forward == [tf32, False, False, tf32]
    # In reverse, two products for each: the last one's, the two exact ones', the first one's.
    assert seen.rounded == [tf32] * 2 + [False] * 4 + [tf32] * 2
    assert CUDA.allow_tf32 == tf32


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: sum(loss_terms(a, b).values()),
        lambda a, b: cross_view_entropy(torch.stack([a, b]).softmax(-1), torch.stack([a, b])),
    ],
)
def test_gradients_that_are_written_out_are_exact_too(loss: Any) -> None:
    set_products("tf32")
    a, b = (torch.randn(4, 6, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in range(2))
    with Products() as seen:
        loss(a * 1, b * 1).backward()
    assert len(seen.rounded) >= 2 and not any(seen.rounded)


def test_exact_is_left_as_it_was_entered() -> None:
    set_products("tf32")
    with pytest.raises(ZeroDivisionError), exact(torch.zeros(1)):
        assert not CUDA.allow_tf32
        raise ZeroDivisionError
    assert CUDA.allow_tf32
    with torch.autocast("cpu", torch.bfloat16), exact(torch.zeros(1)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# -- 8-bit floats


def test_a_tensors_largest_value_becomes_the_types() -> None:
    for dtype, most in ((FORWARD, 448.0), (BACKWARD, 57344.0)):
        x = torch.tensor([[0.5, -3.0], [2.9, 0.0]])
        x8, scale = quantize(x, dtype)
        assert x8.dtype == dtype and x8.float().abs().max() == most
        assert scale.item() == pytest.approx(3.0 / most)
        # Half a unit in the last of 3 or 2 places.
        assert torch.allclose(x8.float() * scale, x, rtol=2**-4 if dtype == FORWARD else 2**-3)
        assert not quantize(torch.zeros(3), dtype)[0].float().any()
        assert quantize(torch.tensor([1.0, torch.nan]), dtype)[0].float().isnan().any()  # a bad step stays one


def test_the_three_products_are_those_of_rounded_factors() -> None:
    torch.manual_seed(0)
    layer, x = Float8Linear(32, 48), torch.randn(4, 16, 32, requires_grad=True)
    gradient = torch.randn(4, 16, 48)
    made = layer.train()(x)
    made.backward(gradient)

    def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
        scale = values.abs().max() / torch.finfo(dtype).max
        return (values / scale).to(dtype).float() * scale

    x8, w8, g8 = rounded(x.detach(), FORWARD), rounded(layer.weight.detach(), FORWARD), rounded(gradient, BACKWARD)
    assert torch.allclose(made, x8 @ w8.T + layer.bias, atol=1e-4)
    assert x.grad is not None and torch.allclose(x.grad, g8 @ w8, atol=1e-4)
    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert torch.allclose(layer.weight.grad, torch.einsum("btn,btk->nk", g8, x8), atol=1e-3)
    assert torch.allclose(layer.bias.grad, gradient.sum((0, 1)), atol=1e-4)  # not rounded


def test_layers_that_fit_are_replaced_and_nothing_else() -> None:
    assert fits(nn.Linear(256, 768)) and fits(nn.Linear(1024, 256))
    for unfit in (
        nn.Linear(256, 255),
        nn.Linear(264, 768),
        nn.Linear(128, 768),
        nn.Linear(256, 256).requires_grad_(False),
    ):
        assert not fits(unfit)
    objective = make(Data2VecConfig(mask_size=8))
    before, teacher = objective.state_dict(), dict(objective.named_modules())["teacher"]
    order = [name for name, _ in objective.named_parameters()]
    assert to_float8(blocks_of(objective)) == 4 * 2  # qkv, proj and the two of the MLP, in the student's two blocks
    assert not any(isinstance(module, Float8Linear) for module in teacher.modules())
    after = objective.state_dict()
    assert list(before) == list(after) and [name for name, _ in objective.named_parameters()] == order
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_what_is_scored_is_not_rounded() -> None:
    plain, eighth = make(), make()
    to_float8(blocks_of(eighth))
    images = make_batch().views[0]
    assert torch.equal(plain.eval().encoder.embed(images), eighth.eval().encoder.embed(images))
    with torch.no_grad():
        assert torch.equal(plain.train().encoder.embed(images), eighth.train().encoder.embed(images))
    assert not torch.equal(plain.encoder.embed(images), eighth.encoder.embed(images))


def make(config: Any = None) -> Objective:
    built = EncoderConfig(image_size=32, channels=1, patch=8, width=256, depth=2, heads=4)
    config = config or MAEConfig(decoder_width=256, decoder_depth=1, decoder_heads=4)
    torch.manual_seed(0)
    encoder = build_encoder(built, preprocessing_of(DataConfig(train="x"), built), 0)
    torch.manual_seed(1)
    return build_objective(config, encoder).train()


def make_batch(count: int = 16) -> Batch:
    draw = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 1, 32).expand(count, 1, 32, 32) * torch.randn(count, 1, 1, 1, generator=draw)
    return Batch((ramp + 0.3 * torch.randn(count, 1, 32, 32, generator=draw),), torch.arange(count), seed=7)


def step(precision: str) -> tuple[float, Tensor]:
    """Loss and gradient of a step, as `train.precision` makes them; TF32 is fp32 on a CPU."""
    objective = make()
    if precision == "fp8":
        to_float8(blocks_of(objective))
    with torch.autocast("cpu", torch.bfloat16, enabled=ARITHMETIC[precision][0] == "bf16"):
        loss = objective(make_batch())
    loss.total.backward()
    return loss.total.item(), torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


@pytest.mark.parametrize(("precision", "of_loss", "of_gradient"), [("bf16", 1e-3, 0.01), ("fp8", 0.01, 0.1)])
def test_rounding_stays_within_what_the_docs_say(precision: str, of_loss: float, of_gradient: float) -> None:
    (true, gradient), (found, rounded) = step("fp32"), step(precision)
    assert 0 < abs(found / true - 1) < of_loss
    assert of_gradient / 10 < (rounded - gradient).norm() / gradient.norm() < of_gradient


def test_fp8_says_what_it_does_and_what_does_not_fit(
    small_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switches, "resolve", lambda precision, device: precision)
    fields = small_fields | {"train.precision": "fp8", "train.batch_size": 32, "train.accumulate": 2}
    objective = make()
    told = switches.switch(load("digits/mae", fields), objective, None, CPU)
    assert told[0] == "fp8: 11 linear layers multiply in 8 bits while they train"
    assert told[1].startswith("warning: train.precision fp8 without train.compile")
    assert (
        sum(isinstance(module, Float8Linear) for module in objective.modules()) == 11
    )  # not the last block's, which splits its weight
    with pytest.raises(UsageError, match="fp8 multiplies 16 at a time; a rank has 8 images at once"):
        switches.switch(load("digits/mae", fields | {"train.accumulate": 4}), make(), None, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_exact_products_of_a_gpu_are_those_of_fp32() -> None:
    set_products("tf32")
    a, b = (torch.randn(512, 512, device="cuda", requires_grad=True) for _ in range(2))
    with exact(a):
        made = a @ b
    made.sum().backward()
    true = a.detach().double() @ b.detach().double()
    assert a.grad is not None
    assert torch.allclose(made.double(), true, atol=1e-3) and not torch.allclose((a @ b).double(), true, atol=1e-3)
    assert torch.allclose(a.grad.double(), b.detach().double().sum(1).expand(512, 512), atol=1e-3)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with 8-bit floats"
)
def test_8_bit_products_of_a_gpu_are_those_of_a_cpu() -> None:
    torch.manual_seed(0)
    here, x = Float8Linear(256, 512), torch.randn(16, 16, 256).bfloat16()
    there = Float8Linear(256, 512).cuda()
    there.load_state_dict(here.state_dict())
    here(x).float().square().sum().backward()
    there(x.cuda()).float().square().sum().backward()
    assert here.weight.grad is not None and there.weight.grad is not None
    difference = there.weight.grad.cpu() - here.weight.grad
    assert difference.norm() < 0.02 * here.weight.grad.norm()
