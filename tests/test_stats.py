"""Statistics against NumPy on all pixels at once, and what a run makes of them."""

import json
import tracemalloc
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from test_formats import npy, tiff
from test_tar import make_tar
from test_tiles import png
from webfault import Plan, Server

from selfsight import cli
from selfsight.data.check import Measure, check, own_pixels
from selfsight.data.decode import Form, decode, value_range
from selfsight.data.formats import to_depth
from selfsight.data.index import build_index
from selfsight.data.moments import Kind, Moments
from selfsight.data.packing import Sample, write_shards
from selfsight.data.placer import normalize
from selfsight.data.shards import Shards
from selfsight.data.stats import fill_in, read_stats, unit_line
from selfsight.errors import DataError, UsageError
from selfsight.loading import load_encoder
from selfsight.recipe import DataConfig, load
from selfsight.train import pretrain

RNG = np.random.default_rng(11)


def arrays(count: int, channels: int, dtype: Any, low: float = 0, high: float = 255) -> list[Any]:
    """Samples of different sizes and levels."""
    made = []
    for i in range(count):
        shape = (channels, 9 + i, 12 + 2 * i)
        level = RNG.uniform(low, low + (high - low) / 2, (channels, 1, 1))
        made.append((level + RNG.uniform(0, (high - low) / 2, shape)).astype(dtype))
    return made


def packed(folder: Path, images: list[Any], per_shard: int = 3) -> Shards:
    bodies = [tiff(image, photometric="minisblack", metadata={"axes": "CYX"}) for image in images]
    folder.mkdir(exist_ok=True)
    write_shards([(body, None) for body in bodies], folder, "s", per_shard=per_shard)
    return Shards(str(folder))


def measured(shards: Shards, samples: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = check(shards, measure=Measure(samples))
    assert found["bad"] == []
    return found


def flat(images: list[Any]) -> Any:
    return np.concatenate([image.reshape(len(image), -1) for image in images], 1).astype(np.float64)


KINDS = [
    (np.uint8, 0, 255),
    (np.uint16, 300, 60000),
    (np.int16, -1000, 3000),
    (np.float32, -0.003, 0.2),
    (np.float32, 1e6, 1e6 + 3),
    (np.int32, -9e5, 9e5),
]


@pytest.mark.parametrize(("dtype", "low", "high"), KINDS)
def test_statistics_are_numpys_on_all_pixels(dtype: Any, low: float, high: float, tmp_path: Path) -> None:
    images = arrays(8, 5, dtype, low, high)
    shards = packed(tmp_path / "s", images)
    assert len(shards.paths) == 3
    found = measured(shards)["stats"]
    values = flat(images)
    (kind,) = found["kinds"]
    assert (kind["channels"], kind["dtype"], kind["samples"], kind["pixels"]) == (
        5,
        np.dtype(dtype).name,
        8,
        values.shape[1],
    )
    assert kind["mean"] == pytest.approx(values.mean(1), rel=1e-12)
    assert kind["std"] == pytest.approx(values.std(1), rel=1e-7)
    assert kind["least"] == values.min(1).tolist()
    assert kind["most"] == values.max(1).tolist()
    for percent in (0.1, 99.9):
        exact = np.percentile(values, percent, axis=1, method="inverted_cdf")
        assert kind[f"p{percent}"] == pytest.approx(exact, rel=0 if dtype is np.uint8 else 1 / 128)
    again = read_stats(shards)
    assert again is not None
    (moments,) = again.kinds.values()
    assert moments.mean.tolist() == kind["mean"]
    assert moments.std.tolist() == kind["std"]
    assert (again.samples, again.of, dict(again.planes), again.mixed) == (8, 8, {1: 8}, [])


@pytest.mark.parametrize("percent", [0.1, 1, 25, 50, 75, 99.9, 100])
def test_percentiles_keep_their_order_through_zero(percent: float) -> None:
    values = np.concatenate(
        [-np.geomspace(1e-30, 1e30, 500), np.zeros(100), -np.zeros(100), np.geomspace(1e-30, 1e30, 500)]
    )
    found = Moments.of(values.astype(np.float32).reshape(1, 1, -1)).percentile(percent)
    exact = np.percentile(values.astype(np.float32), percent, method="inverted_cdf")
    assert found == pytest.approx(exact, rel=1 / 127)


def test_many_parts_far_from_zero_lose_nothing() -> None:
    parts = [1e9 + RNG.normal(size=(2, 3, 40)) for _ in range(300)]
    total = Moments.of(parts[0])
    for part in parts[1:]:
        total.add(Moments.of(part))
    assert total.std == pytest.approx(flat(parts).std(1), rel=1e-6)  # a sum of squares would be off by 100 %
    assert total.mean == pytest.approx(flat(parts).mean(1), rel=1e-15)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_volume_is_measured_and_converted_in_parts(dtype: Any) -> None:
    """Of 8 MiB of 16 bits float64 takes 32, with its square and bins more than 100."""
    volume = (np.arange(2**22) % 251 + np.arange(2**22) // 2**16).astype(dtype).reshape(1, 64, 128, 512)[..., ::-1, :]
    tracemalloc.start()
    try:
        found = Moments.of(volume)
        to_depth(volume, 8, (0.0, 300.0))
        if dtype is np.uint16:
            to_depth(volume, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000
    exact = flat([volume])
    assert (found.pixels, found.least.tolist(), found.most.tolist()) == (2**22, [0], [exact.max()])
    assert found.mean == pytest.approx(exact.mean(1), rel=1e-12)
    assert found.std == pytest.approx(exact.std(1), rel=1e-9)
    assert found.bins.sum() == 2**22
    if dtype is not np.uint8:
        expected = np.rint(np.clip(volume.astype(np.float32), 0, 300) * (255 / 300)).astype(np.uint8)
        assert np.array_equal(to_depth(volume, 8, (0.0, 300.0)), expected)


def test_some_samples_are_evenly_spaced(tmp_path: Path) -> None:
    images = arrays(9, 2, np.uint16, 0, 60000)
    shards = packed(tmp_path / "s", images)
    kind = measured(shards, 3)["stats"]["kinds"][0]
    assert kind["mean"] == pytest.approx(flat([images[i] for i in (0, 4, 8)]).mean(1))
    found = read_stats(shards)
    assert found is not None
    assert (found.samples, found.of) == (3, 9)
    assert measured(shards, 900)["stats"]["samples"] == 9


def test_clips_and_volumes_are_counted_by_their_planes(tmp_path: Path) -> None:
    frames = [RNG.integers(0, 255, (6, 7)).astype(np.uint8) for _ in range(4)]
    volume = RNG.integers(0, 255, (1, 5, 6, 7)).astype(np.uint8)
    samples = [Sample([png(frame) for frame in frames[:3]]), Sample(png(frames[3])), Sample(npy(volume))]
    write_shards(samples, tmp_path, "s")
    found = measured(Shards(str(tmp_path)))
    assert found["stats"]["planes"] == {3: 1, 1: 1, 5: 1}
    assert found["kinds"] == {"PNG L, clips of 3": 1, "PNG L": 1, "npy 1 channel of uint8, 5 planes": 1}
    kind = found["stats"]["kinds"][0]
    everything = np.concatenate([np.stack(frames).ravel(), volume.ravel()])
    assert (kind["samples"], kind["pixels"]) == (3, everything.size)
    assert kind["mean"] == pytest.approx([everything.mean()])
    assert kind["std"] == pytest.approx([everything.std()])


def test_an_unnamed_axis_is_planes_if_asked(tmp_path: Path) -> None:
    write_shards([(npy(RNG.integers(0, 255, (5, 6, 7)).astype(np.uint8)), None)], tmp_path, "s")
    shards = Shards(str(tmp_path))
    assert check(shards, measure=Measure())["stats"]["kinds"][0]["channels"] == 5
    assert check(shards, measure=Measure(volumes=True))["stats"]["planes"] == {5: 1}


def test_of_volumes_the_advice_is_to_measure_planes(tmp_path: Path) -> None:
    write_shards([(npy(RNG.integers(0, 4000, (8, 6, 7)).astype(np.uint16)), None)], tmp_path, "s")
    shards = Shards(str(tmp_path))
    data, told = config(depth=16), rf"shards check {tmp_path} --stats --volumes \(or give data.mean"
    with pytest.raises(UsageError, match=told):
        fill_in(data, 1, [shards], frames=4)
    check(shards, measure=Measure())
    with pytest.raises(UsageError, match=rf"of 8 channels of uint16; measure planes as planes with: selfsight {told}"):
        fill_in(data, 1, [shards], frames=4)
    check(shards, measure=Measure(volumes=True))
    assert fill_in(data, 1, [shards], frames=4).mean is not None


def test_mixed_kinds_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed(tmp_path / "s", arrays(3, 12, np.uint16) + arrays(1, 13, np.uint16) + arrays(2, 12, np.float32))
    assert cli.main(["shards", "check", str(tmp_path / "s"), "--stats"]) == 0
    shown = capsys.readouterr()
    told = "12 channels of uint16: 3; 12 channels of float32: 2; 13 channels of uint16: 1"
    assert f"mixed channels or dtypes, of which a run takes one number of channels: {told}" in shown.err
    assert "uint16, 3 samples, in the files' own units" in shown.out
    assert "tif 12 channels of uint16: 3" in shown.out


def test_the_command_answers_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(
        [Sample(png(np.full((4, 5), 7 + i, np.uint8)), 0, group) for i, group in enumerate((3, 3, 9, None))],
        tmp_path,
        "s",
    )
    assert cli.main(["shards", "check", str(tmp_path), "--stats", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stats"]["kinds"][0]["mean"] == [8.5]
    assert (found["groups"], found["ungrouped"]) == (2, 1)
    assert (tmp_path / "s-000000.tar.stats.json").is_file()
    assert cli.main(["shards", "check", str(tmp_path), "--json"]) == 0
    assert "stats" not in json.loads(capsys.readouterr().out)


def test_bad_samples_are_left_out(tmp_path: Path) -> None:
    good = npy(np.arange(12, dtype=np.float32).reshape(3, 4))
    (tmp_path / "x.tar").write_bytes(
        make_tar([("a.npy", good), ("b.npy", npy(np.full((3, 4), np.nan))), ("c.npy", good)])
    )
    build_index(tmp_path / "x.tar")
    found = check(Shards(str(tmp_path)), measure=Measure())
    assert [bad["reason"] for bad in found["bad"]] == ["holds NaN or infinity; replace them by a number before packing"]
    assert found["stats"]["samples"] == 2


def config(**how: Any) -> DataConfig:
    return DataConfig(train="s", **how)


@pytest.mark.parametrize(
    ("depth", "bounds", "kinds"),
    [
        (8, None, [np.uint8, np.uint16]),
        (16, None, [np.uint8, np.uint16]),
        (16, (0.0, 4095.0), [np.uint16]),
        (16, (1000.0, 60000.0), [np.uint8, np.uint16]),
        (8, (0.0, 60000.0), [np.uint16, np.int32]),
        (32, (-1000.0, 3000.0), [np.int16, np.float32, np.uint8]),
        (32, None, [np.float32]),
    ],
)
def test_a_run_normalises_to_mean_0_and_std_1(depth: Any, bounds: Any, kinds: list[Any], tmp_path: Path) -> None:
    images = []
    for kind in kinds:
        top = {np.uint8: 255, np.uint16: 4000 if bounds and bounds[1] < 5000 else 60000}.get(kind, 2500)
        images += arrays(4, 5, kind, 0, top)
    shards = packed(tmp_path / "s", images)
    measured(shards)
    data = fill_in(config(depth=depth, range=bounds), 5, [shards])
    form = Form(5, depth, data.range)
    assert data.mean is not None
    assert data.std is not None
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    made = [
        normalize(torch.from_numpy(decode(shards.read(i), form)), mean, std, value_range(form))
        for i in range(len(shards))
    ]
    pixels = torch.cat([image.flatten(1) for image in made], 1).double()
    assert pixels.mean(1).tolist() == pytest.approx([0] * 5, abs=0.01)
    assert pixels.std(1, correction=0).tolist() == pytest.approx([1] * 5, abs=0.01)
    if bounds is None and depth == 32:
        values = flat(images)
        exact = np.percentile(values, (0.1, 99.9), axis=1, method="inverted_cdf")
        assert data.range == pytest.approx((exact[0].min(), exact[1].max()), rel=1 / 128)


def test_what_is_given_stays_and_defaults_stay(tmp_path: Path) -> None:
    shards = packed(tmp_path / "s", arrays(2, 3, np.uint8))
    plain = config()
    assert fill_in(plain, 3, [shards]) is plain
    given = config(depth=16, mean=(0.1,) * 5, std=(0.2,) * 5)
    assert fill_in(given, 5, [shards]) is given
    measured(shards)
    half = fill_in(config(depth=16, mean=(0.1,) * 3), 3, [shards])
    assert half.mean == (0.1,) * 3
    assert half.std is not None
    ranged = fill_in(config(depth=32, mean=(0.1,) * 3, std=(0.2,) * 3), 3, [shards])
    assert (ranged.mean, ranged.std) == ((0.1,) * 3, (0.2,) * 3)
    assert ranged.range is not None


def test_grey_counts_for_three_equal_channels(tmp_path: Path) -> None:
    grey, colour = arrays(2, 1, np.uint16, 0, 60000), arrays(2, 3, np.uint16, 0, 60000)
    shards = packed(tmp_path / "s", grey + colour)
    measured(shards)
    data = fill_in(config(depth=16), 3, [shards])
    values = flat([np.repeat(image, 3, 0) for image in grey] + colour) / 65535
    assert data.mean == pytest.approx(values.mean(1))
    assert data.std == pytest.approx(values.std(1))
    with pytest.raises(
        UsageError, match=r"encoder.channels: 1; the shards' statistics are of 1 channel of uint16, 3 channels"
    ):
        fill_in(config(depth=16), 1, [shards])


def test_sets_of_a_mixture_add_up(tmp_path: Path) -> None:
    images = arrays(6, 4, np.uint8)
    one, other = packed(tmp_path / "a", images[:2]), packed(tmp_path / "b", images[2:])
    measured(one)
    with pytest.raises(UsageError, match="shards have no statistics"):
        fill_in(config(), 4, [one, other])
    measured(other)
    assert fill_in(config(), 4, [one, other]).mean == pytest.approx(flat(images).mean(1) / 255)


def test_what_is_missing_or_stale_is_told(tmp_path: Path) -> None:
    images = arrays(2, 12, np.uint8)
    images[1][3] = 7
    images[0][3] = 7
    shards = packed(tmp_path / "s", images)
    with pytest.raises(
        UsageError,
        match=rf"data.mean: no default fits 12 channels of 8 bits.*shards check {tmp_path}/s --stats \(or give data.mean, data.std\)",
    ):
        fill_in(config(), 12, [shards])
    with pytest.raises(UsageError, match=r"and data\.range"):
        fill_in(config(depth=32), 12, [shards])
    measured(shards)
    with pytest.raises(UsageError, match=r"encoder.channels: 13; the shards' statistics are of 12 channels of uint8"):
        fill_in(config(), 13, [shards])
    with pytest.raises(UsageError, match=r"data.std: channel 3 is constant in the shards' statistics"):
        fill_in(config(), 12, [shards])
    for path in (tmp_path / "s").glob("*.tar"):
        path.unlink()
    changed = packed(tmp_path / "s", arrays(2, 12, np.uint8))
    with pytest.raises(
        DataError, match=r"are of another state of the shard; selfsight shards check .*s-000000.tar --stats"
    ):
        read_stats(changed)


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    shards = packed(tmp_path / "s", arrays(2, 2, np.uint8))
    measured(shards)
    path = shards.beside(0, ".stats.json")
    whole = json.loads(path.read_text())
    kind = whole["kinds"][0]
    broken: list[Any] = [
        b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b"null", json.dumps(whole).encode()[:-5],
        {**whole, "kinds": 3}, {**whole, "kinds": [{}]}, {**whole, "planes": [1]}, {**whole, "samples": None},
        {**whole, "kinds": [{**kind, "mean": [1.0]}]}, {**whole, "kinds": [{**kind, "std": 1, "least": [1, 2, 3]}]},
        {**whole, "kinds": [{**kind, "channels": 3}]}, {**whole, "kinds": [{**kind, "bins": [[[70000], [1]], [[1], [1]]]}]},
        {**whole, "kinds": [{**kind, "squares": [float("nan")] * 2}]}, {**whole, "kinds": [{**kind, "channels": 10**12}]},
    ]  # fmt: skip
    for content in broken:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(DataError, match="the statistics are damaged; selfsight shards check"):
            read_stats(shards)
    path.write_text(json.dumps({**whole, "version": 2}))
    with pytest.raises(DataError, match="statistics of version 2, this release reads 1"):
        read_stats(shards)


def test_kinds_in_words() -> None:
    assert str(Kind(1, "uint8")) == "1 channel of uint8"
    assert unit_line("uint8", 8, (0, 4095)) == (1 / 255, 0)
    assert own_pixels(png(np.zeros((2, 3, 3), np.uint8)))[0] == "PNG RGB"


def test_a_run_keeps_what_the_statistics_gave(
    tmp_path: Path, small_fields: dict[str, Any], unchecked_export: None
) -> None:
    images = arrays(16, 5, np.uint16, 0, 60000) + arrays(1, 4, np.uint16)
    shards = packed(tmp_path / "s", images, per_shard=100)
    fields = small_fields | {
        "data.train": str(tmp_path / "s"),
        "data.depth": 16,
        "encoder.channels": 5,
        "train.steps": 2,
    }
    with pytest.raises(UsageError, match=r"no default fits 5 channels of 16 bits"):
        pretrain("digits/mae", fields)
    found = measured(shards)["stats"]["kinds"][0]
    pretrain("digits/mae", fields)
    data = load(Path(small_fields["run_dir"]) / "recipe.yaml").data
    assert data.mean == pytest.approx([value / 65535 for value in found["mean"]])
    assert data.std == pytest.approx([value / 65535 for value in found["std"]])
    made = load_encoder(Path(small_fields["run_dir"]) / "encoder").preprocessing
    assert (made.channels, made.depth, made.mean) == (5, 16, data.mean)
    told = (Path(small_fields["run_dir"]) / "quarantine.jsonl").read_text()
    assert "has 4 channels of uint16; the encoder takes 5" in told


@pytest.mark.parametrize("beside", [True, False])
def test_statistics_of_remote_shards(beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stand beside the shards on the server, or those that were made here."""
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    images = arrays(4, 5, np.uint8)
    near = packed(tmp_path / "s", images)
    if beside:
        measured(near)
    files = {f"/{file.name}": Plan(file.read_bytes(), etag=f'"{file.name}"') for file in (tmp_path / "s").iterdir()}
    with Server(files) as server:
        far = Shards(f"{server.address}/s-{{000000..000001}}.tar")
        if not beside:
            assert read_stats(far) is None
            measured(far)
        found = read_stats(far)
        assert found is not None
        assert found.normalization(5, 8, None)[0] == pytest.approx(flat(images).mean(1) / 255)
        far.close()


def test_statistics_of_many_remote_shards_are_asked_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for each other: an answer is given only when all have been asked for."""
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    images = arrays(8, 5, np.uint8)
    near = packed(tmp_path / "s", images)
    measured(near)
    count = len(near.paths)
    files = {f"/{file.name}": Plan(file.read_bytes(), etag=f'"{file.name}"') for file in (tmp_path / "s").iterdir()}
    with Server(files) as server:
        far, together, real = Shards(f"{server.address}/s-{{000000..{count - 1:06}}}.tar"), Barrier(count), server.fault
        monkeypatch.setattr(server, "fault", lambda *arguments: (together.wait(20), real(*arguments))[1])
        found = read_stats(far)
        assert found is not None
        assert found.samples == 8
        del files["/s-000000.tar.stats.json"]
        monkeypatch.setattr(server, "fault", real)
        assert read_stats(far) is None
        far.close()


def test_statistics_of_each_set_do_not_stand_for_those_of_the_scores(tmp_path: Path) -> None:
    images = arrays(4, 4, np.uint8)
    shards = packed(tmp_path / "a", images)
    measured(shards)
    part = {"train": str(tmp_path / "a"), "mean": [0.1] * 4, "std": [0.2] * 4}
    filled = fill_in(DataConfig.model_validate({"mix": [part]}), 4, [shards])
    assert filled.mean == pytest.approx(flat(images).mean(1) / 255)
    assert filled.mix[0].mean == (0.1,) * 4
