"""A run as one file, ONNX or torch.export, with the proof that it gives what the run gave; and the run's card."""

from .network import ExportedNetwork, head_module, trace
from .onnx_file import OnnxClassifier, add_sklearn_head, onnx_bytes, onnx_model, quantised
from .proof import Proof, as_answers, prove, prove_accuracy
from .pt2_file import Pt2Classifier, pt2_bytes

__all__ = [
    "ExportedNetwork",
    "OnnxClassifier",
    "Proof",
    "Pt2Classifier",
    "add_sklearn_head",
    "as_answers",
    "head_module",
    "onnx_bytes",
    "onnx_model",
    "prove",
    "prove_accuracy",
    "pt2_bytes",
    "quantised",
    "trace",
]
