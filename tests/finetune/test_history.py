"""Rows of epochs: ordered, as a table, as a picture."""

from __future__ import annotations

import csv
import io

from pipeline.finetune.history import EpochRow, SelectionScore, history_csv, history_plot


def test_scores_are_ordered_by_accuracy_then_loss() -> None:
    assert SelectionScore(9.0, 0.8).beats(SelectionScore(0.1, 0.7), "accuracy")
    assert SelectionScore(0.1, 0.7).beats(SelectionScore(9.0, 0.8), "log_loss")
    assert SelectionScore(9.0, 0.8, 0.1).beats(SelectionScore(0.2, 0.8, 0.2), "log_loss")
    assert SelectionScore(0.1, 0.8).beats(SelectionScore(0.2, 0.8), "accuracy")
    assert not SelectionScore(0.1, 0.8).beats(SelectionScore(0.1, 0.8), "accuracy")
    assert not SelectionScore(float("nan"), 0.9).beats(SelectionScore(0.2, 0.5), "accuracy")


def test_history_as_table_and_picture() -> None:
    start = EpochRow(epoch=0, selection_loss=1.0, selection_accuracy=0.5, seconds=0.1, trainable=10, best=True)
    row = EpochRow(
        epoch=1,
        train_loss=0.9,
        train_accuracy=0.6,
        selection_loss=0.8,
        selection_accuracy=0.7,
        seconds=2.0,
        images_per_second=100.0,
        head_lr=1e-3,
        backbone_lr=1e-5,
        trainable=10,
        best=True,
    )
    table = list(csv.DictReader(io.StringIO(history_csv([start, row]))))
    assert [line["epoch"] for line in table] == ["0", "1"] and table[0]["train_loss"] == ""
    assert float(table[1]["backbone_lr"]) == 1e-5
    assert b"<svg" in history_plot([start, row])
    assert "epoch 1" in row.as_text() and "100.0 images/s" in row.as_text()
