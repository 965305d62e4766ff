"""Samples of remote shards: asked for ahead of their use, neighbours in one request, several requests in flight.

`ask` says which samples are wanted and returns at once; `sample` waits for one. Both look into the cache on the disk first.
"""

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from hashlib import sha256
from typing import NamedTuple, TypeVar

from selfsight.console import say
from selfsight.data.crew import Crew
from selfsight.data.decode import BadSample
from selfsight.data.disk_cache import DiskCache, disk_cache
from selfsight.data.store import Address, Away, Changed, Object, Outage, Refused, Store, open_store, patiently
from selfsight.errors import DataError, DataGone

IN_FLIGHT = 32  # requests of one process
GAP = 2**17  # bytes that are read and thrown away rather than asked for in another request
MOST = 2**22  # bytes of one request
HELD = 2**28  # bytes that are asked for ahead of their use, in each process; more is read when it is needed
ROUNDS_KEPT = 4  # calls of `ask` after which what nobody came for is dropped

T = TypeVar("T")


class ShardChanged(DataError):
    """A shard that is no longer the file that was there at the start: no fault of one sample."""


class Want(NamedTuple):
    """A sample: where its bytes are, and their checksum."""

    shard: int
    offset: int
    size: int
    crc: int


class Span(NamedTuple):
    """Bytes of a shard that are read together."""

    shard: int
    start: int
    end: int


def plan(wants: Iterable[Want], gap: int = GAP, most: int = MOST) -> list[tuple[Span, list[Want]]]:
    """The requests for these samples: neighbours with gaps of at most `gap` bytes together, in at most `most` bytes."""
    spans: list[tuple[Span, list[Want]]] = []
    for want in sorted(set(wants)):
        end = want.offset + want.size
        if spans:
            (shard, start, before), those = spans[-1]
            if shard == want.shard and want.offset - before <= gap and end - start <= most:
                spans[-1] = Span(shard, start, max(before, end)), [*those, want]
                continue
        spans.append((Span(want.shard, want.offset, end), [want]))
    return spans


class RemoteReader:
    """Reads samples of remote shards, in one process, from any of its threads.

    Args:
        addresses, seen: each shard's address, and what it was at the start.
        patience: seconds for which a store that is away is tried again, from the first fault since anything came.
    """

    def __init__(self, addresses: Sequence[Address | None], seen: Sequence[Object | None], patience: float) -> None:
        self.addresses, self.seen, self.patience = addresses, seen, patience
        self.cache: DiskCache | None = disk_cache()
        self._stores: dict[str, Store] = {}
        self._lock, self._closed = threading.Lock(), False
        self._crew, self._outage = Crew(IN_FLIGHT), Outage()
        self._coming: dict[Want, tuple[int, Future[dict[Want, bytes]]]] = {}
        self._round = 0

    def ask(self, wants: Sequence[Want], around: Callable[[Want], Span] | None = None) -> None:
        """Begin to read what is neither here nor on its way.

        Args:
            around: what is read, and kept on the disk, in place of a sample alone.
        """
        self._round += 1
        self._coming = {want: kept for want, kept in self._coming.items() if self._round - kept[0] < ROUNDS_KEPT}
        around = around if self.cache else None
        absent, held = [], sum(want.size for want in self._coming)
        for want in wants:
            if want in self._coming or held + want.size > HELD:
                continue
            held += want.size
            if (body := self._cached(want, around and around(want))) is not None:
                self._coming[want] = self._round, _done({want: body})
            else:
                absent.append(want)
        for span, those in _grouped(absent, around) if around else plan(absent):
            fetched = self._crew.submit(partial(self._fetched, span, those, shared=around is not None))
            self._coming |= dict.fromkeys(those, (self._round, fetched))

    def fill(self, wants: Sequence[Want], around: Callable[[Want], Span]) -> None:
        """Bring what is around these samples to the disk, for later; nothing is kept in memory."""
        if self.cache:
            absent = [want for want in wants if want not in self._coming and self._cached(want, around(want)) is None]
            for span, those in _grouped(absent, around):
                self._crew.submit(partial(self._fetched, span, those, shared=True))

    def sample(self, want: Want) -> bytes:
        """The bytes of a sample.

        Raises:
            BadSample: bytes that are not those that were indexed, read twice.
            ShardChanged: the object is another one than at the start.
            DataGone: the store refuses, or was away for `patience` seconds.
        """
        kept = self._coming.pop(want, None)
        body = kept[1].result().get(want) if kept else self._cached(want)
        for _ in range(2):  # a second read tells a passing fault from a lasting one
            if body is not None:
                return body
            body = self._fetched(Span(want.shard, want.offset, want.offset + want.size), [want]).get(want)
        if body is None:
            self._same(want.shard)
            where = f"{self._address(want.shard).name}@{want.offset}"
            raise BadSample(f"{where}: the bytes are not those that were indexed (CRC)")
        return body

    def close(self) -> None:
        """End the threads and close the files."""
        self._crew.close()
        with self._lock:
            self._closed = True
            for store in self._stores.values():
                store.close()
        if self.cache:
            self.cache.close()

    def _cached(self, want: Want, block: Span | None = None) -> bytes | None:
        if not self.cache:
            return None
        return self.cache.get(self._key(want.shard), *want[1:], block.start if block else None)

    def _key(self, shard: int) -> str:
        return key_of(self._address(shard), self._seen(shard))

    def _fetched(self, span: Span, wants: Sequence[Want], shared: bool = False) -> dict[Want, bytes]:
        """Read a span; of the samples in it, those that are whole.

        Args:
            shared: other processes want the same, and what one of them has read is on the disk.
        """
        if not shared or not self.cache:
            return self._read(span, wants, False)
        key, size = self._key(span.shard), span.end - span.start
        with self.cache.alone(key, span.start, size):
            there = {want: body for want in wants if (body := self._cached(want, span)) is not None}
            return there if len(there) == len(wants) else self._read(span, wants, True)

    def _read(self, span: Span, wants: Sequence[Want], shared: bool) -> dict[Want, bytes]:
        pieces = [Span(span.shard, at, min(at + MOST, span.end)) for at in range(span.start, span.end, MOST)]
        body = b"".join([self._waited(span.shard, partial(self._range, piece)) for piece in pieces])
        if self.cache:
            self.cache.put(self._key(span.shard), span.start, body, shared)
        whole = {}
        for want in wants:
            part = body[want.offset - span.start : want.offset - span.start + want.size]
            if zlib.crc32(part) == want.crc:
                whole[want] = part
        return whole

    def _range(self, span: Span, end: float) -> bytes:
        address, seen = self._address(span.shard), self._seen(span.shard)
        try:
            return self._store(address).read(address, span.start, span.end - span.start, seen.version, end)
        except Changed as error:
            if self._store(address).look(address, end) == seen:  # one answer of another kind: a cache on the way
                raise Away(str(error.strerror)) from None
            raise ShardChanged(changed(address)) from None

    def _same(self, shard: int) -> None:
        """See that a shard is what it was at the start."""
        address = self._address(shard)
        if self._waited(shard, partial(self._store(address).look, address)) != self._seen(shard):
            raise ShardChanged(changed(address))

    def _waited(self, shard: int, attempt: Callable[[float], T]) -> T:
        address, began = self._address(shard), time.monotonic()

        def waiting(error: OSError) -> None:
            say(f"{address}: waiting for it ({error.strerror})")

        try:
            return patiently(attempt, self.patience, waiting, self._outage)
        except Refused as error:
            raise DataGone(
                f"{address}: the data cannot be read any more ({error.strerror}); "
                "run the same command when the address and the rights to it are good again"
            ) from None
        except OSError as error:
            lasted, asked = time.monotonic() - min(began, self._outage.began), getattr(error, "after", 0.0)
            more = f", and asks for {asked:,.0f} s more" if asked else ""
            raise DataGone(
                f"{address}: the data cannot be reached any more ({error.strerror or error}, for {lasted:.1f} s{more}); "
                "run the same command when they are back"
            ) from None

    def _store(self, address: Address) -> Store:
        with self._lock:
            if self._closed:
                raise Refused("closed")  # what nobody waits for any more
            if address.scheme not in self._stores:
                self._stores[address.scheme] = open_store(address.scheme)
            return self._stores[address.scheme]

    def _address(self, shard: int) -> Address:
        address = self.addresses[shard]
        assert address is not None
        return address

    def _seen(self, shard: int) -> Object:
        seen = self.seen[shard]
        assert seen is not None
        return seen


@lru_cache(2**16)
def key_of(address: Address, seen: Object) -> str:
    """A file name for what is kept of one state of an object.

    Signatures in an address change from day to day; where an ETag tells objects apart, the query is left out.
    """
    told = str(address) if seen.version else address.url
    return f"{sha256(f'{told} {seen.size} {seen.version}'.encode()).hexdigest()[:24]}-{address.name[-100:]}"


def changed(where: object) -> str:
    return (
        f"{where}: is another file than when the run started (replaced, cut or written to); "
        "put the old one back, or start a new run with the new data"
    )


def _grouped(wants: Iterable[Want], around: Callable[[Want], Span]) -> list[tuple[Span, list[Want]]]:
    spans: dict[Span, list[Want]] = {}
    for want in wants:
        spans.setdefault(around(want), []).append(want)
    return list(spans.items())


def _done(bodies: dict[Want, bytes]) -> "Future[dict[Want, bytes]]":
    future: Future[dict[Want, bytes]] = Future()
    future.set_result(bodies)
    return future
