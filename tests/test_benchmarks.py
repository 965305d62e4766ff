"""The benchmarks of steps: that they compare what they say, tell what is missing, and end; their speeds are in benchmarks/."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import absent
import cold
import competitor
import gpu
import nvjpeg
import overhead
import paired
import pytest
import scaling
import step
import torch
import works
from peers import common
from PIL import Image

BENCHMARKS = Path(step.__file__).parent
TINY = {"image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}


class InThisProcess:
    """A competitor without a process: started and asked as one."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.said = io.StringIO()
        self.spec, self.training = spec, None

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def answer(self) -> dict[str, Any]:
        """What it is."""
        try:
            self.training = works.imported(self.spec)()
        except works.Missing as missing:
            return {"skipped": str(missing)}
        return competitor.described(self.training)

    def ask(self, what: str) -> dict[str, Any]:
        """A round, or the memory."""
        assert self.training
        if what == "memory":
            return {"peak_memory": competitor.peak_of(self.training.step, torch.device("cpu"))}
        wall, cpu = competitor.seconds(self.training.step, torch.device("cpu"), 1)
        return {"wall": wall, "cpu": cpu}


@pytest.fixture
def threads() -> Iterator[None]:
    """torch's threads, as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    tiny = works.Work(
        ("lightly", "lightly:explicit", "transformers", "transformers:explicit", "mae"),
        {"name": "mae", **decoder},
        2,
        2,
        encoder={"name": "vit_tiny_patch16_224", **TINY},
    )
    monkeypatch.setitem(works.WORKS, "mae", tiny)
    monkeypatch.setattr(step, "Competitor", InThisProcess)
    monkeypatch.setattr(step, "matmul_peak", lambda device, dtype: 1e12)
    # The peers read their dimensions from timm's model; here from one with those of the work.
    made = common.timm.create_model
    monkeypatch.setattr(
        common.timm,
        "create_model",
        lambda name, **options: made(name, **{"embed_dim": 32, "depth": 2, "num_heads": 2} | options),
    )


def test_one_object_says_what_was_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    small_work(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["step.py", "--rounds", "2", "--threads", "1", "--device", "cpu", "--json"])
    assert step.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert {
        "ratios",
        "images_per_second",
        "peak_memory",
        "mfu",
        "spread",
        "command",
        "hardware",
        "versions",
        "date",
        "threads",
        "batch",
    } <= {*found}
    peers = {"lightly", "lightly:explicit", "transformers", "transformers:explicit"}
    assert {*found["ratios"]} == {*found["spread"]} == {*found["ratios_cpu_time"]} == peers
    assert found["skipped"]["mae"].startswith("give --mae PATH")
    each = found["each"]
    assert {*each} == {"selfsight"} | peers
    assert all((each[who]["attention"] == "explicit") == who.endswith(":explicit") for who in peers)
    assert each["selfsight"]["note"] == "with fused AdamW and an allocator that keeps what is freed, as a run"
    assert found["images_per_second"] == each["selfsight"]["images_per_second"] > 0
    assert each["selfsight"]["rounds"] == 8 and each["lightly"]["rounds"] == 2
    for facts in each.values():
        assert facts["mfu"] == pytest.approx(facts["flops"] * facts["images_per_second"] / 2 / 1e12, abs=1e-4)
        assert facts["attention"] in ("fused", "explicit")
    # The same work: as many weights (a class token's decoder position may be one of them), and ours never more products.
    sizes = [facts["parameters"] for facts in each.values()]
    assert max(sizes) - min(sizes) <= 0.01 * max(sizes)
    # Ours computes the decoder's last block, here its only one, for hidden patches alone: a quarter of so small a model.
    assert 0.7 * each["transformers"]["flops"] < each["selfsight"]["flops"] <= each["transformers"]["flops"]


@pytest.mark.slow  # two processes and the machine's peak; what they report has tests of its own
def test_processes_take_turns_and_end() -> None:
    command = [
        sys.executable,
        str(BENCHMARKS / "step.py"),
        "--work",
        "vicreg-loss-2048",
        "--peers",
        "vicreg,lightly",
        "--batch",
        "16",
    ]
    done = subprocess.run(
        [*command, "--rounds", "1", "--threads", "1", "--device", "cpu", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert {*found["ratios"]} == {"lightly"} and found["ratios"]["lightly"] > 0
    assert found["memory_ratios"]["lightly"] > 0 and found["matmul_peak"]["fp32"] > 0
    assert found["skipped"] == {"vicreg": "give --vicreg PATH, a checkout of github.com/facebookresearch/vicreg"}


@pytest.mark.parametrize(
    ("option", "value", "known"), [("--peers", "lightly,nobody", "transformers"), ("--work", "nothing", "simmim")]
)
def test_an_unknown_name_is_told_those_that_are_known(
    option: str, value: str, known: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        step.parse([option, value])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and repr(value.split(",")[-1]) in told and known in told


def test_every_work_suits_the_device() -> None:
    assert "mae-large" not in step.parse(["--all", "--device", "cpu"]).work
    assert step.parse(["--work", "vicreg-loss", "--device", "cpu"]).work == ["vicreg-loss-2048", "vicreg-loss-8192"]


def test_what_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = {"work": "mae", "paths": {"mae": str(tmp_path / "nowhere")}}
    with pytest.raises(works.Missing, match="no such folder"):
        works.imported(spec | {"who": "mae:explicit"})
    monkeypatch.setitem(sys.modules, "peers.lightly_peer", None)
    with pytest.raises(works.Missing, match=r"pip install 'selfsight\[bench\]'"):
        works.imported(spec | {"who": "lightly"})


def test_ratios_are_of_pairs() -> None:
    assert paired.ratio([1.0, 2.0, 4.0], [2.0, 3.0, 4.0]) == (1.5, 1.0)
    assert paired.ratio([2.0], [3.0]) == (1.5, None)
    order: list[str] = []
    ask = lambda name, wall: SimpleNamespace(ask=lambda _: order.append(name) or {"wall": wall, "cpu": 1.0})  # noqa: E731
    mine, others, why = paired.in_turn(ask("ours", 1.0), ask("theirs", 2.0), 9, 0.0)  # type: ignore[arg-type]
    assert (
        order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"] and not why
    )  # three at least, whatever the seconds
    assert [one.wall for one in mine] == [1.0] * 3 and [one.wall for one in others] == [2.0] * 3
    gone = SimpleNamespace(ask=lambda _: {"skipped": "why"})
    assert paired.in_turn(ask("ours", 1.0), gone, 1, 0.0) == ([], [], (False, "why"))  # type: ignore[arg-type]
    assert paired.in_turn(gone, ask("theirs", 1.0), 1, 0.0) == ([], [], (True, "why"))  # type: ignore[arg-type]


class Dying(InThisProcess):
    """One that says what it is; ours then dies."""

    def answer(self) -> dict[str, Any]:
        return {"flops": 1, "attention": None, "parameters": 1, "note": ""}

    def ask(self, what: str) -> dict[str, Any]:
        return {"skipped": "killed"} if self.spec["who"] == step.OURS else {"wall": 1.0, "cpu": 1.0}


@pytest.mark.parametrize("peers", ["lightly", "solo-learn"])  # with a rival, and alone
def test_ours_that_dies_is_not_blamed_on_a_peer(monkeypatch: pytest.MonkeyPatch, peers: str, threads: None) -> None:
    small_work(monkeypatch)
    monkeypatch.setattr(step, "Competitor", Dying)
    found = step.measure("mae", step.parse(["--device", "cpu", "--peers", peers]), {}, step.time.perf_counter())
    assert found["skipped"] == {"selfsight": "killed"} and "selfsight: killed" not in step.table([found])


def test_what_the_budget_does_not_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "Competitor", None)  # none is begun
    options = step.parse(["--device", "cpu", "--budget", "5"])
    found = step.measure("dino", options, {}, step.time.perf_counter() - 6)
    assert found == {"work": "dino", "skipped": {"selfsight": "the budget of 5 seconds is spent"}}


def test_a_peak_is_measured_before_anybody_starts(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    small_work(monkeypatch)
    seen: list[object] = []
    monkeypatch.setattr(step, "matmul_peak", lambda device, dtype: seen.append(torch.get_num_threads()) or 1e12)
    monkeypatch.setattr(step, "Competitor", lambda spec: seen.append("started") or Dying(spec))
    monkeypatch.setattr(sys, "argv", ["step.py", "--threads", "3", "--device", "cpu", "--work", "mae,mae", "--json"])
    assert step.main() == 1 and seen[:2] == [3, "started"] and seen.count(3) == 1


def test_fused_peers_are_explicit_too_where_fused_is_slow() -> None:
    options = step.parse(["--device", "cpu", "--peers", "lightly"])
    assert step.rivals_of(works.WORKS["mae"], options, "bf16") == ["lightly", "lightly:explicit"]
    assert step.rivals_of(works.WORKS["mae"], options, "fp32") == ["lightly"]
    options.device = "cuda"
    assert step.rivals_of(works.WORKS["mae"], options, "bf16") == ["lightly"]


BENCH = {  # as `selfsight bench --json` has them
    "images_per_second": 2345.1, "spread": 0.04, "loader": {"images_per_second": 1200.4}, "bound": "data", "mfu": 0.123,
    "memory": {"peak": 2048},
}  # fmt: skip


def test_tests_that_need_a_gpu_are_all_chosen() -> None:
    chosen = {path.name for path in gpu.tests_of_gpus()}
    assert {"test_gpu.py", "test_compile.py", "test_memory.py", "test_precision.py"} <= chosen


def test_a_competitor_that_dies_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with paired.Competitor({}) as broken:
        assert broken.answer()["skipped"].startswith("failed with exit code 1")
        assert "skipped" in broken.ask("round")
    assert "KeyError" in capfd.readouterr().err


def test_absent_libraries_have_stand_ins() -> None:
    assert absent.stand_in(("torch",)) == []
    try:
        assert absent.stand_in(("no_such_library", "torch")) == ["no_such_library"]
        import no_such_library.part  # type: ignore[import-not-found]

        assert isinstance(no_such_library.part.Name, type)
    finally:
        for name in ("no_such_library", "no_such_library.part"):
            sys.modules.pop(name, None)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, absent.Finder)]


def test_one_pair_has_no_spread() -> None:
    facts = {"images_per_second": 1.0, "mfu": 0.1, "peak_memory": None, "attention": None}
    pair = [paired.Round(2.0, 2.0)], [paired.Round(3.0, 3.0)]
    found = step.report({step.OURS: {**facts}, "mae": {**facts}}, {"mae": pair}, "cpu")
    assert found["ratios"] == {"mae": 1.5} and found["spread"] == {"mae": None}
    assert step.table([found | {"work": "mae", "skipped": {}}]).endswith("    1.50")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["--processes", "foo"], "--processes foo: give whole numbers above 0 with commas"),
        (["--processes", "1,0"], "--processes 1,0: give whole numbers"),
        (["--processes", "1,,2"], "--processes 1,,2: give whole numbers"),
        (["--parallel", "ddp,zero"], "--parallel: no 'zero'; there are ddp, fsdp"),
        (["--rounds", "0"], "--rounds and --batch are 1 at least"),
        (["--batch", "0"], "--rounds and --batch are 1 at least"),
    ],
)
def test_scaling_says_what_it_cannot_do(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        scaling.parse(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_scaling_counts_what_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scaling.parse([]).processes == [1, 2, 4]
    asked = scaling.parse(["--processes", "1, 3", "--parallel", "fsdp"])
    assert (asked.processes, asked.parallel) == ([1, 3], ["fsdp"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert scaling.parse([]).processes == [1, 2, 4] and scaling.parse([]).places == 6
    with pytest.raises(SystemExit):
        scaling.parse(["--processes", "8"])
    assert "--processes 8: torch sees 6 GPUs" in capsys.readouterr().err


def test_efficiency_is_of_one_processs_rate() -> None:
    row, first = {"processes": 4, "images_per_second": 6.0}, {"processes": 1, "images_per_second": 2.0}
    assert scaling.efficiency(row, first, 2) == {"efficiency": 0.75, "efficiency_of_cores": 1.5}


def options_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    return gpu.parse()


def test_the_plan_for_a_gpu_is_shown_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "SimMIM").mkdir()
    words = ("--dry-run", "--json", "--peers-at", str(tmp_path), "--cifar10", "a", "b", "--out", str(tmp_path / "out"))
    options_of(monkeypatch, *words)
    assert gpu.main() == 0
    told = json.loads(capsys.readouterr().out)
    groups = {part["group"] for part in told}
    assert groups == {"tests", "step", "shards", "nvjpeg", "bench", "loop", "scaling", "cifar10"}
    assert not (tmp_path / "out").exists()
    parts = [part["part"] for part in told]
    assert parts[0] == "tests.gpu" and parts.index("shards") < min(n for n, part in enumerate(parts) if "bench" in part)
    commands = {part["part"]: part["command"] for part in told}
    assert [name for name, command in commands.items() if "cold.py" in command[1]] == ["bench.disk"]
    assert [*commands["bench.memory"], "--data.decode", "device"] == commands["bench.memory-device"]
    steps = [part["command"] for part in told if part["group"] == "step"]
    assert all("--simmim" in command and "--mae" not in command for command in steps)
    for command in steps:  # step.py takes them
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        step.parse(command[2:])
    for part in told:  # and so does overhead.py
        assert part["group"] != "loop" or overhead.parse(part["command"][2:]).loop == 401


def test_groups_of_the_plan_bring_what_they_wait_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    options_of(monkeypatch, "--dry-run", "--json", "--only", "bench,loop")
    gpu.main()
    parts = {part["part"]: part["command"] for part in json.loads(capsys.readouterr().out)}
    assert {name.partition(".")[0] for name in parts} == {"shards", "nvjpeg", "bench", "loop"}
    options_of(monkeypatch, "--dry-run", "--json", "--only", "scaling")
    gpu.main()
    assert [part["part"] for part in json.loads(capsys.readouterr().out)] == ["scaling"]
    asked = options_of(monkeypatch, "--dry-run", "--data", "photos", "--cifar10", "photos", "s3://bucket/{0..3}.tar")
    assert (asked.data, asked.cifar10) == (
        str(tmp_path / "photos"),
        [str(tmp_path / "photos"), "s3://bucket/{0..3}.tar"],
    )


@pytest.mark.parametrize("name", gpu.SWITCHES)
def test_bench_is_compiled_but_for_one(name: str) -> None:
    words = [word for word in gpu.SWITCHES[name] if word != "--synthetic"]
    fields = {field.removeprefix("--"): value for field, value in zip(words[::2], words[1::2], strict=True)}
    recipe = overhead.load(
        "imagenet/vicreg-s16", fields | {"data.train": "photos", "eval.train": None, "eval.test": None}
    )
    assert recipe.train.compile == (name != "plain")


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "gpus", lambda: 0)
    (tmp_path / "shards.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        options_of(monkeypatch, "--out", str(tmp_path), "--again", "shards")
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.err.count("\n") == 1 and "no GPU" in told.err and not told.out
    assert (tmp_path / "shards.json").exists()


@pytest.mark.parametrize("option", ["--only", "--again"])
def test_a_part_that_is_not_there_is_told(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        options_of(monkeypatch, "--dry-run", "--out", str(tmp_path), option, "nosuch")
    assert ended.value.code == 2 and f"{option}: no nosuch; there are " in capsys.readouterr().err


def test_parts_are_kept_and_one_that_fails_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    python = sys.executable
    parts = [
        gpu.Part("step.a.ours", (python, "-c", "raise SystemExit(3)"), 20),
        gpu.Part("nvjpeg", (python, "-c", "raise SystemExit('no such decoder')"), 20),
        gpu.Part("scaling", (python, "-c", "print('words'); print('{\"rows\": 1}')"), 20),
        gpu.Part("tests", (python, "-c", "import time; time.sleep(60)"), 0.5),
        gpu.Part("bench.cut", (python, "-c", "import time; time.sleep(60)"), 60),
        gpu.Part("cifar10", (python,), 20, needs=("no_such_library",)),
        gpu.Part("shards", (python,), 20, gpus=2),
        gpu.Part("loop.a", (python,), 20, after=("scaling", "step.a.ours")),
        gpu.Part("loop.b", (python, "-c", r"import os; os.write(1, b'\xff')"), 20, after=("scaling",)),
        gpu.Part("bench.a", (python, "-c", f"print({json.dumps(json.dumps(BENCH))})"), 20),
    ]
    monkeypatch.setattr(gpu, "plan", lambda options: parts)
    monkeypatch.setattr(gpu, "gpus", lambda: 1)
    monkeypatch.setattr(
        gpu, "about", lambda: {"hardware": ["a GPU"], "cuda": None, "python": "3", "versions": {"torch": "2"}}
    )
    options = options_of(monkeypatch, "--out", str(tmp_path), "--budget", "28")
    assert gpu.main() == 1
    states = json.loads((tmp_path / "results.json").read_text())["states"]
    assert states["step.a.ours"] == "failed with exit code 3" and states["scaling"] == "done"
    assert (
        states["tests"] == "failed with exit code 124" and states["bench.cut"] == "to do"
    )  # not begun: it would not end
    assert states["loop.a"] == "waits for step.a.ours" and states["loop.b"] == states["bench.a"] == "done"
    assert states["cifar10"] == "needs no_such_library" and states["shards"] == "needs 2 GPUs, torch sees 1"
    assert json.loads((tmp_path / "scaling.json").read_text())["result"] == {"rows": 1}
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| bench.a | 2,345 | 0.04 | 1,200 | data | 12.3% | 2.0 |" in page
    assert "no such decoder" in page  # what a part that fails has said
    assert "| scaling | done |" in page and "## On a GPU" in page
    before = (tmp_path / "scaling.json").read_text()
    gpu.main()
    assert (tmp_path / "scaling.json").read_text() == before  # not run again
    gpu.run(parts[3], options, 0.5)
    assert not (tmp_path / "bench.cut.json").exists()  # cut by the budget, not by its own limit
    options_of(monkeypatch, "--out", str(tmp_path), "--again", "scaling")
    assert not (tmp_path / "scaling.json").exists()
    capsys.readouterr()


def test_shards_are_forgotten_while_a_command_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"a")
    (tmp_path / "b.tar").write_bytes(b"bb")
    forgotten: list[int] = []
    monkeypatch.setattr(cold.os, "posix_fadvise", lambda file, *_: forgotten.append(cold.os.fstat(file).st_size))
    monkeypatch.setattr(cold, "EVERY", 0.01)
    command = [sys.executable, "-c", "import time; time.sleep(0.1); raise SystemExit(3)"]
    monkeypatch.setattr(sys, "argv", ["cold.py", str(tmp_path), "--", *command])
    assert cold.main() == 3
    assert forgotten[:2] == [1, 2] and len(forgotten) >= 6
    monkeypatch.setattr(sys, "argv", ["cold.py", str(tmp_path), *command])
    assert cold.main() == 2


def test_a_decoder_is_one_if_it_gives_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "images", lambda count: [Image.new("RGB", (8, 8), (200, 100, 50))] * 2)
    exact = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)
    monkeypatch.setattr(nvjpeg, "require_decoder", lambda: lambda bodies, mode, device: [exact] * len(bodies))
    found = nvjpeg.measure(torch.device("cpu"), 3)
    assert found["images_per_second"] > 0 and found["levels_from_pillow"] < 2  # a level of JPEG's own rounding
    monkeypatch.setattr(nvjpeg, "require_decoder", lambda: lambda bodies, mode, device: [exact, exact.flip(0)])
    with pytest.raises(SystemExit, match="levels from Pillow's"):
        nvjpeg.measure(torch.device("cpu"), 3)


def test_no_save_and_no_score_is_in_the_loops_figure(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is longer than the recipe's cadence; the shares are of that cadence all the same."""
    asked: list[Any] = []
    monkeypatch.setattr(overhead, "looping", lambda *given: asked.append(given) or {})
    overhead.loop_of(overhead.parse([str(small_shards), "--loop", "2000", "--batch", "8"]))
    [(recipe, steps, _, paced)] = asked
    assert min(recipe.train.save_every, recipe.eval.every) > steps == 2000
    assert (paced.train.save_every, paced.eval.every) == (500, 500)


@pytest.mark.parametrize("block", [1, 6])
def test_the_loop_is_set_against_bare_steps(
    block: int, small_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step of the loop takes half as long again as a bare one."""
    clock = [0.0]

    def taking(seconds: float) -> Any:
        def step(*given: Any) -> None:
            clock[0] += seconds
            update(*given)

        return step

    update = overhead.update
    monkeypatch.setattr(overhead, "update", taking(1.0))
    monkeypatch.setattr("selfsight.train.update", taking(1.5))
    monkeypatch.setattr(overhead, "now", lambda device: clock[0])
    (tmp_path / "run").mkdir()
    fields = small_fields | {"run_dir": str(tmp_path / "run"), "train.steps": 31, "train.device": "cpu"}
    found = overhead.looping(overhead.load("digits/mae", fields), 31, block)
    assert found["loop_percent"] == found["loop_percent_median"] == 50 and found["loop_percent_error"] == 0
    assert found["bare_step_milliseconds"] == 1000 and found["steps_of_each"] == block
    assert found["pairs"] == {1: 20, 6: 3}[block]
