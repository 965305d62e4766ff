"""Shards in a bucket: a real S3 server (moto's) in this process, with faults in front of it."""

import io
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from selfsight import cli
from selfsight.data.shards import ShardChanged, Shards, find_shards
from selfsight.errors import DataError, DataGone

Application = Callable[[dict[str, Any], Callable[..., Any]], Any]


class Bucket:
    """The server, a client, and what the next requests for objects meet."""

    def __init__(self) -> None:
        self.faults: list[Application | None] = []
        self.requests: list[str] = []
        self.real = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.address = f"http://127.0.0.1:{self.server.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "hunter2", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=self.address, **keys)
        self.client.create_bucket(Bucket="images")

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ.get('HTTP_RANGE', '')}")
        fault = self.faults.pop(0) if self.faults and environ["REQUEST_METHOD"] == "GET" else None
        return (fault or self.real)(environ, start_response)

    def put(self, folder: Path, prefix: str, *suffixes: str) -> None:
        for file in sorted(folder.iterdir()):
            if file.suffix in suffixes:
                self.client.put_object(Bucket="images", Key=f"{prefix}/{file.name}", Body=file.read_bytes())


def refusal(code: int, name: str) -> Application:
    """S3's own way of saying no."""
    body = f"<Error><Code>{name}</Code><Message>{name} it is</Message></Error>".encode()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response(f"{code} {name}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return io.BytesIO(body)

    return answer


def stall(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    """No answer for longer than anybody waits in these tests."""
    threading.Event().wait(2)
    return refusal(503, "SlowDown")(environ, start_response)


@pytest.fixture(scope="module")
def _served(small_shards: Path) -> Iterator[Bucket]:
    bucket = Bucket()
    bucket.put(small_shards, "train", ".tar", ".idx")
    bucket.put(small_shards, "bare", ".tar")
    yield bucket
    bucket.server.shutdown()
    bucket.server.server_close()


@pytest.fixture(scope="module")
def _environment(_served: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where the bucket is and who asks. One file system for the module: a client takes half a second to make."""
    nothing = str(tmp_path_factory.mktemp("aws") / "none")
    given = {
        "AWS_ENDPOINT_URL": _served.address,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": nothing,
        "AWS_SHARED_CREDENTIALS_FILE": nothing,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        forget()
        yield
        forget()


@pytest.fixture
def bucket(_served: Bucket, _environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SELFSIGHT_CACHE_GB", "0")
    monkeypatch.setattr(Shards, "patience", 5.0)
    _served.faults.clear()
    return _served


def forget() -> None:
    """fsspec keeps file systems, and with them the credentials."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


def test_a_bucket_is_the_local_folder(bucket: Bucket, small_shards: Path) -> None:
    near = Shards(str(small_shards))
    for spec in ("s3://images/train", "s3://images/train/", "s3://images/train/*.tar", "s3://images/train/small-{000000..000002}.tar"):  # fmt: skip
        far = Shards(spec)
        assert [str(path) for path in far.paths] == [f"s3://images/train/small-00000{i}.tar" for i in range(3)]
        assert far.id == near.id
    far.prefetch(range(30, 70))
    before = len(bucket.requests)
    assert [far.read(i) for i in range(30, 70)] == [near.read(i) for i in range(30, 70)]
    assert len(bucket.requests) - before <= 2
    assert far.read(119) == near.read(119)
    far.close()


def test_a_bucket_without_indexes(bucket: Bucket, small_shards: Path) -> None:
    assert Shards("s3://images/bare/*.tar").id == Shards(str(small_shards)).id
    before = len(bucket.requests)
    assert Shards("s3://images/bare/*.tar").id == Shards(str(small_shards)).id
    assert not any(request.startswith("GET") and ".tar" in request for request in bucket.requests[before:])


@pytest.mark.parametrize(
    "faults",
    [[refusal(503, "SlowDown")] * 3, [refusal(500, "InternalError")], [stall]],
    ids=["slow down", "internal error", "stall"],
)
def test_faults_of_a_bucket_pass(
    bucket: Bucket, small_shards: Path, faults: list[Application], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsight.data.store.TOTAL", 0.7)
    far = Shards("s3://images/train")
    bucket.faults += faults
    assert far.read(3) == Shards(str(small_shards)).read(3)
    assert bucket.faults == []
    far.close()


def test_what_is_not_there(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"2 of 5 shards are missing: s3://images/train/small-000003.tar, s3://images/train/small-000004.tar$"):  # fmt: skip
        Shards("s3://images/train/small-{000000..000004}.tar")
    with pytest.raises(DataError, match=r"s3://images/none/\*.tar: no shards match"):
        find_shards("s3://images/none/")
    with pytest.raises(DataError, match="no shards match"):
        find_shards("s3://nobodys-bucket/x-*.tar")
    assert cli.main(["shards", "check", "s3://nobodys-bucket/x.tar"]) == 65
    assert capsys.readouterr().err == "selfsight: 1 of 1 shards are missing: s3://nobodys-bucket/x.tar\n"


@pytest.mark.parametrize("refused", [(403, "AccessDenied"), (403, "InvalidAccessKeyId"), (400, "ExpiredToken")])
def test_no_right_to_it(bucket: Bucket, refused: tuple[int, str], capsys: pytest.CaptureFixture[str]) -> None:
    far = Shards("s3://images/train")
    bucket.faults += [refusal(*refused)]
    with pytest.raises(
        DataGone, match=r"s3://images/train/small-000000.tar: the data cannot be read any more \(refused: .*it is"
    ):
        far.read(0)
    far.close()
    bucket.faults += [refusal(*refused)]
    assert cli.main(["shards", "check", "s3://images/train/*.tar"]) == 65
    told = capsys.readouterr().err
    assert re.search(r"s3://images/train/\*.tar: cannot be listed \(refused: .*are the credentials right\?\n$", told)
    assert "hunter2" not in told


def test_no_credentials(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget()
    assert cli.main(["shards", "check", "s3://images/train/small-000000.tar"]) == 65
    forget()
    assert (
        "cannot be read (refused: Unable to locate credentials); are address and credentials right?"
        in capsys.readouterr().err
    )


def test_another_object_under_the_key_ends_the_run(bucket: Bucket, small_shards: Path) -> None:
    bucket.put(small_shards, "moved", ".tar", ".idx")
    far = Shards("s3://images/moved")
    assert far.read(0)
    size = (small_shards / "small-000000.tar").stat().st_size
    bucket.client.put_object(Bucket="images", Key="moved/small-000000.tar", Body=bytes(size))
    with pytest.raises(ShardChanged, match=r"small-000000.tar: is another file than when the run started"):
        far.read(1)
    bucket.client.put_object(Bucket="images", Key="moved/small-000001.tar", Body=b"cut")
    with pytest.raises(ShardChanged):
        far.read(60)
    far.close()
