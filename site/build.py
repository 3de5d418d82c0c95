"""The executed notebooks as a static site: `make site`, or `python site/build.py FOLDER`.

nbconvert makes the pages with the template in `site/page`: figures stay interactive, drawn by the one plotly file that
all pages share; formulas become MathML, which browsers draw by themselves. A page needs no server, no kernel and no
network. Deliberately no widgets: what a cell shows without them stands in its saved output.
"""

from __future__ import annotations

import html
import re
import shutil
import sys
from pathlib import Path

import arc  # beside this file
import badges  # beside this file
import nbformat
from bs4 import BeautifulSoup
from latex2mathml import converter
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from plotly.offline import get_plotlyjs
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).resolve().parent
BOOKS = HERE.parent / "notebooks"
BLANK = "\n\n"
FIGURE = ('<img src="../docs/pictures/effect.svg" width="860" alt="Moving picture of one training: predicted against '
          'true pass rates leave their column for the diagonal, and accuracy rises beside them.">')
#: $$...$$ stands by itself, $...$ in a line; code is left alone
FORMULA = re.compile(r"<(pre|code)\b.*?</\1>|\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)


def build(out: Path) -> None:
    """Write the site of all notebooks, solutions included, into a folder."""
    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(HERE)],
                            exclude_anchor_links=True, filters={"formulas": formulas})
    books = {path: nbformat.read(path, 4) for path in sorted(BOOKS.rglob("*.ipynb"))
             if ".ipynb_checkpoints" not in path.parts}
    for book in books.values():
        book.cells[0].source = badges.without(book.cells[0].source)  # a page asks nothing of the network
    for path, book in {**books, BOOKS / "index.ipynb": index(books)}.items():
        place = out / path.relative_to(BOOKS).with_suffix(".html")
        place.parent.mkdir(parents=True, exist_ok=True)
        root = "../" * (len(place.relative_to(out).parts) - 1)
        page, _ = exporter.from_notebook_node(book, {"site": {"root": root, "title": heading(book)}})
        soup = BeautifulSoup(page, "html.parser")
        links(soup, path)
        for picture in soup.select("img[src]:not([src^='data:'])"):
            shutil.copy(path.parent / picture["src"], out)
            picture["src"] = root + Path(picture["src"]).name
        place.write_text(str(soup), encoding="utf8")
    (out / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf8")
    shutil.copy(HERE / "style.css", out)
    with (out / "style.css").open("a", encoding="utf8") as sheet:
        for scheme, style in (("light", "default"), ("dark", "github-dark")):
            rules = HtmlFormatter(style=style).get_token_style_defs(".highlight")
            sheet.write("\n".join([f"@media (prefers-color-scheme: {scheme}) {{", *rules, "}\n"]))


def heading(book: NotebookNode) -> str:
    """The title of a notebook: its first line, without the mark of a heading."""
    return book.cells[0].source.splitlines()[0].removeprefix("# ")


def index(books: dict[Path, NotebookNode]) -> NotebookNode:
    """A notebook of one text: the README's figure, each notebook's title and the paragraph under it, the solutions."""
    entries, solutions = [], []
    for path, book in books.items():
        link = f"[{heading(book)}]({path.relative_to(BOOKS).as_posix()})"
        if path.parent == BOOKS:
            entries.append(f"**{link}**{BLANK}{about(book)}")
        else:
            solutions.append(f"* {link}")
    text = BLANK.join(["# MASA, a walk-through", "The notebooks of `masa_lib`, as they were run.", FIGURE, *entries,
                       "## Solutions of the exercises", "\n".join(solutions)])
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])


def about(book: NotebookNode) -> str:
    """The paragraph under a notebook's title, behind the line that says where its reader is."""
    return next(part for part in book.cells[0].source.split(BLANK)[1:] if not part.startswith(arc.BEGINS))


def formulas(text: str) -> str:
    """HTML with MathML in place of LaTeX."""
    def mathml(found: re.Match[str]) -> str:
        latex = found[2] or found[3]
        if latex is None:
            return found[0]
        return converter.convert(html.unescape(latex).replace(r"\_", "_"), display="block" if found[2] else "inline")

    return FORMULA.sub(mathml, text)


def links(page: BeautifulSoup, source: Path) -> None:
    """Let a page's links lead to other pages; one to a file that is no page is left as plain text."""
    for link in page.select("main a[href]"):
        target, mark, place = link["href"].partition("#")
        if target.endswith(".ipynb") and (source.parent / target).is_file():
            link["href"] = target.removesuffix("ipynb") + "html" + mark + place
        elif target and ":" not in target:
            link.unwrap()


if __name__ == "__main__":
    build(Path(sys.argv[1]))
