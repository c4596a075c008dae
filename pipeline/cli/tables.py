"""Tables and CSV on the terminal."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..files import publish_file

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


def print_backbones(rows: Sequence[BackboneRow]) -> None:
    """One line a backbone on standard output."""
    table = Table("name", "features", "parameters", "input", "weights", box=None, header_style="bold")
    for row in rows:
        table.add_row(row.name, str(row.feature_dim), f"{row.parameters:,}", str(row.input_size), " ".join(row.weights))
    Console(soft_wrap=True, highlight=False).print(table)


def print_ranking(summary: dict[str, Any]) -> None:
    """One line a ranked backbone on standard output, then what is recommended and why."""
    table = Table("backbone", "accuracy", "95 % interval", "parameters", "features", "ms an image", box=None)
    for row in summary["backbones"]:
        low, high = (100 * bound for bound in row["interval"])
        accuracy, interval = f"{100 * row['accuracy']:.1f} %", f"{low:.1f} to {high:.1f}"
        numbers = (f"{row['parameters']:,}", str(row["feature_dim"]), f"{row['milliseconds']:.1f}")
        table.add_row(row["label"], accuracy, interval, *numbers)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    # As wide as it needs, so that paths of weights stay whole.
    console.width = max(console.width, console.measure(table, options=console.options.update_width(10_000)).maximum)
    console.print(table)
    console.print(f"Recommended: {summary['reason']}")
