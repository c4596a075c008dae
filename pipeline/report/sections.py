"""The sections of the page, in the order of `SECTIONS`. Every name from outside goes through `page.esc`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..artifacts import ClassScores, ConfusedPair, RunMetrics, RunModel
from ..evaluate.advice import curve_sentence
from ..evaluate.chosen import chosen_facts, other_facts, plain, tried
from ..evaluate.coverage import coverage_sentence
from ..evaluate.metrics import METRICS
from ..evaluate.protocol import leak_sentence, uncorrected_sentence
from ..evaluate.text import duration, images, percent
from ..insight.gallery import Gallery
from . import page, pictures
from .page import esc
from .plots import confusion_image, coverage_plot, curve_plot, history_plots, reliability_plot

MAX_TABLE = 30
_FEW, _DENSE = 5, 12
_SHOWN_PAIRS = 12
_SHOWN_CLASSES = 5000


@dataclass(frozen=True)
class Content:
    """What a report is made from: a run's name, its ``model.json``, ``metrics.json``, ``params.yaml`` and pictures."""

    name: str
    model: RunModel
    metrics: RunMetrics
    params_text: str = ""
    gallery: Gallery = field(default_factory=Gallery)


def render_report(content: Content) -> str:
    """The report of a run as HTML without external resources and without scripts."""
    sections = (page.section(title, section(content)) for title, section in SECTIONS.items())
    head = (_header(content), _uncorrected(content.metrics), _scores(content.metrics), _notes(content.metrics))
    return page.page(content.name, [*head, *sections])


# -- the head of the page -------------------------------------------------------------------------------------------


def _header(content: Content) -> str:
    model, metrics = content.model, content.metrics
    line = (
        f"{model.backbone.name} ({model.backbone.weights}), {model.head.kind} head, {len(metrics.class_names)} classes"
    )
    made = model.created.strftime("%Y-%m-%d %H:%M UTC")
    subtitle = f"{line}. Scored on {images(metrics.n)} of {metrics.split}. Made {made} by {model.verb}."
    return f"<h1>{esc(content.name)}</h1>{page.paragraph(subtitle, soft=True)}"


def _uncorrected(metrics: RunMetrics) -> str:
    before = metrics.uncorrected
    return "" if before is None else page.note(page.paragraph(uncorrected_sentence(before, metrics.split)), warn=True)


def _scores(metrics: RunMetrics) -> str:
    shown = [name for name in METRICS if name in metrics.metrics]
    kind = "scores three" if len(shown) > 5 else "scores"
    return f'<div class="{kind}">{"".join(_card(name, metrics) for name in shown)}</div>'


def _card(name: str, metrics: RunMetrics) -> str:
    metric, bounds = METRICS[name], metrics.metrics.get(f"{name}_ci95")
    lines = [f"<b>{page.prose(metric.show(metrics.metrics[name]))}</b>"]
    if isinstance(bounds, list):
        lines.append(f"<span>95&nbsp;%: {metric.show_interval(bounds)}{'&nbsp;%' if metric.is_share else ''}</span>")
    elif (reason := metrics.reasons.get(f"{name}_ci95") or metrics.reasons.get(name)) is not None:
        lines.append(f"<span>{page.prose(reason)}</span>")
    if name == "accuracy":
        bar = page.interval_bar(metrics.metrics[name], bounds, mark=metrics.baseline_accuracy)
        lines += [_baseline(metrics), bar]
    kind = "card main" if name == "accuracy" else "card"
    return f'<div class="{kind}"><span>{esc(metric.title[0].upper() + metric.title[1:])}</span>{"".join(lines)}</div>'


def _baseline(metrics: RunMetrics) -> str:
    if metrics.baseline_accuracy is None:
        return f"<span>no baseline: {esc(metrics.reasons.get('baseline_accuracy', 'not known'))}</span>"
    named = f" (always {esc(metrics.baseline_class)})" if metrics.baseline_class is not None else ""
    return f"<span>baseline{named}: {page.prose(percent(metrics.baseline_accuracy))}</span>"


def _notes(metrics: RunMetrics) -> str:
    notes = [page.note(f"<p><strong>Protocol.</strong> {page.prose(metrics.protocol)}</p>")]
    leak = "" if metrics.leak is None else leak_sentence(metrics.leak, metrics.split)
    if leak:
        notes.append(page.note(page.paragraph(leak), warn=True))
    warnings = [warning for warning in metrics.warnings if warning != leak]
    if warnings:
        notes.append(page.note(page.bullets(warnings), warn=True))
    return "".join(notes)


# -- heads ----------------------------------------------------------------------------------------------------------


def leaderboard(content: Content) -> str:
    """One row a head that was tried."""
    rows = content.metrics.leaderboard
    if not rows:
        return ""
    named = [{"head": row.get("kind"), "": _role(row)} | _scores_of(row) for row in rows]
    headings = dict.fromkeys(key for row in named for key in row)
    shown = [key for key in headings if any(row.get(key) not in (None, "") for row in named)]
    chosen = frozenset(place for place, row in enumerate(rows) if row.get("selected") is True)
    cells = [[page.prose(_score_text(key, row.get(key))) for key in shown] for row in named]
    caption = "Scores that chose a head or its settings are a little too good; the reported ones chose nothing."
    intro = page.paragraph(f"The chosen head is shaded. {caption}", soft=True) if chosen else ""
    titles = [LEADERBOARD.get(key, key.replace("_", " ")) for key in shown]
    minor = frozenset(place for place, key in enumerate(shown) if key.endswith(("log_loss", "seconds")))
    return intro + page.table(titles, cells, chosen=chosen, minor=minor)


LEADERBOARD: Final = {
    "cv_accuracy": "cross-validated",
    "val_accuracy": "val",
    "held_out_accuracy": "held out of train",
    "cv_weighted_accuracy": "weighted, cross-validated",
    "val_weighted_accuracy": "weighted, val",
    "cv_log_loss": "log loss, cross-validated",
    "val_log_loss": "log loss, val",
    "held_out_log_loss": "log loss, held out",
    "seconds": "time",
}


def _role(row: Mapping[str, Any]) -> str:
    return "chosen" if row.get("selected") is True else "baseline" if row.get("baseline") is True else ""


def _scores_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("kind", "selected", "chosen", "baseline")}


def _score_text(key: str, value: Any) -> str:
    if isinstance(value, float) and key.endswith("accuracy"):
        return percent(value)
    return duration(value) if key == "seconds" and isinstance(value, float) else plain(value)


# -- classes --------------------------------------------------------------------------------------------------------


def confusion_matrix(content: Content) -> str:
    """A table up to `MAX_TABLE` classes, a picture above, and the most confused pairs."""
    metrics = content.metrics
    names, matrix = metrics.class_names, metrics.confusion
    pairs = _pairs(metrics.confused, metrics.per_class) if len(names) > 2 else ""
    if matrix is None:
        return (
            page.paragraph(f"There is no matrix: {metrics.reasons.get('confusion', 'not known')}.", soft=True) + pairs
        )
    if len(names) <= MAX_TABLE:
        return _matrix_table(matrix, names) + pairs
    caption = "Rows are true classes, columns predicted ones; the class numbers are those of the per-class table."
    return page.figure(confusion_image(matrix), caption) + pairs


def _matrix_table(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    upright = len(names) > _FEW or max(map(len, names)) > 14
    inner = '<span class="up">{}</span>' if upright else "{}"
    head = "".join(f'<th title="{esc(name)}">{inner.format(esc(name))}</th>' for name in names)
    body = "".join(_matrix_row(row, index, names) for index, row in enumerate(matrix))
    kind = "confusion few" if len(names) <= _FEW else "confusion dense" if len(names) > _DENSE else "confusion"
    caption = page.paragraph("Rows are true classes, columns predicted ones; shades are shares of the row.", soft=True)
    return (
        f'{caption}<div class="scroll"><table class="{kind}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _matrix_row(row: Sequence[int], index: int, names: Sequence[str]) -> str:
    total = sum(row)
    cells = "".join(_cell(count, total, index, place, names) for place, count in enumerate(row))
    return f'<tr><th title="{esc(names[index])}" scope="row">{esc(names[index])}</th>{cells}</tr>'


def _cell(count: int, total: int, index: int, place: int, names: Sequence[str]) -> str:
    if not count:
        return '<td class="zero">0</td>'
    share = count / total
    color = "37, 99, 168" if index == place else "201, 84, 28"
    # The square root keeps a rare confusion visible; white text where the shade is dark.
    shade = 0.08 + 0.82 * share**0.5
    ink = "#fff" if shade > 0.6 else "var(--ink)"
    title = f"{names[index]} predicted as {names[place]}: {count:,} of {total:,} ({share:.1%})"
    style = f"background:rgba({color}, {shade:.2f});color:{ink}"
    return f'<td style="{style}" title="{esc(title)}">{count}</td>'


def _pairs(confused: Sequence[ConfusedPair], per_class: Sequence[ClassScores]) -> str:
    if not confused:
        return ""
    sizes = {row.label: row.n for row in per_class}
    rows = [
        (esc(pair.label), esc(pair.predicted), f"{pair.n:,}", f"{100 * pair.n / sizes[pair.label]:.1f} %")
        for pair in confused[:_SHOWN_PAIRS]
        if sizes.get(pair.label)
    ]
    headings = ("true class", "predicted as", "images", "of the class")
    return "<br>" + page.table(headings, rows, names=2, caption="Most confused pairs")


def classes(content: Content) -> str:
    """One row a class; of very many the worst."""
    rows = list(enumerate(content.metrics.per_class))
    headings, caption = ["class", "images", "predicted", "precision", "recall", "95 %", "", "F1"], ""
    numbered = len(rows) > MAX_TABLE
    if numbered:
        rows.sort(key=lambda row: (row[1].recall is None, row[1].recall or 0.0))
        headings.insert(1, "number")
        caption = "Worst recall first; the numbers are those of the matrix."
    if len(rows) > _SHOWN_CLASSES:
        caption += f" Only {_SHOWN_CLASSES:,} of {len(rows):,} classes; metrics.json has all."
    cells = [_class_row(row, [str(number)] if numbered else []) for number, row in rows[:_SHOWN_CLASSES]]
    minor = frozenset(map(headings.index, ("predicted", "", "F1")))
    return page.table(headings, cells, caption=caption, minor=minor)


def _class_row(row: ClassScores, number: list[str]) -> list[str]:
    name = f'<span title="{esc(row.label)}">{esc(row.label)}</span>'
    bar = page.interval_bar(row.recall, row.recall_ci95, width="120")
    recall = (percent(row.recall), METRICS["accuracy"].show_interval(row.recall_ci95), bar)
    return [name, *number, f"{row.n:,}", f"{row.predicted:,}", percent(row.precision), *recall, percent(row.f1)]


# -- plots ----------------------------------------------------------------------------------------------------------


def training(content: Content) -> str:
    """Losses and accuracies by epoch."""
    pictures = "".join(f"<figure>{picture}</figure>" for picture in history_plots(content.metrics.history))
    return f'<div class="plots">{pictures}</div>' if pictures else ""


def learning_curve(content: Content) -> str:
    """Accuracy by the number of training images."""
    if len(content.metrics.curve) < 2:
        return ""
    caption = (
        "Accuracy against the number of training images: the mean of three draws of so many, shaded from the lowest to"
        " the highest (all of train is one draw)."
    )
    verdict = curve_sentence(content.metrics.curve)
    said = page.paragraph(verdict) if verdict else ""
    return said + page.figure(curve_plot(content.metrics.curve), caption)


def calibration(content: Content) -> str:
    """Accuracy by confidence."""
    if not content.metrics.reliability:
        return ""
    bins = content.metrics.reliability
    plain = sum(row.n * abs(row.accuracy - row.confidence) for row in bins) / sum(row.n for row in bins)
    caption = (
        "Bars below the dashed line: the classifier is surer than it is right. The calibration error above is free of"
        f" what chance adds in so few images; computed plainly from these bars it is {percent(plain)}."
    )
    return page.figure(reliability_plot(bins), caption)


def coverage(content: Content) -> str:
    """What share of the images can be decided automatically, at what accuracy."""
    points = content.metrics.coverage
    if len(points) < 2:
        return ""
    return page.paragraph(coverage_sentence(points, content.metrics.n)) + page.figure(
        coverage_plot(points), "Accuracy of the surest images, against their share, with its 95 % interval."
    )


# -- pictures -------------------------------------------------------------------------------------------------------


def mistakes(content: Content) -> str:
    """The surest mistakes, each with the training images nearest to it."""
    return pictures.mistakes(content.gallery)


def most_confused(content: Content) -> str:
    """Examples of the pairs that are confused most."""
    return pictures.confusions(content.gallery)


def feature_map(content: Content) -> str:
    """All images as points."""
    return pictures.feature_map(content.gallery.map)


# -- how it was made ------------------------------------------------------------------------------------------------


def making(content: Content) -> str:
    """The data, the backbone, the versions and the params."""
    model, data, parameters = content.model, content.model.data, content.model.parameters
    counts = ", ".join(f"{split} {count:,}" for split, count in data.images.items())
    values: dict[str, object] = {
        "Data": f"{data.root} ({counts}), digest {data.digest}",
        "Backbone": f"{model.backbone.name}, weights {model.backbone.weights}, {model.feature_dim:,} features",
        "Weights digest": model.backbone.digest,
        "Layer, pooling": f"{model.backbone.layer or 'default'}, {model.backbone.pooling}",
        "Transform": ", ".join(f"{key} {plain(value)}" for key, value in model.transform.items()),
        "Precision": f"{model.precision}, features stored as {model.storage_dtype}",
        "Feature key": model.feature_key or "–",
        "Parameters": _parameters(parameters.trainable, parameters.total),
        "Time": duration(model.seconds),
        "Started from": model.parent or "–",
        "Versions": ", ".join(f"{package} {version}" for package, version in model.versions.items()),
    }
    lines = "\n".join(esc(line) for line in content.params_text.splitlines())
    params = page.folded("params.yaml", f"<pre>{lines}</pre>") if content.params_text else ""
    return page.facts(values) + params


def chosen(content: Content) -> str:
    """What was chosen, the values that were tried with their scores, and how the solver did."""
    selected = content.metrics.selected
    values, others = tried(selected), other_facts(selected)
    scored = [(esc(value), page.prose(score)) for value, score in values]
    score = "log loss" if "curve" in selected and "val_accuracy" not in selected else "accuracy"
    rows = page.folded(f"The {len(values)} values that were tried", page.table(("value", score), scored))
    rest = page.folded("How the fit went", page.facts(others)) if others else ""
    return page.facts(chosen_facts(selected)) + (rows if values else "") + rest


def _parameters(trainable: int | None, total: int | None) -> str:
    if trainable is None or total is None:
        return "not countable for this head"
    return f"Trainable: {trainable:,} / {total:,} ({100 * trainable / max(total, 1):.1f} %)"


Section = Callable[[Content], str]
SECTIONS: Final[dict[str, Section]] = {
    "Heads": leaderboard,
    "Mistakes": mistakes,
    "Confusion matrix": confusion_matrix,
    "Most confused": most_confused,
    "Classes": classes,
    "Map": feature_map,
    "Training": training,
    "Learning curve": learning_curve,
    "Calibration": calibration,
    "Coverage": coverage,
    "What was chosen": chosen,
    "How it was made": making,
}
