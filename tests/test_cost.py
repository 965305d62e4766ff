"""What a run cost: hours over all restarts and ranks, energy from counters that wrap, and no guess where nobody measures."""

import json
import time
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from selfsight.cost import Energy, Spent, cost, hours_text, packages, spent_before
from selfsight.metrics import Meter
from selfsight.run_folder import read_lines
from selfsight.train import pretrain


def counters(folder: Path, *joules: float, span: int = 1000) -> Path:
    for i in range(len(joules)):
        package = folder / f"intel-rapl:{i}"
        (package / f"intel-rapl:{i}:0").mkdir(parents=True, exist_ok=True)
        (package / f"intel-rapl:{i}:0" / "energy_uj").write_text("5")  # a part of the package: counted with it
        (package / "energy_uj").write_text(f"{round(joules[i] * 1e6)}\n")
        (package / "max_energy_range_uj").write_text(f"{round(span * 1e6)}\n")
    return folder


def test_packages_are_added_and_counters_wrap(tmp_path: Path) -> None:
    energy = Energy(torch.device("cpu"), counters(tmp_path, 10, 990))
    counters(tmp_path, 25, 5)
    assert energy.read() == pytest.approx(15 + 15)
    assert energy.read() == 0


def test_nobody_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isnan(Energy(torch.device("cpu"), tmp_path).read())
    counters(tmp_path, 3.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("words")
    assert packages(tmp_path) == []
    monkeypatch.setattr("selfsight.cost._read", lambda counter: (_ for _ in ()).throw(PermissionError()))
    assert packages(tmp_path) == []
    monkeypatch.setenv("LOCAL_RANK", "1")  # the counters are the machine's: its first rank reads them
    assert Energy(torch.device("cpu"), tmp_path).read() == 0


@pytest.mark.parametrize("span", [None, 0, "words"])
def test_counters_that_fail_later_measure_nothing(tmp_path: Path, span: int | str | None) -> None:
    energy = Energy(torch.device("cpu"), counters(tmp_path, 3.0))
    file = tmp_path / "intel-rapl:0" / "max_energy_range_uj"
    file.unlink() if span is None else file.write_text(str(span))
    assert isnan(energy.read())


def test_a_gpus_power_is_integrated(monkeypatch: pytest.MonkeyPatch) -> None:
    now, watts = [0.0], [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: watts[0] * 1e3)
    energy = Energy(torch.device("cuda", 0))
    now[0] = 0.5
    energy.look()  # too soon
    now[0], watts[0] = 2.0, 200.0
    energy.look()
    now[0] = 2.5
    assert energy.read() == pytest.approx(2 * 150 + 0.5 * 200)
    assert energy.read() == 0


def test_hours_count_ranks_pauses_and_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("selfsight.cost.packages", lambda rapl: [])
    meter = Meter(10, torch.device("cpu"), Spent(2.0, 1.0))
    meter.step()
    with meter.pause():
        now[0] += 1800
    now[0] += 1800
    told = meter.read(Accelerator(cpu=True))
    assert told["device_hours"] == 3.0
    assert isnan(told["energy_kwh"])  # which is not written
    assert meter._cost(4, 3.6e6) | {"energy_kwh": 0} == {"device_hours": 3.0, "energy_kwh": 0}
    now[0] += 3600
    assert meter._cost(4, 0.0)["device_hours"] == 7.0


def test_energy_is_kwh() -> None:
    meter = Meter(10, torch.device("cpu"), Spent(0.0, 1.0))
    assert meter._cost(1, 7.2e6)["energy_kwh"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("lines", "hours", "energy"),
    [
        ([], 0.0, 0.0),
        ([{"device_hours": 1.0, "energy_kwh": 2.0}, {"device_hours": 1.5, "energy_kwh": 2.5}], 1.5, 2.5),
        ([{"device_hours": 1.0}], 1.0, None),  # what was not measured before is not measured in all
        ([{"step": 3}], None, None),  # of an earlier release
        ([{"device_hours": "x"}], None, None),
    ],
)
def test_what_a_run_had_cost_before(
    lines: list[dict[str, Any]], hours: float | None, energy: float | None, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for value, wanted in zip(spent_before(tmp_path / "metrics.jsonl"), (hours, energy), strict=True):
        assert isnan(value) if wanted is None else value == wanted


def test_a_resumed_run_goes_on_counting(small_fields: dict[str, Any], unchecked_export: None) -> None:
    folder = Path(small_fields["run_dir"])
    pretrain("digits/mae", small_fields)
    (folder / "scores.json").unlink()
    lines = read_lines(folder / "metrics.jsonl")
    spent = [line["device_hours"] for line in lines]
    assert 0 < spent[0] < spent[-1] < 0.1
    kept = (folder / "metrics.jsonl").read_text().replace(f'"device_hours": {spent[-1]}', '"device_hours": 5.0')
    (folder / "metrics.jsonl").write_text(kept)
    for file in (folder / "checkpoints").glob("step-*6/*"):
        file.unlink()  # the last save was lost, and with it the work after step 3
    pretrain("digits/mae", small_fields)
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert 5 < lines[3]["device_hours"] < lines[5]["device_hours"] < 5.1


def test_cost_in_words() -> None:
    lines = [{"step": i, "images_per_second": 10.0 * i, "device_hours": 50.0, "energy_kwh": 1.25} for i in (1, 2, 30)]
    assert cost(lines, 64) == {
        "device-hours": "50.0 h, of all ranks and restarts",
        "images seen": "1,920",
        "images per second": "20, the median",
        "energy": "1.25 kWh, of GPUs or CPU packages alone",
    }
    assert [told for told in cost([], 64).values()] == ["not measured", "0", "not measured", "not measured"]
    assert [hours_text(h) for h in (0.01, 0.5, 3.21)] == ["36 s", "30.0 min", "3.2 h"]
