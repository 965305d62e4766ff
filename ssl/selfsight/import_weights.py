"""The only door for a foreign .pth, .pt or .bin: read by a process of its own (foreign.py), written as .safetensors."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from selfsight.errors import DataError, StorageError, UsageError
from selfsight.run_folder import sync

DEADLINE = 600  # seconds; 5 GB from a slow disk take a minute
_READER = Path(__file__).with_name("foreign.py")


def import_weights(source: Path, target: Path, key: str | None = None, prefix: str = "") -> list[str]:
    """Write the tensors of a file of torch.save as `target`, as they are stored; nothing else in it is built or run.

    Args:
        key: which set of tensors, where the file holds several, such as "model" or "teacher".
        prefix: take only tensors whose names start so, without it.

    Returns:
        What was taken and what was left out, line by line.

    Raises:
        UsageError: no such file, or a target that exists or is no .safetensors.
        DataError: a file that holds code, no tensors or several sets of them, or that takes too long or too much memory.
        StorageError: the target cannot be written.
    """
    if not source.is_file():
        raise UsageError(f"{source}: no such file")
    if target.suffix != ".safetensors" or target.exists():
        raise UsageError(f"{target}: " + ("exists; name a new file" if target.exists() else "name a .safetensors file"))
    draft = target.with_name(f".draft-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        mode = draft.stat().st_mode
        lines = _read(source, draft, key, prefix)
        draft.chmod(mode)  # safetensors writes for the owner alone
        sync(draft)
        draft.rename(target)
        sync(target.parent)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):  # it is gone, or its folder never was one
            draft.unlink()
    return lines


def _read(source: Path, draft: Path, key: str | None, prefix: str) -> list[str]:
    given = {"source": str(source.resolve()), "target": str(draft.resolve()), "key": key, "prefix": prefix}
    isolated = ["-E", "-P"] if sys.version_info >= (3, 11) else ["-E"]  # not -I: torch may be in the user's own site
    command = [sys.executable, *isolated, str(_READER), json.dumps(given)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        raise DataError(f"{source}: was not read within {DEADLINE} seconds") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        raise DataError(f"{source}: its reader ended: {last[:200]}")
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise DataError(f"{source}: {answer['refused']}")
    return answer["lines"]
