"""facebookresearch/vicreg: the loss of main_vicreg.py, called where it stands, on one process."""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from works import Training, embeddings, forget


def build(spec: dict[str, Any], variant: str) -> Training:
    """Forward and backward of the loss, from embeddings on."""
    sys.path.insert(0, spec["paths"]["vicreg"])
    import main_vicreg

    # Its gathering over ranks wants a group, here of one.
    store = Path(tempfile.mkdtemp(prefix="vicreg-")) / "store"
    backend = "nccl" if spec["device"] == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", world_size=1, rank=0)
    pair = embeddings(spec)
    args = SimpleNamespace(batch_size=spec["batch"], sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0)
    same = lambda x: x  # noqa: E731
    self = SimpleNamespace(args=args, num_features=pair[0].shape[1], projector=same, backbone=same)

    def step() -> None:
        main_vicreg.VICReg.forward(self, *pair).backward()
        forget(pair)

    return Training(step, 0)
