"""Unreadable contents are remembered by digest and rule, and a damaged note is as good as none."""

from __future__ import annotations

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


def note_of(cache: Path) -> Path:
    return next((cache / "quarantine").rglob("*.json"))


def test_a_bad_content_is_known_to_the_next_run(tmp_path: Path) -> None:
    Quarantine(tmp_path, "pillow 12").add(DIGEST, BAD)
    again = Quarantine(tmp_path, "pillow 12")
    assert again.get(DIGEST) == BAD and again.digests == [DIGEST]
    assert again.get(digest_bytes(b"another")) is None


def test_another_rule_tries_again(tmp_path: Path) -> None:
    Quarantine(tmp_path, "pillow 12").add(DIGEST, BAD)
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
    Quarantine(tmp_path, "rule").add(DIGEST, BAD)
    note_of(tmp_path).write_bytes(content)
    again = Quarantine(tmp_path, "rule")
    assert again.digests == []
    again.add(DIGEST, BAD)
    assert Quarantine(tmp_path, "rule").get(DIGEST) == BAD


@pytest.mark.parametrize("name", ["ab", "no digest", DIGEST.hex() * 2])
def test_a_note_whose_name_is_no_digest_is_passed_over(tmp_path: Path, name: str) -> None:
    Quarantine(tmp_path, "rule").add(DIGEST, BAD)
    note = note_of(tmp_path)
    note.with_name(f"{name}.json").write_bytes(note.read_bytes())
    assert stack_digests(Quarantine(tmp_path, "rule").digests).tobytes() == DIGEST


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_flipped_bit_never_keeps_the_quarantine_from_opening(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    Quarantine(cache, "rule").add(DIGEST, BAD)
    note = note_of(cache)
    content = bytearray(note.read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    note.write_bytes(content)
    assert Quarantine(cache, "rule").digests in ([], [DIGEST])


def test_a_note_that_cannot_be_written_ends_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "quarantine").write_text("in the way")
    with pytest.raises(CacheError, match="cannot be noted") as caught:
        Quarantine(tmp_path, "rule").add(DIGEST, BAD)
    assert "cache.dir" in str(caught.value)
