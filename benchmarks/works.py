"""The works that step.py compares, and selfsight's side of them: the objects that a user's run is made of."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from absent import stand_in

PACKAGES = {"lightly": "pip install 'selfsight[bench]'", "transformers": "pip install 'selfsight[bench]'"}
REPOSITORIES = {
    "mae": "facebookresearch/mae",
    "solo-learn": "vturrisi/solo-learn",
    "simmim": "microsoft/SimMIM",
    "vicreg": "facebookresearch/vicreg",
}
PEERS = (*PACKAGES, *REPOSITORIES)


class Missing(Exception):
    """A competitor that this machine does not have, and how to get it."""


@dataclass(frozen=True)
class Work:
    """A step of training, the same for all who do it."""

    rivals: tuple[str, ...]
    """Who else does it; what follows a colon is a variant."""
    objective: dict[str, Any]
    """The recipe's section."""
    cpu_batch: int
    gpu_batch: int
    precision: str | None = None
    """Where it is part of the work."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """The recipe's section."""
    gpu_only: bool = False
    """Left out on a CPU unless it is asked for by name."""


B16, S16 = {"name": "vit_base_patch16_224"}, {"name": "vit_small_patch16_224"}
EXPLICIT = (
    "lightly:explicit",
    "transformers:explicit",
)  # in bf16 on a CPU, where their fused attention is 2 to 7 times slower
MAE_RIVALS = (
    "lightly",
    "lightly:explicit",
    "transformers",
    "transformers:explicit",
    "mae",
    "mae:explicit",
    "solo-learn",
)
TINY = {"decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4}  # of recipes/cifar10/mae.yaml
WORKS = {
    "mae": Work(MAE_RIVALS, {"name": "mae"}, 8, 256, encoder=B16),
    "mae-fp32": Work(("mae", "mae:explicit"), {"name": "mae"}, 8, 256, "fp32", encoder=B16),
    "mae-cross": Work(
        ("mae", "mae:explicit"), {"name": "mae", "decoder": "cross", "decoder_depth": 12, "predict_ratio": 1 / 3}, 8, 256, encoder=B16
    ),
    "mae-large": Work(
        ("mae", "mae:explicit"), {"name": "mae"}, 4, 256, encoder={"name": "vit_large_patch16_224"}, gpu_only=True
    ),
    "cifar": Work(
        ("mae", "mae:explicit"), {"name": "mae", **TINY}, 64, 1024, encoder={"image_size": 32, "patch": 4}
    ),
    "simmim": Work(("simmim", "simmim:rpb"), {"name": "simmim"}, 8, 256, encoder=S16),
    "vicreg-loss-2048": Work(("vicreg", "lightly"), {"name": "vicreg", "expander_width": 2048}, 256, 256, "fp32"),
    "vicreg-loss-8192": Work(("vicreg", "lightly"), {"name": "vicreg", "expander_width": 8192}, 256, 256, "fp32"),
    "vicreg": Work(("lightly", "lightly:explicit"), {"name": "vicreg"}, 8, 256, encoder=S16),
    "dino": Work(("lightly", "lightly:explicit"), {"name": "dino"}, 2, 64, encoder=S16),
}  # fmt: skip
SHORT = {"vicreg-loss": ("vicreg-loss-2048", "vicreg-loss-8192")}


@dataclass
class Training:
    """One competitor's step and what is known of it."""

    step: Callable[[], object]
    parameters: int
    """Trained ones."""
    compile: Callable[[], object] = lambda: None
    """Has torch compile what a user would compile."""
    note: str = ""
    """What was needed to run it."""
    alone: Callable[[], object] | None = None
    """The step without what it tells the other ranks; selfsight's only."""


def imported(spec: dict[str, Any]) -> Callable[[], Training]:
    """What builds the competitor that a spec names; all that it imports is imported by then.

    Raises:
        Missing: its package or path, or a part of selfsight, is not there; what it gives may raise it too.
    """
    who, _, variant = spec["who"].partition(":")
    if who == "selfsight":
        gone = stand_in()
        try:
            from selfsight import assemble, backward, finite, processes  # noqa: F401
        except ModuleNotFoundError as error:
            raise Missing(f"selfsight needs {error.name}: pip install . in its checkout") from None
        note = (f"without {', '.join(gone)}, which no step uses; " if gone else "") + own_note(spec)
        make = selfsights_loss if "loss" in spec["work"] else selfsights
        return lambda: replace(make(spec), note=note)
    if who in REPOSITORIES:
        path = spec["paths"].get(who)
        if not path:
            raise Missing(f"give --{who} PATH, a checkout of github.com/{REPOSITORIES[who]}")
        if not Path(path).is_dir():
            raise Missing(f"--{who} {path}: no such folder")
    try:
        module = importlib.import_module(f"peers.{who.replace('-', '_')}_peer")
    except ModuleNotFoundError as error:
        raise Missing(f"{error.name} is not installed: {PACKAGES.get(who, f'pip install {error.name}')}") from None
    return lambda: module.build(spec, variant)


def own_note(spec: dict[str, Any]) -> str:
    """What selfsight's process has that a peer's has not."""
    own = [] if "loss" in spec["work"] else ["fused AdamW"]
    own += ["an allocator that keeps what is freed"] if spec["device"] == "cpu" and own else []
    return f"with {' and '.join(own)}, as a run" if own else ""


def recipe_of(spec: dict[str, Any]) -> Any:
    """The recipe whose step is timed; its data are never read."""
    from selfsight.recipe import validate

    work = WORKS[spec["work"]]
    model = {"name": spec["model"]} if spec["model"] else {}
    train = {
        "steps": 10**9,
        "batch_size": spec["batch"] * spec.get("world", 1),
        "precision": spec["precision"],
        "threads": spec["threads"],
    }
    train |= {"device": spec["device"], "compile": spec["compile"]}
    train |= {"parallel": spec["parallel"]} if "parallel" in spec else {}
    tree = {"run_dir": "/nowhere", "data": {"train": "nowhere"}, "train": train}
    return validate(tree | {"encoder": work.encoder | model, "objective": dict(work.objective)}, spec["work"])


def selfsights(spec: dict[str, Any]) -> Training:
    """The step of `selfsight pretrain` on a batch that lies on the device: norm, clipping, rates and what follows the weights
    as in its loop, without the loop's check of the numbers, ledger and metrics (overhead.py times those)."""
    from selfsight.finite import gradient_norm
    from selfsight.processes import join
    from selfsight.train import update

    recipe = recipe_of(spec)
    accelerator = join(recipe)
    parts, backward = assembled(recipe, accelerator)
    objective = parts.objective.train()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    batches = resident_batches(spec["batch"], parts.encoder.preprocessing, objective.views, accelerator.device)
    steps = iter(range(10**9))

    def step() -> None:
        number = next(steps)
        backward([None], lambda _: batches(number))  # type: ignore[list-item]
        update(parts, number, trained, gradient_norm(trained))
        parts.optimizer.zero_grad()
        backward.forget()

    def alone() -> None:
        with accelerator.no_sync(backward.model):
            step()

    # Sharded weights are gathered in every step: none is without the others.
    return Training(step, sum(parameter.numel() for parameter in trained), alone=None if parts.sharded else alone)


class Nowhere:
    """A set whose samples nobody reads."""

    spec, id, sets = "nowhere", "nowhere", ()

    def __len__(self) -> int:
        return 10**9


def assembled(recipe: Any, accelerator: Any) -> tuple[Any, Any]:
    """The parts of a run and what makes its gradients, as `train` puts them together."""
    from selfsight import assemble, backward
    from selfsight.optim import make_moments

    with patch.object(assemble, "open_samples", lambda data: Nowhere()):
        parts = assemble.assemble(recipe, accelerator.device, world=accelerator.num_processes)
    make_moments(parts.optimizer)
    kind = backward.Sharded if parts.sharded else backward.Averaged
    return parts, kind(parts.objective, accelerator)


def resident_batches(size: int, preprocessing: Any, views: Any, device: Any) -> Callable[[int], Any]:
    """The batch of step `number`: the same views every time, with the draws of that step."""
    import torch

    from selfsight.data.placer import Batch

    torch.manual_seed(0)
    sides = [view.size or preprocessing.image_size for view in views]
    images = tuple(torch.randn(size, preprocessing.channels, side, side, device=device) for side in sides)
    return lambda number: Batch(images, torch.arange(number * size, (number + 1) * size), 0, progress=0.5)


def selfsights_loss(spec: dict[str, Any]) -> Training:
    """VICReg's loss alone, forward and backward."""
    from selfsight.objectives.vicreg import loss_terms

    pair = embeddings(spec)
    weights = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}

    def step() -> None:
        loss = sum(weights[name] * term for name, term in loss_terms(*pair).items())
        loss.backward()
        forget(pair)

    return Training(step, 0)


def embeddings(spec: dict[str, Any]) -> tuple[Any, Any]:
    """Two views' embeddings (batch, width), the leaves of a graph."""
    import torch

    torch.manual_seed(0)
    shape = spec["batch"], WORKS[spec["work"]].objective["expander_width"]
    first, second = (torch.randn(shape, device=spec["device"], requires_grad=True) for _ in range(2))
    return first, second


def forget(pair: tuple[Any, Any]) -> None:
    """Drop the gradients."""
    for leaf in pair:
        leaf.grad = None
