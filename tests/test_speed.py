"""What a share of the peak is made of."""

import time

import torch
from torch import nn

from selfsight.speed import count_flops, matmul_peak


def test_flops_of_a_linear_layer_and_its_backward_pass() -> None:
    layer, x = nn.Linear(32, 8), torch.randn(5, 32, requires_grad=True)
    forward = 2 * 5 * 32 * 8
    assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * forward


def test_the_peak_is_what_a_product_takes() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak = matmul_peak(torch.device("cpu"), torch.float32, seconds=0.1)
        a = torch.randn(1024, 1024)
        begun = time.perf_counter()
        a @ a
        once = 2 * 1024**3 / (time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    assert 0.02 < once / peak < 10  # the same order of magnitude, on a machine as busy as it may be
