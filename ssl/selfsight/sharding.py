"""FSDP2: of a large model every rank keeps its share of each tensor, and the whole of a block only while it computes it.

Units are the blocks of every encoder (student, teacher, running average); the rest of an objective is one more, gathered
for the whole of its forward and backward pass, so that tokens, prototypes and stems can be read anywhere in it. Files
know nothing of this: checkpoints hold whole tensors under the names that they have without it.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight.encoder import Encoder
from selfsight.errors import UsageError

LARGE = 10**9  # parameters of an encoder; below, 16 bytes for each fit every GPU of today, and DDP sends once a step


def sharded_by(
    parallel: Literal["auto", "ddp", "fsdp"], parameters: int, world: int, device: str, deterministic: bool = False
) -> bool:
    """Whether a run is sharded.

    Args:
        parallel: what the recipe says; auto: large encoders on several GPUs are.
        parameters: of the encoder.
        world: processes of the run; one has nothing to share, and trains plainly.
        device: "cuda" or "cpu".
        deterministic: whether gradients are summed along one tree, which shards cannot.
    """
    if parallel == "auto":
        return world > 1 and device == "cuda" and parameters >= LARGE and not deterministic
    return parallel == "fsdp" and world > 1


def shard(objective: nn.Module, average: Encoder | None, device: torch.device, half: bool) -> None:
    """Shard an objective and the running average of its encoder in place, over all ranks.

    Every rank has built all of it on the CPU; no more than one unit at a time is whole on the device.

    Args:
        half: whether blocks compute in bfloat16; what is kept, and the sum of gradients over ranks, is float32.

    Raises:
        UsageError: batch norms, whose running statistics each rank would make of its own images.
    """
    if any(isinstance(module, _BatchNorm) for module in objective.modules()):
        raise UsageError("train.parallel: fsdp: this encoder has batch norms; choose a vit_*, or ddp")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Autocast rounds the operands of products. Of float32 blocks it would keep rounded copies until the backward pass, so
    # that all weights were there at once after all; blocks are therefore gathered in bfloat16, half the bytes to send.
    # Inputs stay as they are: the residual stream, norms and losses are in the precision that they have under DDP.
    kept = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half else kept
    roots = [objective, *([average] if average else [])]
    for encoder in (module for root in roots for module in root.modules() if isinstance(module, Encoder)):
        units = [fully_shard(block, mesh=mesh, mp_policy=rounded) for block in encoder.blocks]
        for unit, following in pairwise(units):
            unit.set_modules_to_forward_prefetch([following])  # backward does so by itself
        if (
            half and device.type == "cpu"
        ):  # whose norms take no float32 with bfloat16 weights; a GPU's autocast widens these
            for norm in (module for module in encoder.blocks.modules() if isinstance(module, nn.LayerNorm)):
                norm.register_forward_pre_hook(lambda module, given: tuple(x.to(module.weight.dtype) for x in given))
    for root in roots:
        fully_shard(root, mesh=mesh, mp_policy=kept)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was given it."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This rank's share, over the same memory; of a tensor that is not sharded, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, where it lies. Every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the part that is this rank's of `like`.

    Raises:
        RuntimeError: another shape.
    """
    if tensor.shape != like.shape:
        raise RuntimeError(f"a tensor of shape {[*tensor.shape]} where there should be {[*like.shape]}")
    if not isinstance(like, DTensor):
        return tensor
    shares, rank = tensor.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return shares[rank] if rank < len(shares) else tensor[:0]


def beside(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, where its parameter is and sharded as that is; one of another shape, such as a count, stays whole."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    own = share_of(tensor, parameter).to(parameter.device, copy=True)  # a view would keep all of it
    return DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU of tensors that may be sharded, whole; every rank must ask for them, in the same order.

    They are gathered one by one, so that no device holds more of them than one.

    Args:
        keep: whether this rank wants them; else it only helps, and gets none.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.to("cpu", copy=not isinstance(tensor, DTensor))
    return found


def copy_whole(source: nn.Module, into: nn.Module | None) -> None:
    """Copy the weights of a module that may be sharded into a plain one, tensor by tensor; every rank must take part.

    Args:
        into: None on ranks that only help.
    """
    targets = into.state_dict() if into else {}
    for name, tensor in source.state_dict().items():
        full = whole(tensor)
        if into:
            targets[name].copy_(full)


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, of which a sharded module takes its rank's share.

    Raises:
        RuntimeError: names or shapes are others.
    """
    if not is_sharded(module):
        module.load_state_dict(tensors, strict=True)
        return
    own = module.state_dict()
    if other := sorted(own.keys() ^ tensors.keys()):
        raise RuntimeError(f"missing or unexpected: {', '.join(other)}")
    for name, tensor in own.items():
        local(tensor).copy_(share_of(tensors[name], tensor))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory of this rank's shares."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)
