"""Tables and CSV on the terminal."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..files import publish_file

EXTRAS = ("timm", "openclip")  # zoos of that name

if TYPE_CHECKING:
    from ..backbones import BackboneRow
    from ..stages.run import Prediction


def write_predictions_csv(predictions: Sequence[Prediction], top: int, file: Path | None) -> None:
    """``path,label,probability,...,error`` with a label and a probability for each of the ``top`` classes.

    Args:
        file: where to publish the CSV; None is standard output. Names that are not UTF-8 keep their bytes.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    ranks = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("label", "probability")]
    writer.writerow(["path", "label", "probability", *ranks, "error"])
    for prediction in predictions:
        best = [value for pair in prediction.top[:top] for value in pair]
        cells = [*best, *[""] * (2 * top - len(best))]
        writer.writerow([prediction.path, *cells, prediction.error or ""])
    data = buffer.getvalue().encode("utf-8", "surrogateescape")
    if file is not None:
        publish_file(file, data)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def print_predictions(predictions: Sequence[Prediction], top: int) -> None:
    """One line an image on a terminal, with the ``top`` classes; those that could not be classified are left out."""
    table = Table("image", *["class", "probability"] * top, box=None, header_style="bold")
    for prediction in predictions:
        if prediction.error is None:
            pairs = ((label, "-" if value is None else f"{100 * value:.1f} %") for label, value in prediction.top[:top])
            path = os.path.relpath(prediction.path) if os.path.isabs(prediction.path) else prediction.path
            table.add_row(min(path, prediction.path, key=len), *(cell for pair in pairs for cell in pair))
    for column in table.columns[2::2]:
        column.justify = "right"
    if table.row_count:
        screen_for(table).print(table)


def print_backbones(
    rows: Sequence[BackboneRow], *, more: bool = False, first: bool = False, sizes: Mapping[str, int] | None = None
) -> None:
    """One line a backbone on standard output, or the card of the only one.

    Args:
        more: others fit too.
        first: these are a zoo's `first_worth_a_look`.
        sizes: of the zoos, of which the larger ones are not listed unasked.
    """
    if len(rows) == 1:
        _print_card(rows[0])
        return
    columns = {title: show for title, show in COLUMNS.items() if any(show(row) != "-" for row in rows)}
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in columns:
        table.add_column(title, justify="left" if title in ("name", "licence") else "right")
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    console = screen_for(table)
    console.print(table)
    if not rows:
        console.print("No backbone fits.")
    if more:
        console.print("There are more: narrow the name, or list them with --all.")
    if any(row.accuracy is not None for row in rows):
        console.print("ImageNet: share of its images whose class is named right, as published with the weights.")
    if first:
        console.print("Each is more accurate than all that compute less; --all, or a part of a name, lists others.")
    for zoo, count in (sizes or {}).items():
        if count > len(rows) and zoo != "torchvision":
            console.print(f"{zoo}: {count:,}; `pipeline backbones {zoo}/PART_OF_NAME` lists some")
        elif not count and zoo in EXTRAS:
            console.print(f"{zoo}: not installed; pip install 'image-transfer-pipeline[{zoo}]'")


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


COLUMNS: dict[str, Callable[[BackboneRow], str]] = {
    "name": lambda row: row.name,
    "ImageNet": lambda row: "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
    "GFLOPs": lambda row: (
        "-" if row.gflops is None else f"{row.gflops:.2f}" if row.gflops < 10 else f"{row.gflops:.0f}"
    ),
    "download": lambda row: "-" if row.download_mb is None else f"{row.download_mb:,.0f} MB",
    "parameters": lambda row: _millions(row.parameters),
    "features": lambda row: str(row.feature_dim),
    "input": lambda row: str(row.input_size),
    "licence": lambda row: row.licence or "-",
}


def _published(row: BackboneRow) -> str:
    figures = {title: COLUMNS[title](row) for title in ("ImageNet", "GFLOPs", "download")}
    return ", ".join(f"{title} {text}" for title, text in figures.items())


def _print_card(row: BackboneRow) -> None:
    """All that is known of a backbone without its weights."""
    transform, console = row.transform, Console(soft_wrap=True, highlight=False, markup=False)
    mode = "both sides" if transform.get("resize_mode") else "shorter side"
    console.print(row.name)
    for name, text in (
        ("features", f"{row.feature_dim} ({row.pooling})"),
        ("parameters", f"{row.parameters:,}"),
        *([("published", _published(row))] if row.accuracy is not None else []),
        ("images", f"{mode} to {transform['resize']}, {transform['interpolation']}; crop {transform['crop']}"),
        ("normalised", f"mean {transform['mean']}, deviation {transform['std']}"),
        ("weights", " ".join(row.weights) or "none but your own"),
        ("licence", row.licence or "not stated by the library"),
    ):
        console.print(f"  {name:<12}{text}")


def print_ranking(summary: dict[str, Any]) -> None:
    """One line a ranked backbone on standard output, then what is recommended and why."""
    table = Table("backbone", "accuracy", "95 % interval", "parameters", "features", "ms an image", box=None)
    for row in summary["backbones"]:
        low, high = (100 * bound for bound in row["interval"])
        accuracy, interval = f"{100 * row['accuracy']:.1f} %", f"{low:.1f} to {high:.1f}"
        numbers = (f"{row['parameters']:,}", str(row["feature_dim"]), f"{row['milliseconds']:.1f}")
        table.add_row(row["label"], accuracy, interval, *numbers)
    console = screen_for(table)
    console.print(table)
    console.print(f"Recommended: {summary['reason']}")


def screen_for(table: Table) -> Console:
    """Standard output, as wide as the table needs, so that names and paths stay whole."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.width = max(console.width, console.measure(table, options=console.options.update_width(10_000)).maximum)
    return console
