"""Downloads that go on after an interruption, are checked, and never happen unasked.

``HF_TOKEN`` is sent to the hub, and to no other host it redirects to; ``HF_ENDPOINT`` replaces the hub's address.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nextlat.data.tokenizer import text_module
from nextlat.errors import NextLatError
from nextlat.files import explained, write_text

BLOCK = 1 << 20
TIMEOUT = 30.0
"""Seconds without an answer."""
ATTEMPTS = 5
"""How often a connection that breaks is opened again, each time where the last one stopped."""

BUSY = (429, 500, 502, 503, 504)
"""Answers that another attempt may better."""
LONGEST_PAUSE = 60.0

Progress = Callable[[int, int | None], None]
"""Is told the bytes that are there, and those of the whole file if they are known."""


class RemoteFile(NamedTuple):
    """A file to download."""

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None


def endpoint() -> str:
    """Address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_files(repository: str, revision: str = "main", folder: str = "", suffix: str = ".parquet") -> list[RemoteFile]:
    """The files of a dataset on the hub, by name.

    Args:
        repository: e.g. ``HuggingFaceFW/fineweb-edu``.
        revision: a branch, tag or commit; a commit pins what is fetched.
        folder: list only below this one.
        suffix: list only these.

    Raises:
        NextLatError: no connection, no permission, no such dataset, or no such file in it.
    """
    hub = text_module("huggingface_hub")
    where = f"{endpoint()}/datasets/{repository} (revision {revision})"
    _reach(where)
    try:
        api = hub.HfApi(endpoint=endpoint(), token=os.environ.get("HF_TOKEN") or False)
        listing = list(api.list_repo_tree(repository, folder, recursive=True, revision=revision, repo_type="dataset"))
    except Exception as error:  # connection errors come from whichever client the library uses
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = _refusal(status) if status else f"no connection ({type(error).__name__}: {_first_line(error)})"
        raise NextLatError(f"{where} cannot be listed: {reason}") from error
    found = []
    for entry in listing:
        if not isinstance(entry, hub.hf_api.RepoFile) or not entry.path.endswith(suffix):
            continue
        url = f"{endpoint()}/datasets/{repository}/resolve/{urllib.parse.quote(revision, safe='')}/{entry.path}"
        found.append(RemoteFile(entry.path, url, entry.size, entry.lfs.sha256 if entry.lfs else None))
    if not found:
        raise NextLatError(f"{where} has no {suffix} files below {folder or 'its root'}")
    return sorted(found)


def download(file: RemoteFile, path: Path, command: str = "", progress: Progress | None = None) -> Path:
    """Fetch a file, unless it is there as it should be.

    It grows as ``<path>.part`` and gets its name when it is whole and, where its checksum is known, checked. What an
    earlier attempt left is gone on with, if the server can and still has the same file.

    Args:
        file: what to fetch.
        path: where to.
        command: the user's, shown in errors.
        progress: is told how far it is.

    Raises:
        NextLatError: offline, refused, interrupted too often, a wrong size or checksum, or a full disk.
    """
    again = f"; run again: {command}" if command else "; run the command again"
    if path.is_file():
        if wrong := _complaint(file, path):
            raise NextLatError(f"{path} is damaged: it has {wrong} at {file.url}; delete it{again}")
        return path
    part = path.with_name(path.name + ".part")
    with explained("making", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if part.is_file() else 0
        if attempt:
            time.sleep(_pause(attempt))
        try:
            total = _fetch(file, part, progress)
        except urllib.error.HTTPError as error:
            if error.code in BUSY and attempt + 1 < ATTEMPTS:
                time.sleep(_asked_pause(error))
                continue
            raise NextLatError(f"{path.name} was refused: {file.url}: {_refusal(error.code)}{again}") from error
        except (http.client.HTTPException, OSError) as error:
            if isinstance(error, urllib.error.URLError) and not have:
                raise NextLatError(f"{path.name} cannot be reached: {file.url} ({error.reason}){again}") from error
            continue
        if total is None or part.stat().st_size == total:
            break
    else:
        got = part.stat().st_size if part.is_file() else 0
        raise NextLatError(
            f"{path.name} was interrupted {ATTEMPTS} times: {got:,} bytes of {file.url} are in {part}{again}"
        )
    if wrong := _complaint(file, part):
        part.unlink()
        raise NextLatError(f"{file.url} gave a file with {wrong}; it was deleted{again}")
    with explained("writing", path):
        os.replace(part, path)
        _tag(part).unlink(missing_ok=True)
    return path


def _fetch(file: RemoteFile, part: Path, progress: Progress | None) -> int | None:
    """Append to the part what it lacks; returns the size of the whole file if the server tells it."""
    have = part.stat().st_size if part.is_file() else 0
    if file.size is not None and have == file.size:
        return file.size
    headers = {"User-Agent": "nextlat"}
    token = os.environ.get("HF_TOKEN")
    if token and file.url.startswith(endpoint() + "/"):
        headers["Authorization"] = f"Bearer {token}"
    if have:
        headers["Range"] = f"bytes={have}-"
        if _tag(part).is_file():  # another file under the same name must not be glued to the old one's beginning
            headers["If-Range"] = _tag(part).read_text(encoding="utf-8")
    opener = urllib.request.build_opener(_Redirects)
    try:
        answer = opener.open(urllib.request.Request(file.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        part.unlink()  # nothing lies beyond what we have, and it was not the whole file: begin anew
        return _fetch(file, part, progress)
    with answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else file.size
        with explained("downloading", part):
            out = part.open("ab" if resumed else "wb")
        try:
            if answer.headers.get("ETag", "W/").startswith("W/"):
                _tag(part).unlink(missing_ok=True)
            else:
                write_text(_tag(part), answer.headers["ETag"])
            while block := answer.read(BLOCK):
                with explained("downloading", part):
                    out.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, total)
            with explained("downloading", part):
                out.flush()
                os.fsync(out.fileno())
        finally:
            with explained("downloading", part):  # closing writes what is left, and a full disk is no interruption
                out.close()
    return total


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects without taking the token to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            request.remove_header("Authorization")
        return request


def _complaint(file: RemoteFile, path: Path) -> str | None:
    """What a file that is here has otherwise than announced, or ``None``."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size:,} bytes instead of {file.size:,}"
    if file.sha256 is not None:
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != file.sha256:
            return f"sha256 {found} instead of {file.sha256}"
    return None


def _reach(where: str) -> None:
    """Fail at once without a connection; the hub's own client tries for half a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return
    except (http.client.HTTPException, OSError) as error:
        raise NextLatError(f"{where} cannot be listed: no connection ({error})") from error


def _asked_pause(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait for beyond the usual pause."""
    asked = error.headers.get("Retry-After", "0")
    return min(float(asked), LONGEST_PAUSE) if asked.isdecimal() else 0.0


def _refusal(status: int) -> str:
    advice = {
        401: "it wants a login; set HF_TOKEN to an access token",
        403: "the account of HF_TOKEN may not read it; accept its terms on its page, or use another token",
        404: "there is no such file, or it is private: check name and revision, or set HF_TOKEN",
        429: "too many requests; wait some minutes, or set HF_TOKEN",
    }
    return f"HTTP {status}, {advice.get(status, 'the server failed; try later' if status >= 500 else 'refused')}"


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _pause(attempt: int) -> float:
    return float(2**attempt) / 2


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
