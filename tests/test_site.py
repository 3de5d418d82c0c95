"""The site of the notebooks: complete, small, interactive, and nothing on it asks for the network."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
BOOKS = sorted(path for path in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
LIMIT = 30_000_000  # bytes
PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, ROOT / "site" / "build.py", out], check=True)
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, BeautifulSoup]:
    return {path: BeautifulSoup(path.read_text(encoding="utf8"), "html.parser") for path in site.rglob("*.html")}


def page_of(site: Path, book: Path) -> Path:
    return site / book.relative_to(NOTEBOOKS).with_suffix(".html")


def test_every_notebook_has_a_page_and_the_index_leads_to_it(site: Path, pages: dict[Path, BeautifulSoup]) -> None:
    linked = {(site / link["href"]).resolve() for link in pages[site / "index.html"].select("main a[href]")
              if ":" not in link["href"]}
    assert {page_of(site, book) for book in BOOKS} == linked == set(pages) - {site / "index.html"}


def test_the_index_says_of_each_notebook_what_it_is_about(pages: dict[Path, BeautifulSoup], site: Path) -> None:
    text = pages[site / "index.html"].select_one("main").get_text()
    assert "You are here" not in text
    for book in BOOKS:
        parts = json.loads(book.read_text(encoding="utf8"))["cells"][0]["source"]
        assert "".join(parts).splitlines()[0].removeprefix("# ") in text


def test_is_small(site: Path) -> None:
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < LIMIT


def test_every_link_leads_to_a_file_of_the_site_or_is_a_plain_link_to_the_web(pages: dict[Path, BeautifulSoup]) -> None:
    missing = [(path.name, where) for path, page in pages.items() for link in page.select("a[href]")
               if ":" not in (where := unquote(link["href"]).partition("#")[0]) and where
               and not (path.parent / where).is_file()]
    assert missing == []


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, BeautifulSoup]) -> None:
    for path, page in pages.items():
        fetched = [tag[name] for name in ("src", "href", "srcset", "data", "poster", "action")
                   for tag in page.select(f"[{name}]") if tag.name != "a"]
        for address in fetched:
            assert address.startswith("data:") or (path.parent / address).is_file(), (path.name, address)
        styles = " ".join(tag.get_text() for tag in page.select("style")) + (site / "style.css").read_text()
        assert "@import" not in styles
        assert "url(" not in styles


def test_figures_are_drawn_by_the_one_shared_file(site: Path, pages: dict[Path, BeautifulSoup]) -> None:
    assert [path.name for path in site.rglob("*.js")] == ["plotly.min.js"]
    for book in BOOKS:
        cells = json.loads(book.read_text(encoding="utf8"))["cells"]
        figures = sum(PLOTLY in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
        path = page_of(site, book)
        shared = [tag["src"] for tag in pages[path].select("script[src]")]
        assert [(path.parent / where).resolve() for where in shared] == [site / "plotly.min.js"]
        assert sum("Plotly.newPlot" in tag.get_text() for tag in pages[path].select("script")) == figures


def test_formulas_are_drawn_without_a_script(pages: dict[Path, BeautifulSoup]) -> None:
    assert sum(len(page.select("math[display=block]")) for page in pages.values()) >= 3
    for path, page in pages.items():
        text = " ".join(node for section in page.select("section") for node in section.find_all(string=True)
                        if not node.find_parents(["code", "pre"]))
        assert "$" not in text, path.name
        assert "\\" not in text, path.name


def test_what_runs_in_a_browser_has_library_and_records_but_no_weights_and_begins_by_fetching(tmp_path: Path) -> None:
    lite = runpy.run_path(str(ROOT / "site" / "lite.py"))
    lite["contents"](tmp_path / "contents")
    books = sorted((tmp_path / "contents" / "notebooks").rglob("*.ipynb"))
    assert sorted(book.stem for book in books) == sorted(2 * lite["BOOKS"])
    for path in books:
        cells = json.loads(path.read_text(encoding="utf8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells)
        fetch = next(cell for cell in cells if cell["id"] == "fetch")
        root = re.search(r'abspath\("(.*)"\)', "".join(fetch["source"]))[1]
        assert (path.parent / root / "masa_lib" / "config.py").is_file()
    assert list((tmp_path / "contents" / "data" / "runs").rglob("*.parquet"))
    assert list((tmp_path / "contents").rglob("*.safetensors")) == []


def test_no_page_is_wider_than_a_phone_or_says_an_error(site: Path, pages: dict[Path, BeautifulSoup]) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; .ci/run installs it")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chrome or Chromium")
    said: list[tuple[str, str]] = []
    with playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page(
            viewport={"width": 390, "height": 800})
        page.on("console", lambda message: said.append((page.url, message.text)) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append((page.url, str(error))))
        page.on("requestfailed", lambda request: said.append((page.url, request.url)))
        for path in pages:
            page.goto(path.as_uri())
            if (width := page.evaluate("document.documentElement.scrollWidth")) > 390:
                said.append((page.url, f"{width} pixels wide"))
    assert said == []


def test_a_browser_draws_the_figures_from_a_file(site: Path, pages: dict[Path, BeautifulSoup]) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chrome or Chromium")
    path = site / "07_did_it_help.html"
    drawn = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
                            "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", path.as_uri()],
                           check=True, capture_output=True, text=True, timeout=120).stdout
    found = BeautifulSoup(drawn, "html.parser").select(".js-plotly-plot .main-svg")
    assert len({id(svg.find_parent(class_="js-plotly-plot")) for svg in found}) == len(
        pages[path].select("div.figure"))


def test_the_pictures_of_the_notebooks_are_the_figures_that_stand_in_them() -> None:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "site" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    shown = (ROOT / "docs" / "pictures" / "README.md").read_text(encoding="utf8")
    for stem in pictures.CELLS:
        assert f'src="{stem}.png"' in shown
        assert (ROOT / "docs" / "pictures" / f"{stem}.png").read_bytes() == pictures.picture(stem), \
            "run: python site/pictures.py"
