"""The pass is exact, is kept, and costs only the rows that are new."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.digests import stack_digests
from pipeline.files import digest_bytes
from pipeline.insight import neighbours
from pipeline.insight.neighbours import Neighbours, find_neighbours


def made_up(n: int, d: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    features = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32) + 3
    return stack_digests([digest_bytes(row.tobytes()) for row in features]), features


def by_hand(features: np.ndarray, mean: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    unit = features.astype(np.float64) - mean
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    products = unit @ unit.T
    np.fill_diagonal(products, -np.inf)
    index = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return index, np.take_along_axis(products, index, 1)


def assert_exact(found: Neighbours, features: np.ndarray) -> None:
    index, similarity = by_hand(features, found.mean, found.index.shape[1])
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-5)
    assert not index.size or (found.index == index).mean() > 0.99  # ties may fall either way


@pytest.fixture(params=[7, 64, 4096])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(neighbours, "BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("n", [1, 2, 15, 300])
def test_the_pass_is_exact_whatever_the_blocks(block: int, n: int) -> None:
    digests, features = made_up(n)
    found = find_neighbours(digests, features)
    assert found.index.shape == (n, min(20, n - 1))
    assert_exact(found, features)


def test_rows_sorted_by_class_and_equal_rows_are_found(block: int) -> None:
    generator = np.random.default_rng(1)
    centres = np.repeat(generator.normal(size=(5, 16)) * 5, 60, axis=0)
    features = (centres + generator.normal(size=centres.shape)).astype(np.float32)
    features[17] = features[230]
    digests = stack_digests([digest_bytes(bytes([i % 256, i // 256])) for i in range(300)])
    found = find_neighbours(digests, features)
    assert_exact(found, features)
    assert (found.index[17, 0], found.index[230, 0]) == (230, 17)
    assert (np.diff(found.similarity, axis=1) <= 0).all()


def test_new_and_removed_images_cost_only_their_rows(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    digests, features = made_up(200)
    known = find_neighbours(digests[:190], features[:190])
    compared: list[int] = []
    update = neighbours._Search.update
    monkeypatch.setattr(
        neighbours._Search, "update", lambda self, todo, *rest: compared.append(len(todo)) or update(self, todo, *rest)
    )
    monkeypatch.setattr(neighbours._Search, "search_all", lambda *_: pytest.fail("all were compared again"))
    grown = find_neighbours(digests, features, known=known)
    assert compared == [10]
    assert_exact(grown, features)
    kept = np.delete(np.arange(200), 3)
    shrunk = find_neighbours(digests[kept[::-1]], features[kept[::-1]], known=grown)
    assert 0 < compared[1] < 60
    assert_exact(shrunk, features[kept[::-1]])
    assert find_neighbours(digests, features, known=grown).index.tolist() == grown.index.tolist()
    assert compared[2] == 0


def test_it_is_kept_and_damage_costs_only_time(tmp_path: Path) -> None:
    file = tmp_path / "neighbours"
    assert Neighbours.load(file) is None
    digests, features = made_up(50)
    found = find_neighbours(digests, features)
    found.save(file)
    loaded = Neighbours.load(file)
    assert loaded is not None
    assert all(np.array_equal(value, getattr(loaded, name)) for name, value in vars(found).items())
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert Neighbours.load(file) is None
    file.write_bytes(b"")
    assert Neighbours.load(file) is None


def test_a_feature_without_direction_is_far_from_all() -> None:
    digests, features = made_up(30)
    features[5] = features[5:].mean() * 0 + np.delete(features, 5, 0).mean(0)
    assert np.abs(find_neighbours(digests, features).similarity[5]).max() < 1
