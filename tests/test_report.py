"""report.html: complete, self-contained, and drawn by a real browser without a complaint."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfsight import cli
from selfsight.charts import Series, line_chart, number, ticks
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
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfsight.export.verify_export", lambda encoder, folder: 0.0)
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
                   "timm.create_model", "mask_ratio: 0.6", "Python"):  # fmt: skip
        assert wanted in text, wanted
    assert page.tags.count("img") == 8 * 8
    assert page.tags.count("svg") == 1 + 7 + 2 + 7  # the loss, parts and their terms, the watch, and the rest
    assert len(re.findall(r'class="line[^"]* dashed"', text)) == 2  # the floors of reconstruction and rotation
    for score in json.loads((run / "scores.json").read_text())["scores"]:
        assert f"{score['value']:.1f}" in text
    again = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").read_text() == again


def test_a_page_without_scores_says_so(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "scores.json").unlink()
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "so nothing was scored" in (tmp_path / "run" / "report.html").read_text()
    assert cli.main(["report", "/nowhere"]) == 2
    assert "/nowhere/recipe.yaml" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_draws_it_without_a_complaint_or_a_request(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--window-size=1100,2600",
         f"--screenshot={tmp_path / 'page.png'}", (run / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.png").stat().st_size > 30_000
    assert "CONSOLE" not in done.stderr


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6))
def test_ticks_span_and_are_round(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert found[0] <= low + 1e-6 * width
    assert found[-1] >= low + width * (1 - 1e-6)
    assert 2 <= len(found) <= 12
    inside = ticks(low, low + width, inside=True)
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in inside)


@pytest.mark.parametrize("value", [0.0, 1e-12, -3.5, 1e9])
def test_a_constant_line_is_drawn(value: float) -> None:
    assert "<path" in line_chart([Series("x", [(1, value), (2, value)])])


def test_points_that_are_not_finite_are_left_out_and_many_are_thinned() -> None:
    assert line_chart([Series("x", [(1, float("nan"))])]) == ""
    drawn = line_chart([Series("x", [(i, float(i % 7)) for i in range(5000)])])
    assert drawn.count("<circle") <= 402
    assert "at step 4,999" in drawn


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 0.25, 3e-4, 12_000, 2_500_000, 1.23456)] == [
        "0",
        "0.25",
        "3.0e-04",
        "12k",
        "2.5M",
        "1.235",
    ]
