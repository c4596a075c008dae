"""The training loop: epochs, steps, the best epoch, checkpoints from which a killed training goes on bit for bit."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from ..errors import Interrupted
from ..params import FinetuneParams
from ..runtime.distributed import WAIT, World
from ..runtime.interrupt import Interruption
from ..runtime.memory import reuse_freed_memory
from .averaging import MovingAverage, StateDict, interpolate, take_mix
from .batchnorm import fused
from .checkpoint import Checkpoints
from .classifier import Classifier
from .groups import highest_rates, make_schedule
from .history import EpochRow, SelectionScore
from .images import LabelledImages, PixelTransform
from .selection import SelectionSet, selection_temperature
from .step import Setup, Stepper, TrainableClassifier

OVERHEAD = 1.2  # scoring, mixing and decoding, beside the steps of a training


@dataclass(frozen=True)
class Callbacks:
    """Called after each epoch (row) and each batch (images done); ``interruption`` can stop the training."""

    on_epoch: Callable[[EpochRow], None] = lambda row: None
    on_batch: Callable[[int], None] = lambda count: None
    interruption: Interruption = field(default_factory=Interruption)


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves behind; weights are on the CPU, by the classifier's names.

    Attributes:
        start, tuned: the weights before any step, and those of the best epoch after it.
        best_epoch: 0 where no epoch beats the start.
        tuned_epoch: that of ``tuned``.
    """

    start: StateDict
    tuned: StateDict
    best_epoch: int
    tuned_epoch: int
    history: tuple[EpochRow, ...]
    warnings: tuple[str, ...]

    @property
    def best(self) -> StateDict:
        """The better of the two on the selection set."""
        return self.tuned if self.best_epoch else self.start


@dataclass
class TrainingState:
    """How far a training is; all of it goes into the checkpoint.

    Attributes:
        sums: loss, weights, correct, images of this epoch so far.
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    finished: bool = False
    warnings: list[str] = field(default_factory=list)


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Join the other processes (NCCL between GPUs, gloo elsewhere); nothing for a single process."""
    if world.size == 1 or torch.distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def train_classifier(
    classifier: Classifier,
    train: LabelledImages,
    selection: LabelledImages | None,
    transform: PixelTransform,
    params: FinetuneParams,
    setup: Setup,
    *,
    folder: Path,
    fingerprint: str,
    until: int | None = None,
    callbacks: Callbacks | None = None,
) -> TrainingResult:
    """Train, or go on from the checkpoint in ``folder``; ``classifier`` ends up holding the best weights.

    The best epoch is that of the lowest loss or highest accuracy on ``selection``, as ``params.select`` says; without
    a selection set it is the last. The random state of torch is left as it was.

    Args:
        fingerprint: of all that the result depends on; a checkpoint with another one is refused.
        until: end after this epoch of ``params.epochs``.

    Raises:
        FinetuneError: nothing trains, or the checkpoint belongs to another run.
        Interrupted: the user stopped it; the checkpoint is up to date.
        BlockingIOError: another process trains in that folder.
    """
    checkpoints = Checkpoints(folder, fingerprint, setup.world)
    devices = [setup.device] if setup.device.type == "cuda" else []
    reuse_freed_memory()
    with checkpoints.lock(), torch.random.fork_rng(devices=devices):
        model = TrainableClassifier(classifier, params, setup)
        scorer = None if selection is None else SelectionSet(selection, transform, params, setup)
        stepper, callbacks = Stepper(model, train, transform), callbacks or Callbacks()
        return _Training(model, stepper, scorer, checkpoints, callbacks, until or params.epochs).run()


@dataclass(frozen=True)
class Choice:
    """What is best on the selection set.

    Attributes:
        epoch: how long to train; 0 for not at all.
        share: of the way from the start to what training made of it; 0 for the start.
        temperature: what logits are to be divided by.
        weights: of that classifier.
    """

    epoch: int
    share: float
    temperature: float
    weights: StateDict


def choose(
    result: TrainingResult,
    classifier: Classifier,
    train: LabelledImages,
    selection: LabelledImages,
    transform: PixelTransform,
    params: FinetuneParams,
    setup: Setup,
    *,
    calibrate: bool,
) -> Choice:
    """The best of the start, the best epoch and, where asked for, mixes of both (WiSE-FT); ``classifier`` holds it."""
    scorer = SelectionSet(selection, transform, params, replace(setup, dtype=torch.float32))
    share, weights = float(bool(result.best_epoch)), result.best
    if params.interpolate and params.start == "probe":
        images = _normalised(train, transform, params, setup)
        start, tuned = result.start, result.tuned
        judges = len(selection.targets)
        share, weights = interpolate(
            classifier, start, tuned, scorer.score, by=params.select, images=images, judges=judges
        )
    classifier.load_state_dict(weights)
    temperature = selection_temperature(scorer.logits(classifier), selection.targets) if calibrate else 1.0
    return Choice(result.tuned_epoch if share else 0, share, temperature, weights)


def mix_result(
    result: TrainingResult,
    share: float,
    classifier: Classifier,
    train: LabelledImages,
    transform: PixelTransform,
    params: FinetuneParams,
    setup: Setup,
) -> StateDict:
    """The weights at ``share`` of the way from the start to the end, which ``classifier`` ends up holding."""
    images = _normalised(train, transform, params, setup)
    return take_mix(classifier, result.start, result.tuned, share, images=images)


def _normalised(
    train: LabelledImages, transform: PixelTransform, params: FinetuneParams, setup: Setup
) -> Callable[[], Iterator[Tensor]]:
    everything = SelectionSet(train, transform, params, replace(setup, world=World()))

    def images() -> Iterator[Tensor]:
        for batch in everything.pixels():
            yield transform.normalise(batch.to(setup.device), torch.float32)

    return images


def plan_epochs(params: FinetuneParams, seconds: float, refit_seconds: float) -> int:
    """The epochs that fit into ``params.minutes``, of those that ``params`` ask for; at least one.

    Args:
        seconds: of an epoch of the training that chooses, and ``refit_seconds`` of one on all of train.
    """
    if params.minutes is None:
        return params.epochs
    fitting = 60 * params.minutes / max(OVERHEAD * (seconds + refit_seconds), 1e-9)
    return max(1, min(params.epochs, int(fitting)))


def seconds_per_image(
    classifier: Classifier, train: LabelledImages, transform: PixelTransform, params: FinetuneParams, setup: Setup
) -> float:
    """What an image of an epoch takes here, as the first process sees it; measured on a copy with part of a batch.

    Not compiled, which takes longer than what is measured.
    """
    params = params.model_copy(update={"compile": False})
    model = TrainableClassifier(copy.deepcopy(classifier), params, setup)
    stepper = Stepper(model, train, transform)
    model.train_mode()
    batch = replace(stepper.plan(1)[0], closes=True)
    times = []
    with torch.random.fork_rng(devices=[setup.device] if setup.device.type == "cuda" else []), fused(model.pairs):
        for rows in (batch.rows[: max(1, len(batch.rows) // 4)], batch.rows[: max(1, len(batch.rows) // 2)]):
            started = time.perf_counter()
            part = replace(batch, rows=rows)
            for pixels in stepper.prepare([part], 1):
                stepper.add_gradients(part, pixels, 1).tolist()
            times.append((time.perf_counter() - started) / len(rows))
    seconds = [times[-1]]
    if setup.world.size > 1:
        torch.distributed.broadcast_object_list(seconds)
    return seconds[0] / setup.world.size


class Wishes:
    """How many processes wish to stop, on its way from the GPU to the host."""

    def __init__(self, count: Tensor) -> None:
        self._count = count.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    def any(self) -> bool:
        """Whether any does; waits until that is known."""
        self._arrived.synchronize()
        return bool(self._count > 0)


class _Training:
    def __init__(
        self,
        model: TrainableClassifier,
        stepper: Stepper,
        selection: SelectionSet | None,
        checkpoints: Checkpoints,
        callbacks: Callbacks,
        last: int,
    ) -> None:
        self.model, self.stepper, self.selection = model, stepper, selection
        self.checkpoints, self.callbacks, self.last = checkpoints, callbacks, last
        self.params, self.setup = model.params, model.setup
        self.schedule = make_schedule(self.params, sum(batch.closes for batch in stepper.plan(1)))
        self.average = MovingAverage(model.classifier, self.params.ema) if self.params.ema else None
        self.state, self.history = TrainingState(), list[EpochRow]()
        self.last_saved = time.monotonic()
        self._wishes: Wishes | None = None

    # -- epochs ------------------------------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        with fused(self.model.pairs):
            if not self._resume():
                self._score_start()
            while not self.state.finished:
                self._run_epoch()
        return self._result()

    def _score_start(self) -> None:
        started = time.monotonic()
        score = self._score()
        row = EpochRow(
            epoch=0,
            selection_loss=score.loss,
            selection_accuracy=score.accuracy,
            selection_cooled=score.cooled,
            seconds=time.monotonic() - started,
            trainable=self.model.trainable,
            best=True,
        )
        self.checkpoints.save_weights(0, self.model.classifier)
        self._record(row)
        self._save()

    def _run_epoch(self) -> None:
        state, model = self.state, self.model
        model.advance(state.epoch)
        model.train_mode()
        batches = self.stepper.plan(state.epoch)[state.batch :]
        started, seconds_before = time.monotonic(), state.seconds
        sums = torch.tensor(state.sums, dtype=self.stepper.sum_dtype, device=self.setup.device)
        done = sum(len(batch.rows) for batch in batches if batch.counts)
        step_sums = torch.zeros_like(sums)
        for batch, pixels in zip(batches, self.stepper.prepare(batches, state.epoch), strict=True):
            step_sums += self.stepper.add_gradients(batch, pixels, state.epoch)
            if batch.closes:
                self.stepper.step(self.schedule(state.step))
                if self.average:
                    self.average.update()
                stop = self._stops(self._share(step_sums))
                sums += step_sums
                step_sums.zero_()
                state.batch, state.step = batch.index + 1, state.step + 1
                state.seconds = seconds_before + time.monotonic() - started
                self._save_in_epoch(sums, stop=stop)
            self.callbacks.on_batch(len(batch.rows) if batch.counts else 0)
        state.sums = sums.tolist()
        self._finish_epoch(done * self.setup.world.size / max(time.monotonic() - started, 1e-9))

    def _finish_epoch(self, images_per_second: float) -> None:
        state = self.state
        loss, weights, correct, count = state.sums
        with self._averaged():
            score = self._score()
            if state.epoch == 1 or self._improves(score, first=1):
                self.checkpoints.save_weights(state.epoch, self.model.classifier)
        row = EpochRow(
            epoch=state.epoch,
            train_loss=loss / max(weights, 1e-12),
            train_accuracy=correct / max(count, 1),
            selection_loss=score.loss,
            selection_accuracy=score.accuracy,
            selection_cooled=score.cooled,
            seconds=state.seconds,
            images_per_second=images_per_second,
            **highest_rates(self.model.optimizer),
            trainable=self.model.trainable,
            best=self._improves(score, first=0),
        )
        self._record(row)
        state.epoch, state.batch, state.seconds, state.sums = state.epoch + 1, 0, 0.0, [0.0] * 4
        state.finished = state.epoch > self.last or self._stops_early(row)
        self._save()

    def _stops_early(self, row: EpochRow) -> bool:
        selects = self.selection is not None
        if not math.isfinite(row.train_loss or 0.0) or (selects and not math.isfinite(row.selection_loss)):
            self.state.warnings.append(
                f"training diverged in epoch {row.epoch} (loss not finite) and was stopped; lower the learning rates"
            )
            return True
        waited = row.epoch - self._tuned_epoch
        if selects and self.params.patience and waited >= self.params.patience:
            self.state.warnings.append(f"stopped after epoch {row.epoch}: no better for {waited} epochs")
            return True
        return False

    def _share(self, sums: Tensor) -> Tensor | None:
        """Add up the sums of all processes in place; how many were asked to stop, None for a single process."""
        if self.setup.world.size == 1:
            return None
        wish = torch.full((1,), float(bool(self.callbacks.interruption)), dtype=sums.dtype, device=sums.device)
        message = torch.cat([sums, wish])
        torch.distributed.all_reduce(message)
        sums.copy_(message[:4])
        return message[4]

    def _stops(self, wishes: Tensor | None) -> bool:
        """Whether to stop after this step; between GPUs a wish is heard a step later, as none waits to read it."""
        if wishes is None:
            return bool(self.callbacks.interruption)
        if wishes.device.type != "cuda":
            return bool(wishes > 0)
        earlier, self._wishes = self._wishes, Wishes(wishes)
        return earlier is not None and earlier.any()

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied() if self.average else nullcontext()

    # -- history -----------------------------------------------------------------------------------------------------

    def _record(self, row: EpochRow) -> None:
        self.history.append(row)
        self.callbacks.on_epoch(row)

    def _score(self) -> SelectionScore:
        if self.selection is None:
            return SelectionScore(math.nan, math.nan)
        return self.selection.score(self.model.classifier)

    def _improves(self, score: SelectionScore, *, first: int) -> bool:
        """Whether ``score`` is better than all from epoch ``first`` on; every epoch is where nothing selects."""
        return self.selection is None or score.beats(self._best_row(first=first).score, self.params.select)

    def _best_row(self, *, first: int) -> EpochRow:
        if self.selection is None:
            return self.history[-1]
        return max(self.history[first:], key=lambda row: row.score.key(self.params.select))

    @property
    def _tuned_epoch(self) -> int:
        return self._best_row(first=1).epoch if len(self.history) > 1 else 0

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _resume(self) -> bool:
        content = self.checkpoints.load()
        if content is None:
            return False
        self.state = TrainingState(**content["position"])
        self.history = [EpochRow(**row) for row in content["history"]]
        self.model.advance(content["open"])
        self.model.classifier.load_state_dict(content["model"])
        self.model.optimizer.load_state_dict(content["optimizer"])
        self.stepper.scaler.load_state_dict(content["scaler"])
        if self.average:
            self.average.restore(content["average"], content["average_steps"])
        return True

    def _save_in_epoch(self, sums: Tensor, *, stop: bool) -> None:
        due = time.monotonic() - self.last_saved >= 60 * self.params.checkpoint_minutes
        if due or stop:
            self.state.sums = sums.tolist()
            self._save()
        if stop:
            raise Interrupted(
                f"Fine-tuning was stopped in epoch {self.state.epoch} of {self.params.epochs}.",
                where=self.checkpoints.folder,
                remedy="go on with --resume",
            )

    def _save(self) -> None:
        self.last_saved = time.monotonic()
        content = {
            "position": asdict(self.state),
            "history": [asdict(row) for row in self.history],
            "open": self.model.epoch,
            "model": self.model.classifier.state_dict(),
            "optimizer": self.model.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "average": self.average.state() if self.average else {},
            "average_steps": self.average.steps if self.average else 0,
        }
        self.checkpoints.save(content, keep={0, self._tuned_epoch})

    def _result(self) -> TrainingResult:
        epoch = self._tuned_epoch
        start, tuned = self.checkpoints.load_weights(0), self.checkpoints.load_weights(epoch)
        best = max((row.epoch for row in self.history if row.best), default=0)
        result = TrainingResult(start, tuned, best, epoch, tuple(self.history), tuple(self.state.warnings))
        self.model.classifier.load_state_dict(result.best)
        self.model.classifier.eval()
        return result
