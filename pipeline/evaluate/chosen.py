"""What was chosen for a head, for people: made from what a run records as ``selected``, which older runs have too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from .text import duration, percent

SHOWN_VALUES: Final = 8
Value = Callable[[Any], str]


def plain(value: Any) -> str:
    """Any value of JSON as words: lists and mappings without brackets, – for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items()) or "–"
    return ", ".join(map(plain, value)) or "–" if isinstance(value, list) else str(value)


def _percent(value: Any) -> str:
    return percent(value) if isinstance(value, float) else plain(value)


def _points(value: Any) -> str:
    return f"{100 * value:+.1f} points" if isinstance(value, float) else plain(value)


TITLES: Final[dict[str, tuple[str, Value]]] = {
    "estimator": ("Estimator", plain),
    "params": ("Parameters", plain),
    "C": ("Strength C", plain),
    "edges": ("At the edge of what was tried", plain),
    "epochs": ("Epochs", plain),
    "epoch": ("Epoch", plain),
    "selection": ("Images that chose", plain),
    "kept_probe": ("The probe was kept", plain),
    "share": ("Way from the probe to the epoch", _percent),
    "refit": ("Trained on all of train", plain),
    "share_of_prompts": ("Share of the prompts", _percent),
    "prompts_accuracy": ("Accuracy of the prompts alone", _percent),
    "probe_beats_prompts_from": ("A probe alone is better from", plain),
    "cv_accuracy": ("Accuracy, cross-validated", _percent),
    "cv_weighted_accuracy": ("Weighted accuracy, cross-validated", _percent),
    "cv_log_loss": ("Log loss, cross-validated", plain),
    "cv_log_loss_calibrated": ("Log loss, calibrated", plain),
    "val_accuracy": ("Accuracy on images held out", _percent),
    "val_weighted_accuracy": ("Weighted accuracy on images held out", _percent),
    "val_loss": ("Log loss on images held out", plain),
    "val_log_loss": ("Log loss on images held out", plain),
    "held_out": ("Images of train held out", plain),
    "temperature": ("Temperature", plain),
    "ece_before": ("Calibration error before", _percent),
    "ece_after": ("Calibration error after", _percent),
    "probe_run": ("Probe", plain),
    "probe_accuracy": ("Accuracy of the probe", _percent),
    "difference": ("Gained over the probe", _points),
    "mcnemar_p": ("Exact McNemar p", plain),
    "only_probe_right": ("Images that only the probe has right", plain),
    "only_finetuned_right": ("Images that only this run has right", plain),
    "seconds": ("Time", lambda value: duration(value) if isinstance(value, (int, float)) else plain(value)),
}
SEARCHES: Final = ("search", "curve")  # what was tried, one row each


def chosen_facts(selected: Mapping[str, Any]) -> dict[str, str]:
    """What a reader wants to know of ``selected``, titled, in the order of `TITLES`."""
    return {title: show(selected[key]) for key, (title, show) in TITLES.items() if key in selected}


def other_facts(selected: Mapping[str, Any]) -> dict[str, str]:
    """The rest of it: how solvers did, and what this program does not know."""
    rest = {key: value for key, value in selected.items() if key not in TITLES and key not in SEARCHES}
    nested = {key: value if isinstance(value, Mapping) else {"": value} for key, value in rest.items()}
    return {f"{key} {name}".strip(): plain(value) for key, row in nested.items() for name, value in row.items()}


def tried(selected: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each value that was tried and its score, in the order of trying; [] where nothing was searched."""
    if "search" in selected:
        return [(settings(row["params"]), _percent(row.get("cv_accuracy"))) for row in selected["search"]]
    score = _percent if "val_accuracy" in selected else plain
    return [(f"C={strength:.3g}", score(value)) for strength, value in selected.get("curve", [])]


def settings(values: Mapping[str, Any]) -> str:
    """``C=10, gamma=scale``."""
    return ", ".join(f"{name}={plain(value)}" for name, value in values.items())


def choice_words(selected: Mapping[str, Any]) -> str:
    """What a line of the leaderboard says of a head: ``C=10 (the largest tried)``, ``C=0.0316``, ``12 epochs``."""
    if "search" in selected:
        rows = [row["params"] for row in selected["search"]]
        own = {name: selected["params"][name] for name in rows[0] if name in selected.get("params", {})}
        edges = selected.get("edges", {})
        return ", ".join(
            settings({name: value}) + (f" (the {edges[name]} tried)" if name in edges else "")
            for name, value in own.items()
        )
    if "C" in selected:
        return f"C={selected['C']:.3g}"
    return f"{selected['epochs']} epochs" if "epochs" in selected else ""


def tried_sentence(kind: str, selected: Mapping[str, Any]) -> str:
    """The values of a search with their scores, best first; "" where a head was not searched."""
    if "search" not in selected:
        return ""
    rows = sorted(selected["search"], key=lambda row: -row["cv_accuracy"])
    shown = [f"{settings(row['params'])} {percent(row['cv_accuracy'])}" for row in rows[:SHOWN_VALUES]]
    more = f", and {len(rows) - SHOWN_VALUES} more" if len(rows) > SHOWN_VALUES else ""
    return f"Tried for {kind}, cross-validated: {'; '.join(shown)}{more}"
