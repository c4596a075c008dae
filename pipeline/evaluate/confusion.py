"""The confusion matrix in HTML: a table up to 30 classes, a picture above, and the most confused pairs."""

from __future__ import annotations

from collections.abc import Sequence

from ..artifacts.schema import ConfusedPair, RunMetrics
from .page import esc, figure, paragraph, table
from .plots import confusion_image

MAX_TABLE = 30
_FEW, _DENSE = 5, 12
_SHOWN_PAIRS = 12


def confusion_section(metrics: RunMetrics) -> str:
    """HTML for any number of classes."""
    names, matrix = metrics.class_names, metrics.confusion
    pairs = _pairs(metrics.confused, metrics) if len(names) > 2 else ""
    if matrix is None:
        return paragraph(f"There is no matrix: {metrics.reasons.get('confusion', 'not known')}.", soft=True) + pairs
    if len(names) <= MAX_TABLE:
        return _matrix_table(matrix, names) + pairs
    caption = "Rows are true classes, columns predicted ones; the class numbers are those of the per-class table."
    return figure(confusion_image(matrix), caption) + pairs


def _matrix_table(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    upright = len(names) > _FEW or max(map(len, names)) > 14
    inner = '<span class="up">{}</span>' if upright else "{}"
    head = "".join(f'<th title="{esc(name)}">{inner.format(esc(name))}</th>' for name in names)
    body = "".join(_matrix_row(row, index, names) for index, row in enumerate(matrix))
    kind = "confusion few" if len(names) <= _FEW else "confusion dense" if len(names) > _DENSE else "confusion"
    caption = paragraph("Rows are true classes, columns predicted ones; shades are shares of the row.", soft=True)
    return (
        f'{caption}<div class="scroll"><table class="{kind}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _matrix_row(row: Sequence[int], index: int, names: Sequence[str]) -> str:
    total = sum(row)
    cells = "".join(_cell(count, total, index, place, names) for place, count in enumerate(row))
    return f'<tr><th title="{esc(names[index])}" scope="row">{esc(names[index])}</th>{cells}</tr>'


def _cell(count: int, total: int, index: int, place: int, names: Sequence[str]) -> str:
    if not count:
        return '<td class="zero">0</td>'
    share = count / total
    color = "37, 99, 168" if index == place else "201, 84, 28"
    # The square root keeps a rare confusion visible; white text where the shade is dark.
    shade = 0.08 + 0.82 * share**0.5
    ink = "#fff" if shade > 0.6 else "#1d2530"
    title = f"{names[index]} predicted as {names[place]}: {count:,} of {total:,} ({share:.1%})"
    style = f"background:rgba({color}, {shade:.2f});color:{ink}"
    return f'<td style="{style}" title="{esc(title)}">{count}</td>'


def _pairs(confused: Sequence[ConfusedPair], metrics: RunMetrics) -> str:
    if not confused:
        return ""
    sizes = {row.label: row.n for row in metrics.per_class}
    rows = [
        (esc(pair.label), esc(pair.predicted), f"{pair.n:,}", f"{100 * pair.n / sizes[pair.label]:.1f} %")
        for pair in confused[:_SHOWN_PAIRS]
        if sizes.get(pair.label)
    ]
    headings = ("true class", "predicted as", "images", "of the class")
    return "<br>" + table(headings, rows, names=2, caption="Most confused pairs")
