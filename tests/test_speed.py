"""What a share of the peak is made of."""

import pytest
import torch
from torch import nn

from selfsight import speed
from selfsight.speed import count_flops, matmul_peak


def test_flops_of_a_linear_layer_and_its_backward_pass() -> None:
    layer, x = nn.Linear(32, 8), torch.randn(5, 32, requires_grad=True)
    forward = 2 * 5 * 32 * 8
    assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * forward


class Machine:
    """A clock that a product of side n moves by so many seconds at n = 64, by eight times less at n = 32, and so on."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.sides = 0.0, list[int]()
        self.seconds = seconds
        monkeypatch.setattr(speed, "SIDE", {"cpu": 64})
        monkeypatch.setattr(speed, "LEAST_SIDE", 8)
        monkeypatch.setattr(torch, "mm", self.multiply)

    def multiply(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        side = len(a)
        assert a.shape == b.shape == out.shape == (side, side)
        assert a.dtype == b.dtype == out.dtype == torch.bfloat16
        self.sides.append(side)
        self.now += self.seconds * (side / 64) ** 3

    def peak(self) -> float:
        return matmul_peak(torch.device("cpu"), torch.bfloat16, 1.0, lambda: self.now)


@pytest.mark.parametrize(("seconds", "side"), [(0.125, 64), (1.0, 32), (512.0, 8)])
def test_the_peak_is_what_a_product_takes(monkeypatch: pytest.MonkeyPatch, seconds: float, side: int) -> None:
    """Two operations for each of n^3 multiplications, whatever the side that fits into the time."""
    machine = Machine(seconds, monkeypatch)
    assert machine.peak() == pytest.approx(2 * 64**3 / seconds)
    assert machine.sides[-1] == side
    assert machine.sides.count(side) >= 5


def test_a_product_that_is_slow_once_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0.125, monkeypatch)
    multiply = machine.multiply

    def sometimes(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        multiply(a, b, out)
        if len(machine.sides) in (1, 5):
            machine.now += 0.05

    monkeypatch.setattr(torch, "mm", sometimes)
    assert machine.peak() == pytest.approx(2 * 64**3 / 0.125)
