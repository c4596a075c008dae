"""``images = embedded + reused + duplicates + quarantined``, whoever did what."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.features.digests import Digests, stack_digests
from pipeline.features.extractor import Clock
from pipeline.features.ledger import Outcome, count_images, merge_outcomes
from pipeline.files import digest_bytes

CONTENTS = [digest_bytes(bytes([value])) for value in range(6)]


def outcome_of(
    contents: list[int | None], computed: list[int], *, seconds: float = 1.0, failures: dict[int, str] | None = None
) -> Outcome:
    """An outcome of files with these contents (None: not read), of which ``computed`` were forwarded."""
    clock = Clock()
    clock.busy["forward"] += seconds
    known = np.array([content is not None for content in contents], bool)
    digests = stack_digests([CONTENTS[content or 0] for content in contents])
    return Outcome(digests, known, of(computed), failures or {}, clock, seconds)


def of(contents: list[int]) -> Digests:
    return stack_digests([CONTENTS[content] for content in contents])


def test_each_file_is_counted_once() -> None:
    outcome = outcome_of([0, 1, 1, 2, 3, 0, None, 3], computed=[0, 1], failures={6: "PermissionError"})
    assert count_images(outcome, [CONTENTS[3], CONTENTS[5]]) == {
        "images": 7,
        "embedded": 2,
        "reused": 1,
        "duplicates": 3,
        "quarantined": 1,
        "forwarded": 2,
        "failed": 1,
    }


def test_nothing_is_nothing() -> None:
    counts = count_images(outcome_of([], []), [])
    assert set(counts.values()) == {0}


files = st.lists(st.none() | st.integers(0, 5), max_size=12)


@settings(max_examples=100, deadline=None)
@given(files, st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_the_sum_holds(contents: list[int | None], computed: set[int], bad: set[int]) -> None:
    seen = {content for content in contents if content is not None}
    counts = count_images(outcome_of(contents, sorted(computed & seen)), [CONTENTS[content] for content in bad])
    assert counts["images"] == sum(content is not None for content in contents)
    assert counts["images"] == sum(counts[name] for name in ("embedded", "reused", "duplicates", "quarantined"))
    assert counts["embedded"] == len(computed & seen)
    assert counts["quarantined"] == len((bad - computed) & seen)
    assert counts["duplicates"] == counts["images"] - len(seen)


@settings(max_examples=60, deadline=None)
@given(files, st.integers(1, 4), st.sets(st.integers(0, 5)))
def test_shares_merge_to_the_whole(contents: list[int | None], processes: int, computed: set[int]) -> None:
    """Each process reads every n-th file and computes what it met there; equal contents may be computed twice."""
    shares = []
    for rank in range(processes):
        mine = [content if row % processes == rank else None for row, content in enumerate(contents)]
        seen = {content for content in mine if content is not None}
        shares.append(outcome_of(mine, sorted(computed & seen), seconds=1.0 + rank, failures={rank: "gone"}))
    merged = merge_outcomes(shares)
    counts = count_images(merged, [])
    seen = {content for content in contents if content is not None}
    assert counts["images"] == sum(content is not None for content in contents)
    assert counts["embedded"] == len(computed & seen) and counts["reused"] == len(seen - computed)
    assert counts["forwarded"] == sum(len(share.computed) for share in shares)
    assert counts["failed"] == processes and merged.seconds == processes
    assert merged.clock.busy["forward"] == sum(1.0 + rank for rank in range(processes))


def test_merging_leaves_the_shares_as_they_were() -> None:
    one, two = outcome_of([0, None], [0]), outcome_of([None, 1], [1])
    merge_outcomes([one, two])
    assert one.known.tolist() == [True, False] and one.clock.busy["forward"] == 1.0
