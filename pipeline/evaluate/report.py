"""``report.html``: one page that stands alone, made from what ``metrics.json`` and ``model.json`` hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..artifacts.schema import ClassScores, RunMetrics, RunModel
from . import page
from .confusion import MAX_TABLE, confusion_section
from .page import esc
from .plots import curve_plot, history_plots, reliability_plot
from .protocol import leak_sentence
from .text import SHARES, TITLES, duration, interval, percent, printable, score

_SHOWN_CLASSES = 5000


def render_report(model: RunModel, metrics: RunMetrics, *, name: str, params_text: str = "") -> str:
    """The report of a run as HTML without external resources and without scripts.

    Args:
        model, metrics: the contents of the run's ``model.json`` and ``metrics.json``.
        name: of the run.
        params_text: its ``params.yaml``.
    """
    parts = [
        _header(name, model, metrics),
        _scores(metrics),
        _notes(metrics),
        page.section("Heads", _leaderboard(metrics.leaderboard)),
        page.section("Confusion matrix", confusion_section(metrics)),
        page.section("Classes", _per_class(metrics)),
        page.section("Training", _plots(history_plots(metrics.history))),
        page.section("Learning curve", _learning_curve(metrics)),
        page.section("Calibration", _calibration(metrics)),
        page.section("How it was made", _made(model, metrics, params_text)),
    ]
    return page.page(name, parts)


def _header(name: str, model: RunModel, metrics: RunMetrics) -> str:
    images = "1 image" if metrics.n == 1 else f"{metrics.n:,} images"
    line = (
        f"{model.backbone.name} ({model.backbone.weights}), {model.head.kind} head, {len(metrics.class_names)} classes"
    )
    made = model.created.strftime("%Y-%m-%d %H:%M UTC")
    subtitle = f"{line}. Scored on {images} of {metrics.split}. Made {made} by {model.verb}."
    return f"<h1>{esc(name)}</h1>{page.paragraph(subtitle, soft=True)}"


def _scores(metrics: RunMetrics) -> str:
    shown = [key for key in TITLES if key in metrics.metrics]
    kind = "scores three" if len(shown) > 5 else "scores"
    return f'<div class="{kind}">{"".join(_card(key, metrics) for key in shown)}</div>'


def _card(key: str, metrics: RunMetrics) -> str:
    value, bounds = metrics.metrics[key], metrics.metrics.get(f"{key}_ci95")
    lines = [f"<b>{score(key, value)}</b>"]
    if isinstance(bounds, list):
        unit = "&nbsp;%" if key in SHARES else ""
        lines.append(f"<span>95&nbsp;%: {interval(key, bounds)}{unit}</span>")
    elif (reason := metrics.reasons.get(f"{key}_ci95") or metrics.reasons.get(key)) is not None:
        lines.append(f"<span>{esc(reason)}</span>")
    if key == "accuracy":
        lines += [_baseline(metrics), _accuracy_bar(metrics)]
    kind = "card main" if key == "accuracy" else "card"
    title = TITLES[key][0].upper() + TITLES[key][1:]
    return f'<div class="{kind}"><span>{title}</span>{"".join(lines)}</div>'


def _baseline(metrics: RunMetrics) -> str:
    if metrics.baseline_accuracy is None:
        return f"<span>no baseline: {esc(metrics.reasons.get('baseline_accuracy', 'not known'))}</span>"
    named = f" (always {esc(metrics.baseline_class)})" if metrics.baseline_class is not None else ""
    return f"<span>baseline{named}: {percent(metrics.baseline_accuracy)}</span>"


def _accuracy_bar(metrics: RunMetrics) -> str:
    """The accuracy on its interval, from 0 to 100 %, with a mark at the baseline."""
    value, bounds = metrics.metrics["accuracy"], metrics.metrics.get("accuracy_ci95")
    if not isinstance(value, float) or not isinstance(bounds, list):
        return ""
    baseline = metrics.baseline_accuracy
    mark = "" if baseline is None else f'<path d="M{100 * baseline:.1f} 2V12" stroke="#66717f" stroke-width=".7"/>'
    return (
        '<svg viewBox="-2 0 104 14" width="100%" aria-hidden="true">'
        '<path d="M0 7H100" stroke="#d3dfec" stroke-width="1.6"/>'
        f'<path d="M{100 * bounds[0]:.1f} 7H{100 * bounds[1]:.1f}" stroke="#8fb6e0" stroke-width="3.4"/>{mark}'
        f'<circle cx="{100 * value:.1f}" cy="7" r="2.1" fill="#2563a8"/></svg>'
    )


def _notes(metrics: RunMetrics) -> str:
    notes = [page.note(f"<p><strong>Protocol.</strong> {page.prose(metrics.protocol)}</p>")]
    leak = "" if metrics.leak is None else leak_sentence(metrics.leak, metrics.split)
    if leak:
        notes.append(page.note(page.paragraph(leak), warn=True))
    warnings = [warning for warning in metrics.warnings if warning != leak]
    if warnings:
        notes.append(page.note(page.bullets(warnings), warn=True))
    return "".join(notes)


def _leaderboard(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    flat = [_flat(row) for row in rows]
    headings = [key for key in dict.fromkeys(key for row in flat for key in row) if key != "selected"]
    chosen = frozenset(place for place, row in enumerate(flat) if row.get("selected") is True)
    cells = [[esc(_value(row.get(key))) for key in headings] for row in flat]
    titles = [heading.replace("_", " ") for heading in headings]
    caption = "The chosen head is shaded." if chosen else ""
    return page.table(titles, cells, caption=caption, chosen=chosen)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections become ``section key`` columns."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key} {inner}": part for inner, part in value.items()}
        else:
            flat[key] = value
    return flat


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, (int, float)) for part in value):
        return ", ".join(_value(part) for part in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _per_class(metrics: RunMetrics) -> str:
    order = list(range(len(metrics.per_class)))
    if len(order) > MAX_TABLE:
        order.sort(key=lambda place: (metrics.per_class[place].recall is None, metrics.per_class[place].recall or 0.0))
    numbered = len(order) > MAX_TABLE
    caption = "Worst recall first; the numbers are those of the matrix." if numbered else ""
    if len(order) > _SHOWN_CLASSES:
        caption += f" Only {_SHOWN_CLASSES:,} of {len(order):,} classes; metrics.json has all."
    headings = ["class", "images", "predicted", "precision", "recall", "95 %", "", "F1"]
    cells = [_class_row(metrics.per_class[place]) for place in order[:_SHOWN_CLASSES]]
    if numbered:
        headings.insert(1, "number")
        cells = [[row[0], str(place), *row[1:]] for place, row in zip(order, cells, strict=False)]
    return page.table(headings, cells, caption=caption)


def _class_row(row: ClassScores) -> list[str]:
    name = f'<span title="{esc(row.label)}">{esc(row.label)}</span>'
    recall = (percent(row.recall), interval("accuracy", row.recall_ci95), _bar(row))
    return [name, f"{row.n:,}", f"{row.predicted:,}", percent(row.precision), *recall, percent(row.f1)]


def _bar(row: ClassScores) -> str:
    """The recall as a dot on its interval, from 0 to 100 %."""
    if row.recall is None or row.recall_ci95 is None:
        return ""
    low, high = (2 + 116 * bound for bound in row.recall_ci95)
    return (
        '<svg width="120" height="12" aria-hidden="true"><path d="M2 6H118" stroke="#e3e7ec" stroke-width="2"/>'
        f'<path d="M{low:.1f} 6H{high:.1f}" stroke="#9dbfe3" stroke-width="4"/>'
        f'<circle cx="{2 + 116 * row.recall:.1f}" cy="6" r="3.2" fill="#2563a8"/></svg>'
    )


def _plots(pictures: Sequence[str]) -> str:
    if not pictures:
        return ""
    return f'<div class="plots">{"".join(f"<figure>{picture}</figure>" for picture in pictures)}</div>'


def _learning_curve(metrics: RunMetrics) -> str:
    if len(metrics.curve) < 2:
        return ""
    caption = "Accuracy against the number of training images, with a 95 % band; where it still climbs, labels help."
    return page.figure(curve_plot(metrics.curve), caption)


def _calibration(metrics: RunMetrics) -> str:
    if not metrics.reliability:
        return ""
    caption = "Bars below the dashed line: the classifier is surer than it is right."
    return page.figure(reliability_plot(metrics.reliability), caption)


def _made(model: RunModel, metrics: RunMetrics, params_text: str) -> str:
    data, parameters = model.data, model.parameters
    counts = ", ".join(f"{split} {count:,}" for split, count in data.images.items())
    values: dict[str, object] = {
        "Data": f"{data.root} ({counts}), digest {data.digest}",
        "Backbone": f"{model.backbone.name}, weights {model.backbone.weights}, {model.feature_dim:,} features",
        "Weights digest": model.backbone.digest,
        "Layer, pooling": f"{model.backbone.layer or 'default'}, {model.backbone.pooling}",
        "Transform": ", ".join(f"{key} {_value(value)}" for key, value in model.transform.items()),
        "Precision": f"{model.precision}, features stored as {model.storage_dtype}",
        "Feature key": model.feature_key or "–",
        "Parameters": _parameters(parameters.trainable, parameters.total),
        "Time": duration(model.seconds),
        "Started from": model.parent or "–",
        "Versions": ", ".join(f"{package} {version}" for package, version in model.versions.items()),
    }
    chosen = {key: _value(value) for key, value in metrics.selected.items()}
    selected = page.paragraph("Selected", soft=True) + page.facts(chosen) + "<br>" if chosen else ""
    text = "\n".join(printable(line) for line in params_text.splitlines())
    params = page.folded("params.yaml", f"<pre>{_escaped(text)}</pre>") if params_text else ""
    return selected + page.facts(values) + params


def _parameters(trainable: int | None, total: int | None) -> str:
    if trainable is None or total is None:
        return "not countable for this head"
    return f"Trainable: {trainable:,} / {total:,} ({100 * trainable / max(total, 1):.1f} %)"


def _escaped(text: str) -> str:
    """Several lines, each already printable."""
    return "\n".join(esc(line) for line in text.split("\n"))
