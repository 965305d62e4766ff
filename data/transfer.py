"""Small tensors on their way to the device, without waiting for it."""

import torch
from torch import Tensor


def without_waiting(small: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on the device, in its turn among what that computes.

    From memory that is not pinned even a `non_blocking` copy to a GPU may hold up the host until the GPU has come to it.
    """
    return small.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else small.to(device)
