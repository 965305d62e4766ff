"""Compiled transformer blocks: one graph for all blocks of a kind and every shape, replayed as a CUDA graph if asked.

Blocks are compiled one by one: they share their code, so dynamo finds the first one's graph again for each of the others,
whose weights and drop rates are inputs. What makes another graph is another kind of block (the first has no drop path), a
resolution, a batch size, training or not, gradients or not: few, and known after the first step.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

MODE = "default"  # "max-autotune-no-cudagraphs" also times kernels, by which a resumed run might choose other ones
GRAPHS = 64  # of one piece of code, before torch gives up on it: its own limit of 8 is below a multi-crop joint's


def compile_blocks(
    objective: nn.Module, blocks: Iterable[nn.Module], cuda_graphs: bool = False, **options: Any
) -> None:
    """Have each of an objective's blocks compiled when it first runs. Names and state stay as they are.

    With CUDA graphs by inductor's trees ("reduce-overhead"), and not by `torch.cuda.make_graphed_callables`: that one
    records one shape, and a block that runs twice before its backward pass, as on two views, would silently overwrite
    what the first run had kept. Trees record each run of a step at its own addresses, under `no_grad` too, and refuse
    what they would overwrite; drop paths are inputs to them, and DDP's buckets see ordinary gradients.

    Args:
        options: for torch.compile, such as another backend.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    mode = {"mode": "reduce-overhead" if cuda_graphs else MODE}
    for block in blocks:
        # Shapes are few and repeat: a graph for each is faster than one for all, and than finding out.
        block.compile(dynamic=False, **mode | options)
    if cuda_graphs:  # what the last step's graphs left may be overwritten from here on
        objective.register_forward_pre_hook(_begin_step)


def _begin_step(module: nn.Module, given: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()


def eager(encoder: nn.Module) -> AbstractContextManager[Any]:
    """Run an encoder's blocks as they are written: scores are then those of the exported encoder, and batches of other
    sizes compile nothing."""
    compiled = any(module._compiled_call_impl is not None for module in encoder.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
