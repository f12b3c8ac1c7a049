"""The report is one page that needs nothing else, and shows what it was given."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from open_mythos.analysis.report import Section, format_cell, render_page

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SECTIONS = [
    Section(
        title="Sizes & shapes",
        text="Each loop begins with `A*h + B*e`, where 0 < A < 1.",
        verdict="Half of it.",
        rows=[{"model": "<b>tiny</b>", "loops": 4, "share": 0.5}, {"model": "large", "loops": 16}],
        pictures={"first": PIXEL, "second_one": PIXEL},
    ),
    Section(title="Answers", text="Marked.", preformatted="0 1 <\n  ^"),
]
PAGE = render_page("Title <1>", "Written by `mythos demo`.", SECTIONS, footer="seed 0")


class Tags(HTMLParser):
    """Every tag with its attributes, and the balance of opening and closing ones."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_nothing_is_fetched_and_nothing_runs() -> None:
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r'src="data:[^"]*"', "", PAGE))
    for tag, attributes in Tags(PAGE).found:
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:").startswith("data:image/png;base64,") or tag != "img"


def test_every_tag_is_closed() -> None:
    assert Tags(PAGE).stack == []


def test_pictures_are_inside_the_page_with_a_name() -> None:
    images = [attributes for tag, attributes in Tags(PAGE).found if tag == "img"]
    assert [image["alt"] for image in images] == ["first", "second one"]
    assert {base64.b64decode((image["src"] or "").partition(",")[2]) for image in images} == {PIXEL}


def test_what_looks_like_html_is_text() -> None:
    for escaped in (
        "Title &lt;1&gt;",
        "Sizes &amp; shapes",
        "0 &lt; A &lt; 1",
        "&lt;b&gt;tiny&lt;/b&gt;",
        "0 1 &lt;\n",
    ):
        assert escaped in PAGE
    assert "<b>" not in PAGE


def test_backquotes_are_code() -> None:
    assert "begins with <code>A*h + B*e</code>, where" in PAGE
    assert "<code>mythos demo</code>" in PAGE


def test_sections_are_numbered_and_show_only_what_they_have() -> None:
    assert re.findall(r'<span class="number">(\d+)</span>([^<]+)', PAGE) == [
        ("1", "Sizes &amp; shapes"),
        ("2", "Answers"),
    ]
    last = PAGE.partition("Answers")[2]
    assert "<table" not in last
    assert "<img" not in last
    assert "verdict" not in last
    assert "<footer>seed 0</footer>" in last


def test_a_row_without_a_value_has_a_dash() -> None:
    assert "<td>large</td><td>16</td><td>-</td>" in PAGE


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (1234567, "1,234,567"),
        (0.0, "0.000"),
        (0.5, "0.500"),
        (-0.25, "-0.250"),
        (99.9994, "99.999"),
        (3235.968, "3,236.0"),
        (0.000124, "0.000124"),
        (2.5e9, "2.5e+09"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        ("text", "text"),
    ],
)
def test_format_cell(value: object, text: str) -> None:
    assert format_cell(value) == text
