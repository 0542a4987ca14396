"""Downloads against a server in this process: interrupted, wrong, refused, full disk, no connection."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from nextlat.data import download as module
from nextlat.data.download import RemoteFile, download, hub_files
from nextlat.errors import NextLatError

DATA = bytes(range(256)) * 1000
SHA = hashlib.sha256(DATA).hexdigest()


class Server:
    """Serves bytes by path; remembers requests; can break off, refuse, redirect and ignore ranges."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/file": DATA}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.break_after: list[int] = []
        self.status: dict[str, int] = {}
        self.redirect: dict[str, str] = {}
        self.ranges, self.tag = True, '"one"'
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(handler.path.partition("?")[0])
        self.requests.append((path, dict(handler.headers.items())))
        if path in self.redirect:
            handler.send_response(302)
            handler.send_header("Location", self.redirect[path])
            handler.end_headers()
            return
        if path in self.status or path not in self.files:
            handler.send_error(self.status.get(path, 404))
            return
        data, begin = self.files[path], 0
        asked = handler.headers.get("Range")
        if asked and self.ranges and handler.headers.get("If-Range", self.tag) == self.tag:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(data):
                handler.send_error(416)
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) - begin))
        handler.send_header(
            "Content-Type", "application/json" if path.startswith("/api") else "application/octet-stream"
        )
        handler.send_header("ETag", self.tag)
        handler.end_headers()
        sent = data[begin:]
        if self.break_after and path == "/file":
            sent = sent[: self.break_after.pop(0)]
        handler.wfile.write(sent)

    def ranges_asked(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(module, "_pause", lambda attempt: 0.0)
    yield server
    server.http.shutdown()
    server.http.server_close()


def remote(server: Server, size: int | None = len(DATA), sha256: str | None = SHA) -> RemoteFile:
    return RemoteFile("file", f"{server.url}/file", size, sha256)


def test_a_file_comes_whole_and_is_not_fetched_twice(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = download(remote(server), tmp_path / "deep" / "file", progress=lambda *now: seen.append(now))
    assert path.read_bytes() == DATA and seen[-1] == (len(DATA), len(DATA))
    download(remote(server), path)
    assert len(server.requests) == 1 and [p.name for p in path.parent.iterdir()] == ["file"]


def test_an_interrupted_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.break_after = [1000, 70_000]
    assert download(remote(server), tmp_path / "file").read_bytes() == DATA
    assert server.ranges_asked() == [None, "bytes=1000-", "bytes=71000-"]


def test_what_an_earlier_command_left_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.break_after = [1000] * 5
    with pytest.raises(NextLatError, match=r"file was interrupted 5 times: 5,000 bytes .*run again: fetch it"):
        download(remote(server), tmp_path / "file", "fetch it")
    assert not (tmp_path / "file").exists()
    server.requests.clear()
    assert download(remote(server), tmp_path / "file").read_bytes() == DATA
    assert server.ranges_asked() == ["bytes=5000-"]


def test_a_server_without_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.ranges, server.break_after = False, [1000]
    assert download(remote(server), tmp_path / "file").read_bytes() == DATA


def test_the_rest_of_another_file_is_not_glued_to_the_beginning(server: Server, tmp_path: Path) -> None:
    server.break_after = [1000] * 5
    with pytest.raises(NextLatError):
        download(remote(server, sha256=None), tmp_path / "file")
    server.files["/file"], server.tag = DATA[::-1], '"two"'
    assert download(remote(server, sha256=None), tmp_path / "file").read_bytes() == DATA[::-1]


def test_a_part_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(DATA + b"more")
    assert download(remote(server), tmp_path / "file").read_bytes() == DATA


def test_a_wrong_checksum_is_named_and_nothing_is_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        NextLatError, match=rf"{server.url}/file gave a file with sha256 {SHA} instead of 00.*run again: fetch it"
    ):
        download(remote(server, sha256="00"), tmp_path / "file", "fetch it")
    assert not list(tmp_path.glob("file*")) or [p.name for p in tmp_path.iterdir()] == ["file.part.etag"]


def test_a_wrong_size_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match=r"gave a file with 256,000 bytes instead of 7"):
        download(remote(server, size=7), tmp_path / "file")
    (tmp_path / "file").write_bytes(b"half")


def test_a_file_that_was_damaged_after_it_came_is_named_and_not_used(server: Server, tmp_path: Path) -> None:
    for content, wrong in ((b"half", "4 bytes instead of 256,000"), (DATA[::-1], rf"sha256 .* instead of {SHA}")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(NextLatError, match=rf"{tmp_path}/file is damaged: it has {wrong}.*delete it; run again"):
            download(remote(server), tmp_path / "file", "fetch it")
    assert server.requests == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_and_named_when_it_stays_busy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            server.status.clear()

    monkeypatch.setattr(module.time, "sleep", wait)
    server.status["/file"] = status
    assert download(remote(server), tmp_path / "file").read_bytes() == DATA
    server.status["/other"] = status
    with pytest.raises(NextLatError, match=rf"other was refused: .*HTTP {status}"):
        download(RemoteFile("other", f"{server.url}/other"), tmp_path / "other")
    assert sum(path == "/other" for path, _ in server.requests) == module.ATTEMPTS


def test_a_disk_that_is_full_at_the_end_is_no_interruption(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Callable[..., Any] = Path.open

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if path.suffix == ".part" and mode != "rb":
            path.touch()
            return io.BufferedWriter(Full(), 10**6)  # all of the file waits to be written until it is closed
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(NextLatError, match=r"disk is full while downloading .*file\.part"):
        download(remote(server), tmp_path / "file")
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "advice"), [(401, "set HF_TOKEN"), (403, "accept its terms"), (404, "revision")])
def test_refusals_say_what_to_do(server: Server, tmp_path: Path, status: int, advice: str) -> None:
    server.status["/file"] = status
    with pytest.raises(
        NextLatError, match=rf"file was refused: {server.url}/file: HTTP {status}.*{advice}.*run again: x"
    ):
        download(remote(server), tmp_path / "file", "x")


def test_the_token_goes_to_the_hub_and_not_where_it_redirects_to(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Server()
    try:
        server.redirect["/file"] = f"{other.url}/file"
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert download(remote(server), tmp_path / "file").read_bytes() == DATA
        assert server.requests[0][1]["Authorization"] == "Bearer secret"
        assert "Authorization" not in other.requests[0][1]
        download(RemoteFile("file", f"{other.url}/file"), tmp_path / "elsewhere")
        assert "Authorization" not in other.requests[1][1]
    finally:
        other.http.shutdown()
        other.http.server_close()


def test_a_full_disk_is_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Callable[..., Any] = Path.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return Full(path, mode) if path.suffix == ".part" and mode != "rb" else opened(path, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(NextLatError, match=r"disk is full while downloading .*file\.part"):
            download(remote(server), tmp_path / "file")
    assert download(remote(server), tmp_path / "file").read_bytes() == DATA


def test_offline_names_file_address_and_command(tmp_path: Path) -> None:
    nowhere = RemoteFile("stories.parquet", "http://127.0.0.1:9/stories.parquet")
    with pytest.raises(
        NextLatError, match=r"stories\.parquet cannot be reached: http://127\.0\.0\.1:9/.*run again: get it"
    ):
        download(nowhere, tmp_path / "stories.parquet", "get it")


def listing(server: Server, repository: str, folder: str, names: dict[str, bytes]) -> None:
    entries = []
    for name, data in names.items():
        sha = hashlib.sha256(data).hexdigest()
        entry = {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
        entries.append({**entry, "lfs": {"oid": sha, "size": len(data), "pointerSize": 130}})
        server.files[f"/datasets/{repository}/resolve/main/{name}"] = data
    tree = f"/api/datasets/{repository}/tree/main" + (f"/{folder}" if folder else "")
    server.files[tree] = json.dumps(entries).encode()


def test_files_of_a_hub_dataset_are_listed_with_size_and_checksum(server: Server, tmp_path: Path) -> None:
    listing(
        server, "some/data", "sample/10BT", {"sample/10BT/b.parquet": DATA, "sample/10BT/a.parquet": b"a", "x.md": b""}
    )
    files = hub_files("some/data", folder="sample/10BT")
    assert [file.name for file in files] == ["sample/10BT/a.parquet", "sample/10BT/b.parquet"]
    assert (files[1].size, files[1].sha256) == (len(DATA), SHA)
    assert download(files[1], tmp_path / "b").read_bytes() == DATA


def test_a_dataset_that_cannot_be_listed_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NextLatError, match=r"some/data \(revision main\) cannot be listed: HTTP 404"):
        hub_files("some/data")
    listing(server, "some/data", "", {"readme.md": b""})
    with pytest.raises(NextLatError, match=r"no \.parquet files"):
        hub_files("some/data")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NextLatError, match=r"127\.0\.0\.1:9/datasets/some/data .*no connection"):
        hub_files("some/data")
