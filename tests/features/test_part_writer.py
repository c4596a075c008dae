"""Rows become durable by number and by time, and stay so whatever happens next."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.digests import Digests
from pipeline.features import store as writer_module
from pipeline.features.rounding import Features
from pipeline.features.store import PartWriter

from .examples import features_of, make_digests, make_store


class Shelf:
    """Takes what is published and remembers it; fails from the ``fails_at``-th time on."""

    def __init__(self, *, fails_at: int = 99) -> None:
        self.parts: list[tuple[Features, Digests]] = []
        self.calls, self._fails_at = 0, fails_at

    def __call__(self, features: Features, digests: Digests) -> list[Path]:
        self.calls += 1
        if self.calls >= self._fails_at:
            raise OSError(28, "No space left on device")
        self.parts.append((features, digests))
        return []

    @property
    def sizes(self) -> list[int]:
        return [len(features) for features, _ in self.parts]


def send(writer: PartWriter, count: int, *, seed: int = 0) -> None:
    digests = make_digests(count, seed=seed)
    writer(features_of(digests), digests)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the writer sees: one changeable number, in seconds."""
    now = [0.0]
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "PART_ROWS", 8)


@pytest.mark.usefixtures("clock", "small_parts")
def test_it_publishes_as_soon_as_a_part_is_full() -> None:
    shelf = Shelf()
    with PartWriter(shelf, 60.0) as writer:
        for seed in range(6):
            send(writer, 3, seed=seed)
        writer.flush()
        writer.flush()
        assert shelf.sizes == [9, 9]
    assert shelf.sizes == [9, 9] and writer.published == 18


def test_it_publishes_when_its_oldest_row_is_old_enough(clock: list[float]) -> None:
    shelf = Shelf()
    with PartWriter(shelf, 30.0) as writer:
        for clock[0] in (0.0, 10.0, 29.0, 31.0, 32.0, 62.0, 63.0):
            send(writer, 1, seed=int(clock[0]))
    assert shelf.sizes == [4, 2, 1]


def test_rows_keep_their_digests_and_their_order(clock: list[float]) -> None:
    shelf = Shelf()
    with PartWriter(shelf, 2.0) as writer:
        for seed in range(7):
            clock[0] += 1
            send(writer, 2, seed=seed)
    digests = np.concatenate([digests for _, digests in shelf.parts])
    assert digests.tolist() == np.concatenate([make_digests(2, seed=seed) for seed in range(7)]).tolist()
    assert np.concatenate([rows for rows, _ in shelf.parts]).tobytes() == features_of(digests).tobytes()
    assert len(shelf.parts) > 2


def test_nothing_to_publish_publishes_nothing() -> None:
    shelf = Shelf()
    with PartWriter(shelf, 0.001):
        pass
    assert shelf.calls == 0


def test_what_came_before_a_failure_of_the_block_is_kept() -> None:
    shelf = Shelf()
    writer = PartWriter(shelf, 60.0)

    def work() -> None:
        with writer:
            send(writer, 5)
            raise ValueError("a batch failed")

    with pytest.raises(ValueError, match="a batch failed"):
        work()
    assert shelf.sizes == [5] and writer.published == 5


@pytest.mark.usefixtures("small_parts")
def test_a_failure_to_publish_is_raised_by_the_next_call_and_keeps_what_was_published() -> None:
    shelf = Shelf(fails_at=2)
    writer = PartWriter(shelf, 60.0)

    def work() -> None:
        with writer:
            for seed in range(9):
                send(writer, 8, seed=seed)

    with pytest.raises(OSError, match="No space left"):
        work()
    assert shelf.sizes == [8] and writer.published == 8
    # The second publish failed; the third call of the writer, or at the latest the fourth, had to say so.
    assert shelf.calls <= 3


def test_a_failure_at_the_end_is_raised_on_closing() -> None:
    shelf = Shelf(fails_at=1)
    with pytest.raises(OSError, match="No space left"), PartWriter(shelf, 60.0) as writer:
        send(writer, 2)
    assert writer.published == 0


@pytest.mark.usefixtures("small_parts")
def test_it_publishes_in_the_background_but_never_two_parts_at_once() -> None:
    gate, running, most = threading.Event(), [0], [0]

    def publish(features: Features, digests: Digests) -> list[Path]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        gate.wait(10)
        running[0] -= 1
        return []

    with PartWriter(publish, 60.0) as writer:
        send(writer, 8)
        send(writer, 4, seed=1)
        assert writer.published == 0  # the first part waits at the gate, and taking rows went on
        gate.set()
        send(writer, 8, seed=2)
    assert writer.published == 20 and most[0] == 1


def test_it_calls_after_each_part(clock: list[float]) -> None:
    published: list[int] = []
    with PartWriter(Shelf(), 1.0, after=lambda: published.append(writer.published)) as writer:
        for seed in range(3):
            clock[0] += 2
            send(writer, 2, seed=seed)
            clock[0] += 2
            send(writer, 1, seed=seed + 10)
    assert published == [3, 6, 9]


def test_parts_of_a_store_are_durable_before_they_are_counted(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    counted: list[int] = []
    with store.writing(), PartWriter(store.publish, 0.0, after=lambda: counted.append(rows_on_disk())) as writer:

        def rows_on_disk() -> int:
            return len(make_store(tmp_path).digests)

        for seed in range(3):
            send(writer, 2, seed=seed)
    assert counted == [2, 4, 6]
