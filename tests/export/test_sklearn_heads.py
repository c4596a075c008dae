"""scikit-learn heads as ONNX: the probabilities that `SklearnHead` gives, or a clear no."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.errors import ExportError
from pipeline.heads import make_head
from pipeline.params import HeadParams

CONVERTED = ["svm", "knn", "ridge", "lda", "random_forest", "mlp_sklearn", "sklearn.linear_model.LogisticRegression"]


def examples(classes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    y = np.arange(120) % classes
    noise = np.random.default_rng(classes).normal(size=(120, 16))
    return (noise + 0.6 * np.eye(classes, 16)[y]).astype(np.float32), y


def passed_through(size: int) -> Any:
    """A model whose features (n, d) are its input."""
    onnx = pytest.importorskip("onnx")
    info = onnx.helper.make_tensor_value_info
    ends = [info(name, onnx.TensorProto.FLOAT, ["n", size]) for name in ("images", "features")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["images"], ["features"])], "features", ends[:1], ends[1:]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("kind", CONVERTED)
def test_probabilities_are_those_of_the_head(kind: str, classes: int) -> None:
    pytest.importorskip("skl2onnx")
    runtime = pytest.importorskip("onnxruntime")
    from pipeline.export.onnx_file import add_sklearn_head

    X, y = examples(classes)
    names = [f"class {number}" for number in range(classes)]
    for calibrate in ("none", "temperature"):
        params = HeadParams.model_validate({"kind": kind, "folds": 3, "calibrate": calibrate})
        head = make_head(kind, params, class_names=names).fit(X, y)
        model = add_sklearn_head(passed_through(X.shape[1]), head, batch=True)
        session = runtime.InferenceSession(model.SerializeToString())
        probabilities, label = session.run(["probabilities", "label"], {"images": X})
        np.testing.assert_allclose(probabilities, head.predict_proba(X), atol=2e-4)
        assert (label == head.predict(X)).mean() >= 0.99


@pytest.mark.parametrize("kind", ["nearest_centroid", "gradient_boosting"])
def test_what_skl2onnx_cannot_do_is_a_clear_no(kind: str) -> None:
    pytest.importorskip("skl2onnx")
    from pipeline.export.onnx_file import add_sklearn_head

    X, y = examples(2)
    head = make_head(kind, HeadParams(kind=kind), class_names=["a", "b"]).fit(X, y)
    with pytest.raises(ExportError, match=f"kind {kind} cannot be written as ONNX") as caught:
        add_sklearn_head(passed_through(X.shape[1]), head, batch=True)
    assert "skl2onnx says" in str(caught.value.why) and "logistic" in str(caught.value.remedy)
