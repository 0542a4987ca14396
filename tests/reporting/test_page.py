"""The written report: its files, its HTML, and what a browser makes of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nextlat.errors import NextLatError
from nextlat.reporting import write_report
from tests.reporting.synthetic import write_run

VOID = {"meta", "link", "img", "source", "wbr"}


class Nesting(HTMLParser):
    """Open elements, ids and addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.addresses += [values[key] or "" for key in ("src", "srcset", "href") if key in values]
        self.images += [values] if tag == "img" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_written_whole_and_again_with_the_same_bytes(six_runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    assert write_report(six_runs, out) == out / "report.html"
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    names = [f"figures/{name}.png" for name in ("accuracy", "health", "loss", "seeds", "tokens")]
    assert files == [*names, "report.html", "summary.csv", "table.md"]
    before = {name: (out / name).read_bytes() for name in files}
    write_report(six_runs, out)
    assert {name: (out / name).read_bytes() for name in files} == before


def test_the_page_is_well_formed_and_holds_all_it_needs(six_runs: list[Path], tmp_path: Path) -> None:
    text = write_report(six_runs, tmp_path / "out").read_text()
    page = Nesting()
    page.feed(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert len(page.images) == 5
    assert all(image["alt"] and image["width"] for image in page.images)
    assert "nextlat: 99.15 %, 99.70 %, 94.80 %" in (page.images[0]["alt"] or "")


def test_odd_names_are_escaped(six_runs: list[Path], tmp_path: Path) -> None:
    text = write_report(six_runs, tmp_path / "out").read_text()
    assert "<b>" not in text
    assert "nextlat &lt;b&gt;&amp;&quot;odd&quot;|[red]" in text


def test_a_directory_that_is_no_run_leaves_no_report(six_runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match="is not a run directory"):
        write_report([*six_runs, tmp_path], tmp_path / "out")
    with pytest.raises(NextLatError, match="no run directory given"):
        write_report([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium; absent, the test is skipped, but never in CI."""
    absent = pytest.fail if os.environ.get("CI") else pytest.skip
    executable = shutil.which("chromium")
    if executable is None:
        absent("no chromium on the path")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=arguments)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_a_network(
    browser: Any, six_runs: list[Path], tmp_path: Path, scheme: str
) -> None:
    path = write_report(six_runs, tmp_path / "out")
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, offline=True)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url[:80]))
    page.on("request", lambda request: requests.append(request.url.split(",")[0]))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert page.title() == "path_star: next-latent report"

    images = page.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.currentSrc])")
    assert len(images) == 5
    assert all(width > 0 for width, _ in images)
    inside = {address for _, address in images}
    light = set(page.eval_on_selector_all("img", "all => all.map(i => i.src)"))
    assert (inside == light) if scheme == "light" else not (inside & light)

    tables = page.locator("main > section table")
    assert tables.count() >= 3
    assert all(tables.nth(i).is_visible() for i in range(3))
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.get_by_text("objective: gpt").first.is_visible()
    context.close()


def test_a_long_run_name_does_not_widen_the_page(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "gpt", 0, 0.5, name="a" * 120)
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(write_report([run], tmp_path / "out").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
