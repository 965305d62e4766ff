"""No file that is read runs anything, takes the machine, or shows a secret; foreign weights come in by one door."""

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import audit
import numpy as np
import pytest
import torch
from corpus import TINY, _Payload, _torch_zip, tiny_encoder
from safetensors.torch import load_file

from selfsight import cli, console, foreign, import_weights
from selfsight.errors import DataError, StorageError, UsageError
from selfsight.exports import export
from selfsight.loading import load_encoder
from selfsight.redact import redact
from selfsight.weights import load_weights

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one watched process found: its own misdeeds, a run, the corpus."""
    folder = tmp_path_factory.mktemp("watched")
    command = [sys.executable, str(HERE / "audit.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_hook_fires_for_every_kind(watched: dict[str, Any]) -> None:
    assert {*audit._NEVER, *audit._CODE, *audit._PATHS, "open", "subprocess.Popen", "socket.connect"} < {
        *watched["provoked"]
    }
    for kind, noted in watched["provoked"].items():
        assert any(line.startswith(f"{kind}: ") for line in noted), kind


def test_a_run_and_its_readers_do_nothing_of_the_kind(watched: dict[str, Any]) -> None:
    assert watched["in_use"] == []


def test_hostile_files_run_nothing_and_are_refused_in_time(watched: dict[str, Any]) -> None:
    assert watched["attacks"] > 350
    assert watched["attacks_executed"] == 0, watched["executed"]
    assert watched["under_attack"] == []
    assert watched["over_time"] == []
    assert watched["over_memory"] == []
    assert watched["not_ours"] == []
    for name, told in watched["told"].items():
        assert "Traceback" not in told, name
        assert "hf.co" not in told, name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tag-apply", "tags (!name) are not read"),
        ("bomb-aliases", "aliases (*name) are not read"),
        ("bomb-100MB", "larger than"),
        ("base-loop", "circular"),
        ("objective-colon", "no objective 'canary_module:Payload'"),
        ("spec-pipe", "pipe: is not read"),
        ("spec-nested-braces", "stands for more than 1,000,000 shards"),
        ("tar-symlink", "a symbolic link; only plain files are read"),
        ("tar-base256", "past the end of the file"),
        ("index-far", "lie outside the shard"),
        ("index-pipe", "is not a file"),
        ("image-postscript", "not an image of a known format"),
        ("pickle-payload-2", "holds code (posix.system)"),
        ("zip-payload", "holds code (posix.system)"),
        ("torch-deflated", "is compressed"),
        ("torch-stretched-tensor", "its tensors claim 8,796,093,018,112 bytes"),
        ("torch-bytearray", "asks for more memory"),
        ("weights-pickle.pth", "import it first: selfsight import-weights"),
        ("safetensors-pickle", "not a safetensors file"),
        ("config-width", "config.json: encoder.width: "),
        ("config-giant", "describes an encoder of"),
        ("config-timm-giant", "describes an encoder"),
        ("manifest-endless", "'/dev/zero' of its manifest is no file in it"),
        ("manifest-pipe", "incomplete or damaged"),
        ("checkpoint-state-pickle", "is no checkpoint of selfsight's"),
        ("stored-objects", "holds no stored teacher"),
    ],
)
def test_why_they_are_refused(watched: dict[str, Any], name: str, said: str) -> None:
    """A hostile file that is refused for another reason than the one it is about tests nothing."""
    assert said in watched["told"][name]


# The one door


def given(path: Path, tree: Any, **how: Any) -> Path:
    torch.save(tree, path, **how)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_of_others_gives_its_tensors(tmp_path: Path, zipped: bool) -> None:
    tied = torch.randn(4, 3)
    weights = {"a": tied, "b": tied, "c": tied.t(), "half": torch.ones(2).half(), "p": torch.nn.Parameter(torch.ones(1)), "note": "x"}  # fmt: skip
    args = argparse.Namespace(lr=0.1, path=Path("/x"), loss=np.float64(0.5))
    tree = {"model": weights, "optimizer": {"state": {0: {"m": tied}}}, "args": args, "epoch": 3}
    source = given(tmp_path / "x.pth", tree, _use_new_zipfile_serialization=zipped)
    lines = foreign.convert(source, tmp_path / "x.safetensors", None, "")
    assert lines == ["5 tensors of model, 152 bytes", "1 left out: note"]
    found = load_file(tmp_path / "x.safetensors")
    assert sorted(found) == ["a", "b", "c", "half", "p"]
    assert torch.equal(found["a"], tied)
    assert torch.equal(found["c"], tied.t())
    assert found["half"].dtype == torch.float16


def test_several_sets_are_listed_and_prefixes_taken_off(tmp_path: Path) -> None:
    part = {"module.backbone.w": torch.ones(2), "module.head.w": torch.zeros(1)}
    source = given(tmp_path / "x.pth", {"teacher": part, "student": part, "deep": {"inner": part}})
    target = tmp_path / "x.safetensors"
    with pytest.raises(foreign.Refused, match=r"teacher \(2 tensors\), student \(2 tensors\), deep.inner \(2 tensors\); choose with --key"):  # fmt: skip
        foreign.convert(source, target, None, "")
    with pytest.raises(foreign.Refused, match=r"holds no tensors under 'model'; there is teacher"):
        foreign.convert(source, target, "model", "")
    with pytest.raises(foreign.Refused, match=r"no tensor's name starts with 'encoder.'; there are module.backbone.w"):
        foreign.convert(source, target, "teacher", "encoder.")
    assert foreign.convert(source, target, "deep.inner", "")[-1].endswith("--prefix module. takes it off")
    assert foreign.convert(source, target, "teacher", "module.backbone.")[1] == "1 left out: module.head.w"
    assert sorted(load_file(target)) == ["w"]
    flat = given(tmp_path / "flat.pth", {"w": torch.ones(2), "buffers": part})
    assert foreign.convert(flat, target, None, "")[0] == "1 tensors, 8 bytes"


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (torch.nn.Linear(1, 1), r"holds code \(torch.nn.modules.linear.Linear\)"),
        ({"a": 1}, "holds no mapping of names to tensors"),
        (torch.ones(2), "holds no mapping of names to tensors"),
        ({"a": torch.ones(2).to_sparse()}, "holds no mapping of names to tensors"),
        ({"a": torch.ones(1).expand(10**7).as_strided((10**7,), (0,))}, "claim 40,000,000 bytes"),
    ],
)
def test_what_is_no_set_of_weights(tmp_path: Path, tree: Any, said: str) -> None:
    with pytest.raises(foreign.Refused, match=said):
        foreign.convert(given(tmp_path / "x.pth", tree), tmp_path / "x.safetensors", None, "")


def test_the_command_in_its_own_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of ours as somebody else would have saved them, then a payload, by the real command."""
    encoder = tiny_encoder(3)
    source = given(tmp_path / "x.pth", {"model": {f"module.{n}": t for n, t in encoder.backbone.state_dict().items()}})
    target = tmp_path / "x.safetensors"
    assert cli.main(["import-weights", str(source), str(target), "--prefix", "module."]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{target}\n"
    assert "18 tensors of model" in shown.err
    assert target.stat().st_mode == source.stat().st_mode
    other = tiny_encoder(4)
    load_weights(other, str(target), "vit_tiny_patch16_224")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), encoder.state_dict().values(), strict=True))  # fmt: skip
    _torch_zip(source, b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00touch\x85R.")
    assert cli.main(["import-weights", str(source), str(tmp_path / "y.safetensors")]) == 65
    told = capsys.readouterr().err
    assert told == f"selfsight: {source}: holds code (posix.system), not only tensors; ask its maker for a state_dict or a .safetensors\n"  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["x.pth", "x.safetensors"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its reader ended: killed by signal 9"),
        ("raise MemoryError('x')", "its reader ended: MemoryError: x"),
        ("import time; time.sleep(60)", "was not read within 1 seconds"),
    ],
)
def test_a_reader_that_ends_badly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    (tmp_path / "reader.py").write_text(code)
    monkeypatch.setattr(import_weights, "_READER", tmp_path / "reader.py")
    monkeypatch.setattr(import_weights, "DEADLINE", 1 if "sleep" in code else 60)
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(DataError, match=said):
        import_weights.import_weights(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["reader.py", "x.pth"]


def test_the_reader_caps_its_memory_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(foreign.resource, "setrlimit", lambda what, limits: set_to.append(limits))
    source = given(tmp_path / "x.pth", [])
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    order = {"source": str(source), "target": str(tmp_path / "y"), "key": None, "prefix": ""}
    assert foreign.main(order) == {"refused": "holds no mapping of names to tensors"}
    ((limit, most),) = set_to
    assert taken + 2**30 < limit < taken + 3 * 2**30
    assert most == foreign.resource.getrlimit(foreign.resource.RLIMIT_AS)[1]
    monkeypatch.setattr(foreign, "convert", lambda *_: pytest.fail("read before the cap") if not set_to[1:] else ["x"])
    assert foreign.main(order) == {"lines": ["x"]}


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "x.pth").touch()
    (tmp_path / "old.safetensors").touch()
    for source, target, said in (
        ("none.pth", "x.safetensors", "no such file"), ("x.pth", "old.safetensors", "exists"), ("x.pth", "x.bin", "name a .safetensors"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            import_weights.import_weights(tmp_path / source, tmp_path / target)
    with pytest.raises(StorageError, match="cannot be written"):
        import_weights.import_weights(tmp_path / "x.pth", tmp_path / "x.pth" / "x.safetensors")


def test_a_recipe_with_a_pickle_is_told_the_door(tmp_path: Path) -> None:
    given(tmp_path / "x.pth", {"w": torch.ones(1)})
    with pytest.raises(UsageError, match=rf"import it first: selfsight import-weights {tmp_path}/x.pth {tmp_path}/x.safetensors"):  # fmt: skip
        load_weights(tiny_encoder(), str(tmp_path / "x.pth"), "vit_tiny_patch16_224")


# Exports


def test_an_interrupted_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any file operation of sealing and replacing: the old export or the new one loads, or is put back."""
    monkeypatch.setattr(export, "verify_export", lambda encoder, folder: 0.0)
    target = tmp_path / "enc"
    export.export(tiny_encoder(1), target, {})
    old, new = (encoder.state_dict()["backbone.cls_token"] for encoder in (tiny_encoder(1), tiny_encoder(2)))
    seen = []
    for deadly in range(30):
        with pytest.MonkeyPatch.context() as patch:
            count = _die_at(patch, deadly)
            try:
                export.export(tiny_encoder(2), target, {})
                break
            except KeyboardInterrupt:
                pass
        if target.exists():
            found = load_encoder(target).state_dict()["backbone.cls_token"]
            assert torch.equal(found, old) or torch.equal(found, new)
            seen.append("old" if torch.equal(found, old) else "new")
        else:
            seen.append("none")
            export._put_back(target)  # as the next export does first
            assert torch.equal(load_encoder(target).state_dict()["backbone.cls_token"], old)
        if seen[-1] == "new":
            export.export(tiny_encoder(1), target, {})
    assert count[0] <= deadly
    assert (seen.count("none"), seen[0]) == (1, "old")  # between two renames
    assert len(seen) > 5


def _die_at(patch: pytest.MonkeyPatch, deadly: int) -> list[int]:
    """A kill stands before the n-th fsync or rename; the count is answered."""
    count = [0]

    def dying(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] > deadly:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return call

    patch.setattr(export, "sync", dying(export.sync))
    patch.setattr(Path, "rename", dying(Path.rename))
    return count


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "verify_export", lambda encoder, folder: 0.0)
    done: list[str] = []
    sync, rename = export.sync, Path.rename
    monkeypatch.setattr(export, "sync", lambda path: (done.append(path.name), sync(path))[1])
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(f"rename {path.name}"), rename(path, to))[1])
    export.export(tiny_encoder(), tmp_path / "enc", {})
    assert sorted(done[:4]) == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    assert done[4:] == [".draft-enc", "rename .draft-enc", tmp_path.name]


def test_an_export_gives_away_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "verify_export", lambda encoder, folder: 0.0)
    export.export(tiny_encoder(), tmp_path / "enc", {"recipe": {"data": {"train": [URL, "a.tar"]}, "seed": 3}})
    assert len({path.stat().st_mode for path in (tmp_path / "enc").iterdir()}) == 1
    kept = json.loads((tmp_path / "enc" / "config.json").read_text())["selfsight"]["recipe"]
    assert kept == {"data": {"train": ["https://***@host.example/x.tar?***", "a.tar"]}, "seed": 3}


# Secrets

SECRETS = ["hunter2", "X1Y2Z3SIGNATURE", "AKIAABCDEFGHIJKLMNOP", "hf_abcdefghijklmnopqrstuv", "ghp_" + "q" * 36]
URL = f"https://user:{SECRETS[0]}@host.example/x.tar?X-Amz-Signature={SECRETS[1]}#{SECRETS[0]}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URL, "https://***@host.example/x.tar?***"),
        ("s3://key:se/cret@bucket/x", "s3://***@bucket/x"),
        ("gs://b/o?a=b; copy it", "gs://b/o?***; copy it"),
        ("az://h:8080/x, https://h/y#f.", "az://h:8080/x, https://h/y#***."),
        ("hf://token@datasets/x", "hf://***@datasets/x"),
        (f"keys {' '.join(SECRETS[2:])}.", "keys *** *** ***."),
        ("token=abc sig=1%2F access_token = 'a b' --hf_token=x", "token=*** sig=*** access_token = *** --hf_token=***"),
        ('{"password": "a, b", "n": 1}', '{"password": ***, "n": 1}'),
        ("AWS_SECRET_ACCESS_KEY=a/b+c", "AWS_SECRET_ACCESS_KEY=***"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.sig-part", "***"),
        ("a\x1b[2Jb\x00\r", "a?[2Jb??"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "encoder.class_token: null", "class_token=True, mask_token=x", "http://www.w3.org/2000/svg", "a: b\n\tc", "user@host 3/4 a?b #5",
        "runs/mae: goes on from step 5; 10 steps", "k=3 keys=4 monkey=5", "s3://bucket/{000..009}.tar", "12:30 @x", "the token is",
    ],
)  # fmt: skip
def test_other_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", URL],
        ["pretrain", "digits/mae", "--data.train", URL],
        ["pretrain", "digits/mae", "--optim.lr", f"password={SECRETS[0]}"],
        ["pretrain", "digits/mae", "--encoder.weights", f"/nowhere?sig={SECRETS[1]}"],
        ["--debug", "pretrain", "digits/mae", "--data.train", URL],
        ["eval", URL, "--train", "digits:train", "--test", "digits:test"],
        ["shards", "check", URL],
        ["shards", "index", f"/nowhere/token={SECRETS[0]}.tar"],
        ["export", f"/nowhere/token={SECRETS[0]}", "/tmp/never"],
        ["import-weights", f"/nowhere/{SECRETS[3]}.pth", "/tmp/never.safetensors"],
        ["report", f"/nowhere/{SECRETS[2]}"],
        ["shards", "check", "x.tar", "--tokens", URL],
    ],
)
def test_errors_show_no_secret(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsight.data.remote_index.PATIENCE", 0.2)
    if words[1:2] == ["digits/mae"] or words[2:3] == ["digits/mae"]:
        words = [*words, "--run_dir", str(tmp_path / "run"), "--train.workers", "0"]
    try:
        code = cli.main(words)
    except SystemExit as stop:  # argparse's own
        code = int(stop.code or 0)
    assert code in {2, 65, 74, 75}  # the last: no such host, which may come back
    shown = "".join(capfd.readouterr())
    assert shown
    assert [secret for secret in SECRETS if secret in shown] == []
    assert "***" in shown or "//host.example/x.tar:" in shown  # an address of data is told without its query


def test_messages_tables_and_reports_show_no_secret(capfd: pytest.CaptureFixture[str], watched: dict[str, Any]) -> None:
    console.say(f"reading {URL} [bold]not markup[/]")
    console.table(["a", "b"], [[URL, "[/x]"]], URL)
    shown = "".join(capfd.readouterr())
    assert [secret for secret in SECRETS if secret in shown] == []
    assert "[bold]not markup[/]" in shown
    assert "[/x]" in shown
    assert watched["leaks"] == []


def test_a_crash_of_ours_shows_no_secret_either() -> None:
    """What is no error of ours, and so has a traceback, in the process of the command."""
    code = (
        "import sys, selfsight.cli as cli; cli.build_parser = lambda: 1 / 0 if not sys.stderr else open(3.5, sys.argv[1]);"
        "sys.argv = ['selfsight', sys.argv[1]]; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, URL], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert [secret for secret in SECRETS if secret in done.stderr] == []


# The source

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def sources() -> Iterator[Path]:
    for folder in ("ssl", "data", "eval"):
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if not path.is_symlink())


def problems(tree: ast.AST, name: str) -> Iterator[str]:
    """Every way of running what is in a file that we know of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {module}" for module in modules if module.partition(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            called, named = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            last = called.rpartition(".")[2]
            if called in {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load"}:
                yield f"calls {called}"
            if called == "torch.load" and (name != "foreign.py" or named.get("weights_only") != "True"):
                yield "calls torch.load"
            if called in {"np.load", "numpy.load"} and named.get("allow_pickle") != "False":
                yield "calls np.load without allow_pickle=False"
            if named.get("shell") not in {None, "False"}:
                yield "runs a shell"
            if called.startswith("yaml.") and last in {"load", "load_all", "full_load", "unsafe_load"} and ast.unparse(node.args[-1]) != "_Loader":  # fmt: skip
                yield f"calls {called} with another loader"
            if (
                last in {"extract", "extractall", "unpack_archive"} and called != "extract"
            ):  # eval.features has an extract
                yield f"calls {called}"


def test_the_source_has_no_way_of_running_what_it_reads() -> None:
    found = list(sources())
    assert len(found) > 50
    assert [f"{path.name}: {told}" for path in found for told in problems(ast.parse(path.read_text()), path.name)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from marshal import loads", "import joblib.x as y", "torch.load(x, weights_only=True)", "np.load(x)",
        "np.load(x, allow_pickle=True)", "eval(x)", "exec(x)", "os.system(x)", "run(x, shell=True)", "yaml.load(x, yaml.SafeLoader)",
        "yaml.unsafe_load(x)", "tar.extractall(x)", "tarfile.open(x).extract(y)", "shutil.unpack_archive(x)",
    ],
)  # fmt: skip
def test_the_look_at_the_source_sees(line: str) -> None:
    assert len(list(problems(ast.parse(line), "other.py"))) == 1


def test_tiny_is_tiny() -> None:
    """The corpus rests on it: memory that an attack takes must stand out."""
    assert TINY["width"] == 16
    assert sum(p.numel() for p in tiny_encoder().parameters()) < 10_000
    assert _Payload("x").__reduce__() == (os.system, ("x",))
