"""Rows are found as a dict would find them, also where the first eight bytes agree."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.digests import (
    Digests,
    DigestTable,
    data_digest,
    empty_digests,
    first_occurrences,
    locate,
    stack_digests,
)

# Few different halves, so that equal first halves, equal second halves and whole repeats all occur often.
halves = st.sampled_from([bytes([value]) * 8 for value in (0, 1, 127, 128, 255)])
rows = st.lists(st.builds(bytes.__add__, halves, halves), max_size=24)


def as_rows(digests: Digests) -> list[bytes]:
    return [row.tobytes() for row in digests]


@settings(max_examples=150, deadline=None)
@given(rows, rows)
def test_locate_agrees_with_a_dict(table: list[bytes], query: list[bytes]) -> None:
    first: dict[bytes, int] = {}
    for row, digest in enumerate(table):
        first.setdefault(digest, row)
    found = locate(stack_digests(table), stack_digests(query))
    assert found.tolist() == [first.get(digest, -1) for digest in query]


@settings(max_examples=100, deadline=None)
@given(rows)
def test_first_occurrences_agree_with_a_set(digests: list[bytes]) -> None:
    expected = [digest not in digests[:row] for row, digest in enumerate(digests)]
    assert first_occurrences(stack_digests(digests)).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=16, max_size=16)))
def test_stacked_digests_come_back(digests: list[bytes]) -> None:
    assert as_rows(stack_digests(digests)) == digests


def test_locate_finds_in_a_strided_table() -> None:
    table = np.random.default_rng(0).integers(0, 256, (40, 16)).astype(np.uint8)
    assert locate(table[::2], table).tolist() == [row // 2 if row % 2 == 0 else -1 for row in range(40)]


def test_nothing_is_found_in_nothing() -> None:
    some = np.zeros((3, 16), np.uint8)
    assert locate(empty_digests(), some).tolist() == [-1, -1, -1]
    assert locate(some, empty_digests()).tolist() == []


def test_data_digest_knows_contents_labels_and_splits_but_not_order() -> None:
    digests = np.arange(48, dtype=np.uint8).reshape(3, 16)
    labels, splits = ["a", "b", "caf\udce9"], ["train", "val", "train"]
    same = data_digest(digests, labels, splits)
    assert len(same) == 32
    assert data_digest(digests[::-1], labels[::-1], splits[::-1]) == same
    assert data_digest(digests, ["b", "a", "caf\udce9"], splits) != same
    assert data_digest(digests, labels, ["val", "val", "train"]) != same
    assert data_digest(digests[[0, 1, 1]], labels, splits) != same


def test_a_table_that_was_extended_is_the_table_of_all() -> None:
    """With contents that repeat, and some that agree in the first half only."""
    rows = np.random.default_rng(5).integers(0, 3, (300, 16)).astype(np.uint8)
    rows[:, :14] = rows[:, :1]
    table = DigestTable(rows[:120]).extended(rows[120:121]).extended(rows[121:121]).extended(rows[121:])
    query = np.concatenate([rows[::-1], rows + 100])
    first = {row.tobytes(): place for place, row in reversed(list(enumerate(rows)))}
    expected = [first.get(row.tobytes(), -1) for row in query]
    assert table.locate(query).tolist() == DigestTable(rows).locate(query).tolist() == expected
