"""The HTML of a page that needs nothing but itself: no script, no network, no file beside it."""

from __future__ import annotations

import html
from collections.abc import Sequence

from streammerge.text import visible

# Nothing but the styles below may ever load, whatever a model's name says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #595959; --grid: #d4d4d4; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --soft: #b4b4b4; --grid: #4a4a4a; --paper: #161616; }
}
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --grid: #ccc; --paper: #fff; } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--grid); }
code, pre, tbody :is(th, td) { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .875rem; }
pre { padding: .75rem; border: 1px solid var(--grid); white-space: pre-wrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem;
  align-items: start; }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; max-width: 38rem; height: auto; fill: var(--ink); }
figcaption, caption, .told { color: var(--soft); font-size: .875rem; }
caption { text-align: left; padding-bottom: .25rem; }
.wide { overflow-x: auto; margin: 1rem 0; background:
  linear-gradient(to right, var(--paper) 50%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 50%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--soft), transparent) left / .5rem 100% no-repeat scroll,
  linear-gradient(to left, var(--soft), transparent) right / .5rem 100% no-repeat scroll; }
.wide:focus-visible, summary:focus-visible { outline: 2px solid var(--ink); }
table { border-collapse: collapse; }
th, td { padding: .2rem .75rem .2rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th:first-child { text-align: left; }
tbody th { font-weight: normal; }
thead th { vertical-align: bottom; }
table.words :is(th, td) { text-align: left; }
table.wraps td { white-space: normal; min-width: 8rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; }
"""


def escaped(text: object) -> str:
    """Text from strangers, fit to stand in an element or an attribute."""
    return html.escape(visible(str(text)))


def document(title: str, body: Sequence[str]) -> bytes:
    """A whole page; `body` is markup, `title` is text."""
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>"
    )
    lines = ['<html lang="en">', "<head>", head, "</head>", "<body>", *body, "</body>", "</html>", ""]
    return "\n".join(lines).encode()


def section(title: str, *parts: str) -> str:
    """A section under a heading of its own; the parts are markup."""
    return f"<section>\n<h2>{escaped(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def paragraph(text: str) -> str:
    return f'<p class="told">{escaped(text)}</p>'


def figure(drawing: str, caption: str) -> str:
    """A drawing, which is markup, above its caption."""
    return f"<figure>\n{drawing}\n<figcaption>{escaped(caption)}</figcaption>\n</figure>"


def figures(drawn: Sequence[str]) -> str:
    """Figures beside one another where there is room."""
    return '<div class="figures">\n' + "\n".join(drawn) + "\n</div>" if drawn else ""


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[object]], *, words: bool = False, wraps: bool = False
) -> str:
    """A table of texts that scrolls sideways by itself, with a shade at the edge behind which there is more of it; the
    first column names the rows, numbers go to the right.

    Args:
        words: the cells are words, and go to the left.
        wraps: those after the first take several lines where there is little room.
    """
    heads = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in header)
    lines = "\n".join(
        f'<tr><th scope="row">{escaped(first)}</th>' + "".join(f"<td>{escaped(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    classes = " ".join(["words"] * words + ["wraps"] * wraps)
    kind = f' class="{classes}"' if classes else ""
    return (
        f'<div class="wide" role="region" aria-label="{escaped(caption)}" tabindex="0">\n<table{kind}>\n'
        f"<caption>{escaped(caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n"
        "</table>\n</div>"
    )


def details(summary: str, content: str) -> str:
    """Markup that is shown on demand."""
    return f"<details>\n<summary>{escaped(summary)}</summary>\n{content}\n</details>"
