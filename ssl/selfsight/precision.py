"""In which arithmetic a run multiplies, and how a loss keeps its own products exact in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from selfsight.errors import UsageError

FP8_CAPABILITY = (8, 9)  # Ada and later: the first whose matrix units multiply 8-bit floats
FP8_MULTIPLE = 16  # of every side of an 8-bit product

# name -> (what Accelerate calls its autocast, may fp32 products use TF32, may fp32 convolutions). In bf16 and fp8 all
# products of a step but those of exact losses are autocast's already: TF32 would only reach the scores, so it stays as
# torch has it.
ARITHMETIC = {
    "fp32": ("no", False, False),
    "tf32": ("no", True, True),
    "bf16": ("bf16", False, True),
    "fp8": ("bf16", False, True),
}


def resolve(precision: str, device: torch.device) -> str:
    """A key of ARITHMETIC; auto is bf16 on a GPU and fp32 on a CPU.

    Raises:
        UsageError: an arithmetic that the device does not have.
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision in ("tf32", "fp8") and device.type != "cuda":
        raise UsageError(f"train.precision: {precision} is a GPU's; on a CPU use fp32 or bf16")
    if precision == "fp8" and (found := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        needs, has = (".".join(map(str, version)) for version in (FP8_CAPABILITY, found))
        raise UsageError(
            f"train.precision: fp8 needs a GPU of compute capability {needs}, this one has {has}; use bf16"
        )
    return precision


def set_products(precision: str) -> None:
    """Whether fp32 products and convolutions on a GPU may round their factors to TF32's 10 bits, in this whole process.

    By torch's older switches: code of its own (inductor's products) still reads them, and they raise once the newer
    `fp32_precision` was set beside them; what sets the older keeps both in step.
    """
    _, products, convolutions = ARITHMETIC[precision]
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def exact(x: Tensor) -> Iterator[None]:
    """Arithmetic as precise as the tensors, whatever autocast and TF32 say: for losses whose sums are long.

    Autocast casts nothing here, so the backward pass has nothing to cast back. TF32 is another matter: a switch of the
    process that is read when a product starts, and products of the backward pass start long after this region was left.
    So each step of the graph that is made here turns it off while it runs backward.
    """
    with torch.autocast(x.device.type, enabled=False):
        if not torch.backends.cuda.matmul.allow_tf32:
            yield
            return
        _allow(False)
        try:
            with _ExactBackward():
                yield
        finally:
            _allow(True)


class _ExactBackward(TorchFunctionMode):
    """Hooks on every node of autograd's graph that is made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What an operation is given was made outside, or by an operation that was seen.
        self.seen |= {tensor.grad_fn for tensor in _tensors((args, kwargs)) if tensor.grad_fn is not None}
        made = function(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            self._mark(tensor.grad_fn)
        return made

    def _mark(self, node: Any) -> None:
        """An operation may be several nodes, as einsum is."""
        if node is None or node in self.seen or node.name().endswith("AccumulateGrad"):
            return
        self.seen.add(node)
        node.register_prehook(lambda gradients: _allow(False))
        node.register_hook(lambda after, before: _allow(True))
        for earlier, _ in node.next_functions:
            self._mark(earlier)


def apply(function: type[torch.autograd.Function], *given: Tensor) -> Any:
    """`function.apply(*given)`, whose backward pass `exact` keeps exact, too: autograd itself tells no mode of it."""
    if torch.overrides.has_torch_function(given):
        return torch.overrides.handle_torch_function(function.apply, given, *given)
    return function.apply(*given)


def _allow(tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = tf32


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
