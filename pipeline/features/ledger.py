"""What an extraction did, content by content; outcomes of several processes merge into one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .digests import Digests, first_occurrences, locate, stack_digests
from .extractor import Clock


@dataclass(frozen=True)
class Outcome:
    """What one process knows and did after its share of an extraction.

    Args:
        digests: uint8 (n, 16), a row for each file of the scan; rows where ``known`` is false mean nothing.
        known: bool (n,), false where the file was not read (in another process's share, or unreadable).
        computed: uint8 (k, 16), contents that went through the backbone in this process.
        failures: position to reason, for files that could not be read.
        clock: seconds of each step.
        seconds: from the first file opened to the last part published.
    """

    digests: Digests
    known: NDArray[np.bool_]
    computed: Digests
    failures: dict[int, str]
    clock: Clock
    seconds: float


def merge_outcomes(outcomes: list[Outcome]) -> Outcome:
    """One outcome for processes that worked side by side, so that the longest share gives the seconds."""
    digests, known, clock = outcomes[0].digests.copy(), outcomes[0].known.copy(), Clock()
    for outcome in outcomes:
        digests[outcome.known] = outcome.digests[outcome.known]
        known |= outcome.known
        clock.add(outcome.clock)
    return Outcome(
        digests=digests,
        known=known,
        computed=np.concatenate([outcome.computed for outcome in outcomes]),
        failures={position: why for outcome in outcomes for position, why in outcome.failures.items()},
        clock=clock,
        seconds=max(outcome.seconds for outcome in outcomes),
    )


def count_images(outcome: Outcome, quarantined: list[bytes]) -> dict[str, int]:
    """The ledger: ``images = embedded + reused + duplicates + quarantined``, and ``failed`` files beside it.

    Embedded, reused and quarantined count distinct contents; duplicates count files whose bytes occurred earlier
    in the scan; forwarded counts images that went through the backbone.
    """
    digests = outcome.digests[outcome.known]
    first = first_occurrences(digests)
    embedded = first & (locate(outcome.computed, digests) >= 0)
    bad = first & ~embedded & (locate(stack_digests(quarantined), digests) >= 0)
    return {
        "images": len(digests),
        "embedded": int(embedded.sum()),
        "reused": int((first & ~embedded & ~bad).sum()),
        "duplicates": int((~first).sum()),
        "quarantined": int(bad.sum()),
        "forwarded": len(outcome.computed),
        "failed": len(outcome.failures),
    }
