"""A process that never sees this package: what it reads is what everybody else will read."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfsight.errors import StorageError

DEADLINE = 600  # seconds; timm starts in 5, but a disk may be asleep
_BEFORE = """
import sys, torch
from safetensors.torch import load_file, save_file
folder, sample = sys.argv[1:]
"""
_AFTER = """
found = {}
with torch.inference_mode():
    for size, images in load_file(sample).items():
        found |= {name + " " + size: value.float().contiguous().clone() for name, value in outputs(images).items()}
assert "selfsight" not in sys.modules
save_file(found, sample + ".out")
"""


def script(clean: str) -> str:
    """The whole of what runs there, for a format's `clean`."""
    return _BEFORE + clean + _AFTER


def outputs_of(folder: Path, clean: str, batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a format's own reader, without us, makes of these batches: {"name batch": tensor}.

    Raises:
        StorageError: it cannot load the folder, or not in time.
    """
    sample = folder / "check.safetensors"
    save_file(batches, sample)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", script(clean), str(folder.resolve()), str(sample.resolve())]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        raise StorageError(
            f"{folder}: a process of its own did not load the export within {DEADLINE} seconds"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        raise StorageError(f"{folder}: a process of its own could not load the export: {last[:300]}")
    found = load_file(str(sample) + ".out")
    sample.unlink()
    Path(str(sample) + ".out").unlink()
    return {name: tensor.clone() for name, tensor in found.items()}


def batches_of(shape: tuple[int, ...], sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random normalised inputs in batches of these sizes, by their size."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(max(sizes), *shape, generator=random)
    return {str(size): images[:size].clone() for size in sizes}
