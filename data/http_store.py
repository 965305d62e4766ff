"""Ranges of objects on web servers, whatever these do: stall, lie, leave off, answer with something else.

fsspec's own HTTP file system reads whatever comes to its end, has no deadlines for a stall, follows every redirect and does not
say which version it read; so this is Python's http.client under the rules of `selfsight.data.store`.
"""

import base64
import http.client
import re
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import selfsight
from selfsight.data.store import CONNECT, SILENCE, TOTAL, WEB, Address, Away, Changed, Object, Refused, Unfit
from selfsight.errors import UsageError

REDIRECTS = 5
NO_RANGES = "the server gives no ranges of an object; copy the shards to a disk"
PIECE = 2**18  # bytes that are taken from a socket at once
PASSING = frozenset({408, 425, 429})  # beside 5xx
IDLE_MOST = 64  # connections that are kept open for each server


class HttpStore:
    """Objects of web servers. Safe to use from many threads; connections are kept open and used again."""

    def __init__(self) -> None:
        self._idle: defaultdict[tuple[str, str], list[http.client.HTTPConnection]] = defaultdict(list)
        self._lock = threading.Lock()
        self._most = IDLE_MOST

    def look(self, address: Address, end: float) -> Object:
        """By a range of one byte: signed addresses are signed for GET alone, and this shows whether there are ranges."""
        with self._get(address, {"Range": "bytes=0-0"}, end) as answer:
            span = answer.getheader("Content-Range", "")
            total = span.rpartition("/")[2]
            if answer.status == 200 or not total.isdecimal():
                raise Unfit(NO_RANGES)
            version = answer.getheader("ETag") or answer.getheader("Last-Modified") or ""
            if answer.status == 206:
                _body(answer, 1, end)
            return Object(int(total), version)

    def read(self, address: Address, offset: int, size: int, version: str, end: float) -> bytes:
        if not size:
            return b""
        asked = {"Range": f"bytes={offset}-{offset + size - 1}"}
        if version.startswith('"'):  # weak ETags and dates match nothing
            asked["If-Match"] = version
        with self._get(address, asked, end) as answer:
            found = answer.getheader("ETag") or answer.getheader("Last-Modified") or ""
            if answer.status in (412, 416) or (version and found and found != version):
                raise Changed(f"HTTP {answer.status}, {'another ETag' if answer.status < 400 else answer.reason}")
            span = re.match(r"bytes (\d+)-(\d+)/", answer.getheader("Content-Range", ""))
            if answer.status == 206 and span and (int(span[1]), int(span[2])) != (offset, offset + size - 1):
                raise Changed(f"gave the range {span[0]}, asked for {offset}-{offset + size - 1}")
            length = answer.getheader("Content-Length", "")
            if answer.status == 200 and (offset, length) != (0, str(size)):  # not read: it may be the whole shard
                raise Unfit(NO_RANGES)
            return _body(answer, size, end)

    def list(self, pattern: Address, end: float) -> list[Address]:
        raise UsageError(f"{pattern}: a web server lists nothing; name the shards with braces, x-{{000..009}}.tar")

    def close(self) -> None:
        with self._lock:
            self._most = 0  # what is in use now is closed when it comes back
            lines = [line for idle in self._idle.values() for line in idle]
            self._idle.clear()
        for line in lines:
            line.close()

    @contextmanager
    def _get(self, address: Address, headers: Mapping[str, str], end: float) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, after its redirects. What is not read to its end closes the connection."""
        url = urlsplit(address.url)
        for _ in range(REDIRECTS):
            line, answer, whole = None, None, False
            try:
                line = self._line(url)
                answer = _ask(line, url, headers, end)
                if (onwards := _onwards(answer, url)) is None:
                    _refuse(answer)
                    yield answer
                    whole = (answer.isclosed() or answer.length == 0) and not answer.will_close
                    return
                url = onwards
            except (http.client.InvalidURL, ValueError):  # whose words may hold a password
                raise Refused("its address, a redirect's or the proxy's is none that can be") from None
            except http.client.HTTPException as error:
                raise Away(f"broken answer ({type(error).__name__})") from None
            except TimeoutError:
                raise Away("the server is silent") from None
            except ssl.SSLCertVerificationError as error:
                raise Refused(f"the server's certificate is not trusted: {error.verify_message}") from None
            finally:
                if answer:
                    answer.close()  # it may hold the socket by itself
                if line:
                    self._back(line, url, whole)
        raise Refused(f"more than {REDIRECTS} redirects")

    def _line(self, url: SplitResult) -> http.client.HTTPConnection:
        """An idle connection, or a new one."""
        with self._lock:
            if idle := self._idle[url.scheme, url.netloc]:
                return idle.pop()
        host, port = url.hostname or "", url.port
        proxy = None if proxy_bypass(host) or proxy_bypass(_host(url)) else getproxies().get(url.scheme)
        if not proxy:
            return _connection(url.scheme, host, port)
        through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if url.scheme == "http":
            return _Proxied(through)
        line = _connection(url.scheme, through.hostname or "", through.port)
        line.set_tunnel(host, port or 443, _login("Proxy-Authorization", through))
        return line

    def _back(self, line: http.client.HTTPConnection, url: SplitResult, whole: bool) -> None:
        with self._lock:
            idle = self._idle[url.scheme, url.netloc]
            if whole and len(idle) < self._most:
                idle.append(line)
                return
        line.close()


def web_address(url: str, encoding: str = "utf-8") -> str:
    """The address as it can be sent: letters outside ASCII and spaces quoted, a host of such letters in IDNA.

    Raises:
        ValueError: it has no host or port that can be, with the reason.
    """
    scheme, host, rest = re.fullmatch(r"([^:]*://)([^/?#]*)(.*)", url, re.S).groups()  # type: ignore[union-attr]
    user, at, host = host.rpartition("@")
    try:
        host = host.encode("idna").decode()
    except UnicodeError:  # a label of none or more than 63 letters
        raise ValueError("its host is no name that a host can have") from None
    try:
        parts = urlsplit(scheme + host)
        name, port = parts.hostname, parts.port
    except ValueError:  # whose words may hold a password with a slash
        raise ValueError("its host or port is none that can be asked") from None
    if not name:
        raise ValueError("it has no host")
    if port == 0 or not re.fullmatch(r"[!-~]+", host):
        raise ValueError("its host or port is none that can be asked")
    return scheme + user + at + host + re.sub(r"[^!-~]+", lambda part: quote(part[0], encoding=encoding), rest)


class _Proxied(http.client.HTTPConnection):
    """A connection to a proxy that is asked for whole addresses: many tunnel to port 443 alone."""

    def __init__(self, proxy: SplitResult) -> None:
        super().__init__(proxy.hostname or "", proxy.port, timeout=CONNECT)
        self.login = _login("Proxy-Authorization", proxy)


def _login(header: str, url: SplitResult) -> dict[str, str]:
    """The header with an address's user and password, if it has them."""
    if not url.username:
        return {}
    pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return {header: f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _host(url: SplitResult) -> str:
    """Host and port."""
    return url.netloc.rpartition("@")[2]


@cache
def _secure() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads all certificates, which takes a while


def _connection(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    if scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=CONNECT, context=_secure())
    return http.client.HTTPConnection(host, port, timeout=CONNECT)


def _left(most: float, end: float) -> float:
    """Seconds that may pass; a timeout of 0 would mean not to wait at all."""
    return max(0.01, min(most, end - time.monotonic()))


def _ask(
    line: http.client.HTTPConnection, url: SplitResult, headers: Mapping[str, str], end: float
) -> http.client.HTTPResponse:
    if line.sock is None:
        line.timeout = _left(CONNECT, end)
        _connect(line)
    line.sock.settimeout(_left(SILENCE, end))
    sent = {"Accept-Encoding": "identity", "User-Agent": f"selfsight/{selfsight.__version__}", **headers}
    sent |= _login("Authorization", url)
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    if isinstance(line, _Proxied):
        sent, target = sent | line.login, f"{url.scheme}://{_host(url)}{target}"
    sock = line.sock
    line.request("GET", target, headers=sent)
    answer = line.getresponse()
    answer.sock = sock  # type: ignore[attr-defined] # http.client forgets it where the server will close
    return answer


def _connect(line: http.client.HTTPConnection) -> None:
    try:
        line.connect()
    except OSError as error:
        told = re.match(r"Tunnel connection failed: (4\d\d)(.*)", str(error))  # http.client has no class for it
        if told and int(told[1]) not in PASSING:
            raise Refused(f"the proxy answers HTTP {told[1]}{told[2]}") from None
        raise


def _onwards(answer: http.client.HTTPResponse, url: SplitResult) -> SplitResult | None:
    """Where a redirect leads: to the same scheme, or from http to https."""
    if answer.status not in (301, 302, 303, 307, 308):
        return None
    target = urljoin(url.geturl(), answer.getheader("Location", ""))
    scheme = urlsplit(target).scheme
    if scheme != url.scheme and (url.scheme, scheme) != WEB:
        raise Refused(f"redirected from {url.scheme} to {scheme or 'nowhere'}, which is not followed")
    return urlsplit(web_address(target, "latin-1"))  # http.client takes headers to be Latin-1: the same bytes again


def _refuse(answer: http.client.HTTPResponse) -> None:
    """Errors of the server's that have nothing to do with ranges and versions."""
    status = answer.status
    if status in PASSING or status >= 500:
        raise Away(f"HTTP {status}", after=_retry_after(answer.getheader("Retry-After", "")))
    if status >= 400 and status not in (412, 416):
        raise Refused(f"HTTP {status} {answer.reason}", missing=status in (404, 410))
    if answer.getheader("Content-Encoding", "identity").lower() not in ("", "identity"):
        raise Unfit("the server compresses what it was asked to leave as it is")


def _retry_after(text: str) -> float:
    """Seconds, given as a number or as a date."""
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _body(answer: http.client.HTTPResponse, size: int, end: float) -> bytes:
    """Exactly `size` bytes, within the deadlines."""
    end = min(end, time.monotonic() + TOTAL)
    body = bytearray()
    while len(body) <= size:
        if time.monotonic() > end:
            raise Away(f"{len(body):,} of {size:,} bytes came in time")
        answer.sock.settimeout(_left(SILENCE, end))  # type: ignore[attr-defined]
        if not (piece := answer.read1(min(PIECE, size - len(body) + 1))):
            break
        body += piece
    if len(body) != size:
        raise Away(f"the answer has {'more' if len(body) > size else f'{len(body):,}'} of {size:,} bytes")
    return bytes(body)
