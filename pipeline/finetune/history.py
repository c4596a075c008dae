"""What each epoch was worth: rows, history.csv, a plot, TensorBoard."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import FinetuneError

Criterion = Literal["log_loss", "accuracy"]

# Log likelihood that a choice has to gain: one for each number chosen, the epoch and the share (Akaike 1974).
NATS = 2.0


@dataclass(frozen=True)
class SelectionScore:
    """Mean cross-entropy and accuracy on the selection set.

    Attributes:
        cooled: the cross-entropy at the temperature that the classifier would be given; None where it is given none.
    """

    loss: float
    accuracy: float
    cooled: float | None = None

    def key(self, by: Criterion) -> tuple[float, float]:
        """What orders scores, the best highest: by one, at equality by the other. A loss that is NaN is the worst."""
        loss = self.loss if self.cooled is None else self.cooled
        if not math.isfinite(loss):
            return (-math.inf, 0.0)
        return (self.accuracy, -loss) if by == "accuracy" else (-loss, self.accuracy)

    def beats(self, other: SelectionScore, by: Criterion) -> bool:
        """Whether this is strictly the better one."""
        return self.key(by) > other.key(by)

    def gains_on(self, start: SelectionScore, by: Criterion, *, images: int) -> bool:
        """Whether ``images`` show that leaving the ``start`` pays: by more than `NATS`, where loss counts."""
        if by == "accuracy":
            return self.beats(start, by)
        return images * (self.key(by)[0] - start.key(by)[0]) > NATS


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch. Epoch 0 is the start, before any step; its training columns are None.

    Attributes:
        selection_loss, selection_accuracy: NaN where nothing selects; ``selection_cooled`` as in `SelectionScore`.
        train_loss, train_accuracy: running means over the augmented images of the epoch, as they were trained on.
        trainable: parameters that trained in this epoch.
        best: better than every earlier epoch, epoch 0 included.
    """

    epoch: int
    train_loss: float | None = None
    train_accuracy: float | None = None
    selection_loss: float
    selection_accuracy: float
    selection_cooled: float | None = None
    seconds: float
    images_per_second: float | None = None
    head_lr: float | None = None
    backbone_lr: float | None = None
    trainable: int
    best: bool

    @property
    def score(self) -> SelectionScore:
        """The score on the selection set."""
        return SelectionScore(self.selection_loss, self.selection_accuracy, self.selection_cooled)

    def as_text(self) -> str:
        """One line for the terminal."""
        train = "" if self.train_loss is None else f"train loss {self.train_loss:.4f} acc {self.train_accuracy:.4f}  "
        rate = "" if self.images_per_second is None else f"  {self.images_per_second:.1f} images/s"
        best = "  best" if self.best else ""
        chosen = f"selection loss {self.selection_loss:.4f} acc {self.selection_accuracy:.4f}  "
        if math.isnan(self.selection_accuracy):
            chosen = ""
        return f"epoch {self.epoch}  {train}{chosen}{self.seconds:.1f} s{rate}{best}"


def history_csv(rows: Sequence[EpochRow]) -> str:
    """history.csv, one line an epoch; absent values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def history_plot(rows: Sequence[EpochRow]) -> bytes:
    """Loss and accuracy against the epoch, train and selection, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "selection"):
            points = [(row.epoch, getattr(row, f"{split}_{name}")) for row in rows]
            known = [point for point in points if point[1] is not None]
            axes.plot([x for x, _ in known], [y for _, y in known], marker="o", markersize=3, label=split)
        best = [row.epoch for row in rows if row.best]
        if best:
            axes.axvline(best[-1], color="0.7", linewidth=1, zorder=0)
        axes.set(xlabel="epoch", ylabel=name)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


class TensorboardLog:
    """Writes each row's numbers as scalars below ``folder``.

    Raises:
        FinetuneError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise FinetuneError(
                "TensorBoard is asked for but not installed.",
                where="finetune.tensorboard",
                why=str(error),
                remedy="pip install 'image-transfer-pipeline[tensorboard]', or set finetune.tensorboard=false",
            ) from error
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, row: EpochRow) -> None:
        """Log one epoch."""
        for name, value in asdict(row).items():
            if name not in ("epoch", "best") and value is not None:
                self._writer.add_scalar(name, value, row.epoch)
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()
