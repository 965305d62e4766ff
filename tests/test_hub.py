"""Publishing: only when asked, never over something, and no error that shows the token. No hub is asked."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from selfsight.errors import SelfsightError, StorageError, UsageError
from selfsight.exports import hub

TOKEN = "hf_" + "s3cr3t" * 5


class StandIn:
    """HfApi's two functions that are used, and what they were asked."""

    def __init__(self, token: str | None = TOKEN, fails: Exception | None = None) -> None:
        self.token, self.fails, self.asked = token, fails, []  # type: ignore[var-annotated]

    def create_repo(self, name: str, **options: Any) -> str:
        self.asked.append(("create", name, options))
        return f"https://hub/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options["repo_id"], options["folder_path"]))
        if self.fails:
            raise self.fails


def test_a_repository_is_made_and_the_folder_sent(tmp_path: Path) -> None:
    api = StandIn()
    assert hub.push(tmp_path, "me/enc", True, api) == "https://hub/me/enc"
    assert api.asked == [
        ("create", "me/enc", {"private": True, "exist_ok": False}),
        ("upload", "me/enc", str(tmp_path)),
    ]


@pytest.mark.parametrize("name", ["enc", "me/", "/enc", "me/enc/x", "me/e nc", "../enc", "https://hub/me/enc"])
def test_names_are_checked_first(tmp_path: Path, name: str) -> None:
    api = StandIn()
    with pytest.raises(UsageError, match="is not USER/NAME"):
        hub.push(tmp_path, name, api=api)
    assert api.asked == []


def test_without_a_token_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    api = StandIn(token=None)
    with pytest.raises(UsageError, match="no token; run `hf auth login`, or set HF_TOKEN"):
        hub.push(tmp_path, "me/enc", api=api)
    assert api.asked == []


def test_an_upload_that_ends_says_what_is_left(tmp_path: Path) -> None:
    api = StandIn(fails=OSError(f"connection lost, token={TOKEN}"))
    with pytest.raises(StorageError, match=r"the repository was created, but is not complete; .* is whole") as told:
        hub.push(tmp_path, "me/enc", api=api)
    assert TOKEN not in str(told.value)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """A hub on this machine that answers every request with one status."""
    seen: dict[str, Any] = {"status": 401, "paths": []}

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen["paths"].append(self.path)
            body = json.dumps({"error": f"no, {self.headers.get('Authorization')}"}).encode()
            self.send_response(seen["status"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    served = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield f"http://127.0.0.1:{served.server_port}", seen
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (401, UsageError, "the token is not accepted"),
        (403, UsageError, "the token may not write there"),
        (409, UsageError, "exists; name another repository"),
        (500, StorageError, "500"),
    ],
)
def test_a_hub_that_says_no_is_one_line(
    tmp_path: Path, server: tuple[str, dict[str, Any]], status: int, kind: type[SelfsightError], told: str
) -> None:
    address, seen = server
    seen["status"] = status
    with pytest.raises(kind, match=f"--push me/enc: .*{told}.* is whole") as error:
        hub.push(tmp_path, "me/enc", api=HfApi(endpoint=address, token=TOKEN))
    assert seen["paths"] == ["/api/repos/create"]
    assert TOKEN not in str(error.value) and "\n" not in str(error.value)


def test_offline_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="--push me/enc: ") as error:  # HF_HUB_OFFLINE is set for all tests
        hub.push(tmp_path, "me/enc", api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))
    assert TOKEN not in str(error.value) and "\n" not in str(error.value)
