"""A page of HTML that opens without a network, on a phone and on a wide screen, in the reader's own light or dark.

Pieces of a page are strings of HTML, made here from plain text, tables and plotly figures (drawn by `svg`).
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import plotly.graph_objects as go

from masa_lib import crash_safe_files as files
from masa_lib.analysis.figures import plain

HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">"""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8881; --link: light-dark(#0060a8, #7cc0f4); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; line-height: 1.25; margin: 1.6rem 0 .5rem; }
p, li { max-width: 48rem; overflow-wrap: break-word; } a { color: var(--link); }
.lead { font-size: 1.08rem; margin: .6rem 0; max-width: 62rem; }
.warning { border-left: 4px solid #D55E00; padding-left: .8rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.numbers div { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; }
.numbers dt { font-size: .85rem; } .numbers dd { margin: 0; } .numbers .note { font-size: .85rem; }
.numbers .value { font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.25; }
.top { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 2.5rem; }
.top section:first-child { grid-column: span 1; }
@media (min-width: 70rem) { .top { grid-template-columns: 2fr 1fr; } }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem 1.5rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: pre; }
details { border-top: 1px solid var(--line); } summary { cursor: pointer; padding: .55rem 0; }
details > :not(summary) { margin-left: 1rem; } details[open] > summary { font-weight: 600; }
blockquote { margin: .5rem 0; padding: .4rem .8rem; background: var(--faint); border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: break-word; font: .88rem/1.45 ui-monospace, monospace; max-width: 60rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: .6rem 1rem; }
.panels > svg { width: 100%; max-width: 34rem; height: auto; }
svg text { font-family: system-ui, sans-serif; fill: currentColor; } .p { stroke: transparent; stroke-width: 6px; }
.grid { fill: none; stroke: #8883; stroke-width: .8px; } .ghost use { opacity: 0; } .ghost use:hover { opacity: 1; }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .2rem 0;
  font-size: .88rem; }
.key span { font: .88rem monospace; letter-spacing: -.1em; }
#tip { position: fixed; max-width: 18rem; padding: .3rem .5rem; font-size: .82rem; line-height: 1.3;
  white-space: pre-line; background: Canvas; color: CanvasText; border: 1px solid var(--line); border-radius: .3rem;
  pointer-events: none; }
"""
#: shows `data-tip` of what is pointed at or tapped
SCRIPT = """
const tip = document.getElementById("tip");
addEventListener("pointerover", ({target, clientX, clientY}) => {
  tip.hidden = !(target.dataset && target.dataset.tip);
  if (tip.hidden) return;
  tip.textContent = target.dataset.tip;
  tip.style.left = Math.max(4, Math.min(clientX + 12, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(4, clientY - tip.offsetHeight - 10) + "px";
});
"""


def write(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page that needs no network.

    Args:
        path: of the file.
        title: plain text.
        parts: HTML.
    """
    text = (f'{HEAD}<title>{escaped(title)}</title><style>{STYLE}</style></head><body><h1>{escaped(title)}</h1>'
            f'{"".join(parts)}<div id="tip" hidden></div><script>{SCRIPT}</script></body></html>')
    with files.writing(path, "make the page again, or elsewhere with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, lambda temporary: temporary.write_text(text, encoding="utf8", errors="backslashreplace"))


def escaped(text: str) -> str:
    """Plain text as HTML, with arrows for `->`."""
    return html.escape(text).replace("-&gt;", "&rarr;")


def paragraphs(said: Iterable[str], kind: str = "") -> str:
    """A paragraph a sentence."""
    mark = f' class="{kind}"' if kind else ""
    return "".join(f"<p{mark}>{escaped(sentence)}</p>" for sentence in said)


def numbers(found: Iterable[tuple[str, str, str]]) -> str:
    """Numbers side by side: what each is, the number, and a note."""
    return '<dl class="numbers">' + "".join(
        f'<div><dt>{escaped(label)}</dt><dd class="value">{escaped(value)}</dd>'
        f'<dd class="note">{escaped(note)}</dd></div>'
        for label, value, note in found) + "</dl>"


def table(rows: Sequence[Sequence[str]], about: str = "Table") -> str:
    """A table, the first row its header, that is scrolled by itself where it is wider than the page."""
    body = "".join("<tr>" + "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in row) + "</tr>"
                   for tag, row in [("th", rows[0]), *(("td", row) for row in rows[1:])])
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(about)}"><table>{body}</table></div>'


def figure(drawn: go.Figure, said: Iterable[str]) -> str:
    """A figure and what is seen in it."""
    from masa_lib.analysis import svg  # here, as notebooks in a browser write no page and need not fetch matplotlib

    return f"{svg.draw(drawn)}<p>{'<br>'.join(map(escaped, said))}</p>"


def heading(drawn: go.Figure) -> str:
    """The title of a figure as plain text."""
    return plain(drawn.layout.title.text or "Another figure")


def shown(drawn: Iterable[tuple[go.Figure, list[str]]]) -> str:
    """Figures under their titles."""
    return '<div class="top">' + "".join(f"<section><h2>{escaped(heading(one))}</h2>{figure(one, said)}</section>"
                                             for one, said in drawn) + "</div>"


def folded(drawn: Iterable[tuple[go.Figure, list[str]]]) -> list[str]:
    """Figures that are opened by their titles."""
    return [fold(heading(one), figure(one, said)) for one, said in drawn]


def fold(title: str, content: str) -> str:
    """Something that is opened by its title; nothing where there is nothing."""
    return f"<details><summary>{escaped(title)}</summary><div>{content}</div></details>" if content else ""
