"""What `predict` and `classify` print."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from pipeline.cli.options import Reporter
from pipeline.cli.tables import print_predictions
from pipeline.cli.verbs import _finish_predictions
from pipeline.stages.run import Prediction

GOOD = Prediction("/far/a.jpg", "ant", 0.123456789, (("ant", 0.123456789), ("bee", 0.1)))
BAD = Prediction("/far/b.jpg", None, None, (), "not an image")


def test_the_table_rounds_and_leaves_out_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    print_predictions([GOOD, BAD], 2)
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["image", "class", "probability", "class", "probability"]
    assert row.split() == ["/far/a.jpg", "ant", "12.3", "%", "bee", "10.0", "%"]


def test_errors_are_counted_apart_and_none_at_all_is_a_failure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _finish_predictions([GOOD, BAD], 1, None, Reporter(), run=None)
    captured = capsys.readouterr()
    assert captured.out.startswith("path,label,probability,error\n") and "0.123456789" in captured.out
    assert captured.err.count("not an image") == 1 and "1 image classified, 1 not" in captured.err
    with pytest.raises(click.exceptions.Exit) as stopped:
        _finish_predictions([BAD], 1, tmp_path / "out.csv", Reporter(), run=None)
    assert stopped.value.exit_code == 1 and (tmp_path / "out.csv").exists()
