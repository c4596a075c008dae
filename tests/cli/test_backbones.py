"""The list of backbones: some by name or limits, the card of one, never a wall."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from pipeline.cli import main
from pipeline.cli import verbs as verbs_module

Call = Callable[..., str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["backbones", *arguments])
        out = capsys.readouterr()
        assert stop.value.code == code
        return out.out if code == 0 else out.err

    return run


def test_part_of_a_name_or_a_pattern_lists_some(call: Call) -> None:
    out = call("squeezenet", "resnet1?")
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == ["squeezenet1_1", "resnet18", "squeezenet1_0"]
    assert re.search(r"resnet18 +69\.8 % +1\.81 +45 MB +11\.2 M +512 +224", out)
    assert "No backbone fits." in call("resnet999")


def test_unasked_it_shows_what_helps_to_choose(call: Call) -> None:
    """One screen: each more accurate than all that compute less, by published figures, the lightest first."""
    lines = call().splitlines()
    rows = [line.split() for line in lines if " MB " in line]
    assert 10 < len(rows) < 24 and lines[1].split()[0] == "starter" and "--all" in lines[len(rows) + 3]
    accuracies, costs = [float(row[1]) for row in rows], [float(row[3]) for row in rows]
    assert accuracies == sorted(accuracies) and costs == sorted(costs)
    assert {"efficientnet_b0", "vit_h_14"} <= {row[0] for row in rows}
    assert "CC-BY-NC-4.0" in lines[len(rows) + 1]
    assert max(map(len, lines)) <= 92


def test_what_is_published_is_in_the_json_and_on_the_card(call: Call) -> None:
    (row,) = json.loads(call("resnet50", "--json"))["backbones"]
    assert (row["accuracy"], row["gflops"], row["download_mb"]) == pytest.approx((0.80858, 4.089, 97.79), rel=1e-3)
    (starter,) = json.loads(call("starter", "--json"))["backbones"]
    assert starter["accuracy"] is starter["gflops"] is None
    assert "ImageNet 80.9 %, GFLOPs 4.09, download 98 MB" in call("resnet50")


def test_limits_narrow_the_list(call: Call) -> None:
    summary = json.loads(call("net", "--parameters", "1.5M", "--width", "1,000", "--json"))
    rows = summary["backbones"]
    names = {row["name"] for row in rows}
    assert "squeezenet1_1" in names and "mobilenet_v3_small" not in names
    assert rows and all(row["parameters"] <= 1_500_000 and row["feature_dim"] <= 1000 for row in rows)
    starter = json.loads(call("s*r", "--licence", "mit", "--json"))["backbones"]
    assert [row["name"] for row in starter] == ["starter"]
    assert "no number" in call("net", "--parameters", "many", code=2)


def test_one_is_shown_as_a_card(call: Call) -> None:
    out = call("vit_b_16")
    assert "features    768 (class token)" in out and "crop 224" in out
    assert "average over positions" in call("starter") and "MIT" in call("starter")
    assert "2048" in call("resnet50")  # not all those whose names go on


def test_more_than_a_screenful_is_said_to_be_more(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs_module, "SHOWN", 3)
    out = call("resnet")
    assert len(out.splitlines()) == 1 + 3 + 2 and "--all" in out
    assert "--all" not in call("resnet", "--all") and json.loads(call("resnet", "--json"))["more"]


def test_zoos_are_counted(call: Call) -> None:
    zoos = json.loads(call("absent-name", "--json"))["zoos"]
    assert set(zoos) == {"torchvision", "timm", "openclip", "own"} and zoos["torchvision"] > 70
