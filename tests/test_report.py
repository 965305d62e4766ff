"""report.html: complete, self-contained, and drawn by a real browser without a complaint."""

import html.parser
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from selfsight import __version__, cli, plainyaml
from selfsight.charts import MOST_POINTS, Series, line_chart, number, ticks
from selfsight.curves import charts, curves, numbers
from selfsight.errors import DataError, Stopped
from selfsight.finish import read_scores, report_again
from selfsight.recipe import load
from selfsight.train import pretrain

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """Checks nesting and collects addresses."""

    VOID = frozenset({"meta", "link", "img", "br", "line", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.lacking: list[str] = []
        """What a person who cannot see would miss."""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        wanted = {"img": "alt", "th": "scope", "svg": "aria-label", "html": "lang"}.get(tag)
        if wanted and not dict(attrs).get(wanted):
            self.lacking.append(str(self.getpos()))
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """Probes of a few steps, and exports that are not loaded again in another process: others test both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfsight.exports.export.verify_export", lambda encoder, folder: 0.0)
        patch.setattr("selfsight.eval.linear.LEAST_STEPS", 50)
        yield


@pytest.fixture(scope="module")
def run(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three objectives, with scores."""
    folder = tmp_path_factory.mktemp("report") / "run"
    sets = {
        "data.train": str(small_shards),
        "eval.train": str(small_shards),
        "eval.test": str(small_shards),
        "eval.k": [5],
    }
    small = {"encoder.width": 16, "encoder.depth": 1, "train.epochs": None, "train.steps": 6, "train.batch_size": 8}
    often = {"train.log_every": 1, "train.workers": 0, "objective.parts.agree.objective.expander_width": 16}
    pretrain("digits/joint", sets | small | often | {"run_dir": str(folder)})
    return folder


def test_the_page_holds_everything_and_asks_for_nothing(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert len(text) < 5_000_000
    for wanted in ("Loss", "Online kNN", "RankMe", "Learning rate", "Gradient norm", "Images per second", "Waiting for data",
                   "source image", "rebuild: augmented view", "rebuild: what the encoder sees", "rebuild: reconstruction",
                   "rotation: turned", "agree: view 2", "rotation/accuracy", "agree/variance", "Spread of agree/embedding",
                   "RankMe of agree/embedding", "no floor to compare with", "random-init", "pixels", "majority",
                   "attention of all patches on average", "attention of head 1", "three principal components", "nearest neighbour of their own class",
                   "PCA", "t-SNE", "class 1", "device-hours", "not measured", "How each score was made",
                   "timm.create_model", "mask_ratio: 0.6", "Python"):  # fmt: skip
        assert wanted in text, wanted
    rows = 8 + 1 + 2 + 1  # source and views, mean attention, its two heads, tokens
    assert page.tags.count("img") == 8 * rows + 6 * 7
    # The loss, parts and their terms, the watch, the rest, a scale for each of two evaluators, a confusion matrix, attention
    # distance, two maps.
    assert page.tags.count("svg") == 1 + 7 + 2 + 8 + 2 + 1 + 1 + 2
    assert len(re.findall(r'class="line[^"]* dashed"', text)) == 2  # the floors of reconstruction and rotation
    for score in json.loads((run / "scores.json").read_text())["scores"]:
        assert (f"{score['value']:.1f}" if score["unit"] == "%" else f"{score['value']:.3g}") in text.replace("−", "-")
        assert score["encoder"] != "pretrained" or score["protocol"] in html.unescape(text)
    assert page.lacking == []
    again = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").read_text() == again


def test_a_page_without_scores_says_so(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "scores.json").unlink()
    shutil.rmtree(tmp_path / "run" / "encoder")
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Not scored yet" in text  # the run names sets, but has not come so far
    assert "Use it" not in text
    assert "create_model" not in text
    recipe = tmp_path / "run" / "recipe.yaml"
    tree = plainyaml.read(recipe)
    del tree["eval"]
    recipe.write_text(plainyaml.dump(tree))
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "so nothing was scored" in (tmp_path / "run" / "report.html").read_text()
    capsys.readouterr()
    assert cli.main(["report", "/nowhere"]) == 2
    assert "/nowhere/recipe.yaml" in capsys.readouterr().err


def drawn_by_chromium(page: Path, folder: Path, *options: str) -> Path:
    """A picture of the page, after a browser has drawn it without a complaint and without asking anybody for anything."""
    log, picture = folder / "net.json", folder / "page.png"
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--window-size=1100,2600", *options,
         f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    asked = set(re.findall(r'"url":"(?:https?|wss?|ftp)://([^/"]+)', log.read_text()))
    assert not {host for host in asked if "google" not in host and "gvt1" not in host}, asked  # the browser's own
    assert picture.stat().st_size > 20_000
    return picture


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_draws_it_without_a_complaint_or_a_request(run: Path, tmp_path: Path) -> None:
    light = Image.open(drawn_by_chromium(run / "report.html", tmp_path)).convert("L")
    dark = Image.open(drawn_by_chromium(run / "report.html", tmp_path, "--blink-settings=preferredColorScheme=0"))
    assert light.getpixel((1, 1)) > 200 > 60 > dark.convert("L").getpixel((1, 1))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_nothing_is_wider_than_a_phone(run: Path, tmp_path: Path) -> None:
    """The page in a frame of 390 pixels tells how wide it would be; tables scroll in boxes of their own."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe src='{(run / 'report.html').as_uri()}' style='width:390px;height:900px' onload=\""
        "document.title = this.contentDocument.documentElement.scrollWidth + ' wide'\"></iframe>"
    )
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--allow-file-access-from-files", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "<title>390 wide</title>" in done.stdout


def test_what_cannot_be_reported_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)

    def told(code: int) -> str:
        assert cli.main(["report", str(broken)]) == code
        return capsys.readouterr().err

    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo\n[1, 2]\n{"step": "x", "loss": null}\n')
    assert told(0) == ""
    assert "2 lines of metrics.jsonl cannot be read" in (broken / "report.html").read_text()
    (broken / "scores.json").write_text('{"scores": [{"encoder": "pretrained", "value": "high"}]}')
    assert "scores.json: is damaged" in told(74)
    (broken / "scores.json").unlink()
    recipe = broken / "recipe.yaml"
    shutil.rmtree(broken / "checkpoints")
    assert "has no checkpoint to report on" in told(2)
    recipe.unlink()
    assert "is no run folder" in told(2)


def test_a_recipe_of_another_release_names_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "knob_of_the_future: 1\n")
    monkeypatch.setattr("selfsight.finish.__version__", "0.0.1")
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert "knob_of_the_future" in shown
    assert f"was written by selfsight {__version__}; this is 0.0.1" in shown


def test_a_report_goes_where_it_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").stat().st_mtime_ns
    assert cli.main(["report", str(run), "--out", str(tmp_path / "there.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "there.html")
    assert (run / "report.html").stat().st_mtime_ns == before
    assert (tmp_path / "there.html").read_text() == (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("the disk is gone"), "the disk is gone"),
        (torch.OutOfMemoryError("tried to\n allocate"), "OutOfMemoryError: tried to allocate"),
        (ValueError("no shape"), "ValueError: no shape"),
    ],
)
def test_a_section_that_fails_is_left_out_with_its_reason(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr("selfsight.report.bank_of", fail)
    made = report_again(run, run / "other.html").read_text()
    assert f"Left out: neighbours: {told}" in made
    assert "What it finds alike" not in made
    assert "source image" in made


def test_scores_are_kept_whatever_the_report_fails_of(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    for name in ("scores.json", "report.html"):
        (tmp_path / "run" / name).unlink()

    def fail(*given: Any) -> None:
        raise KeyError("a slip of ours")

    monkeypatch.setattr("selfsight.report.bank_of", fail)
    recipe = load(tmp_path / "run" / "recipe.yaml", {"run_dir": str(tmp_path / "run")})
    pretrain(recipe)
    shown = capsys.readouterr()
    assert "warning: the report could not be written (KeyError: 'a slip of ours')" in shown.out + shown.err
    assert read_scores(tmp_path / "run" / "scores.json") == read_scores(run / "scores.json")
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_request_to_stop_is_no_reason_to_leave_something_out(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: Any) -> None:
        raise Stopped("on request")

    monkeypatch.setattr("selfsight.report.bank_of", stop)
    with pytest.raises(Stopped):
        report_again(run, run / "other.html")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "scores.json").unlink()
    with pytest.raises(Stopped):
        pretrain(load(tmp_path / "run" / "recipe.yaml", {"run_dir": str(tmp_path / "run")}))
    assert not (tmp_path / "run" / "scores.json").exists()


@pytest.mark.parametrize("page", [".", "..", "/"])
def test_a_folder_is_no_page(run: Path, capsys: pytest.CaptureFixture[str], page: str) -> None:
    assert cli.main(["report", str(run), "--out", page]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6))
def test_ticks_span_and_are_round(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert found[0] <= low + 1e-6 * width
    assert found[-1] >= low + width * (1 - 1e-6)
    assert 2 <= len(found) <= 12
    inside = ticks(low, low + width, inside=True)
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in inside)


@pytest.mark.parametrize(
    "values",
    [(0, 5e-324), (1e-320, 2e-320), (1e308, -1e308), (1e300, 0), (1e16, 1e16 + 4), (9e299, -9e299), (inf, nan)],
)
def test_numbers_at_the_ends_of_what_there_is_are_drawn_or_left_out(values: tuple[float, float]) -> None:
    for line in ([(1, values[0]), (2, values[1])], [(min(values), 1), (max(values), 2)]):
        assert not re.search("nan|inf", line_chart([Series("x", [*line, (2.0, 3.0)])]))


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e-310, -3.5, 1e9])
def test_a_constant_line_is_drawn(value: float) -> None:
    assert "<path" in line_chart([Series("x", [(1, value), (2, value)])])


def test_points_that_are_not_finite_are_left_out_and_many_are_thinned() -> None:
    assert line_chart([Series("x", [(1, float("nan"))])]) == ""
    drawn = line_chart([Series("x", [(i, float(i % 7)) for i in range(5000)])])
    assert drawn.count(" ", drawn.index(' d="')) < 2.2 * MOST_POINTS + 500
    assert drawn.count("<circle") <= 62
    assert "at step 4,999" in drawn


def test_later_is_right_and_more_is_up() -> None:
    drawn = line_chart([Series("a", [(0, 0.0), (10, 1.0)]), Series("b", [(10, 0.5)], colour=6)])
    first, last, other = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert first == (46.0, 174.0)
    assert last == (408.0, 12.0)
    assert other == (408.0, 93.0)
    assert 'class="line c0"' in drawn and 'class="line c6"' in drawn


def test_one_point_is_seen() -> None:
    drawn = line_chart([Series("knn", [(500, 89.5)])], " %")
    assert 'class="dot c0 shown"' in drawn
    assert "knn 89.5 % at step 500" in drawn
    assert "shown" in line_chart([Series("floor", [(500, 89.5)], dashed=True)])
    assert drawn.count('class="tick"') >= 4


def test_all_that_metrics_hold_is_drawn_and_nothing_twice() -> None:
    line = {"step": 1, "epoch": 0.1, "loss": 2.0, "loss/a": 1.0, "loss/a/floor": 3.0, "loss/same": 2.0, "watch/z/std": 1.0,
            "watch/z/cosine": 0.1, "watch/z/rank": 3.0, "alpha": 1.1, "knn": 50.0, "lr": 0.1, "novelty": 7.0, "device_hours": 1.0,
            "slowest_rank": 0, "slowest_wait": 0.1, "word": "x", "flag": True}  # fmt: skip
    lines = numbers([line, {"step": 2}, {"loss": 1.0}])
    assert len(lines) == 1
    titles = [chart.title for chart in charts(lines)]
    assert titles == ["Loss", "a", "Spread of z", "RankMe of z", "Online kNN", "alpha-ReQ", "Learning rate", "Slowest rank's wait", "novelty"]  # fmt: skip
    assert len({name for curve in curves(lines) for name in curve.fields}) == sum(len(c.fields) for c in curves(lines))
    assert {chart.title: chart.last for chart in charts(lines)}["Online kNN"] == "50 %"
    back = numbers([{"step": 3, "loss": 1.0}, {"step": 1, "loss": 2.0}])
    assert [line["step"] for line in back] == [1, 3]


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 0.25, 3e-4, 12_000, 2_500_000, 1.23456)] == [
        "0",
        "0.25",
        "3.0e-04",
        "12k",
        "2.5M",
        "1.235",
    ]
