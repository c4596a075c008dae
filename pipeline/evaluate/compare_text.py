"""A comparison as a table for the terminal or as Markdown."""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from .compare import TEXT_COLUMNS, Comparison
from .matching import ALPHA
from .text import SHORT_TITLES, TITLES, duration, interval, printable, score

_MARK_TITLE = "beats"
_INTERVAL_WIDTH = len("[95.4–100.0]")


def comparison_table(comparison: Comparison) -> Table:
    """A rich table; a column of names that says the same for all runs goes into the title."""
    shared = _shared(comparison)
    title = ", ".join(f"{key} {value}" for key, value in shared.items())
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    names = [key for key in TEXT_COLUMNS if key not in shared]
    widths = dict.fromkeys(_metric_titles(comparison), _INTERVAL_WIDTH)
    for heading in ("#", _MARK_TITLE, *names, "n", *widths, "time"):
        # Where the terminal is narrow, the names fold and the numbers stay whole.
        width = widths.get(heading)
        justify: Literal["left", "right"] = "left" if heading in (*TEXT_COLUMNS, _MARK_TITLE) else "right"
        table.add_column(heading, overflow="fold", justify=justify, min_width=width)
    for index in range(len(comparison.runs)):
        if index:
            table.add_row()
        table.add_row(*(Text(cell) for cell in _cells(comparison, index, skip=set(shared), between="\n")))
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """The same as a Markdown table followed by the notes."""
    headings = ["#", _MARK_TITLE, *TEXT_COLUMNS, "n", *_metric_titles(comparison), "time"]
    names = len(TEXT_COLUMNS)
    lines = [headings, ["--:", *[":--"] * (names + 1), *["--:"] * (len(headings) - names - 2)]]
    for index in range(len(comparison.runs)):
        lines.append([_markdown(cell) for cell in _cells(comparison, index, skip=set(), between=" ")])
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", *(f"- {_markdown(note)}" for note in comparison_notes(comparison))]) + "\n"


def comparison_notes(comparison: Comparison) -> list[str]:
    """What the marks mean, and what else a reader must know."""
    tested = sum(pair.p is not None for pair in comparison.pairs)
    notes = [printable(note) for note in comparison.notes]
    if not tested:
        return notes
    pairs = "1 pair" if tested == 1 else f"all {tested} pairs"
    return [
        f"`{_MARK_TITLE}`: McNemar's exact test on the same images, Holm-corrected over {pairs}, "
        f"at {100 * ALPHA:.0f} %. No mark means: not shown to differ.",
        "Brackets are 95 % intervals of each score alone; the test goes image by image and sees smaller differences.",
        *notes,
    ]


def _shared(comparison: Comparison) -> dict[str, str]:
    if len(comparison.runs) < 2:
        return {}
    values = {key: {run.value(key) for run in comparison.runs} for key in TEXT_COLUMNS}
    return {key: printable(found.pop()) for key, found in values.items() if len(found) == 1}


def _metrics(comparison: Comparison) -> list[str]:
    """The metrics that at least one run has."""
    return [name for name in TITLES if any(run.value(name) is not None for run in comparison.runs)]


def _metric_titles(comparison: Comparison) -> list[str]:
    return [SHORT_TITLES[name] for name in _metrics(comparison)]


def _cells(comparison: Comparison, index: int, *, skip: set[str], between: str) -> list[str]:
    run = comparison.runs[index]
    marks = ", ".join(str(other + 1) for other in comparison.better_than(index))
    cells = [str(index + 1), marks, *(printable(str(run.value(key))) for key in TEXT_COLUMNS if key not in skip)]
    cells.append(f"{run.metrics.n:,}")
    for name in _metrics(comparison):
        bounds = run.metrics.metrics.get(f"{name}_ci95")
        text = interval(name, bounds, between="–") if isinstance(bounds, list) else ""
        cells.append(score(name, run.value(name)) + (f"{between}[{text}]" if text else ""))
    return [*cells, duration(run.model.seconds)]


def _markdown(text: str) -> str:
    for special in "\\|<>*":
        text = text.replace(special, f"\\{special}")
    return text
