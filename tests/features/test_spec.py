"""The key flips with everything that determines a feature, and with nothing else."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.errors import CacheError
from pipeline.features.spec import FeatureSpec, differences
from pipeline.files import digest_bytes

from .examples import SPEC, spec_with

words = st.text(max_size=8)
numbers = st.integers(-1000, 1000) | st.floats(allow_nan=False, allow_infinity=False, width=32)
values = st.none() | st.booleans() | numbers | words | st.lists(numbers, max_size=3)
specs = st.builds(
    FeatureSpec,
    backbone=words,
    weights_digest=words,
    layer=st.none() | words,
    pooling=words,
    transform=st.dictionaries(words, values, max_size=5),
    decoder=words,
    precision=words,
    dtype=words,
    view=words,
    schema=st.integers(0, 9),
)


def as_json(value: Any) -> str:
    """A text that tells values apart as JSON does: True from 1, 1 from 1.0."""
    return json.dumps(value, sort_keys=True)


@settings(max_examples=60, deadline=None)
@given(specs, st.sampled_from([field.name for field in fields(FeatureSpec)]), st.data())
def test_key_flips_with_each_field(spec: FeatureSpec, name: str, data: st.DataObject) -> None:
    strategies: dict[str, st.SearchStrategy[Any]] = {
        "transform": st.dictionaries(words, values, max_size=5),
        "schema": st.integers(0, 99),
        "layer": st.none() | words,
    }
    changed = data.draw(strategies.get(name, words))
    assume(as_json(changed) != as_json(getattr(spec, name)))
    other = FeatureSpec(**{**spec.as_dict(), name: changed})
    assert other.key != spec.key
    assert {found.partition(".")[0] for found, _, _ in differences(spec, other)} == {name}


@settings(max_examples=60, deadline=None)
@given(specs, st.randoms())
def test_key_is_equal_for_equal_specs_in_any_order(spec: FeatureSpec, random: Any) -> None:
    items = list(spec.transform.items())
    random.shuffle(items)
    shuffled = FeatureSpec(**{**spec.as_dict(), "transform": dict(items)})
    outer = list(spec.as_dict().items())
    random.shuffle(outer)
    again = FeatureSpec.from_dict(json.loads(json.dumps(dict(outer))))
    assert spec.key == shuffled.key == again.key
    assert differences(spec, again) == []


def test_key_takes_tuples_for_lists() -> None:
    as_tuple = spec_with(transform={**SPEC.transform, "mean": (0.485, 0.456, 0.406)})
    assert as_tuple.key == SPEC.key
    assert differences(SPEC, as_tuple) == []


@pytest.mark.parametrize("name", ["resize", "crop", "exif"])
def test_key_flips_when_a_field_of_the_transform_goes_away(name: str) -> None:
    rest = {key: value for key, value in SPEC.transform.items() if key != name}
    assert spec_with(transform=rest).key != SPEC.key
    assert [found for found, _, _ in differences(SPEC, spec_with(transform=rest))] == [f"transform.{name}"]


def test_differences_tell_none_from_absent() -> None:
    old, new = spec_with(transform={}), spec_with(transform={"resize": None})
    assert old.key != new.key
    assert differences(old, new) == [("transform.resize", "(absent)", None)]


def test_key_is_what_older_caches_hold() -> None:
    # A key that changed without a raised schema would orphan every cache there is.
    assert SPEC.folder_name == "resnet18-1eaebf4cb8f27534"


def test_differences_name_the_field_and_both_values() -> None:
    other = spec_with(transform={**SPEC.transform, "resize": 232}, precision="bfloat16")
    assert differences(other, SPEC) == [("precision", "bfloat16", "float32"), ("transform.resize", 232, 256)]


def test_every_bit_of_an_image_changes_its_digest() -> None:
    data = bytearray(b"an image's bytes")
    seen = {digest_bytes(data)}
    for position in range(len(data) * 8):
        data[position // 8] ^= 1 << position % 8
        seen.add(digest_bytes(data))
        data[position // 8] ^= 1 << position % 8
    assert len(seen) == len(data) * 8 + 1


@pytest.mark.parametrize("damage", [None, [], {}, {"backbone": "resnet18"}, {**SPEC.as_dict(), "more": 1}])
def test_what_is_no_spec_is_refused(damage: object) -> None:
    with pytest.raises(CacheError, match="not a feature spec"):
        FeatureSpec.from_dict(damage)


def test_a_transform_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(CacheError, match="not a feature spec"):
        FeatureSpec.from_dict({**SPEC.as_dict(), "transform": "resize"})
