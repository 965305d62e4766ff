"""The indexes of remote shards: fetched from beside them, or made in one walk over the object, and kept in the cache folder."""

import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TypeVar

from selfsight.console import say
from selfsight.data.crew import Crew
from selfsight.data.disk_cache import disk_cache
from selfsight.data.index import Records, Walked, cache_folder, read_records, walk, write_index
from selfsight.data.remote import IN_FLIGHT, MOST, key_of
from selfsight.data.store import Address, Changed, Object, Refused, Store, Unfit, open_store, patiently
from selfsight.data.targets import SUFFIX
from selfsight.errors import DataError, DataGone, NoShards, StorageError

PATIENCE = 5.0  # seconds, at the start of a run, where a person waits and an address may be misspelt
_WALKING = threading.Semaphore(2)  # each has a copy of a shard on the disk

T = TypeVar("T")


def looked_at(addresses: Sequence[Address]) -> list[tuple[Object, Path]]:
    """What each shard is now, and the local file of its index.

    Raises:
        NoShards: shards that are missing; all of them are listed.
        DataError: shards that are refused, or that hold no samples.
        DataGone: a store that cannot be reached.
    """
    disk_cache()  # a size that is no number is better known now than by a worker
    with _together(addresses) as (crew, stores):
        looks = [crew.submit(partial(_look, stores[one.scheme], one)) for one in addresses]
        found = [look.result() for look in looks]
        lost = [str(one) for one, seen in zip(addresses, found, strict=True) if seen is None]
        if lost:
            raise NoShards(
                f"{len(lost)} of {len(found)} shards are missing: {', '.join(lost[:8])}{' ...' if lost[8:] else ''}"
            )
        seen = [one for one in found if one is not None]
        pairs = zip(addresses, seen, strict=True)
        paths = [crew.submit(partial(local_index, stores[one.scheme], one, state)) for one, state in pairs]
        return list(zip(seen, [path.result() for path in paths], strict=True))


@contextmanager
def _together(addresses: Sequence[Address]) -> Iterator[tuple[Crew, dict[str, Store]]]:
    """Threads for several requests at once, and the stores by their scheme."""
    crew, stores = Crew(IN_FLIGHT), {scheme: open_store(scheme) for scheme in {one.scheme for one in addresses}}
    try:
        yield crew, stores
    finally:
        crew.close()
        for store in stores.values():
            store.close()


def local_index(store: Store, address: Address, seen: Object) -> Path:
    """The file with a shard's index: that beside the shard as it is now, else the one that was made here, now or before."""
    return copy_beside(store, address, ".idx") or _made(store, address, seen)


def copy_beside(store: Store, address: Address, suffix: str) -> Path | None:
    """A local copy of the small file of this suffix beside a shard, as it is now; None where there is none.

    Raises:
        DataError: it changed while it was read.
        DataGone: the store cannot be reached.
    """
    beside = address.beside(suffix)
    try:
        state = patiently(partial(store.look, beside), PATIENCE)
    except (Refused, Unfit):  # none, one that the shard's own signature does not open, or a page that says so
        return None
    except OSError as error:
        raise _gone(beside, error) from None
    path = _kept(beside, state, "")
    if not path.exists():
        pieces = [(at, min(MOST, state.size - at)) for at in range(0, state.size, MOST)]
        _publish(
            path, b"".join([_asked(beside, partial(store.read, beside, *piece, state.version)) for piece in pieces])
        )
    return path


def copies_beside(addresses: Sequence[Address], suffix: str) -> list[Path] | None:
    """Copies of the small files beside several shards, as `copy_beside`; None as soon as one has none."""
    with _together(addresses) as (crew, stores):
        coming = [crew.submit(partial(copy_beside, stores[one.scheme], one, suffix)) for one in addresses]
        paths = []
        for copy in coming:
            if (path := copy.result()) is None:
                return None
            paths.append(path)
        return paths


def build_remote_index(address: Address, missing: str) -> Records:
    """Walk a remote shard and keep its index in the cache folder; see `index.scan`."""
    with closing(open_store(address.scheme)) as store:
        seen = _there(store, address)
        found = _walked(store, address, seen, missing)
    if found.left:
        say(f"{address}: {found.left}; left out")
    path = _kept(address, seen)
    write_index(path, found.records, seen.size, found.targets)
    also = f" (and {path.with_suffix(SUFFIX)} as {address.name}{SUFFIX})" if found.targets else ""
    say(
        f"{address}: its index is {path}; put beside the shard as {address.name}.idx{also}, it spares everybody the walk"
    )
    return found.records


def read_remote_index(address: Address) -> Records:
    """The records of a remote shard's index."""
    (seen, path), *_ = looked_at([address])
    return read_records(path, address, seen.size)


def scan_remote(address: Address, missing: str) -> Walked:
    """What a remote shard holds now; see `index.scan`."""
    with closing(open_store(address.scheme)) as store:
        return _walked(store, address, _there(store, address), missing)


def _there(store: Store, address: Address) -> Object:
    if (seen := _look(store, address)) is None:
        raise DataError(f"{address}: not found")
    return seen


def _look(store: Store, address: Address) -> Object | None:
    """What an object is now; None for nothing."""
    try:
        return patiently(partial(store.look, address), PATIENCE, partial(_waiting, address))
    except Refused as error:
        if error.missing:
            return None
        raise DataError(f"{address}: cannot be read ({error.strerror}); are address and credentials right?") from None
    except Unfit as error:
        raise DataError(f"{address}: {error.strerror}") from None
    except OSError as error:
        raise _gone(address, error) from None


def _made(store: Store, address: Address, seen: Object) -> Path:
    path = _kept(address, seen)
    if not path.exists():
        with _WALKING, _alone(path):
            if not path.exists():  # nor has another process made it meanwhile
                say(f"{address}: no index beside it; reading it once ({seen.size / 1e6:,.1f} MB)")
                found = _walked(store, address, seen, "error")
                write_index(path, found.records, seen.size, found.targets)
    return path


def _walked(store: Store, address: Address, seen: Object, missing: str) -> Walked:
    """Walk a copy of the object, in a file that has no name and goes with this process."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()) as copy:
            _download(store, address, seen, copy.fileno())
            buffer = memoryview(mmap(copy.fileno(), 0, access=ACCESS_READ) if seen.size else b"")
            return walk(address, buffer, missing)
    except OSError as error:
        raise StorageError(
            f"{cache_folder()}: cannot hold a copy of {address} ({error.strerror}, {seen.size:,} bytes); "
            "SELFSIGHT_CACHE=FOLDER chooses another place"
        ) from None


def _download(store: Store, address: Address, seen: Object, file: int) -> None:
    crew = Crew(4)

    def piece(start: int) -> None:
        size = min(MOST, seen.size - start)
        os.pwrite(file, _asked(address, partial(store.read, address, start, size, seen.version)), start)

    try:
        for done in [crew.submit(partial(piece, start)) for start in range(0, seen.size, MOST)]:
            done.result()
    finally:
        crew.close()


def _asked(address: Address, attempt: Callable[[float], T]) -> T:
    try:
        return patiently(attempt, PATIENCE, partial(_waiting, address))
    except Changed:
        raise DataError(f"{address}: changed while it was read; run the same command again") from None
    except OSError as error:
        raise _gone(address, error) from None


def _waiting(address: Address, error: OSError) -> None:
    say(f"{address}: waiting for it ({error.strerror or error})")


def _gone(address: Address, error: OSError) -> DataGone:
    return DataGone(f"{address}: cannot be reached ({error.strerror or error}); run the same command when it can")


def _kept(address: Address, seen: Object, suffix: str = ".idx") -> Path:
    return cache_folder() / "index" / f"{key_of(address, seen)}{suffix}"


def _publish(path: Path, body: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(body)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: the index cannot be written ({error.strerror})") from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of a machine at a time: the ranks of a run all start at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise StorageError(f"{path.parent}: cannot be written ({error.strerror})") from None
