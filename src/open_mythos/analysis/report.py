"""One self-contained HTML page of results: headings, sentences, tables, pictures; no script, nothing fetched.

Main entries: `Section`, `render_page`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

Row = Mapping[str, object]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --paper: #fff; --line: #d8dde6; --soft: #f4f6fa; --accent: #0b62a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ef; --paper: #14181f; --line: #333b48; --soft: #1c222c; --accent: #6fb7ee; }
  figure img { background: #fff; border-radius: 6px; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h2 .number { color: var(--accent); margin-right: .6rem; }
p { max-width: 46rem; }
p.verdict { border-left: 4px solid var(--accent); background: var(--soft); padding: .6rem .9rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; background: var(--soft); }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
pre { background: var(--soft); padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; font-size: .9rem; }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 4px; font-size: .9em; }
footer { margin-top: 4rem; color: #7a8494; font-size: .85rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, prose, what was found (`verdict`), at most one table, preformatted text, and PNG pictures by name.

    Words between backquotes in prose are code.
    """

    title: str
    text: str
    verdict: str = ""
    rows: Sequence[Row] = field(default_factory=tuple)
    preformatted: str = ""
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def render_page(title: str, introduction: str, sections: Sequence[Section], footer: str = "") -> str:
    """The page as HTML text."""
    body = "\n".join(_section(number, section) for number, section in enumerate(sections, start=1))
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>\n<p>{_prose(introduction)}</p>\n{body}\n"
        f"<footer>{escape(footer)}</footer>\n</main></body></html>\n"
    )


def format_cell(value: object) -> str:
    """A table cell: three decimals, or one from 100 on, thousands separated, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or 0.001 <= abs(value) < 100:
            return f"{value:.3f}"
        return f"{value:,.1f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def _section(number: int, section: Section) -> str:
    parts = [f'<h2><span class="number">{number}</span>{escape(section.title)}</h2>', f"<p>{_prose(section.text)}</p>"]
    if section.verdict:
        parts.append(f'<p class="verdict">{_prose(section.verdict)}</p>')
    if section.rows:
        parts.append(_table(section.rows))
    if section.preformatted:
        parts.append(f"<pre>{escape(section.preformatted)}</pre>")
    for name, picture in section.pictures.items():
        data = base64.b64encode(picture).decode("ascii")
        alt = escape(name.replace("_", " "))
        parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>')
    return "\n".join(parts)


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(rows: Sequence[Row]) -> str:
    columns = list(rows[0])
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(format_cell(row.get(column)))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
