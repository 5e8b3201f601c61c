"""Parts of a page: one self-contained HTML file, readable without its script, on paper, on a phone.

Knows how values become HTML; not what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from .. import __version__
from .charts import Chart
from .svg import NARROW, WIDE, draw


def document(title: str, top: str, sections: Iterable[tuple[str, str, str]]) -> str:
    """A whole page.

    Args:
        top: HTML of the head of the page, before the contents.
        sections: (anchor, heading, HTML); empty ones are left out.
    """
    assets = resources.files(__name__.rpartition(".")[0]) / "assets"
    style = (assets / "report.css").read_text(encoding="utf-8")
    script = (assets / "report.js").read_text(encoding="utf-8")
    kept = [(anchor, heading, body) for anchor, heading, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in kept[1:])
    bodies = "".join(
        f'<section id="{anchor}" class="{"long" if anchor == "events" else ""}">'
        f"<h2>{escape(heading)}</h2>{body}</section>"
        for anchor, heading, body in kept
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>\n{style}</style>'
        f'</head><body><header class="top">{top}<nav class="contents">{links}</nav></header>'
        f"<main>{bodies}<footer>crowdmesh_jax {__version__}. This page loads nothing from the"
        f" network.</footer></main><script>\n{script}</script></body></html>\n"
    )


def figure(chart: Chart | None) -> str:
    """A chart at both widths; the style sheet shows the one that fits."""
    return f"<figure>{draw(chart, WIDE)}{draw(chart, NARROW)}</figure>" if chart else ""


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = (0,)
) -> str:
    """A table; cells are HTML. Columns whose index is in `left` hold words, others numbers."""

    def cells(kind: str, row: Sequence[str]) -> str:
        styles = ("name" if i == 0 else "words" if i in left else "num" for i in range(len(row)))
        parts = zip(styles, row, strict=True)
        return "".join(f'<{kind} class="{style}">{cell}</{kind}>' for style, cell in parts)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = cells("th", [escape(column) for column in columns])
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """(what, figure, remark) in a grid."""
    made = "".join(
        f'<div class="tile"><span>{escape(what)}</span><b>{escape(value)}</b>'
        f"<span>{escape(remark) or '&nbsp;'}</span></div>"
        for what, value, remark in figures
    )
    return f'<div class="tiles">{made}</div>'
