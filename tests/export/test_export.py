"""A run as one file: the contract of the file, its proof, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifacts import read_metrics
from pipeline.cli import main
from pipeline.errors import ExportError
from pipeline.export.onnx_file import OnnxClassifier
from pipeline.stages.export import export_run, load_exported

from ..conftest import PROJECT
from .conftest import IMAGES, Exported, LoadRun

CaptureFixture = pytest.CaptureFixture[str]
VAL = IMAGES / "val"
KINDS = ["logistic", "mlp", "svm", "tuned"]


def quiet(_line: str) -> None:
    pass


def extras() -> None:
    for module in ("onnx", "onnxscript", "onnxruntime", "skl2onnx"):
        pytest.importorskip(module)


def picture(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


class TestOnnx:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        extras()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_run_and_its_file_predict_the_same(self, kind: str, exported: Exported) -> None:
        run, file, summary = exported(kind)
        assert summary["n"] == summary["agree"] == 9
        assert summary["max_difference"] <= 0.01
        assert (summary["file"], summary["bytes"]) == (str(file), file.stat().st_size)
        for live, found in zip(run.predict([VAL]), load_exported(file).predict([VAL]), strict=True):
            assert (found.path, found.label) == (live.path, live.label)
            assert found.probability == pytest.approx(live.probability, abs=0.01)
            assert [label for label, _ in found.top] == [label for label, _ in live.top]

    def test_the_contract_of_the_file(self, exported: Exported) -> None:
        import onnxruntime

        run, file, _ = exported("logistic")
        session = onnxruntime.InferenceSession(file.read_bytes())
        ((name, kind, shape),) = [(value.name, value.type, value.shape) for value in session.get_inputs()]
        assert (name, kind, shape) == ("image", "tensor(uint8)", ["height", "width", 3])
        outputs = [(value.name, value.type, value.shape) for value in session.get_outputs()]
        assert outputs == [("probabilities", "tensor(float)", [3]), ("label", "tensor(int64)", [])]
        for size in ((48, 40), (500, 333), (1, 7)):
            probabilities, label = session.run(None, {"image": picture(*size)})
            assert (probabilities.dtype, probabilities.shape) == (np.float32, (3,))
            assert (label.dtype, label.shape) == (np.int64, ())
            assert probabilities.sum() == pytest.approx(1, abs=1e-5) and label == probabilities.argmax()
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["class_names"]) == ["ants", "bees", "cats"]
        assert (metadata["run"], metadata["data_digest"]) == ("logistic", run.model.data.digest)
        record = json.loads(file.with_name(f"{file.name}.json").read_text())
        proof = json.loads(metadata["proof"])
        assert {name: record[name] for name in proof} == proof
        assert {"file", "n", "agree", "max_difference", "bytes"} <= set(record)

    def test_a_batch_gives_what_its_images_give_alone(self, exported: Exported) -> None:
        one, many, summary = exported("svm")[1], *exported("svm", batch=True)[1:]
        assert summary["agree"] == 9
        alone, together = OnnxClassifier(one.read_bytes()), OnnxClassifier(many.read_bytes())._session
        images = picture(5, 90, 70)
        probabilities, labels = together.run(None, {"images": images})
        assert (probabilities.shape, labels.shape) == ((5, 3), (5,))
        for image, row, label in zip(images, probabilities, labels, strict=True):
            answer = alone(image)
            assert answer["label"] == label
            np.testing.assert_allclose(answer["probabilities"], row, atol=1e-4)
        assert len(load_exported(many).predict([VAL])) == 9

    def test_features(self, exported: Exported) -> None:
        run, file, summary = exported("svm", features=True)
        assert summary["agree"] == 9
        (features,) = OnnxClassifier(file.read_bytes())(picture(50, 60)).values()
        assert (features.dtype, features.shape) == (np.float32, (run.model.feature_dim,))
        with pytest.raises(ExportError, match="gives features"):
            load_exported(file)

    def test_float16_is_smaller(self, exported: Exported) -> None:
        summary = exported("mlp", precision="float16")[2]
        assert summary["agree"] == 9 and summary["bytes"] < exported("mlp")[2]["bytes"]

    def test_int8_states_what_it_costs(self, exported: Exported) -> None:
        run, _, summary = exported("mlp", precision="int8")
        assert summary["run_accuracy"] == read_metrics(run.folder).metrics["accuracy"]
        assert 0 <= summary["accuracy"] <= 1 and 0 <= summary["p"] <= 1

    def test_bad_images_get_an_error_as_from_a_run(self, exported: Exported, tmp_path: Path) -> None:
        run, file, _ = exported("logistic")
        (tmp_path / "bad.png").write_bytes(b"no image")
        paths = [tmp_path / "bad.png", VAL / "ants" / "24.png"]
        bad, good = load_exported(file).predict(paths)
        assert bad.error == run.predict(paths)[0].error and good.error is None

    def test_the_command_line_takes_a_file_for_a_run(self, exported: Exported, capsys: CaptureFixture) -> None:
        _, file, _ = exported("logistic")
        with pytest.raises(SystemExit) as stop:
            main(["predict", str(file), str(VAL), "--json"])
        summary = json.loads(capsys.readouterr().out)
        assert (stop.value.code, summary["run"], summary["n"]) == (0, str(file), 9)

    def test_a_file_that_gives_other_answers_is_not_published(self, run_of: LoadRun, tmp_path: Path) -> None:
        run, file = run_of("logistic"), tmp_path / "model.onnx"
        recorded = run.folder / "predictions.csv"
        head, *rows = recorded.read_text().splitlines()
        first = next(number for number, row in enumerate(rows) if row.startswith("val/ants"))
        cells = rows[first].split(",")
        rows[first] = ",".join([*cells[:4], "cats", "0.1", "0.1", "0.8"])
        recorded.write_text("\n".join([head, *rows]) + "\n")
        with pytest.raises(ExportError, match="not published") as caught:
            export_run(run, file, quiet, quiet=True)
        assert f"1 of 9 labels differ: {cells[0]} is {cells[4]}, was cats" in str(caught.value.why)
        assert list(tmp_path.glob("model.onnx*")) == []

    def test_without_the_reported_images_others_have_to_be_given(self, run_of: LoadRun, tmp_path: Path) -> None:
        run, file = run_of("logistic", f"data.root={tmp_path / 'gone'}"), tmp_path / "model.onnx"
        with pytest.raises(ExportError, match="are gone") as caught:
            export_run(run, file, quiet, quiet=True)
        assert "--data FOLDER" in str(caught.value.remedy) and not file.exists()
        summary = export_run(run, file, quiet, data=IMAGES / "train", quiet=True)
        assert summary["n"] == summary["agree"] == 24 and "own predictions" in summary["against"]

    def test_a_head_without_a_counterpart_is_a_clear_no(self, run_of: LoadRun, tmp_path: Path) -> None:
        from sklearn.neighbors import NearestCentroid

        run = run_of("svm")
        old = run.head.pipeline  # type: ignore[attr-defined]
        X = np.random.default_rng(0).normal(size=(30, run.model.feature_dim)).astype(np.float32)
        old.steps[-1] = ("classify", NearestCentroid().fit(X, np.arange(30) % 3))
        with pytest.raises(ExportError, match="cannot be written as ONNX") as caught:
            export_run(run, tmp_path / "model.onnx", quiet, quiet=True)
        assert "skl2onnx says" in str(caught.value.why)

    def test_a_strange_file_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        (tmp_path / "no.onnx").write_bytes(b"nothing")
        with pytest.raises(ExportError, match="cannot load"):
            load_exported(tmp_path / "no.onnx")


class TestPt2:
    def test_a_run_and_its_file_predict_the_same(self, exported: Exported) -> None:
        run, file, summary = exported("logistic", ".pt2")
        assert summary["n"] == summary["agree"] == 9
        for live, found in zip(run.predict([VAL]), load_exported(file).predict([VAL]), strict=True):
            assert found.label == live.label
            assert found.probability == pytest.approx(live.probability, abs=0.02)

    @pytest.mark.slow
    def test_batches(self, exported: Exported) -> None:
        assert exported("mlp", ".pt2", batch=True)[2]["agree"] == 9

    def test_a_scikit_learn_head_is_refused(self, run_of: LoadRun, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="cannot be written as"):
            export_run(run_of("svm"), tmp_path / "model.pt2", quiet, quiet=True)


def test_another_ending_is_refused(run_of: LoadRun, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="none of the known endings"):
        export_run(run_of("logistic"), tmp_path / "model.tflite", quiet, quiet=True)


def test_the_absence_of_the_extra_is_an_error_that_names_it(
    run_of: LoadRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match="onnx is not installed") as caught:
        export_run(run_of("logistic"), tmp_path / "model.onnx", quiet, quiet=True)
    assert "image-transfer-pipeline[export]" in str(caught.value.remedy)


def test_the_recipe_of_the_readme_gives_what_the_run_gives(exported: Exported, tmp_path: Path) -> None:
    extras()
    run, file, _ = exported("logistic")
    shutil.copy(file, tmp_path / "model.onnx")
    blocks = re.findall(r"^```python\n(.*?)^```$", (PROJECT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "onnxruntime" in block]
    photo = VAL / "ants" / "24.png"
    command = [sys.executable, "-c", block, str(photo)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    path, label, probability = done.stdout.split()
    (live,) = run.predict(photo)
    assert (path, label) == (str(photo), live.label) and float(probability) > 0
