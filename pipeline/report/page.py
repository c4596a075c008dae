"""Small pieces of HTML. Every text that comes from outside goes through `esc`; names of classes are hostile."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template

from ..evaluate.text import printable

_UNIT = re.compile(r"(\d) (%|(?:ms|s|min|h|kB|MB|GB)\b)")


def esc(text: object) -> str:
    """``text`` for the inside of an element or of a quoted attribute; unprintable characters become escapes."""
    return html.escape(printable(str(text)), quote=True)


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document. ``title`` is plain text, ``parts`` are HTML."""
    template = Template(files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    return template.substitute(title=esc(title), body="\n".join(part for part in parts if part))


def prose(text: object) -> str:
    """`esc`, with numbers kept on one line with their unit."""
    return _UNIT.sub(r"\1&nbsp;\2", esc(text))


def section(title: str, *parts: str) -> str:
    """A heading and its parts, or nothing where all parts are empty."""
    inner = "\n".join(part for part in parts if part)
    return f"<h2>{esc(title)}</h2>\n{inner}" if inner else ""


def paragraph(text: str, *, soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{prose(text)}</p>"


def note(inner: str, *, warn: bool = False) -> str:
    """A box around HTML."""
    kind = "note warn" if warn else "note"
    return f'<div class="{kind}">{inner}</div>'


def bullets(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{prose(item)}</li>' for item in items)}</ul>"


def figure(picture: str, caption: str) -> str:
    """HTML of a picture with a caption of plain text."""
    return f"<figure>{picture}<figcaption>{prose(caption)}</figcaption></figure>"


def interval_bar(value: object, bounds: object, *, width: str = "100%", mark: float | None = None) -> str:
    """A share as a dot on its interval, from 0 to 100 %, with a line at ``mark``; nothing where either is None."""
    if not isinstance(value, float) or not isinstance(bounds, list):
        return ""
    low, high = (100 * bound for bound in bounds)
    line = "" if mark is None else f'<path d="M{100 * mark:.1f} 2V12" stroke="#66717f" stroke-width=".7"/>'
    return (
        f'<svg viewBox="-2 0 104 14" width="{width}" aria-hidden="true">'
        '<path d="M0 7H100" stroke="#d3dfec" stroke-width="1.6"/>'
        f'<path d="M{low:.1f} 7H{high:.1f}" stroke="#8fb6e0" stroke-width="3.4"/>{line}'
        f'<circle cx="{100 * value:.1f}" cy="7" r="2.1" fill="#2563a8"/></svg>'
    )


def facts(values: Mapping[str, object]) -> str:
    """Two columns: what, and its value."""
    rows = (f"<tr><th>{esc(name)}</th><td>{prose(value)}</td></tr>" for name, value in values.items())
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>' if values else ""


def folded(title: str, inner: str) -> str:
    """HTML behind a line that opens it."""
    return f"<details><summary>{esc(title)}</summary>{inner}</details>"


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    names: int = 1,
    caption: str = "",
    chosen: frozenset[int] = frozenset(),
    minor: frozenset[int] = frozenset(),
) -> str:
    """A table of HTML cells.

    Args:
        headings: plain texts.
        rows: cells as HTML (already escaped).
        names: how many leading columns hold names.
        caption: plain text above.
        chosen: places of rows that stand out.
        minor: places of columns that a phone does without.
    """
    kinds = [("name" if place < names else "number") + " minor" * (place in minor) for place in range(len(headings))]
    head = "".join(f'<th class="{kind}">{esc(text)}</th>' for kind, text in zip(kinds, headings, strict=True))
    body = "".join(_row(row, kinds, place in chosen) for place, row in enumerate(rows))
    title = paragraph(caption, soft=True) if caption else ""
    return f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(cells: Sequence[str], kinds: Sequence[str], chosen: bool) -> str:
    inner = "".join(
        f'<th class="{kind}" scope="row">{cell}</th>' if kind.startswith("name") else f'<td class="{kind}">{cell}</td>'
        for kind, cell in zip(kinds, cells, strict=True)
    )
    return f'<tr class="chosen">{inner}</tr>' if chosen else f"<tr>{inner}</tr>"
