"""What was found, image by image: ``insights.csv``, which the user corrects and gives back as ``data.corrections``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from ..data.source import SPLITS
from ..features.cache import FeatureTable

Kind = Literal["near-duplicate", "leak", "label", "outlier", "quality"]
KINDS: Final[tuple[Kind, ...]] = ("near-duplicate", "leak", "label", "outlier", "quality")
COLUMNS: Final = ("path", "digest", "split", "label", "finding", "score", "suggestion", "correction")


@dataclass(frozen=True)
class Finding:
    """One thing about one image: ``score`` is larger where it is worse, within its kind."""

    row: int
    kind: Kind
    score: float
    suggestion: str = ""


def insights_csv(table: FeatureTable, findings: Iterable[Finding]) -> bytes:
    """The findings by kind, worst first within each, with an empty column to correct in; names keep their bytes."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    writer.writerow(COLUMNS)
    for finding in sorted(findings, key=lambda each: (KINDS.index(each.kind), -each.score, each.row)):
        row = finding.row
        target = int(table.targets[row])
        label = table.class_names[target] if target >= 0 else ""
        known = (table.paths[row], table.digests[row].tobytes().hex(), SPLITS[table.splits[row]], label)
        writer.writerow([*known, finding.kind, f"{finding.score:.4g}", finding.suggestion, ""])
    return buffer.getvalue().encode("utf-8", "surrogateescape")
