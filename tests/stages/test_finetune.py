"""Stage three end to end on a tiny folder: from the probe, compared with it, resumed, extracted with again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import load_run
from pipeline.errors import FinetuneError, Interrupted
from pipeline.params import Params, dump_params, load_params
from pipeline.stages import finetune as stage
from pipeline.stages.extract import extract
from pipeline.stages.finetune import find_lr, finetune
from pipeline.stages.train_head import train_head

from .conftest import FAST

PROJECT = Path(__file__).resolve().parents[2]
Extract = Callable[..., dict[str, Any]]
MakeParams = Callable[..., Params]
QUICK = (
    "head.logistic.strengths=5",
    "head.folds=2",
    "finetune.epochs=2",
    "finetune.batch_size=8",
    "finetune.selection_fraction=0.25",
    "finetune.device=cpu",
)


def silent(_line: str) -> None:
    """Say nothing."""


@pytest.fixture
def probe(run_extract: Extract, make_params: MakeParams) -> Path:
    """A stage-two run to start from."""
    run_extract()
    return Path(train_head(make_params(*QUICK), silent)["run"])


def test_the_tuned_run_predicts_what_it_reports_and_can_be_extracted_with(
    probe: Path, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    summary = finetune(make_params(*QUICK, "finetune.backbone_lr=1e-3"), lines.append)
    assert any(line.startswith("Epoch 0 repeats the probe") for line in lines)
    assert any("McNemar" in line for line in lines)
    assert summary["selected"]["probe_run"] == probe.name
    run = load_run(summary["run"], [f"cache.dir={tmp_path / 'live'}"])
    reported = (Path(summary["run"]) / "predictions.csv").read_text()
    for prediction in run.predict([root / "val"]):
        assert prediction.probability is not None
        assert f"{Path(prediction.path).name}," in reported and repr(prediction.probability) in reported
    weights = f"backbone.weights={Path(summary['run']) / 'backbone.safetensors'}"
    again = extract(make_params(weights), silent, quiet=True)
    assert again["key"] == run.model.feature_key
    assert again["forwarded"] == 0


def test_without_a_better_epoch_the_probe_is_kept(probe: Path, make_params: MakeParams) -> None:
    lines: list[str] = []
    ruin = ("finetune.head_lr=100", "finetune.backbone_lr=1", "finetune.optimizer=sgd", "finetune.clip_norm=0")
    summary = finetune(make_params(*QUICK, *ruin), lines.append)
    kept = load_run(probe).head
    assert summary["selected"]["epoch"] == 0
    assert summary["selected"]["difference"] == 0
    assert any("keeps what training started from" in line for line in lines)
    assert (load_run(summary["run"]).head.layers.weights[0] == kept.layers.weights[0]).all()  # type: ignore[attr-defined]


def test_features_in_a_file_start_it_where_those_in_memory_do(
    probe: Path, make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params(*QUICK, "finetune.refit=false")
    memory = finetune(params, silent)
    monkeypatch.setattr("pipeline.stages.open.COPIES", 10**12)
    lines: list[str] = []
    blocks = finetune(params, lines.append)
    assert any(line.startswith("Epoch 0 repeats the probe") for line in lines)
    assert list(params.cache.dir.glob("*/rows-*.npy"))
    assert blocks["metrics"]["log_loss"] == pytest.approx(memory["metrics"]["log_loss"], rel=1e-2)


def test_a_random_head_needs_no_probe(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    lines: list[str] = []
    summary = finetune(make_params(*QUICK, "finetune.start=random"), lines.append)
    assert summary["n"] == 8
    assert "probe_run" not in summary["selected"]
    assert any("BatchNorm train" in line for line in lines)


def test_a_probe_of_random_weights_is_tuned_with_the_statistics_it_was_fitted_to(
    probe: Path, make_params: MakeParams
) -> None:
    """Statistics of batches give the head other features than its own: it is lost before the first step is done."""
    losses = {}
    gently = ("finetune.epochs=1", "finetune.backbone_lr=1e-9", "finetune.head_lr=1e-9")
    for mode in ("auto", "train"):
        run = finetune(make_params(*QUICK, *gently, f"finetune.batchnorm={mode}"), silent)["run"]
        (_, row) = json.loads((Path(run) / "metrics.json").read_text())["history"]
        losses[mode] = row["train_loss"]
    assert losses["auto"] < 2 < 10 * losses["auto"] < losses["train"]


def test_interpolation_is_chosen_on_the_selection_set(probe: Path, make_params: MakeParams) -> None:
    lines: list[str] = []
    finetune(make_params(*QUICK, "finetune.interpolate=true"), lines.append)
    assert any("of the way from the probe" in line or "no mix beat" in line for line in lines)


def test_without_a_fitting_probe_the_message_says_what_to_do(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    with pytest.raises(FinetuneError) as caught:
        finetune(make_params(*QUICK), silent)
    assert "train-head" in str(caught.value)


def test_a_run_that_does_not_fit_says_why(probe: Path, make_params: MakeParams) -> None:
    extract(make_params("transform.crop=24"), silent, quiet=True)
    with pytest.raises(FinetuneError, match="it was made with another transform"):
        finetune(make_params(*QUICK, "transform.crop=24"), silent, from_run=probe.name)


def test_the_rate_finder_suggests_both_rates(probe: Path, make_params: MakeParams) -> None:
    found = find_lr(make_params(*QUICK), silent)
    assert set(found["suggested"]) == {"head_lr", "backbone_lr"}
    assert Path(found["plot"]).read_bytes().startswith(b"<?xml")
    with pytest.raises(FinetuneError, match="unfinished are: none"):
        finetune(make_params(*QUICK), silent, resume="latest")


def test_a_killed_training_resumes_to_the_same_weights(probe: Path, make_params: MakeParams, tmp_path: Path) -> None:
    settings = (*QUICK, "finetune.epochs=6", "finetune.checkpoint_minutes=0.0001", "runs.name=tuned")
    whole = finetune(make_params(*settings, "runs.name=whole"), silent)
    command = [sys.executable, "-m", "pipeline", "finetune", "-q", "-p", str(tmp_path / "params.yaml")]
    places = (f"data.root={tmp_path / 'images'}", f"cache.dir={tmp_path / 'cache'}", f"runs.dir={tmp_path / 'runs'}")
    for override in (*FAST, *places, *settings):
        command += ["-s", override]
    process = subprocess.Popen(command)
    checkpoint = tmp_path / "runs" / ".training" / "tuned" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while process.poll() is None and not checkpoint.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = finetune(make_params(), silent, resume="latest")
    assert Path(resumed["run"]).name == "tuned"
    first, second = (load_file(Path(summary["run"]) / "backbone.safetensors") for summary in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not checkpoint.exists()


FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if "choose_by" not in path.read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_a_step(recipe: Path, root: Path, tmp_path: Path) -> None:
    places = (f"data.root={root}", f"cache.dir={tmp_path / 'cache'}", f"runs.dir={tmp_path / 'runs'}")
    small = (
        "backbone.weights=random",
        "transform.resize=32",
        "transform.crop=32",
        "extract.batch_size=8",
        "finetune.epochs=1",
        "finetune.batch_size=8",
        "finetune.selection_fraction=0.25",
        "finetune.augment.crop=32",
        "head.mlp.epochs=1",
        "head.logistic.strengths=3",
        "head.folds=2",
    )
    params = load_params(recipe, (*places, *small))
    extract(params, silent, quiet=True)
    summary = train_head(params, silent)
    tunes = "finetune" in recipe.read_text().split("\nhead:")[0] and "\nfinetune:" in recipe.read_text()
    if tunes:
        summary = finetune(params, silent)
    metrics = json.loads((Path(summary["run"]) / "metrics.json").read_text())
    assert metrics["n"] == 8


def metrics_of(summary: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads((Path(summary["run"]) / "metrics.json").read_text()))


MOVING = ("finetune.backbone_lr=3e-3", "finetune.head_lr=1e-2")
RUIN = ("finetune.head_lr=100", "finetune.backbone_lr=1", "finetune.optimizer=sgd", "finetune.clip_norm=0")


def test_a_kept_probe_is_reported_with_the_images_that_it_was_fitted_to(probe: Path, make_params: MakeParams) -> None:
    protocol = metrics_of(finetune(make_params(*QUICK, *RUIN), silent))["protocol"]
    assert "the logistic head was fitted on 16 images of train" in protocol
    assert "The probe rather than an epoch of fine-tuning was chosen" in protocol


def test_a_fine_tuned_run_that_kept_its_probe_is_no_start_for_the_next(probe: Path, make_params: MakeParams) -> None:
    finetune(make_params(*QUICK, *RUIN), silent)
    again = finetune(make_params(*QUICK, *RUIN), silent)
    assert again["selected"]["probe_run"] == probe.name


def test_the_share_of_the_mix_is_in_the_protocol(
    probe: Path, make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pipeline.finetune.averaging"], "SHARES", (0.5, 1.0))  # the probe is no choice
    summary = finetune(make_params(*QUICK, "finetune.interpolate=true", "finetune.backbone_lr=1e-3"), silent)
    assert summary["selected"]["share"] in (0.5, 1.0)
    assert "the mix with the probe was chosen" in metrics_of(summary)["protocol"]


def test_a_tuned_head_is_calibrated_where_the_params_ask_for_it(
    probe: Path, make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pipeline.finetune.averaging"], "SHARES", (1.0,))  # the probe is no choice
    monkeypatch.setattr(
        sys.modules["pipeline.finetune.training"], "selection_temperature", lambda _logits, _targets: 2.0
    )
    quick = (*QUICK, *MOVING, "finetune.calibrate=none", "finetune.refit=false")
    plain, cooled = (finetune(make_params(*quick, f"head.calibrate={how}"), silent) for how in ("none", "temperature"))
    temperature = cooled["selected"]["temperature"]
    assert temperature == 2 and "temperature" not in plain["selected"]
    first, second = (load_run(summary["run"]).head.as_layers() for summary in (plain, cooled))
    assert first is not None and second is not None
    assert second.biases[0] * temperature == pytest.approx(first.biases[0])
    assert "the temperature was chosen" in metrics_of(cooled)["protocol"]


def test_what_was_chosen_is_trained_on_all_of_train(
    probe: Path, make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it trains on all of train, it goes on to the same weights; the protocol says what was fitted."""
    monkeypatch.setattr(sys.modules["pipeline.finetune.averaging"], "SHARES", (0.5, 1.0))  # the probe is no choice
    whole = finetune(make_params(*QUICK, *MOVING, "runs.name=whole"), silent)
    real, refits = stage.train_classifier, 0

    def dies_on_all_of_train(*arguments: Any, **options: Any) -> Any:
        nonlocal refits
        refits += arguments[2] is None
        if refits == 1:
            options["callbacks"] = replace(
                options["callbacks"], on_batch=lambda _count: os.kill(os.getpid(), signal.SIGINT)
            )
        return real(*arguments, **options)

    monkeypatch.setattr(stage, "train_classifier", dies_on_all_of_train)
    with pytest.raises(Interrupted):
        finetune(make_params(*QUICK, *MOVING, "runs.name=cut"), silent)
    resumed = finetune(make_params(), silent, resume="cut")
    assert whole["selected"]["refit"] and whole["selected"]["epoch"]
    assert "was fitted on 16 images of train" in metrics_of(whole)["protocol"]
    one, two = (load_file(Path(summary["run"]) / "backbone.safetensors") for summary in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_interrupted_while_scoring_it_says_how_to_go_on_and_times_add_up(
    probe: Path, make_params: MakeParams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_arguments: Any, **_options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "score", interrupt)
    with pytest.raises(Interrupted) as caught:
        finetune(make_params(*QUICK, "runs.name=cut"), silent)
    monkeypatch.undo()
    assert "`pipeline finetune --resume` goes on" in str(caught.value)
    start = tmp_path / "runs" / ".training" / "cut" / "start.json"
    begun = json.loads(start.read_text())
    assert begun["seconds"] > 0
    start.write_text(json.dumps({**begun, "seconds": 1000.0}))
    resumed = finetune(make_params(), silent, resume="latest")
    assert json.loads((Path(resumed["run"]) / "model.json").read_text())["seconds"] > 1000


def test_minutes_leave_fewer_epochs(probe: Path, make_params: MakeParams) -> None:
    lines: list[str] = []
    finetune(make_params(*QUICK, "finetune.epochs=50", "finetune.minutes=0.001"), lines.append)
    assert any(line.startswith("An epoch takes about") for line in lines)
    assert any("leaves time for 1 of 50 epochs" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["probe", "random"])
def test_two_processes_train_on_all_of_train_what_they_chose_and_share_the_tuned_features(
    probe: Path, make_params: MakeParams, tmp_path: Path, start: str
) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(dump_params(make_params(*QUICK, "runs.name=two", f"finetune.start={start}")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "pipeline", "finetune", "-p", str(file), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert done.returncode == 0, done.stderr
    run, summary = load_run(tmp_path / "runs" / "two"), json.loads(done.stdout)
    assert summary["run"] == str(run.folder.resolve())
    if start == "random":  # any epoch is better than that
        assert summary["selected"]["refit"] and "was fitted on 16 images of train" in metrics_of(summary)["protocol"]
        assert run.model.feature_key != load_run(probe).model.feature_key
        assert len(list((tmp_path / "cache").glob(f"*-{run.model.feature_key}/*.h5"))) == 2  # one part of each process
