"""A run as one file that takes what a program has, proven to give what the run gave; and such a file as a predictor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..artifacts import MODEL_FILE, current_versions, read_metrics, read_predictions
from ..backbones import Transform, prepare_for_inference
from ..data.decode import BadImage, Decoder
from ..data.images import Given, Images, open_given, open_images
from ..errors import DataError, ExportError
from ..evaluate import ClassifierOutput, apply_head
from ..export.network import ExportedNetwork, head_module, trace
from ..export.onnx_file import OnnxClassifier, add_sklearn_head, onnx_bytes, onnx_model, quantised
from ..export.proof import Proof, as_answers, prove, prove_accuracy
from ..export.pt2_file import Pt2Classifier, pt2_bytes
from ..files import digest_bytes, human_bytes, publish_file, read_regular_file
from ..heads import Layers
from ..params import Params
from ..runtime.progress import ProgressBar
from .run import Prediction, Run, label_images

Say = Callable[[str], None]
Answers = dict[str, NDArray[Any]]
Write = Callable[[dict[str, str]], bytes]
Precision = Literal["float32", "float16", "int8"]
LOADERS: dict[str, Callable[[bytes], OnnxClassifier | Pt2Classifier]] = {".onnx": OnnxClassifier, ".pt2": Pt2Classifier}
SAMPLE = 2000


def export_run(
    run: Run,
    file: Path,
    say: Say = print,
    *,
    data: Path | None = None,
    features: bool = False,
    precision: Precision = "float32",
    batch: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write ``run`` as FILE.onnx or FILE.pt2, which is published only once it has given what the run gave.

    The file takes ``image``, uint8 (height, width, 3), RGB of any size, and gives ``probabilities``, float32
    (classes,), and ``label``, int64 (). FILE.json beside it (``model.onnx.json``) tells what the proof found.

    Args:
        data: a folder of other images for the proof, where those that the run was reported on are gone.
        features: give ``features``, float32 (d,), instead.
        precision: of the backbone; ``int8`` quantises the weights of an ONNX file and states what that costs.
        batch: take ``images``, uint8 (n, height, width, 3), and give n of everything.

    Returns:
        the summary of ``--json``: ``file, n, agree, max_difference, bytes`` and more.

    Raises:
        ExportError: the run cannot be exported so, there is nothing to prove it on, or the file gives other answers.
    """
    _check(run, file, features=features, precision=precision, data=data)
    examples = _others(run, data, quiet=quiet) if data else _reported(run)
    say(f"Exporting {run.folder.name}: {run.model.backbone.name} in {precision}")
    write = _writer(run, file.suffix, features=features, precision=precision, batch=batch)
    metadata = _metadata(run, features=features, precision=precision, batch=batch)
    proof = _prove(run, LOADERS[file.suffix](write(metadata)), examples, quantised=precision == "int8", quiet=quiet)
    if proof.problems:
        raise ExportError(
            "The exported file does not give what the run gave; it was not published.",
            where=file,
            why="\n    " + "\n    ".join([*proof.problems, f"compared with {proof.against}"]),
            remedy=_remedy(run, precision),
        )
    contents = write({**metadata, "proof": json.dumps(proof.as_dict())})
    summary = {"file": str(file.absolute()), "run": str(run.folder), **proof.as_dict(), "bytes": len(contents)}
    try:
        publish_file(file.absolute(), contents)
        record = json.dumps({**_decoded(metadata), **summary}, indent=1) + "\n"
        publish_file(file.with_name(f"{file.name}.json").absolute(), record.encode())
    except OSError as error:
        raise ExportError("The file cannot be written.", where=error.filename or file, why=str(error)) from error
    _tell(say, proof, summary)
    return summary


def _tell(say: Say, proof: Proof, summary: dict[str, Any]) -> None:
    say(
        f"{proof.agree} of {proof.n} labels are those of {proof.against}; the largest difference of a probability is "
        f"{proof.max_difference:.2g}"
    )
    if proof.accuracy is not None and proof.run_accuracy is not None:
        shares = f"Accuracy {100 * proof.accuracy:.1f} %, the run's {100 * proof.run_accuracy:.1f} %"
        say(f"{shares} (exact McNemar p = {proof.p:.2g})")
    say(f"{summary['file']}: {human_bytes(summary['bytes'])}")


def _check(run: Run, file: Path, *, features: bool, precision: str, data: Path | None) -> None:
    problem, remedy = None, None
    if file.suffix not in LOADERS:
        problem, remedy = f"{file.name} has none of the known endings.", "name it FILE.onnx or FILE.pt2"
    elif precision == "int8" and file.suffix != ".onnx":
        problem, remedy = "Only an ONNX file can be quantised to int8.", "name it FILE.onnx"
    elif precision == "int8" and (features or data):
        problem, remedy = "int8 is proven by its accuracy, on the run's own images.", "leave --features and --data out"
    elif not run.head.has_probabilities:
        problem, remedy = "The run's head gives no probabilities to compare.", "choose another head"
    elif run.head.as_layers() is None and file.suffix == ".pt2" and not features:
        problem = f"A head of kind {run.head.kind} cannot be written as .pt2."
        remedy = "name it FILE.onnx, or export --features"
    elif not np.array_equal(run.head.classes_, np.arange(len(run.class_names))):
        problem, remedy = "The head does not know all classes of the run.", "train the head again"
    if problem:
        raise ExportError(problem, where=file, why=run.head.why_no_probabilities, remedy=remedy)


def _remedy(run: Run, precision: str) -> str:
    if precision != "float32":
        return "export with --precision float32"
    if run.model.precision != "float32":
        return f"the run computed in {run.model.precision}: make it again with extract.precision=float32"
    return "serve the run folder itself, or choose another head or backbone"


# -- the file --------------------------------------------------------------------------------------------------------


def _writer(run: Run, suffix: str, *, features: bool, precision: str, batch: bool) -> Write:
    """What makes the file's bytes from its metadata."""
    layers: Layers | None = None if features else run.head.as_layers()
    sklearn = not features and layers is None
    # BatchNorm is folded before anything is rounded, as where features are extracted.
    prepared = prepare_for_inference(
        run.backbone.build(),
        device=torch.device("cpu"),
        precision="float16" if precision == "float16" else "float32",
        fuse=False,
    )
    network = ExportedNetwork(
        run.backbone.transform,
        prepared.network,
        None if layers is None else head_module(layers),
        dtype=prepared.dtype,
        batch=batch,
    )
    if suffix == ".pt2":
        program = trace(network)
        return lambda metadata: pt2_bytes(program, metadata)
    model = onnx_model(network)
    if sklearn:
        model = add_sklearn_head(model, run.head, batch=batch)
    if precision == "int8":
        model = quantised(model)
    return lambda metadata: onnx_bytes(model, metadata)


def _metadata(run: Run, *, features: bool, precision: str, batch: bool) -> dict[str, str]:
    """What the file tells of itself: text by name, JSON where it is more than a word."""
    backbone, model = run.backbone, run.model
    files = (MODEL_FILE, model.head.model_dump()["file"])
    values: dict[str, Any] = {
        "class_names": list(run.class_names),
        "run": run.folder.name,
        "run_digest": digest_bytes(b"".join((run.folder / name).read_bytes() for name in files)).hex(),
        "data_digest": model.data.digest,
        "backbone": f"{backbone.identity.name} {backbone.identity.weights} {backbone.identity.digest}",
        "head": model.head.kind,
        "precision": precision,
        "input": "images" if batch else "image",
        "outputs": ["features"] if features else ["probabilities", "label"],
        "transform": backbone.transform.as_dict(),
        "decoding": {"rule": backbone.decoder.rule, **vars(backbone.decoder)},
        "versions": current_versions(),
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _decoded(metadata: dict[str, str]) -> dict[str, Any]:
    return {name: json.loads(value) if value[:1] in "[{" else value for name, value in metadata.items()}


# -- the proof -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Examples:
    """Images with the run's answers: ``rows`` of ``images``, in the order of ``wanted``, of ``y`` (-1: unknown) and of
    ``groups`` (None: each is alone)."""

    images: Images
    rows: Sequence[int]
    wanted: ClassifierOutput
    y: NDArray[np.int64]
    against: str
    groups: NDArray[np.int64] | None = None


def _reported(run: Run) -> _Examples:
    """The images that the run was reported on, as far as they are still what they were; a sample of many."""
    recorded, split = read_predictions(run.folder), read_metrics(run.folder).split
    assert recorded.probabilities is not None
    try:
        images = open_images(run.params.data, run.params.cache.dir)
    except DataError as error:
        raise _nothing_to_prove(run, f"{error.what} {error.why or ''}") from error
    rows = _sample([row for row, name in enumerate(recorded.splits) if name == split and recorded.labels[row]])
    place = {path: position for position, path in enumerate(images.paths)}
    there = [row for row in rows if _is_there(images, place.get(recorded.paths[row]), recorded.digests[row])]
    if not there:
        raise _nothing_to_prove(run, f"none of the {len(rows)} images of {split} is what it was")
    code = {name: target for target, name in enumerate(run.class_names)}
    predicted = np.array([code[recorded.predicted[row]] for row in there])
    positions = [place[recorded.paths[row]] for row in there]
    return _Examples(
        images,
        positions,
        ClassifierOutput(predicted, recorded.probabilities[there]),
        np.array([code[recorded.labels[row]] for row in there]),
        f"predictions.csv ({split})",
        images.groups_of(np.array(positions)),
    )


def _is_there(images: Images, position: int | None, digest: NDArray[np.uint8]) -> bool:
    return position is not None and images.read(position) is not None and images.digest(position) == digest.tobytes()


def _nothing_to_prove(run: Run, why: str) -> ExportError:
    return ExportError(
        "The images that the run was reported on are gone, so that nothing can prove an exported file.",
        where=run.params.data.root,
        why=why,
        remedy="give a folder of other images: --data FOLDER (any will do; they need no labels)",
    )


def _others(run: Run, folder: Path, *, quiet: bool) -> _Examples:
    """The images under ``folder``, with what the run says of them now."""
    images = open_given(folder, run.params.data, run.params.cache.dir)
    cache = run.cache(images, quiet=quiet)
    cache.fill()
    rows = _sample(np.flatnonzero(cache.present).tolist())
    if not rows:
        raise ExportError("No image of the folder can be read.", where=folder)
    answers = apply_head(run.head, cache.read(images.digests[rows]), len(run.class_names))
    return _Examples(images, rows, answers, np.full(len(rows), -1), f"the run's own predictions on {folder}")


def _sample(rows: list[int]) -> list[int]:
    """All of some rows, or `SAMPLE` spread evenly over them."""
    if len(rows) <= SAMPLE:
        return rows
    return [rows[place] for place in np.linspace(0, len(rows) - 1, SAMPLE).astype(int).tolist()]


def _prove(
    run: Run, classifier: OnnxClassifier | Pt2Classifier, examples: _Examples, *, quantised: bool, quiet: bool
) -> Proof:
    outputs: list[Answers] = []
    with ProgressBar("proving", len(examples.rows), quiet=quiet) as bar:
        for row in examples.rows:
            data = examples.images.read(row)
            assert data is not None
            outputs.append(classifier(np.asarray(run.backbone.decoder(data))))
            bar.advance()
    if "features" in outputs[0]:
        found = apply_head(run.head, np.array([output["features"] for output in outputs]), len(run.class_names))
    else:
        found = as_answers(outputs)
    names = [examples.images.paths[row] for row in examples.rows]
    proof = prove(examples.wanted, found, names, run.class_names, against=examples.against)
    if quantised:
        return prove_accuracy(proof, examples.wanted.predicted, found.predicted, examples.y, examples.groups)
    return proof


# -- an exported file as a predictor ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportedRun:
    """An exported file, which predicts as a `Run` does, without the run folder."""

    file: Path
    classifier: OnnxClassifier | Pt2Classifier

    def _value(self, name: str) -> Any:
        return json.loads(self.classifier.metadata[name])

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The classes, by target."""
        return tuple(self._value("class_names"))

    @cached_property
    def _decoder(self) -> Decoder:
        values = {key: value for key, value in self._value("decoding").items() if key != "rule"}
        size, background = values.pop("draft_size"), tuple(values.pop("background"))
        return Decoder(background=background, draft_size=size and tuple(size), **values)

    @property
    def folder(self) -> Path:
        """Where it lies, as a run's."""
        return self.file.absolute()

    def predict(
        self,
        images: Given | Iterable[Given],
        *,
        top: int = 5,
        say: Say = lambda _line: None,
        quiet: bool = True,
    ) -> list[Prediction]:
        """As `Run.predict`; nothing is cached.

        Raises:
            TypeError: something is no image and no path.
            DataError: a path does not exist, or there is no image.
        """
        params, transform = Params(), Transform.from_dict(self._value("transform"), where=self.file)
        opened = open_given(images, params.data, params.cache.dir)
        for warning in opened.warnings:
            say(f"Warning: {warning}")
        return self._predict(opened, transform, top, quiet)

    def _predict(self, images: Images, transform: Transform, top: int, quiet: bool) -> list[Prediction]:
        outputs: dict[int, Answers] = {}
        errors: dict[int, str] = {}
        with ProgressBar("predicting", len(images), quiet=quiet) as bar:
            for row in range(len(images)):
                try:
                    if (data := images.read(row)) is None:
                        raise OSError(images.failures[row])
                    image = self._decoder(data)
                    transform.framing.check_size(image.size)
                    outputs[row] = self.classifier(np.asarray(image))
                except BadImage as error:
                    errors[row] = f"{error.reason}: {error.reason.remedy}"
                except OSError as error:
                    errors[row] = str(error)
                bar.advance()
        answers = as_answers(list(outputs.values())) if outputs else ClassifierOutput(np.empty(0, np.int64))
        return label_images(
            images, list(outputs), answers, self.class_names, top, problem=lambda _images, row: errors[row]
        )


def load_exported(file: Path | str) -> ExportedRun:
    """A file made by `export_run`, ready to predict.

    Raises:
        ExportError: it cannot be read, was not made by `export_run`, or gives features instead of labels.
    """
    file = Path(file)
    try:
        classifier = LOADERS[file.suffix](read_regular_file(file))
    except OSError as error:
        raise ExportError("The file cannot be read.", where=file, why=str(error)) from error
    if not {"class_names", "decoding", "transform"} <= set(classifier.metadata):
        raise ExportError("The file was not made by `pipeline export`.", where=file, why="its metadata is missing")
    if "label" not in json.loads(classifier.metadata["outputs"]):
        raise ExportError("The file gives features, not labels.", where=file, remedy="export without --features")
    return ExportedRun(file, classifier)
