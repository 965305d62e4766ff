"""One process, two and four: the same loss, terms, gradients and state, for objectives that compare images.

Mutations that these tests caught when they were tried: gradients of gather or total left on their rank, every rank given
the first's, sums of one rank, ranks in another order, a count or mean of one rank in the batch norm, an unbiased variance,
half precision there, a maximum in place; and an objective that forgets to gather: the embeddings of vicreg, its batch
norm, KoLeo's features, the centre, the sums of Sinkhorn-Knopp, the similarities of distillation.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import spread
from torch.nn import functional as F

from selfsight.objectives.across import GlobalBatchNorm, gather, largest, total
from selfsight.objectives.teacher import write_outputs

DINO: dict[str, Any] = {
    "name": "dino", "outputs": 12, "head_width": 16, "bottleneck": 8, "local_views": 2, "local_view": {"size": 8},
    "freeze_prototypes": 0.0, "koleo": 0.1, "ibot": 1.0, "mask_probability": 0.7, "momentum": 0.9,
}  # fmt: skip
VICREG: dict[str, Any] = {"name": "vicreg", "covariance": 5.0}


def numbers(*shape: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).tolist()


NORM = {
    "kind": "batch_norm", "x": numbers(8, 5, seed=0), "upstream": numbers(8, 5, seed=1), "weight": numbers(5, seed=2),
    "bias": numbers(5, seed=3), "eps": 0.1,
}  # fmt: skip
COLLECTIVES = {"kind": "collectives", "x": numbers(8, 3, seed=4), "upstream": numbers(8, 3, seed=5)}
OBJECTIVES: dict[str, dict[str, Any]] = {
    # The Gram matrix is taken of the few images, the covariance of the many.
    "vicreg, wide": {"objective": VICREG | {"expander_width": 32}, "encoder": {"drop_path": 0.5}},
    "vicreg, narrow": {"objective": VICREG | {"expander_width": 6}},
    # The channels that a step shows are drawn for the whole batch; the moments of clips are three views.
    "vicreg, channels": {
        "objective": VICREG | {"expander_width": 6, "order": 3.0},
        "encoder": {"channels": 4, "channel_tokens": True},
    },
    "dino, centering": {"objective": DINO | {"balance": "centering"}, "encoder": {"drop_path": 0.5}},
    "dino, sinkhorn": {"objective": DINO | {"balance": "sinkhorn"}},
    "distill": {
        "objective": {"name": "distill", "teacher": "x", "augmentations": 1, "similarity": 2.0, "patches": 0.5}
    },
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By number of ranks and name of the job, what it gave."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = {name: {"kind": "objective", **job} for name, job in OBJECTIVES.items()}
    jobs["distill"]["objective"] |= {"stored": str(stored_teacher(folder / "teacher"))}
    results = spread([*jobs.values(), NORM, COLLECTIVES], folder)
    return {world: dict(zip([*jobs, "norm", "collectives"], given, strict=True)) for world, given in results.items()}


def stored_teacher(folder: Path) -> Path:
    """Random outputs of a teacher for 16 rows."""
    drawn = torch.Generator().manual_seed(0)
    outputs = {"embedding": torch.randn(16, 10, generator=drawn), "patches": torch.randn(16, 16, 10, generator=drawn)}
    about = {"weights": "x", "widths": {"embedding": 10, "patches": 10}}
    write_outputs(folder, {}, about, 16, [outputs])
    return folder


def assert_near(one: torch.Tensor, several: torch.Tensor, scale: float, name: str) -> None:
    """Equal to 1e-5 of the largest value, or to 4e-6 of `scale`.

    The second is for packed views: float32 rounding of sums that nearly cancel, which ranks cut at other places. In float64
    ranks agree to 6e-14.
    """
    one, several = one.double(), several.double()
    assert (one - several).abs().max().item() <= 1e-5 * one.abs().max().item() + 4e-6 * scale, name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_change_nothing(found: dict[int, dict[str, Any]], name: str, world: int) -> None:
    alone, spread_out = found[1][name], found[world][name]
    for one, several in zip(alone["steps"], spread_out["steps"], strict=True):
        assert several["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-5)
        assert several["terms"].keys() == one["terms"].keys()
        for term, value in one["terms"].items():
            assert several["terms"][term].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), term
        assert several["gradients"].keys() == one["gradients"].keys()
        # Some gradients are 0 but for rounding, such as that of a bias before a batch norm.
        scale = max(gradient.abs().max().item() for gradient in one["gradients"].values())
        for parameter, gradient in one["gradients"].items():
            assert_near(gradient, several["gradients"][parameter], scale, parameter)
    assert spread_out["state"].keys() == alone["state"].keys()
    for tensor, value in alone["state"].items():
        assert_near(value, spread_out["state"][tensor], 1.0, tensor)


def test_the_jobs_can_tell(found: dict[int, dict[str, Any]]) -> None:
    """What a term compares is there: no term is 0, the centre has moved, and the two steps differ."""
    for name in OBJECTIVES:
        first, second = found[1][name]["steps"]
        assert all(term.abs() > 1e-4 for term in (*first["terms"].values(), *second["terms"].values())), name
        assert first["loss"] != second["loss"]
    assert found[1]["dino, centering"]["state"]["center"].abs().sum(1).min() > 1e-4
    assert not found[1]["dino, sinkhorn"]["state"]["center"].any()
    assert first.keys() == {"loss", "terms", "gradients"}
    assert found[1]["vicreg, wide"]["steps"][0]["terms"].keys() == {"invariance", "variance", "covariance"}
    assert {"dino", "ibot", "koleo"} <= found[1]["dino, sinkhorn"]["steps"][0]["terms"].keys()


def reference_norm() -> dict[str, torch.Tensor]:
    """torch's batch norm of the whole batch, in float64."""
    x, weight, bias, upstream = (
        torch.tensor(NORM[name], dtype=torch.float64, requires_grad=True)
        for name in ("x", "weight", "bias", "upstream")
    )
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=NORM["eps"])
    gradients = torch.autograd.grad((y * upstream).sum(), (x, weight, bias))
    return {"y": y.detach()} | dict(zip(("x", "weight", "bias"), gradients, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batch_norm_is_torchs_of_the_whole_batch(found: dict[int, dict[str, Any]], world: int) -> None:
    for name, expected in reference_norm().items():
        assert torch.allclose(found[world]["norm"][name].double(), expected, rtol=1e-5, atol=1e-5), name


def test_batch_norm_far_from_zero_keeps_its_digits() -> None:
    """Statistics in two passes: a mean of 1,000 with a deviation of 0.1 costs no digits but those of the input."""
    x = 1000 + 0.1 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    expected = F.batch_norm(x.double(), None, None, training=True)
    found = GlobalBatchNorm(3)(x)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=2e-3)
    halves = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.batch_norm(halves.double(), None, None, training=True)
    assert torch.allclose(GlobalBatchNorm(3)(halves).double(), expected, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_collectives(found: dict[int, dict[str, Any]], world: int) -> None:
    """Every rank has the loss, so that the sum of the ranks' gradients is `world` times that of one process."""
    x, upstream = np.array(COLLECTIVES["x"]), np.array(COLLECTIVES["upstream"])
    given = {name: value.double().numpy() for name, value in found[world]["collectives"].items()}
    assert np.array_equal(given["gather"], x)
    assert np.array_equal(given["x untouched"], x)
    assert np.allclose(given["total"], x.sum(0), atol=1e-5)
    assert np.array_equal(given["largest"], x.reshape(world, -1, 3).max(0))
    assert np.allclose(given["gradient of gather"], world * 2 * x * upstream, atol=1e-5)
    expected = np.broadcast_to(world * 2 * x.sum(0) * upstream[0], x.shape)
    assert np.allclose(given["gradient of total"], expected, atol=1e-4)


def test_alone_nothing_is_copied() -> None:
    x = torch.ones(2, 3)
    assert gather(x) is x
    assert total(x) is x
    assert largest(x) is x
