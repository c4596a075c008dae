"""The training loop: epochs, steps, the best epoch, checkpoints from which a killed training goes on bit for bit."""

from __future__ import annotations

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
from ..runtime.distributed import World
from ..runtime.interrupt import Interruption
from ..runtime.memory import reuse_freed_memory
from .averaging import MovingAverage, StateDict, interpolate
from .batchnorm import fused
from .checkpoint import Checkpoints
from .classifier import Classifier
from .groups import highest_rates, make_schedule
from .history import EpochRow
from .images import LabelledImages, PixelTransform
from .selection import SelectionSet
from .step import Setup, Stepper, TrainableClassifier


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
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def train_classifier(
    classifier: Classifier,
    train: LabelledImages,
    selection: LabelledImages,
    transform: PixelTransform,
    params: FinetuneParams,
    setup: Setup,
    *,
    folder: Path,
    fingerprint: str,
    callbacks: Callbacks | None = None,
) -> TrainingResult:
    """Train, or go on from the checkpoint in ``folder``; ``classifier`` ends up holding the best weights.

    The best epoch is that of the highest accuracy on ``selection``, of equal ones that of the lower loss. The random
    state of torch is left as it was.

    Args:
        fingerprint: of all that the result depends on; a checkpoint with another one is refused.

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
        scorer = SelectionSet(selection, transform, params, setup)
        return _Training(model, Stepper(model, train, transform), scorer, checkpoints, callbacks or Callbacks()).run()


def interpolate_result(
    result: TrainingResult,
    classifier: Classifier,
    train: LabelledImages,
    selection: LabelledImages,
    transform: PixelTransform,
    params: FinetuneParams,
    setup: Setup,
) -> tuple[TrainingResult, float]:
    """The result with the best point between its start and end as ``tuned``, and that point's share; in float32."""
    scorer = SelectionSet(selection, transform, params, replace(setup, dtype=torch.float32))
    everything = SelectionSet(train, transform, params, replace(setup, world=World()))

    def images() -> Iterator[Tensor]:
        for batch in everything.pixels():
            yield transform.normalise(batch.to(setup.device), torch.float32)

    share, state = interpolate(classifier, result.start, result.tuned, scorer.score, images=images)
    return replace(result, tuned=state, best_epoch=result.tuned_epoch if share else 0), share


class _Training:
    def __init__(
        self,
        model: TrainableClassifier,
        stepper: Stepper,
        selection: SelectionSet,
        checkpoints: Checkpoints,
        callbacks: Callbacks,
    ) -> None:
        self.model, self.stepper, self.selection = model, stepper, selection
        self.checkpoints, self.callbacks = checkpoints, callbacks
        self.params, self.setup = model.params, model.setup
        self.schedule = make_schedule(self.params, sum(batch.closes for batch in stepper.plan(1)))
        self.average = MovingAverage(model.classifier, self.params.ema) if self.params.ema else None
        self.state, self.history = TrainingState(), list[EpochRow]()
        self.last_saved = time.monotonic()

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
        score = self.selection.score(self.model.classifier)
        row = EpochRow(
            epoch=0,
            selection_loss=score.loss,
            selection_accuracy=score.accuracy,
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
                stop = self._share(step_sums)
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
            score = self.selection.score(self.model.classifier)
            if state.epoch == 1 or score.beats(self._best_row(first=1).score):
                self.checkpoints.save_weights(state.epoch, self.model.classifier)
        row = EpochRow(
            epoch=state.epoch,
            train_loss=loss / max(weights, 1e-12),
            train_accuracy=correct / max(count, 1),
            selection_loss=score.loss,
            selection_accuracy=score.accuracy,
            seconds=state.seconds,
            images_per_second=images_per_second,
            **highest_rates(self.model.optimizer),
            trainable=self.model.trainable,
            best=score.beats(self._best_row(first=0).score),
        )
        self._record(row)
        state.epoch, state.batch, state.seconds, state.sums = state.epoch + 1, 0, 0.0, [0.0] * 4
        state.finished = state.epoch > self.params.epochs or self._stops_early(row)
        self._save()

    def _stops_early(self, row: EpochRow) -> bool:
        if not math.isfinite(row.train_loss or 0.0) or not math.isfinite(row.selection_loss):
            self.state.warnings.append(
                f"training diverged in epoch {row.epoch} (loss not finite) and was stopped; lower the learning rates"
            )
            return True
        waited = row.epoch - self._tuned_epoch
        if self.params.patience and waited >= self.params.patience:
            self.state.warnings.append(f"stopped after epoch {row.epoch}: no better for {waited} epochs")
            return True
        return False

    def _share(self, sums: Tensor) -> bool:
        """Add up the sums of all processes in place; whether any of them was asked to stop."""
        stop = bool(self.callbacks.interruption)
        if self.setup.world.size == 1:
            return stop
        message = torch.cat([sums, sums.new_tensor([float(stop)])])
        torch.distributed.all_reduce(message)
        sums.copy_(message[:4])
        return bool(message[4] > 0)

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied() if self.average else nullcontext()

    # -- history -----------------------------------------------------------------------------------------------------

    def _record(self, row: EpochRow) -> None:
        self.history.append(row)
        self.callbacks.on_epoch(row)

    def _best_row(self, *, first: int) -> EpochRow:
        return max(self.history[first:], key=lambda row: row.score.key)

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
