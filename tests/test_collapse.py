"""The measures of spread against slow loops, the alarm with vectors made for it, and short runs that do collapse.

Mutations that these tests caught when they were tried: the count never reset, shared by all names, one look more or less;
the threshold turned round, doubled or halved; a warning at every look, for one name only, or from every rank; only the first
rank stops; the sum over ranks; all rows or the last; vectors not normalised; the deviation of one dimension, uncentred or
squared; the mean cosine with the vector itself; RankMe of centred or raw vectors, from squared singular values, from the
larger Gram matrix, without exp.
"""

from collections.abc import Callable
from math import log, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsight.assemble import assemble
from selfsight.collapse import EVERY, LIMITS, PATIENCE, ROWS, CollapseWatch, Limits, spread
from selfsight.errors import NumericError
from selfsight.eval.health import rankme
from selfsight.objectives.base import Loss, Objective
from selfsight.objectives.dino import DINO
from selfsight.optim import lr_at, set_rates
from selfsight.past import Past
from selfsight.recipe import load


class One:
    """An accelerator of one rank."""

    def __init__(self, is_main_process: bool = True) -> None:
        self.is_main_process = is_main_process
        self.asked: set[str] = set()

    def wait_for_everyone(self) -> None:
        self.asked.add("barrier")

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        self.asked.add(reduction)
        return value


def look(watch: CollapseWatch, step: int, rank: One | None = None, **vectors: Tensor) -> dict[str, float]:
    accelerator: Any = rank or One()
    return watch(EVERY * step, Loss(torch.tensor(0.0), {}, vectors), accelerator)


def vectors(noise: float, seed: int = 0, rows: int = 24, width: int = 12) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.ones(width) + noise * torch.randn(rows, width, generator=draw)


def slow_rank(features: np.ndarray) -> float:
    values = np.linalg.svd(features, compute_uv=False)
    return float(np.exp(-sum((v / values.sum() + 1e-7) * log(v / values.sum() + 1e-7) for v in values)))


@pytest.mark.parametrize("shape", [(7, 5), (4, 40), (30, 3)])
@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_spread_is_a_slow_loop(shape: tuple[int, int], noise: float) -> None:
    given = vectors(noise, rows=shape[0], width=shape[1])
    unit = [row / sqrt(sum(value**2 for value in row)) for row in given.double().numpy()]
    deviations = [np.std([row[k] for row in unit]) for k in range(shape[1])]
    cosines = [(unit[i] * unit[j]).sum() for i in range(shape[0]) for j in range(shape[0]) if i != j]
    found = {name: value.item() for name, value in spread(given).items()}
    assert found["std"] == pytest.approx(sqrt(np.mean(np.square(deviations))) * sqrt(shape[1]), rel=1e-4)
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert found["rank"] == pytest.approx(slow_rank(np.stack(unit)), rel=1e-4)


def test_spread_at_its_ends() -> None:
    same = {name: value.item() for name, value in spread(torch.ones(9, 4)).items()}
    assert same == pytest.approx({"std": 0.0, "cosine": 1.0, "rank": 1.0}, abs=1e-3)
    apart = {name: value.item() for name, value in spread(torch.eye(6)).items()}
    assert apart == pytest.approx({"std": sqrt(5 / 6), "cosine": 0.0, "rank": 6.0}, abs=1e-4)
    opposite = spread(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    assert (opposite["std"].item(), opposite["cosine"].item()) == pytest.approx((1.0, -1.0))
    longer = spread(vectors(0.5) * torch.arange(1, 25)[:, None])
    assert {name: value.item() for name, value in longer.items()} == pytest.approx(
        {name: value.item() for name, value in spread(vectors(0.5)).items()}, rel=1e-4
    )
    assert spread(torch.randn(1, 4))["cosine"].isfinite()


def test_spread_looks_at_the_first_rows_only_and_takes_half_precision() -> None:
    many = vectors(1.0, rows=ROWS + 40)
    for name, value in spread(many).items():
        assert value.item() == pytest.approx(spread(many[:ROWS])[name].item())
        assert value.item() != pytest.approx(spread(many[: ROWS - 1])[name].item(), rel=1e-6)
    half = spread(vectors(1.0).bfloat16())
    assert all(value.dtype == torch.float32 for value in half.values())
    assert half["std"].item() == pytest.approx(spread(vectors(1.0))["std"].item(), abs=1e-2)


@pytest.mark.parametrize("shape", [(5, 19), (5, 20), (5, 21), (5, 60), (40, 6), (1, 9)])
def test_rankme_is_numpys_svd_whatever_the_shape(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    assert rankme(features) == pytest.approx(slow_rank(features.double().numpy()), rel=1e-6)
    assert rankme(features * 100) == pytest.approx(rankme(features), rel=1e-6)


def test_rankme_counts_directions() -> None:
    assert rankme(torch.eye(8)) == pytest.approx(8, abs=1e-3)
    assert rankme(torch.ones(10, 60)) == pytest.approx(1, abs=1e-3)
    planes = torch.cat([torch.eye(8)[:2]] * 5)
    assert rankme(planes) == pytest.approx(2, abs=1e-3)
    assert rankme(torch.cat([planes, torch.zeros(10, 80)], dim=1)) == pytest.approx(2, abs=1e-3)


def test_vectors_of_zero_have_a_finite_spread() -> None:
    assert all(value.isfinite() for value in spread(torch.zeros(5, 4)).values())
    assert all(value.isfinite() for value in spread(torch.zeros(5, 40)).values())


def test_the_line_has_every_measure_of_every_name() -> None:
    rank = One()
    line = look(CollapseWatch(True, Past()), 10, rank, feature=vectors(1.0), teacher=vectors(2.0))
    assert rank.asked == {"mean"}
    for name, given in (("feature", vectors(1.0)), ("teacher", vectors(2.0))):
        for key, value in spread(given).items():
            assert line[f"watch/{name}/{key}"] == pytest.approx(value.item(), abs=1e-5)
    assert len(line) == 6
    assert look(CollapseWatch(True, Past()), 10) == {}


def test_the_alarm_comes_after_enough_looks_in_a_row() -> None:
    watch = CollapseWatch(True, Past())
    for number in range(PATIENCE - 1):
        look(watch, number, feature=vectors(1e-4))
    with pytest.raises(
        NumericError, match=r"step 770: collapse: the feature vectors .* for 50 steps.*on_collapse: stop"
    ):
        look(watch, 77, feature=vectors(1e-4))
    assert PATIENCE == 5


def test_one_look_at_different_vectors_starts_the_count_anew() -> None:
    watch = CollapseWatch(True, Past())
    for noise in [1e-4] * (PATIENCE - 1) + [1.0] + [1e-4] * (PATIENCE - 1):
        look(watch, 1, feature=vectors(noise))
    with pytest.raises(NumericError):
        look(watch, 2, feature=vectors(1e-4))


def test_lines_between_the_looks_are_not_counted() -> None:
    watch, accelerator = CollapseWatch(True, Past()), One()
    for step in range(1, EVERY * PATIENCE):
        line = watch(step, Loss(torch.tensor(0.0), {}, {"feature": vectors(1e-4)}), accelerator)  # type: ignore[arg-type]
        assert line["watch/feature/std"] < 1e-3


def test_each_name_is_counted_alone() -> None:
    watch = CollapseWatch(True, Past())
    for number in range(4 * PATIENCE):
        flat, other = (1e-4, 1.0) if number % 2 else (1.0, 1e-4)
        look(watch, number, first=vectors(flat), second=vectors(other))
    for _ in range(PATIENCE - 2):
        look(watch, 90, first=vectors(1.0), second=vectors(1e-4))
    with pytest.raises(NumericError, match="the second vectors"):
        for _ in range(2):
            look(watch, 91, first=vectors(1.0), second=vectors(1e-4))


def test_different_vectors_raise_no_alarm() -> None:
    watch = CollapseWatch(True, Past())
    for step in range(4 * PATIENCE):
        look(watch, step, wide=vectors(3.0, step), narrow=vectors(1.5 * Limits().std, step, rows=200, width=40))


def test_vectors_just_below_the_threshold_do() -> None:
    watch = CollapseWatch(True, Past())
    with pytest.raises(NumericError):
        for step in range(PATIENCE):
            look(watch, step, narrow=vectors(0.7 * Limits().std, step, rows=200, width=40))


def test_a_few_answers_to_all_images_are_a_collapse_of_a_teacher() -> None:
    limits, watch = LIMITS["teacher"], CollapseWatch(True, Past())
    answers = torch.eye(8)[torch.arange(64) % 3]  # three prototypes: far apart, and too few
    assert limits.rank > spread(answers)["rank"].item() > 2.9
    assert spread(answers)["std"].item() > 0.5
    for step in range(2 * PATIENCE):
        look(watch, step, feature=answers, teacher=torch.eye(64), few=answers[:4])
    for step in range(2 * PATIENCE):  # a batch of eight cannot have a rank to speak of
        look(watch, step, teacher=answers[:8])
    with pytest.raises(NumericError, match="the rebuild/teacher vectors"):
        for step in range(PATIENCE):
            look(watch, step, **{"rebuild/teacher": answers})


def test_a_warning_is_said_once_for_each_name(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("selfsight.console.say", said.append)
    watch = CollapseWatch(False, Past())
    for step in range(3 * PATIENCE):
        line = look(watch, step, feature=vectors(1e-4), fine=vectors(1.0))
        assert line["watch/feature/cosine"] == pytest.approx(1, abs=1e-4)
    assert len(said) == 1
    assert said[0].startswith(
        f"warning: step {EVERY * (PATIENCE - 1)}: collapse: the feature vectors of different images are nearly the same"
    )
    for step in range(PATIENCE):
        look(watch, step, feature=vectors(1e-4), fine=vectors(1e-4))
    assert ["the fine vectors" in line for line in said] == [False, True]


def test_only_the_first_rank_speaks_but_every_one_stops(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, loud, stopped = CollapseWatch(False, Past()), CollapseWatch(False, Past()), CollapseWatch(True, Past())
    for step in range(PATIENCE):
        look(quiet, step, One(is_main_process=False), feature=vectors(1e-4))
    assert capsys.readouterr().err == ""
    for step in range(PATIENCE):
        look(loud, step, feature=vectors(1e-4))
    assert "warning: step 40: collapse" in capsys.readouterr().err
    with pytest.raises(NumericError):
        for step in range(PATIENCE):
            look(stopped, step, One(is_main_process=False), feature=vectors(1e-4))


VICREG: dict[str, Any] = {"objective.expander_width": 64}


def run(
    name: str, steps: int, overrides: dict[str, Any], spoil: Callable[[Objective], None] = lambda own: None
) -> None:
    """The training loop, without its luggage, with a watch that stops."""
    small = {"encoder.width": 32, "encoder.depth": 1, "train.batch_size": 32, "eval.train": None, "eval.test": None}
    recipe = load(f"digits/{name}.yaml", {"run_dir": "never-made"} | small | overrides)
    parts = assemble(recipe, torch.device("cpu"))
    spoil(parts.objective)
    batches, place, watch = parts.batches(), parts.placer(torch.device("cpu")), CollapseWatch(True, Past())
    for step in range(steps):
        loss = parts.objective(place(batches[step], step / steps))
        loss.total.backward()
        set_rates(parts.optimizer, lr_at(step, steps, recipe.optim), recipe.optim.weight_decay)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        parts.objective.after_step(step + 1, steps)
        if (step + 1) % EVERY == 0:
            accelerator: Any = One()
            watch(step + 1, loss, accelerator)


def test_vicreg_raises_no_alarm() -> None:
    run("vicreg", 60, VICREG)


def test_vicreg_without_variance_and_covariance_raises_it() -> None:
    with pytest.raises(NumericError, match="collapse: the embedding vectors"):
        run("vicreg", 200, VICREG | {"objective.variance": 0, "objective.covariance": 0})


def test_dino_raises_no_alarm() -> None:
    run("dino", 60, {})


@pytest.mark.parametrize("norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dino_without_centering_raises_it(norm: bool) -> None:
    def spoil(objective: Objective) -> None:
        assert isinstance(objective, DINO)
        objective.balanced = lambda outputs, temperature, which: (outputs / temperature).softmax(-1)  # type: ignore[method-assign]

    with pytest.raises(NumericError, match="collapse: the teacher vectors"):
        run("dino", 200, {"objective.head_norm": norm}, spoil)


@pytest.mark.parametrize("norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dino_without_sharpening_raises_it(norm: bool) -> None:
    with pytest.raises(NumericError, match="collapse: the teacher vectors"):
        run("dino", 200, {"objective.head_norm": norm, "objective.teacher_temperature": [0.5, 0.5]})
