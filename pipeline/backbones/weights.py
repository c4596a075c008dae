"""Put the tensors of a checkpoint into a network, strictly: what is missing, misshapen or left over is named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..files import DIGEST_BYTES, canonical_json
from .catalogue import (
    AUXILIARY_PREFIXES,
    PACKAGED,
    Architecture,
    backbone_names,
    classifier_path,
    find_architecture,
    image_size_of_tokens,
    make_classifier,
)
from .checkpoint import Checkpoint, problem_of_tensor

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
COUNTER = "num_batches_tracked"

_PREFIXES = ("module.", "model.", "backbone.", "network.", "net.", "_orig_mod.")
_POSITIONS = "encoder.pos_embedding"
# Module names lost their dots long after these files were made; torchvision renames the keys in the same way.
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var|num_batches_tracked))$"
)
_SHOWN = 4


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from. ``label`` goes into the identity: the enum name, ``file`` or ``random-SEED``."""

    kind: Literal["enum", "file", "random"]
    label: str
    path: Path | None = None
    enum: Any = None


def locate_weights(architecture: Architecture, weights: str, *, seed: int = 0) -> WeightsSource:
    """Resolve ``backbone.weights`` (aliases included) without opening or downloading anything.

    Raises:
        WeightsError: neither ``DEFAULT``, ``random``, a path, nor a name of this model's weights.
    """
    if weights == "random":
        return WeightsSource("random", f"random-{seed}")
    if "/" in weights or "\\" in weights or weights.endswith(WEIGHTS_SUFFIXES):
        return WeightsSource("file", "file", Path(weights).expanduser().absolute())
    if weights == "DEFAULT" and architecture.packaged:
        return WeightsSource("file", "DEFAULT", architecture.packaged)
    name = architecture.default_weights if weights == "DEFAULT" else weights.rpartition(".")[2]
    if name in architecture.weights:
        return WeightsSource("enum", name, enum=architecture.weights[name])
    raise WeightsError(
        f"{architecture.name} has no weights {weights!r}.",
        where="backbone.weights",
        remedy=f"use DEFAULT, {', '.join([*architecture.weights, 'random'])} or the path of a weights file",
    )


@dataclass(frozen=True)
class Fitted:
    """The tensors of a checkpoint under a model's own names, and what else there was.

    Attributes:
        tensors: by the names of the whole torchvision model, prefixes stripped.
        prefix: what was stripped from the names.
    """

    tensors: dict[str, Tensor]
    prefix: str


def fit_names(architecture: Architecture, checkpoint: Checkpoint, expected: Iterable[str]) -> Fitted:
    """Strip the prefixes of training programs and bring old names to today's."""
    wanted = set(expected)
    names = {_modern_name(architecture, name): name for name in checkpoint.tensors}
    prefix = max(_prefixes_of(names), key=lambda item: (sum(item + name in names for name in wanted), -len(item)))
    tensors = {
        name.removeprefix(prefix): checkpoint.tensors[stored]
        for name, stored in names.items()
        if name.startswith(prefix) or not prefix
    }
    rest = {name: checkpoint.tensors[stored] for name, stored in names.items() if not name.startswith(prefix)}
    return Fitted({**{name: tensor for name, tensor in rest.items() if name not in wanted}, **tensors}, prefix)


def image_size_in(architecture: Architecture, checkpoint: Checkpoint) -> int | None:
    """The image size that the position embeddings in a file were made for; ``None`` where there are none."""
    if not architecture.has_image_size:
        return None
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(_POSITIONS) and tensor.dim() == 3:
            return image_size_of_tokens(make_classifier(architecture), int(tensor.shape[1]))
    return None


def load_tensors(
    architecture: Architecture, network: nn.Module, checkpoint: Checkpoint, *, whole: nn.Module, where: object
) -> tuple[str, ...]:
    """Replace the parameters and buffers of ``network`` (torchvision's names) by those of ``checkpoint``, as float32.

    Args:
        network: what computes; all its tensors must be there, except BatchNorm's counters.
        whole: the whole model with its classifier, to tell what may be left over.
        where: shown in messages.

    Returns:
        Notes for the user: a classifier that was dropped, tensors that belong to nothing.

    Raises:
        WeightsError: missing, misshapen or unusable tensors; the first few are named, and the model they would fit.
    """
    expected = network.state_dict()
    fitted = fit_names(architecture, checkpoint, expected)
    missing = [name for name in expected if name not in fitted.tensors and not name.endswith(COUNTER)]
    present = [name for name in expected if name in fitted.tensors]
    unfit = {name: problem_of_tensor(fitted.tensors[name], expected[name].shape) for name in present}
    problems = [f"{name} {problem}" for name, problem in unfit.items() if problem]
    if missing or problems:
        needed = sum(not name.endswith(COUNTER) for name in expected)
        raise _mismatch(architecture, fitted, missing, problems, needed, where)
    # Updated in place, because a state dict carries the versions of its modules, without which MNASNet refuses it.
    expected.update({name: _own(fitted.tensors[name]) for name in present})
    network.load_state_dict(expected, assign=True)
    return tuple(_notes(fitted, set(expected), whole))


def check_head(model: nn.Module, architecture: Architecture, checkpoint: Checkpoint, *, where: object) -> None:
    """Refuse weights whose classifier is absent or is not the model's own of 1000 classes.

    Raises:
        WeightsError: with the number of classes that the weights have.
    """
    head = f"{classifier_path(model)}.weight"
    tensor = fit_names(architecture, checkpoint, model.state_dict()).tensors.get(head)
    classes = len(model.get_parameter(head))
    if tensor is None or tensor.dim() == 0 or len(tensor) != classes:
        raise WeightsError(
            f"These weights cannot classify into the {classes} classes of ImageNet.",
            where=where,
            why="they hold no classifier" if tensor is None else f"their classifier has shape {tuple(tensor.shape)}",
            remedy=f"use weights with {classes} outputs, or train a head on them and use `pipeline predict`",
        )


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """BLAKE2b-128, in hex, of the tensors that compute: names, dtypes, shapes and float32 values, counters excluded.

    The same whatever file format or precision the values were stored in.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(state):
        if name.endswith(COUNTER):
            continue
        tensor = state[name].detach().cpu()
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        header = canonical_json([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(len(header).to_bytes(4, "little") + header.encode())
        digest.update(tensor.reshape(-1).numpy().data)
    return digest.hexdigest()


def _own(tensor: Tensor) -> Tensor:
    """A float32 (or integer) copy with storage of its own: a file may hold overlapping views."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)


def _modern_name(architecture: Architecture, name: str) -> str:
    match = _OLD_DENSENET.match(name) if architecture.model.startswith("densenet") else None
    return match.group(1) + match.group(2) if match else name


def _prefixes_of(names: Iterable[str]) -> set[str]:
    """Every chain of known prefixes with which a name begins, the empty one included."""
    found = {""}
    for name in names:
        prefix = ""
        while step := next((item for item in _PREFIXES if name.startswith(item, len(prefix))), None):
            prefix += step
            found.add(prefix)
    return found


def _notes(fitted: Fitted, used: set[str], whole: nn.Module) -> Iterable[str]:
    head = classifier_path(whole)
    known = set(whole.state_dict())
    left = sorted(name for name in fitted.tensors if name not in used)
    classes = next((len(fitted.tensors[n]) for n in left if n.startswith(f"{head}.") and n.endswith("weight")), None)
    if classes is not None and classes != len(whole.get_parameter(f"{head}.weight")):
        yield f"the classifier of the weights ({classes} outputs) was dropped"
    strange = [
        name
        for name in left
        if name not in known and not name.startswith((*AUXILIARY_PREFIXES, f"{head}.")) and not name.endswith(COUNTER)
    ]
    if strange:
        yield f"{len(strange)} tensors of the weights belong to no part of the backbone: {_some(strange)}"


def _mismatch(
    architecture: Architecture,
    fitted: Fitted,
    missing: Sequence[str],
    problems: Sequence[str],
    count: int,
    where: object,
) -> WeightsError:
    lines = [f"{len(missing)} of {count} tensors are missing: {_some(missing)}"] if missing else []
    lines += [_some(problems, "; ")] if problems else []
    others = len(missing) + len(problems) > count / 10  # else this is the right model, with something amiss
    nearest = _nearest_architecture(fitted.tensors) if others else None
    remedy = f"they fit {nearest}: set backbone.name={nearest}" if nearest not in (None, architecture.name) else None
    return WeightsError(
        f"The weights do not fit {architecture.name}.",
        where=where,
        why="; ".join(lines),
        remedy=remedy or "use weights that were saved from this torchvision model (state_dict)",
    )


def _nearest_architecture(tensors: Mapping[str, Tensor]) -> str | None:
    """The backbone of which nearly all tensors are there with their shapes; looked for only to explain an error."""
    best, best_share = None, 0.9
    for name in backbone_names():
        if name in PACKAGED:
            continue  # the same model as one of torchvision's
        model = make_classifier(find_architecture(name))
        head = f"{classifier_path(model)}."
        state = {key: value for key, value in model.state_dict().items() if not key.endswith(COUNTER)}
        fitting = [
            key in tensors and tensors[key].shape == state[key].shape for key in state if not key.startswith(head)
        ]
        share = sum(fitting) / len(fitting)
        if share > best_share:
            best, best_share = name, share
        if share == 1:
            break
    return best


def _some(items: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
