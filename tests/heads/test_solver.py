from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.heads import make_head, path, standardisation
from pipeline.heads.logistic import LogisticHead
from pipeline.heads.solver import Design, Problems, Search, Solutions, solve
from pipeline.params import HeadParams

from .conftest import make_features


def scaled(X: np.ndarray) -> np.ndarray:
    mean, scale = standardisation(X, True)
    return (X - mean) / scale


def solved(
    X: np.ndarray, y: np.ndarray, strengths: list[float], weight: np.ndarray | None = None, tolerance: float = 1e-8
) -> tuple[Design, Solutions]:
    """Every strength on all rows with ``weight``, in one batch from zero."""
    classes = int(y.max()) + 1
    design = Design.build(torch.from_numpy(X), torch.from_numpy(y), classes)
    rows = torch.ones(1, len(y), dtype=torch.float64) if weight is None else torch.from_numpy(weight)[None]
    strength = torch.tensor(strengths, dtype=torch.float64)
    problems = Problems.build(design, strength, rows.repeat(len(strengths), 1))
    start = torch.zeros(len(strengths), design.outputs, design.exact.shape[1], dtype=torch.float64)
    return design, solve(design, problems, start, tolerance)


def sklearn_objective(X: np.ndarray, y: np.ndarray, C: float, weight: np.ndarray | None = None) -> tuple[float, object]:
    model = LogisticRegression(C=C, tol=1e-12, max_iter=20_000).fit(X, y, sample_weight=weight)
    logits = X @ model.coef_.T + model.intercept_
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
    return C * float((losses if weight is None else losses * weight).sum()) + 0.5 * float((model.coef_**2).sum()), model


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("shape", [(150, 24), (40, 90)], ids=["rows", "features"])
def test_objective_and_predictions_are_those_of_scikit_learn(classes: int, shape: tuple[int, int]) -> None:
    X, y = make_features(*shape, classes)
    X = scaled(X)
    strengths = [1e-5, 1e-3, 1e-1, 1e1, 1e3]
    _, solutions = solved(X, y, strengths)
    for number, C in enumerate(strengths):
        expected, model = sklearn_objective(X, y, C)
        assert float(solutions.objective[number]) <= expected * (1 + 1e-6)
        logits = solutions.logits[number].T.numpy()
        ours = logits.argmax(axis=1) if classes > 2 else (logits[:, 0] > 0).astype(int)
        assert (ours == model.predict(X)).mean() > 0.99  # type: ignore[attr-defined]
        assert abs(float(solutions.objective[number]) - expected) <= expected * 1e-5


@pytest.mark.parametrize(("shape", "classes", "spread"), [((60, 80), 2, 2.0), ((300, 20), 3, 3.0), ((150, 24), 3, 1.0)])
def test_the_certificate_is_a_bound(shape: tuple[int, int], classes: int, spread: float) -> None:
    X, y = make_features(*shape, classes, spread=spread)
    keep = np.flatnonzero((y == 0) | (np.arange(len(y)) % 4 == 0))  # of unequal size, so that intercepts matter
    X, y, strengths = scaled(X[keep]), y[keep], [1e-4, 1e-2, 0.1, 1.0, 100.0]
    _, exact = solved(X, y, strengths, tolerance=1e-13)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        _, rough = solved(X, y, strengths, tolerance=tolerance)
        assert float(rough.gap.max()) <= tolerance
        assert (1 - exact.objective / rough.objective <= rough.gap + 1e-12).all()


@pytest.mark.parametrize(("classes", "shots", "width", "strength"), [(150, 1, 300, 1.0), (60, 5, 200, 3.0)])
def test_many_classes_converge_from_a_cold_start(classes: int, shots: int, width: int, strength: float) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(classes), shots)
    X = scaled((3 * rng.normal(size=(classes, width))[y] + rng.normal(size=(len(y), width))).astype(np.float32))
    _, solutions = solved(X, y, [strength])
    assert float(solutions.gap[0]) <= 1e-8
    assert int(solutions.iterations[0]) < 100
    assert solutions.logits[0].argmax(0).tolist() == y.tolist()


def test_a_batch_of_many_classes_is_solved_on_several_threads() -> None:
    y, threads = np.repeat(np.arange(170), 2), torch.get_num_threads()
    X = scaled(np.random.default_rng(0).normal(size=(len(y), 20)).astype(np.float32) + y[:, None] % 7)
    torch.set_num_threads(2)
    try:
        _, solutions = solved(X, y, [1e-3, 1e-2, 1e-1])
    finally:
        torch.set_num_threads(threads)
    assert float(solutions.gap.max()) <= 1e-8


def test_what_is_not_finite_or_rises_is_no_step() -> None:
    X, y = make_features(classes=3)
    design = Design.build(torch.from_numpy(scaled(X)), torch.from_numpy(y), 3)
    ones = torch.ones(1, len(y), dtype=torch.float64)
    search = Search(design, Problems.build(design, ones[:, 0], ones), torch.zeros(1, 3, design.exact.shape[1]).double())
    objective = search.objective
    direction = -1e200 * search.gradient
    length, *_, losses = search._line_search(direction, design.logits(direction))
    assert torch.isfinite(losses).all() and float(length[0]) < 1e-150
    assert float(losses[0]) <= float(objective[0])


def test_float64_polishes_what_float32_cannot_reach() -> None:
    X, y = make_features(classes=4)
    _, solutions = solved(scaled(X), y, [1e-4, 1.0, 1e4], tolerance=1e-12)
    assert float(solutions.gap.max()) <= 1e-12


def test_weights_of_rows_are_those_of_scikit_learn() -> None:
    X, y = make_features(classes=3)
    X = scaled(X)
    weight = np.random.default_rng(0).integers(0, 3, len(y)).astype(np.float64)
    _, solutions = solved(X, y, [0.1], weight)
    expected, _ = sklearn_objective(X[weight > 0], y[weight > 0], 0.1, weight[weight > 0])
    assert float(solutions.objective[0]) == pytest.approx(expected, rel=1e-6)


def test_separable_data_has_a_solution_at_every_strength() -> None:
    X, y = make_features(60, 80, 2, spread=5.0)
    _, solutions = solved(scaled(X), y, list(np.geomspace(1e-6, 1e5, 12)), tolerance=1e-7)
    assert float(solutions.gap.max()) <= 1e-7
    assert torch.isfinite(solutions.weights).all()


def test_a_class_without_rows_is_left_out() -> None:
    X, y = make_features(classes=4)
    X = scaled(X)
    weight = (y != 2).astype(np.float64)
    _, solutions = solved(X, y, [1.0], weight)
    kept = y != 2
    expected, _ = sklearn_objective(X[kept], np.searchsorted([0, 1, 3], y[kept]), 1.0)
    assert float(solutions.objective[0]) == pytest.approx(expected, rel=1e-6)
    assert not solutions.weights[0, 2].any()


def test_the_rotation_shrinks_to_the_rank() -> None:
    X, y = make_features(30, 90, 2)
    design = Design.build(torch.from_numpy(scaled(X)), torch.from_numpy(y), 2)
    assert design.exact.shape == (30, 30)  # 29 dimensions of centred rows, and the intercept
    assert torch.allclose(design.exact[:, :-1] @ design.basis.T, torch.from_numpy(scaled(X)), atol=1e-10)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_solutions() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    X, y = make_features(classes=3)
    X = scaled(X)
    _, ours = solved(X, y, [0.1, 10.0])
    target = torch.from_numpy(y).cuda()
    design = Design.build(torch.from_numpy(X).cuda(), target, 3)
    strength = torch.tensor([0.1, 10.0], dtype=torch.float64, device="cuda")
    rows = torch.ones(2, len(y), dtype=torch.float64, device="cuda")
    start = torch.zeros(2, 3, design.exact.shape[1], dtype=torch.float64, device="cuda")
    theirs = solve(design, Problems.build(design, strength, rows), start, 1e-8)
    assert torch.allclose(theirs.objective.cpu(), ours.objective, rtol=1e-7)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_sketched_design_has_the_same_solutions(classes: int) -> None:
    X, y = make_features(400, 300, classes)
    X = scaled(X)
    rows = torch.ones(2, len(y), dtype=torch.float64)
    strength = torch.tensor([1e-3, 1e1], dtype=torch.float64)
    found = []
    for rotate in (True, False):
        design = Design.build(torch.from_numpy(X), torch.from_numpy(y), classes, rotate=rotate)
        start = torch.zeros(2, design.outputs, design.exact.shape[1], dtype=torch.float64)
        found.append((design, solve(design, Problems.build(design, strength, rows), start, 1e-9)))
    (rotated, ours), (sketched, theirs) = found
    assert rotated.basis is not None and sketched.basis is None and len(sketched.leading)
    assert torch.allclose(ours.objective, theirs.objective, rtol=2e-9)
    assert torch.allclose(rotated.feature_weights(ours.weights), sketched.feature_weights(theirs.weights), atol=1e-3)


def test_the_weights_of_all_classes_sum_to_zero() -> None:
    X, y = make_features(classes=4)
    start = np.random.default_rng(0).normal(size=(1, 4, 25))
    design = Design.build(torch.from_numpy(scaled(X)), torch.from_numpy(y), 4)
    rows = torch.from_numpy((y != 2).astype(np.float64))[None]
    problems = Problems.build(design, torch.ones(1, dtype=torch.float64), rows)
    start[:, 2] = 0
    solutions = solve(design, problems, torch.from_numpy(start), 1e-8)
    assert float(solutions.weights.sum(1).abs().max()) < 1e-5
    assert not solutions.weights[0, 2].any()


@pytest.mark.parametrize("classes", [2, 4])
def test_rows_that_are_worked_on_by_parts_give_the_same_solution(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    X, y = make_features(300, 24, classes)
    weight = (np.arange(len(y)) % 5 > 0).astype(np.float64)
    _, whole = solved(scaled(X), y, [1e-3, 1.0, 100.0], weight)
    monkeypatch.setattr("pipeline.heads.solver.CELLS", {"cpu": 1})
    monkeypatch.setattr("pipeline.heads.solver.FEWEST_AT_ONCE", 7)
    _, parts = solved(scaled(X), y, [1e-3, 1.0, 100.0], weight)
    assert torch.allclose(parts.objective, whole.objective, rtol=1e-7)
    assert torch.allclose(parts.weights, whole.weights, rtol=1e-3, atol=1e-3) and float(parts.gap.max()) <= 1e-8


@contextmanager
def rounded_products(bits: int) -> Iterator[list[int]]:
    """Products that may be rounded are of factors with so many ``bits``; yields how many were not, and were."""
    counts = [0, 0]

    def rounded(factor: torch.Tensor) -> torch.Tensor:
        lost = 1 << (24 - bits)
        return ((factor.contiguous().view(torch.int32) + lost // 2) & -lost).view(torch.float32)

    def patched(plain: Callable[[Design, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def product(self: Design, factor: torch.Tensor, **names: bool) -> torch.Tensor:
            counts[names.get("rounded", False)] += 1
            if not names.get("rounded", False):
                return plain(self, factor)
            return plain(replace(self, fast=rounded(self.fast)), rounded(factor))

        return product

    with pytest.MonkeyPatch.context() as patch:
        for name in ("logits", "backward"):
            patch.setattr(Design, name, patched(getattr(Design, name)))
        yield counts


@pytest.mark.parametrize("bits", [11, 8], ids=["tf32", "bfloat16"])
@pytest.mark.parametrize("classes", [2, 5])
def test_rounded_products_do_most_of_the_work_and_nothing_to_the_proof(classes: int, bits: int) -> None:
    X, y = make_features(400, 60, classes)
    X, strengths = scaled(X), [1e-4, 1e-2, 1.0, 100.0]
    with rounded_products(bits) as counts:
        _, solutions = solved(X, y, strengths)
    assert float(solutions.gap.max()) <= 1e-8
    exact, rough = counts
    assert rough > 10
    _, plain = solved(X, y, strengths, tolerance=1e-10)
    assert torch.allclose(solutions.objective, plain.objective, rtol=1e-8)
    assert exact < rough, counts


@pytest.mark.parametrize("classes", [2, 5])
def test_a_cpu_with_and_without_bfloat16_gives_the_same_solutions(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = make_features(400, 60, classes)
    found = []
    for fast in (True, False):
        monkeypatch.setattr("pipeline.heads.solver.bfloat16_is_fast", lambda device, fast=fast: fast)
        design, solutions = solved(scaled(X), y, [1e-4, 1e-2, 1.0, 100.0])
        assert (design.rough is not None) == fast
        assert float(solutions.gap.max()) <= 1e-8
        found.append(solutions.objective)
    assert torch.allclose(*found, rtol=1e-8)


@pytest.mark.parametrize("shape", [(160, 30, 3), (900, 24, 2), (300, 80, 6)])
def test_a_gpu_chooses_the_same_strength_in_few_batches(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = make_features(*shape, spread=0.3)
    batches, plain = [0], path.solve

    def counted(*arguments: Any) -> Solutions:
        batches[0] += 1
        return plain(*arguments)

    monkeypatch.setattr(path, "solve", counted)
    names = [f"c{number}" for number in range(shape[2])]
    ours = make_head("logistic", HeadParams(), class_names=names).fit(X, y)
    on_cpu, batches[0] = batches[0], 0
    with rounded_products(11), monkeypatch.context() as patch:
        patch.setattr(Design, "on_gpu", True)
        theirs = make_head("logistic", HeadParams(), class_names=names).fit(X, y)
    assert theirs.selected["C"] == ours.selected["C"]
    assert theirs.selected["cv_log_loss"] == pytest.approx(ours.selected["cv_log_loss"], rel=3e-3)
    assert theirs.selected["certificate"]["gap"] <= 1e-6
    assert np.allclose(theirs.predict_proba(X), ours.predict_proba(X), atol=2e-3)
    assert batches[0] <= 8 < on_cpu


def test_a_device_with_too_little_memory_leaves_the_head_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = make_features()
    names = ["a", "b", "c"]
    expected = make_head("logistic", HeadParams(), class_names=names).fit(X, y)
    plain = LogisticHead._design

    def design(self: LogisticHead, *arguments: Any) -> Design:
        if self.device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, *arguments)

    monkeypatch.setattr(LogisticHead, "_design", design)
    head = make_head("logistic", HeadParams(), class_names=names, device="meta").fit(X, y)
    assert np.array_equal(head.predict_proba(X), expected.predict_proba(X))
    assert any("meta has too little memory" in warning for warning in head.warnings)


def test_a_batch_gives_what_each_of_its_problems_gives_alone() -> None:
    X, y = make_features(300, 40, 4)
    strengths = [1e-5, 1e-2, 1.0, 1e3]  # some take a few iterations, others many
    _, together = solved(scaled(X), y, strengths)
    alone = [solved(scaled(X), y, [strength])[1] for strength in strengths]
    assert together.iterations.max() > 3 * together.iterations.min()
    assert torch.allclose(together.objective, torch.cat([one.objective for one in alone]), rtol=1e-7)
    assert torch.allclose(together.iterations, torch.cat([one.iterations for one in alone]), atol=2, rtol=0)
