"""The shards that a data SPEC names: paths and addresses, with braces, globs and folders."""

import glob
import re
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from braceexpand import braceexpand

from selfsight.data import digits
from selfsight.data.index import IMAGE_SUFFIXES
from selfsight.data.store import TOTAL, WEB, Address, Refused, open_store, patiently, remote
from selfsight.errors import DataError, DataGone, NoShards, UsageError
from selfsight.redact import redact

MOST_SHARDS, MOST_LETTERS = 1_000_000, 4096


def find_shards(spec: str | Sequence[str]) -> list[Path | Address]:
    """The tars that a data SPEC names, in its own order: braces in sequence, globs and folders sorted by name.

    Addresses are not asked whether they are there; only their globs and folders are listed.

    Args:
        spec: paths or addresses with `{000..009}` braces, globs, folders of tars, a list of these, or a built-in set such
            as `digits:train`.

    Raises:
        NoShards: nothing matches, or named files are missing (all of them are listed).
        DataError: a folder without shards, a shard that is named twice, or a store that cannot be listed.
        DataGone: a store that is to be listed cannot be reached.
        UsageError: a kind of address that is not read, or one that cannot be.
    """
    shards: list[Path | Address] = []
    for part in (one.removeprefix("file://") for one in ([spec] if isinstance(spec, str) else spec)):
        if part.startswith("digits:"):
            shards += digits.shards(part.removeprefix("digits:"))
        elif remote(part):
            shards += [shard for pattern in _patterns(part) for shard in _listed(_address(pattern))]
        else:
            shards += [shard for pattern in _patterns(part) for shard in _expand(_path(pattern))]
    lost = [str(shard) for shard in shards if isinstance(shard, Path) and not shard.is_file()]
    if lost:
        raise NoShards(
            f"{len(lost)} of {len(shards)} shards are missing: {', '.join(lost[:8])}{' ...' if lost[8:] else ''}"
        )
    if len(set(shards)) < len(shards):
        raise DataError(f"{spec}: names the same shard twice")
    return shards


def _patterns(part: str) -> list[str]:
    """What braces stand for, unless they are more than a set can have: 40 pairs are a trillion names."""
    try:
        if len(part) > MOST_LETTERS or _expansions(part) > MOST_SHARDS:
            raise UsageError(f"{part[:200]}: stands for more than {MOST_SHARDS:,} shards")
        return list(braceexpand(part))
    except (ValueError, RecursionError):
        raise UsageError(f"{part}: its braces do not match") from None


def _path(pattern: str) -> Path:
    try:
        return Path(pattern).expanduser()
    except RuntimeError:
        raise UsageError(f"{pattern}: there is no such user's home folder") from None


def _address(url: str) -> Address:
    """An address that can be asked: what is wrong with one of the web is better known now than by each request."""
    address = Address(url)
    if address.scheme not in WEB:
        return address
    from selfsight.data.http_store import web_address

    try:
        return Address(web_address(url))
    except ValueError as error:
        raise UsageError(redact(f"{address}: is no address of the web: {error}")) from None


def _expansions(part: str) -> int:
    """How many names braces stand for, at most; counted from the innermost outwards."""
    product, inner = 1, re.compile(r"\{([^{}]*)\}")
    while found := inner.findall(part):
        for body in found:
            ends = re.match(r"(-?\d+)\.\.(-?\d+)", body)
            product *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else body.count(",") + (26 if ".." in body else 1)
        part = inner.sub("", part)
    return product


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            images = any(file.suffix[1:].lower() in IMAGE_SUFFIXES for file in path.rglob("*"))
            advice = f"; pack its images first: selfsight shards build {path} FOLDER" if images else ""
            raise DataError(f"{path}: no shards here (*.tar){advice}")
        return found
    if glob.has_magic(str(path)):
        found = sorted(Path(match) for match in glob.glob(str(path)))
        if not found:
            raise NoShards(f"{path}: no shards match")
        return found
    return [path]


def _listed(address: Address) -> list[Address]:
    """The address itself, or what its glob or folder holds. A name without a dot is a folder's."""
    below = address.path.partition("/")[2] if address.scheme in WEB else address.path  # [::1] is a host
    pattern, magic = address, any(sign in below for sign in "*[")  # ? begins a query, of versions for example
    if address.scheme in WEB and not magic and not address.path.endswith("/"):
        return [address]  # a link to download from may have any name
    if not magic and ("." not in address.name or address.path.endswith("/")):
        pattern = Address(address.url.rstrip("/") + "/*.tar")
    elif not magic:
        return [address]
    try:
        with closing(open_store(address.scheme)) as store:
            found = patiently(partial(store.list, pattern), TOTAL / 2)
    except Refused as error:
        found = []
        if not error.missing:
            raise DataError(f"{address}: cannot be listed ({error.strerror}); are the credentials right?") from None
    except OSError as error:
        raise DataGone(f"{address}: cannot be reached ({error.strerror}); run the same command when it can") from None
    if not found:
        raise NoShards(f"{pattern}: no shards match")
    return found
