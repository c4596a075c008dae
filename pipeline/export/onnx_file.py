"""ONNX: from the traced network (and a scikit-learn head) to bytes, and back to something that classifies."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from ..errors import ExportError
from ..heads import Head
from ..heads.common import LOG_FLOOR
from .extra import need
from .network import ExportedNetwork, trace

OPSETS = {"": 18, "ai.onnx.ml": 3}  # 18 brought Resize with antialiasing
MAX_BYTES = 2_000_000_000  # of one protobuf message
PILLOW_CUBIC = -0.5
# skl2onnx 1.20 gives these the softmax of both signs of a decision where scikit-learn takes its logistic function.
FROM_DECISIONS = frozenset({"LinearDiscriminantAnalysis"})


def onnx_model(network: ExportedNetwork) -> Any:
    """The network as an ONNX model with named inputs and outputs.

    Raises:
        ExportError: a part of the network has no counterpart in ONNX, or it is too large for one file.
    """
    for module in ("onnx", "onnxscript"):
        need(module)
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    if size > MAX_BYTES:
        raise ExportError(
            "The network is too large for one ONNX file.",
            why=f"its weights have {size:,} bytes, and a file holds {MAX_BYTES:,}",
            remedy="export FILE.pt2, or use --precision float16",
        )
    image = "images" if network.batch else "image"
    outputs = ["features"] if network.head is None else ["probabilities", "label"]
    model = _converted(trace(network), image, outputs)
    _name_sizes(model, ("n", "height", "width") if network.batch else ("height", "width"))
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Resize" else ():
            if attribute.name == "cubic_coeff_a":
                attribute.f = PILLOW_CUBIC
    return model


def _converted(program: ExportedProgram, image: str, outputs: list[str]) -> Any:
    try:
        # What the exporter has to tell is for its developers, and standard output is not its own.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program, dynamo=True, input_names=[image], output_names=outputs, opset_version=OPSETS[""], verbose=False
            )
    except Exception as error:  # the exporter raises whatever its parts raise
        raise ExportError(
            "The network cannot be written as ONNX.",
            why=str(error).strip().splitlines()[0],
            remedy="export FILE.pt2, or choose another backbone",
        ) from error
    assert exported is not None
    return exported.model_proto


def _name_sizes(model: Any, names: tuple[str, ...]) -> None:
    """Give the free sizes of the image the names that the contract has; runtimes infer those in between."""
    shape = model.graph.input[0].type.tensor_type.shape
    for dim, name in zip(shape.dim, names, strict=False):
        dim.dim_param = name
    del model.graph.value_info[:]
    if "n" in names:
        for output in model.graph.output:
            output.type.tensor_type.shape.dim[0].dim_param = "n"


# -- scikit-learn ----------------------------------------------------------------------------------------------------


def add_sklearn_head(model: Any, head: Head, *, batch: bool) -> Any:
    """A model that gives features, (d,) or with ``batch`` (n, d), followed by a fitted scikit-learn head.

    Raises:
        ExportError: skl2onnx knows no such estimator.
    """
    onnx = need("onnx")
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    tail = _sklearn_model(head)
    tail.ir_version = model.ir_version
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "first"))
    model.graph.node.append(node("Identity" if batch else "Unsqueeze", ["features", "first"][: 2 - batch], ["rows"]))
    model.graph.output[0].name = "rows"
    model.graph.output[0].type.CopyFrom(tail.graph.input[0].type)
    whole = onnx.compose.merge_models(model, tail, io_map=[("rows", "features")], prefix2="head/")
    finish = node("Identity" if batch else "Squeeze", ["head/chances", "first"][: 2 - batch], ["probabilities"])
    label = node("Identity" if batch else "Squeeze", ["head/label", "first"][: 2 - batch], ["label"])
    whole.graph.node.extend([finish, label])
    rows: list[Any] = ["n"] if batch else []
    del whole.graph.output[:]
    whole.graph.output.append(info("probabilities", onnx.TensorProto.FLOAT, [*rows, len(head.classes_)]))
    whole.graph.output.append(info("label", onnx.TensorProto.INT64, rows))
    onnx.checker.check_model(whole)
    return whole


def _sklearn_model(head: Head) -> Any:
    """Features (n, d) to ``label`` (n,) and ``chances`` (n, c), by the rules of `SklearnHead.predict_proba`."""
    onnx, skl2onnx = need("onnx"), need("skl2onnx")
    pipeline = head.pipeline  # type: ignore[attr-defined]
    estimator = pipeline[-1]
    decisions = head.source == "decision_function" or type(estimator).__name__ in FROM_DECISIONS  # type: ignore[attr-defined]
    kind = skl2onnx.common.data_types.FloatTensorType([None, pipeline.n_features_in_])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = skl2onnx.to_onnx(
                pipeline,
                initial_types=[("features", kind)],
                options={id(estimator): {**_plain_arrays(estimator), **({"raw_scores": True} if decisions else {})}},
                target_opset=OPSETS,
            )
    except Exception as error:  # what it does not know shows in as many ways as there are estimators
        raise ExportError(
            f"A head of kind {head.kind} cannot be written as ONNX.",
            why=f"skl2onnx says: {str(error).strip().splitlines()[0][:200]}",
            remedy="choose another head (logistic, mlp, svm, knn, random_forest), or export --features",
        ) from error
    # One decision comes as minus and plus itself, and counts as minus and plus its half.
    factor = (0.5 if decisions and len(head.classes_) == 2 else 1.0) / head.temperature
    node, double, single = onnx.helper.make_node, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT
    steps = [node("Identity", ["probabilities"], ["chances"])]
    if decisions or head.temperature != 1:
        constants = {"factor": np.float64(factor), "floor": np.float64(LOG_FLOOR)}
        model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
        logarithm = [node("Max", ["scores", "floor"], ["positive"]), node("Log", ["positive"], ["logits"])]
        steps = [  # in float64, as a probability of zero counts as a number that float32 does not have
            node("Cast", ["probabilities"], ["scores"], to=double),
            *([node("Identity", ["scores"], ["logits"])] if decisions else logarithm),
            node("Mul", ["logits", "factor"], ["cooled"]),
            node("Softmax", ["cooled"], ["exact"], axis=1),
            node("Cast", ["exact"], ["chances"], to=single),
        ]
    model.graph.node.extend(steps)
    del model.graph.output[1:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("chances", onnx.TensorProto.FLOAT, [None, None]))
    return model


def _plain_arrays(estimator: Any) -> dict[str, Any]:
    """The option that asks for arrays instead of dictionaries; LinearSVC has no other and does not know it."""
    return {} if type(estimator).__name__ == "LinearSVC" else {"zipmap": False}


# -- bytes -----------------------------------------------------------------------------------------------------------


def quantised(model: Any) -> Any:
    """The model with int8 weights, whose activations are quantised as they come (onnxruntime's dynamic scheme).

    Depthwise convolutions stay as they are: they hold few of the weights, and their channels are too unlike.
    """
    onnx, quantization = need("onnx"), need("onnxruntime.quantization")
    depthwise = [node.name for node in model.graph.node if any(a.name == "group" and a.i > 1 for a in node.attribute)]
    with tempfile.TemporaryDirectory() as folder, _silent_logging():
        file = Path(folder) / "int8.onnx"
        quantization.quantize_dynamic(
            model, file, per_channel=True, weight_type=quantization.QuantType.QInt8, nodes_to_exclude=depthwise
        )
        return onnx.load(file)


@contextlib.contextmanager
def _silent_logging() -> Iterator[None]:
    """onnxruntime's advice is for its developers, and goes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def onnx_bytes(model: Any, metadata: Mapping[str, str]) -> bytes:
    """The file: the model with ``metadata`` in place of what it had."""
    del model.metadata_props[:]
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    data: bytes = model.SerializeToString()
    return data


class OnnxClassifier:
    """A file of `onnx_bytes`, run by onnxruntime on the CPU.

    Raises:
        ExportError: it is no such file, or onnxruntime is not installed.
    """

    def __init__(self, data: bytes) -> None:
        runtime = need("onnxruntime")
        try:
            self._session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common base for what it raises
            raise ExportError("onnxruntime cannot load the file.", why=str(error).strip().splitlines()[0]) from error
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        (self._input,) = self._session.get_inputs()
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The outputs by name for one image (height, width, 3)."""
        batched = self._input.name == "images"
        values = self._session.run(None, {self._input.name: image[None] if batched else image})
        return {name: value[0] if batched else value for name, value in zip(self._names, values, strict=True)}
