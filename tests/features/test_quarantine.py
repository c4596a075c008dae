"""Unreadable contents are remembered by digest and rule, and a damaged note is as good as none."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.digests import stack_digests
from pipeline.errors import CacheError
from pipeline.features.quarantine import BadContent, Quarantine
from pipeline.files import digest_bytes

BAD = BadContent("/images/caf\udce9.jpg", "truncated", "image file is truncated", "fetch it again")
DIGEST = digest_bytes(b"half an image")


def note(cache: Path, rule: str = "rule", *digests: bytes) -> Quarantine:
    """A quarantine with the example, or with these contents, saved."""
    quarantine = Quarantine(cache, rule)
    for digest in digests or (DIGEST,):
        quarantine.add(digest, BAD)
    quarantine.save()
    return quarantine


def note_of(cache: Path) -> Path:
    return next((cache / "quarantine").rglob("*.notes"))


def test_a_bad_content_is_known_to_the_next_run(tmp_path: Path) -> None:
    note(tmp_path, "pillow 12")
    again = Quarantine(tmp_path, "pillow 12")
    assert again.get(DIGEST) == BAD and again.digests == [DIGEST]
    assert again.get(digest_bytes(b"another")) is None


def test_another_rule_tries_again(tmp_path: Path) -> None:
    note(tmp_path, "pillow 12")
    assert Quarantine(tmp_path, "pillow 13").digests == []
    assert Quarantine(tmp_path, "pillow 12").digests == [DIGEST]


def test_an_empty_quarantine_makes_no_folder(tmp_path: Path) -> None:
    assert Quarantine(tmp_path, "pillow 12").digests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"{}", b'{"path": 1}', b"\xff", b"[" * 100_000, b'{"path":"a","reason":[],"detail":"","remedy":""}'],
)
def test_a_damaged_note_is_passed_over_and_written_again(tmp_path: Path, content: bytes) -> None:
    note(tmp_path)
    note_of(tmp_path).write_bytes(content)
    again = Quarantine(tmp_path, "rule")
    assert again.digests == []
    note(tmp_path)
    assert Quarantine(tmp_path, "rule").get(DIGEST) == BAD


def test_many_contents_are_one_file_and_nothing_new_is_none(tmp_path: Path) -> None:
    many = [digest_bytes(bytes([number])) for number in range(200)]
    quarantine = note(tmp_path, "rule", *many)
    quarantine.save()
    assert len(list((tmp_path / "quarantine").rglob("*.notes"))) == 1
    assert set(Quarantine(tmp_path, "rule").digests) == set(many)


def test_notes_of_before_many_went_into_one_file_are_read(tmp_path: Path) -> None:
    note(tmp_path)
    file = note_of(tmp_path)
    (file.parent / f"{DIGEST.hex()}.json").write_text(json.dumps(asdict(BAD)))
    (file.parent / "no digest.json").write_text(json.dumps(asdict(BAD)))
    file.unlink()
    assert Quarantine(tmp_path, "rule").get(DIGEST) == BAD and len(Quarantine(tmp_path, "rule").digests) == 1


def test_what_is_released_is_tried_again_and_nothing_else(tmp_path: Path) -> None:
    other = digest_bytes(b"other")
    quarantine = note(tmp_path, "rule", DIGEST, other)
    assert quarantine.release(stack_digests([DIGEST, digest_bytes(b"unknown")])) == 1
    assert quarantine.digests == Quarantine(tmp_path, "rule").digests == [other]
    assert quarantine.release(stack_digests([DIGEST])) == 0


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_flipped_bit_never_keeps_the_quarantine_from_opening(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    note(cache)
    file = note_of(cache)
    content = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    assert Quarantine(cache, "rule").digests in ([], [DIGEST])


def test_a_note_that_cannot_be_written_ends_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "quarantine").write_text("in the way")
    with pytest.raises(CacheError, match="cannot be noted") as caught:
        note(tmp_path)
    assert "cache.dir" in str(caught.value)
