"""``images = embedded + reused + duplicates + quarantined``, whoever did what."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.digests import Digests, stack_digests
from pipeline.features.cache import count_contents
from pipeline.files import digest_bytes

CONTENTS = [digest_bytes(bytes([value])) for value in range(6)]


def of(contents: list[int]) -> Digests:
    return stack_digests([CONTENTS[content] for content in contents])


def test_each_image_is_counted_once() -> None:
    assert count_contents(of([0, 1, 1, 2, 3, 0, 3]), of([0, 1]), of([3, 5])) == {
        "images": 7,
        "embedded": 2,
        "reused": 1,
        "duplicates": 3,
        "quarantined": 1,
    }


def test_nothing_is_nothing() -> None:
    assert set(count_contents(of([]), of([]), of([])).values()) == {0}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=12), st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_the_sum_holds(contents: list[int], computed: set[int], bad: set[int]) -> None:
    seen = set(contents)
    counts = count_contents(of(contents), of(sorted(computed & seen)), of(sorted(bad)))
    assert counts["images"] == len(contents)
    assert counts["images"] == sum(counts[name] for name in ("embedded", "reused", "duplicates", "quarantined"))
    assert counts["embedded"] == len(computed & seen)
    assert counts["quarantined"] == len((bad - computed) & seen)
    assert counts["duplicates"] == counts["images"] - len(seen)
