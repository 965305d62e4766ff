"""Where remote shards lie: addresses, and stores that give a range of an object, whose every failure is one of three kinds.

HTTP(S) has a client of its own (`selfsight.data.http_store`); the others are fsspec's file systems, made by the process that reads.
"""

import asyncio
import errno
import random
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from selfsight.errors import UsageError

SCHEMES = {  # to the scheme of fsspec, the package that has it, and the extra that brings the package
    "http": ("http", "", ""),
    "https": ("https", "", ""),
    "s3": ("s3", "s3fs", "cloud"),
    "gs": ("gs", "gcsfs", "cloud"),
    "gcs": ("gs", "gcsfs", "cloud"),
    "az": ("az", "adlfs", "cloud"),
    "abfs": ("abfs", "adlfs", "cloud"),
    "abfss": ("abfss", "adlfs", "cloud"),
    "hf": ("hf", "huggingface_hub", ""),
}
WEB = ("http", "https")
CONNECT = 10.0  # seconds for a connection
SILENCE = 10.0  # seconds without a byte
TOTAL = 60.0  # seconds for one answer, however it trickles
LEAST = 1.0  # seconds that an attempt has, also the last one: what it would say of its end hides the cause
UNFIT = 3  # tries for a server that seems unfit
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
VERSIONS = ("ETag", "etag", "generation", "blob_id", "content_md5", "LastModified", "last_modified", "mtime")

T = TypeVar("T")


class Away(OSError):
    """A fault that may pass.

    Args:
        after: seconds that the server asks us to wait.
    """

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(errno.EIO, reason)
        self.after = after


class Unfit(Away):
    """An answer of a server that seems unable to do what is needed; a few of them, and it is."""


class Refused(OSError):
    """What no waiting mends: nothing there, no right to it, an address that leads elsewhere."""

    def __init__(self, reason: str, missing: bool = False) -> None:
        super().__init__(errno.ENOENT if missing else errno.EACCES, reason)
        self.missing = missing


class Changed(OSError):
    """An answer that looks as if the object were another one."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.ESTALE, reason)


class Object(NamedTuple):
    """What tells one state of an object from another."""

    size: int
    version: str
    """Its ETag, else its time, else nothing."""


@dataclass(frozen=True)
class Address:
    """Where a remote shard lies. As text it is for messages: without user, password and query."""

    url: str

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0].lower()

    @property
    def path(self) -> str:
        """Without the query, which only the web has."""
        rest = self.url.partition("://")[2]
        return rest.split("?")[0].split("#")[0] if self.scheme in WEB else rest

    @property
    def name(self) -> str:
        """The shard's own name, `train-000003.tar`."""
        return self.path.rstrip("/").rpartition("/")[2]

    def beside(self, suffix: str) -> "Address":
        """The object whose name has this suffix too; its query stays."""
        head, mark, query = self.url.partition("?") if self.scheme in WEB else (self.url, "", "")
        return Address(head + suffix + mark + query)

    def __str__(self) -> str:
        host, slash, path = self.path.split("?")[0].partition("/")
        return f"{self.scheme}://{host.rpartition('@')[2]}{slash}{path}"


class Store(Protocol):
    """Objects by address.

    Every method raises Away, Refused or Changed, and takes the time (of the monotonic clock) at which it must end.
    """

    def look(self, address: Address, end: float) -> Object:
        """Size and version of an object."""

    def read(self, address: Address, offset: int, size: int, version: str, end: float) -> bytes:
        """Exactly `size` bytes of this version of an object."""

    def list(self, pattern: Address, end: float) -> list[Address]:
        """The objects that a glob matches, sorted by name."""

    def close(self) -> None:
        """Give up its connections."""


def remote(part: str) -> bool:
    """Whether a part of a SPEC is an address and no path.

    Raises:
        UsageError: an address of an unknown kind.
    """
    scheme = part.partition(":")[0].lower()
    if "://" not in part and not part.startswith("pipe:"):
        return False
    if scheme in SCHEMES:
        return True
    near = get_close_matches(scheme, SCHEMES, 1, 0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UsageError(
        f"{Address(part)}: {scheme}: is not read{hint}; shards are local paths or {'://, '.join(SCHEMES)}://"
    )


def open_store(scheme: str) -> Store:
    """The store for addresses of a scheme, to be used by this process only.

    Raises:
        UsageError: the package that reads it is not there.
    """
    if scheme in WEB:
        from selfsight.data.http_store import HttpStore

        return HttpStore()
    return FsspecStore(scheme)


class Outage:
    """Since when nothing comes, for all who share it: what waits in a queue must not begin to be patient when its turn comes."""

    def __init__(self) -> None:
        self.began = self._last = float("inf")
        self._lock = threading.Lock()

    def failed(self, patience: float) -> None:
        """A try has failed. One after a rest of more than `patience` seconds says nothing of the time before."""
        now = time.monotonic()
        with self._lock:
            self.began = now if now - self._last > patience else min(self.began, now)
            self._last = now

    def over(self) -> None:
        """Something came."""
        with self._lock:
            self.began = float("inf")


def patiently(
    attempt: Callable[[float], T],
    patience: float,
    waiting: Callable[[OSError], None] | None = None,
    outage: Outage | None = None,
) -> T:
    """What `attempt` gives, tried again with growing pauses while the fault is one that may pass.

    Args:
        attempt: is told when it must end.
        patience: seconds for all of it, and since the outage began.
        waiting: told the fault once, before the first pause of a second or more.
        outage: shared with others whose faults count for this one, too.

    Raises:
        OSError: the last one, of a fault that lasts.
    """
    begun, pause, tries, outage = time.monotonic(), FIRST_PAUSE, 0, outage or Outage()
    while True:
        end = min(begun, outage.began) + patience
        try:
            found = attempt(max(end, time.monotonic() + LEAST))
            outage.over()
            return found
        except (Refused, Changed):
            raise
        except OSError as error:
            tries += 1
            outage.failed(patience)
            end = min(begun, outage.began) + patience
            # A thousand workers must not come back at the same moment.
            wait = max(pause, getattr(error, "after", 0.0)) * (1 + random.random() / 4)
            if time.monotonic() + wait > end or (isinstance(error, Unfit) and tries >= UNFIT):
                raise
            if waiting and wait >= 1:
                waiting(error)
                waiting = None
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)


class FsspecStore:
    """One of fsspec's file systems. Its own settings (endpoints, `anon`) come from the environment and fsspec's configuration."""

    def __init__(self, scheme: str) -> None:
        import fsspec

        self.scheme = scheme
        protocol, package, extra = SCHEMES[scheme]
        # What fsspec and botocore try again by themselves would not count as waiting.
        once = {"config_kwargs": {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64}}
        try:
            self.files: Any = fsspec.filesystem(protocol, use_listings_cache=False, **(once if scheme == "s3" else {}))
        except ImportError:
            name = f"selfsight[{extra}]" if extra else package
            raise UsageError(f"{scheme}:// needs {package}: pip install '{name}'") from None
        except ValueError as error:  # an account that is not said
            raise UsageError(f"{scheme}://: {_one_line(error)}") from None
        if scheme == "s3":
            self.files.retries = 1

    def look(self, address: Address, end: float) -> Object:
        found = self._call("info", end, address.path)
        if found.get("type") == "directory":
            raise Refused("is a folder", missing=True)
        version = next((str(found[key]) for key in VERSIONS if found.get(key)), "")
        return Object(int(found["size"]), version)

    def read(self, address: Address, offset: int, size: int, version: str, end: float) -> bytes:
        # Those that are no coroutines open a file, which would read five megabytes ahead.
        more = {} if self.files.async_impl else {"cache_type": "none"}
        body = (
            bytes(self._call("cat_file", end, address.path, start=offset, end=offset + size, **more)) if size else b""
        )
        if len(body) != size:
            raise Changed(f"gave {len(body):,} of {size:,} bytes")
        return body

    def list(self, pattern: Address, end: float) -> list[Address]:
        found = sorted(self._call("glob", end, pattern.path))
        return [Address(f"{self.scheme}://{path.lstrip('/')}") for path in found]

    def close(self) -> None:
        """fsspec shares its file systems among all who ask for the same, and ends them with the process."""

    def _call(self, method: str, deadline: float, *arguments: Any, **named: Any) -> Any:
        seconds = max(0.01, min(TOTAL, deadline - time.monotonic()))
        try:
            if not self.files.async_impl:
                return getattr(self.files, method)(*arguments, **named)
            made = getattr(self.files, f"_{method}")(*arguments, **named)
            return asyncio.run_coroutine_threadsafe(_within(seconds, made), self.files.loop).result()
        except (asyncio.TimeoutError, TimeoutError):
            raise Away(f"no whole answer within {seconds:.0f} s") from None
        except FileNotFoundError:
            raise Refused("not found", missing=True) from None
        except (PermissionError, IsADirectoryError) as error:
            raise Refused(f"refused: {_one_line(error)}") from None
        except Exception as error:  # noqa: BLE001 - each file system has its own, and those of the libraries below
            if getattr(error, "errno", None) == errno.EINVAL or getattr(error, "code", None) == 416:
                raise Changed("has no such range") from None
            if any(word in type(error).__name__ for word in ("Credential", "Auth", "Token", "NotFound")):
                raise Refused(f"refused: {_one_line(error)}", missing="NotFound" in type(error).__name__) from None
            raise Away(_one_line(error)) from None


async def _within(seconds: float, made: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wait_for(made, seconds)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__


def host_of(address: Address) -> str:
    """The host and port of an address of the web, without user and password."""
    return urlsplit(address.url).netloc.rpartition("@")[2]
