"""Deterministic mode: the same bits on any number of ranks, and what the ordinary mode computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Job, Launcher, words

from selfsight.assemble import assemble
from selfsight.backward import with_same_weights
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.metrics import TIMING
from selfsight.objectives import build_objective, parse_objective
from selfsight.objectives.across import Parts, gather, largest, ranks, total, tree_sum
from selfsight.objectives.mae import MAE
from selfsight.processes import join
from selfsight.recipe import DataConfig, EncoderConfig, load
from selfsight.run_folder import read_lines

Start = Callable[..., Job]
OWN: dict[str, dict[str, Any]] = {
    "vicreg": {"objective.expander_width": 16},
    "dino": {"objective.outputs": 16, "objective.head_width": 8, "objective.bottleneck": 8, "encoder.heads": 2},
}
FIELDS = {
    "train.steps": 3,
    "train.batch_size": 16,
    "train.deterministic": 4,
    "encoder.drop_path": 0.1,
    "encoder.depth": 2,
}


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The bytes of the last checkpoint's tensors, and the metrics but for time and what only one rank looks at."""
    files = (folder / "checkpoints" / "step-00000003").glob("*.safetensors")
    lines = [
        {key: value for key, value in line.items() if key not in TIMING and not key.startswith("watch")}
        for line in read_lines(folder / "metrics.jsonl")
    ]
    return {file.name: file.read_bytes() for file in files}, lines


@pytest.mark.parametrize(
    "objective",
    ["mae", "vicreg", "distill", *(pytest.param(name, marks=pytest.mark.slow) for name in ("simmim", "rotation"))],
)
def test_bits_do_not_depend_on_the_number_of_ranks(start: Start, tmp_path: Path, objective: str) -> None:
    found = []
    for world in (1, 2, 4):
        fields = FIELDS | OWN.get(objective, {}) | {"run_dir": tmp_path / str(world)}
        job = start(world, fields=fields, objective=objective)
        assert job.wait(100) == [0] * world, job.told()
        found.append(outcome(tmp_path / str(world)))
    assert found[0][0].keys() == {"model.safetensors", "optim.safetensors"}
    assert len(found[0][1]) == 3
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("objective", ["mae", "vicreg"])
def test_it_learns_what_the_ordinary_mode_learns(start: Start, tmp_path: Path, objective: str) -> None:
    """Another rounding, nothing else; accumulation too."""
    for name, more in {
        "plain": {"train.deterministic": 0},
        "parts": {},
        "both": {"train.deterministic": 2, "train.accumulate": 2},
    }.items():
        if objective == "vicreg" and name == "both":
            continue  # its micro-batches are another objective
        fields = FIELDS | OWN.get(objective, {}) | more | {"run_dir": tmp_path / name}
        assert start(1, fields=fields, objective=objective).wait(60) == [0]
    plain = outcome(tmp_path / "plain")[1]
    for folder in tmp_path.glob("[pb]*"):
        for a, b in zip(plain, outcome(folder)[1], strict=True):
            assert a == {key: pytest.approx(value, rel=1e-5, abs=1e-5) for key, value in b.items()}


def test_ordinary_sums_do_depend_on_it(start: Start, tmp_path: Path) -> None:
    """Negative control: the comparison above can fail."""
    for world in (1, 2):
        fields = FIELDS | {"train.deterministic": 0, "run_dir": tmp_path / str(world)}
        assert start(world, fields=fields).wait(60) == [0] * world
    assert outcome(tmp_path / "1")[0] != outcome(tmp_path / "2")[0]


def test_the_switch_of_the_command_line(launcher: Launcher, small_fields: dict[str, Any], tmp_path: Path) -> None:
    job = launcher.start(["pretrain", "digits/mae", "--deterministic", *words(small_fields)])
    assert job.wait(60) == [0]
    assert load(tmp_path / "run" / "recipe.yaml").train.deterministic == 8


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"train.deterministic": 6}, "is not a power of two"),
        ({"train.deterministic": 32}, "batch_size 8 does not split into 1 x 32 parts"),
        ({"train.deterministic": 8, "train.compile": True}, "compiled blocks round in another way"),
    ],
)
def test_parts_that_do_not_fit_are_refused(small_fields: dict[str, Any], fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load("digits/mae", small_fields | fields)


@pytest.mark.parametrize(("fields", "threads"), [({}, 1), ({"train.threads": 2}, 2)])
def test_sums_have_the_same_number_of_threads_everywhere(
    small_fields: dict[str, Any], fields: dict[str, Any], threads: int
) -> None:
    torch.set_num_threads(3)
    try:
        join(load("digits/mae", small_fields | {"train.deterministic": 8} | fields))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_running_statistics_are_refused(small_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = MAE.__init__

    def with_norm(self: MAE, *arguments: Any) -> None:
        made(self, *arguments)
        self.normed = torch.nn.BatchNorm1d(3)

    monkeypatch.setattr(MAE, "__init__", with_norm)
    with pytest.raises(UsageError, match=r"train.deterministic: .* has batch norms"):
        assemble(load("digits/mae", small_fields | {"train.deterministic": 8}), torch.device("cpu"))


def test_ranks_that_the_parts_do_not_split_over_are_refused(start: Start) -> None:
    job = start(3, fields={"train.deterministic": 4, "train.batch_size": 12})
    assert job.wait(30) == [2, 2, 2]
    assert "train.deterministic: 4 parts do not split over 3 ranks" in job.told(0)


# -- the parts of a batch


def test_a_tree_adds_neighbours_first() -> None:
    values = [torch.tensor(v) for v in (1e8, 1.0, -1e8, 1.0)]
    assert tree_sum(values).item() == ((torch.tensor(1e8) + 1.0) + (torch.tensor(-1e8) + 1.0)).item()
    with pytest.raises(ValueError):  # no power of two
        tree_sum(values[:3])


def test_parts_meet_as_ranks_do() -> None:
    x = torch.arange(8.0).view(4, 2).requires_grad_()
    seen: list[int] = []
    rows = torch.tensor([[1.0], [2.0], [3.0], [5.0]])

    def part(number: int) -> torch.Tensor:
        mine = x[number : number + 1]
        seen.append(number)
        assert ranks() == 4
        whole, summed, most = gather(mine), total(mine.sum(0)), largest(mine.max())
        assert whole.tolist() == x.tolist()
        assert summed.tolist() == [12.0, 16.0]
        assert most.item() == 7.0
        loss = (whole * rows * (number + 1)).sum() + summed.prod()
        loss.backward()
        return loss.detach()

    Parts(4).run([lambda number=number: part(number) for number in range(4)])  # type: ignore[misc]
    assert seen == [0, 1, 2, 3]  # in turn
    expected = rows.expand(4, 2) * (1.0 + 2 + 3 + 4) + 4 * torch.tensor([16.0, 12.0])
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    assert ranks() == 1


def test_an_error_in_one_part_ends_all() -> None:
    def part(number: int) -> torch.Tensor:
        if number == 2:
            raise UsageError("part 2")
        return gather(torch.ones(1))

    with pytest.raises(UsageError, match="part 2"):
        Parts(4).run([lambda number=number: part(number) for number in range(4)])  # type: ignore[misc]


def test_a_copy_has_the_weights_and_its_own_gradients() -> None:
    config = EncoderConfig(image_size=16, patch=4, width=24, depth=2, heads=2)
    encoder = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    made = build_objective(parse_objective({"name": "dino", "outputs": 8, "head_width": 8, "bottleneck": 4}), encoder)
    other = with_same_weights(made)
    ours, theirs = dict(made.named_parameters()), dict(other.named_parameters())
    assert json.dumps(list(ours)) == json.dumps(list(theirs))
    for name, parameter in ours.items():
        assert theirs[name] is not parameter
        assert theirs[name].data_ptr() == parameter.data_ptr()
        assert theirs[name].requires_grad == parameter.requires_grad
    assert all(a is b for a, b in zip(made.buffers(), other.buffers(), strict=True))
    assert other.encoder is not made.encoder
