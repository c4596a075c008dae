"""The training loop: epochs, steps, best state, checkpoints from which a killed run goes on bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import Interrupted
from ..files import file_lock
from ..params.sections import FinetuneParams
from ..runtime.distributed import World
from ..runtime.interrupt import Interruption
from ..runtime.memory import reuse_freed_memory
from ..runtime.seeds import derive_seed
from .augment import Augment
from .batches import Batch, plan_epoch, prepare_batches, resolve_workers
from .batchnorm import fused
from .checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from .classifier import Classifier
from .ema import MovingAverage
from .history import EpochRow, Score
from .images import CachedImages, LabelledImages, PixelTransform, cache_budget
from .mixing import mix_images
from .network import BatchNormMode, TrainingNetwork
from .objective import correct_sum, make_objective
from .optimizer import set_rates
from .schedule import make_schedule
from .selection import SelectionSet, autocast

State = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Where and how a training runs; resolved, nothing ``auto``.

    Attributes:
        folder: of the checkpoints.
        fingerprint: of all that the result depends on (params, data, starting weights); a checkpoint with another
            one is refused.
        dtype: of mixed precision; float32 for none.
        class_weights: (c,), or None.
    """

    folder: Path
    fingerprint: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batchnorm: BatchNormMode = "frozen"
    class_weights: NDArray[np.floating] | None = None
    world: World = field(default_factory=World)


@dataclass(frozen=True)
class Watch:
    """Who looks on: called after each epoch (row) and each batch (images done), and able to stop the training."""

    on_epoch: Callable[[EpochRow], None] = lambda row: None
    on_batch: Callable[[int], None] = lambda count: None
    interruption: Interruption = field(default_factory=Interruption)


@dataclass(frozen=True)
class Outcome:
    """States are on the CPU, by the classifier's parameter names.

    Attributes:
        start, tuned: the state before any step, and that of the best epoch after it.
        best_epoch: 0 where no epoch beats the start.
    """

    start: State
    tuned: State
    best_epoch: int
    tuned_epoch: int
    history: tuple[EpochRow, ...]
    warnings: tuple[str, ...]

    @property
    def best(self) -> State:
        """The better of the two on the selection set."""
        return self.tuned if self.best_epoch else self.start


@dataclass
class Position:
    """How far the training is; all of it goes into the checkpoint."""

    epoch: int = 1
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)  # loss, weights, correct, images of this epoch
    finished: bool = False
    warnings: list[str] = field(default_factory=list)


def train_classifier(
    classifier: Classifier,
    train: LabelledImages,
    selection: LabelledImages,
    transform: PixelTransform,
    params: FinetuneParams,
    setting: Setting,
    *,
    watch: Watch | None = None,
) -> Outcome:
    """Train, or go on from the checkpoint in ``setting.folder``; ``classifier`` ends up holding the best state.

    The best epoch is that of the highest accuracy on ``selection``, of equal ones that of the lower loss. The random
    state of torch is left as it was.

    Raises:
        FinetuneError: nothing trains, or the checkpoint belongs to another run.
        Interrupted: the user stopped it; the checkpoint is up to date.
        BlockingIOError: another process trains in that folder.
    """
    devices = [setting.device] if setting.device.type == "cuda" else []
    alone = (
        file_lock(setting.folder / ".lock", shared=False, blocking=False) if setting.world.is_main else nullcontext()
    )
    reuse_freed_memory()
    with alone, torch.random.fork_rng(devices=devices):
        return _Training(classifier, train, selection, transform, params, setting, watch or Watch()).run()


class _Training:
    def __init__(
        self,
        classifier: Classifier,
        train: LabelledImages,
        selection: LabelledImages,
        transform: PixelTransform,
        params: FinetuneParams,
        setting: Setting,
        watch: Watch,
    ) -> None:
        self.params, self.setting, self.watch, self.transform = params, setting, watch, transform
        self.device, self.world = setting.device, setting.world
        budget = cache_budget(params.image_cache_mb)
        self.selection = SelectionSet(
            selection, transform, device=self.device, batch_size=params.batch_size, budget=budget, world=self.world
        )
        self.source, self.targets = CachedImages(train.source, budget), train.targets
        self.augment = Augment(
            params.augment, size=transform.crop, interpolation=transform.interpolation, fill=transform.mean
        )
        self.workers = resolve_workers(params.workers, self.device)
        self.network = TrainingNetwork(
            classifier, params, device=self.device, batchnorm=setting.batchnorm, world=self.world
        )
        self.objective = make_objective(params.label_smoothing, setting.class_weights, self.device)
        steps = math.ceil(len(train) / (params.batch_size * self.world.size * params.accumulate))
        self.schedule = make_schedule(params, steps)
        self.average = MovingAverage(self.network.classifier, params.ema) if params.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=setting.dtype == torch.float16)
        self.fingerprint = f"{setting.fingerprint}/{self.world.size}"
        self.position, self.history = Position(), list[EpochRow]()
        self.last_saved = time.monotonic()

    # -- epochs ------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        if not self._resume():
            self._begin()
        with fused(self.network.pairs):
            while not self.position.finished:
                self._run_epoch()
        return self._outcome()

    def _begin(self) -> None:
        started = time.monotonic()
        score = self.selection.score(self.network.classifier, self.setting.dtype)
        row = EpochRow(
            epoch=0,
            train_loss=None,
            train_accuracy=None,
            selection_loss=score.loss,
            selection_accuracy=score.accuracy,
            seconds=time.monotonic() - started,
            images_per_second=None,
            head_lr=None,
            backbone_lr=None,
            trainable=self.network.trainable,
            best=True,
        )
        if self.world.is_main:
            save_state(self.setting.folder, 0, self._state())
        self._record(row)
        self._save()

    def _run_epoch(self) -> None:
        position, network = self.position, self.network
        network.advance(position.epoch)
        network.train_mode()
        batches = plan_epoch(
            len(self.targets),
            batch_size=self.params.batch_size,
            accumulate=self.params.accumulate,
            seed=self.params.seed,
            epoch=position.epoch,
            world=self.world,
        )[position.batch :]
        started, seconds_before = time.monotonic(), position.seconds
        sums = torch.tensor(position.sums, dtype=self._sum_dtype, device=self.device)
        done = sum(len(batch.rows) for batch in batches if batch.counts)
        step_sums = torch.zeros_like(sums)
        for batch, pixels in zip(batches, self._prepare(batches), strict=True):
            step_sums += self._backward(batch, pixels)
            if batch.closes:
                self._step()
                stop = self._share(step_sums)
                sums += step_sums
                step_sums.zero_()
                position.batch, position.step = batch.index + 1, position.step + 1
                position.seconds = seconds_before + time.monotonic() - started
                self._save_in_epoch(sums, stop=stop)
            self.watch.on_batch(len(batch.rows) if batch.counts else 0)
        position.sums = sums.tolist()
        rate = done * self.world.size / max(time.monotonic() - started, 1e-9)
        self._finish_epoch(rate)

    def _finish_epoch(self, images_per_second: float) -> None:
        position = self.position
        loss, weights, correct, count = position.sums
        score = self._score()
        rates = {group["name"].split(".")[0].split(" ")[0]: group["lr"] for group in self._optimizer.param_groups}
        row = EpochRow(
            epoch=position.epoch,
            train_loss=loss / max(weights, 1e-12),
            train_accuracy=correct / max(count, 1),
            selection_loss=score.loss,
            selection_accuracy=score.accuracy,
            seconds=position.seconds,
            images_per_second=images_per_second,
            head_lr=rates.get("head"),
            backbone_lr=rates.get("backbone"),
            trainable=self.network.trainable,
            best=score.beats(self._best_score(first=0)),
        )
        if self.world.is_main and (position.epoch == 1 or score.beats(self._best_score(first=1))):
            with self._averaged():
                save_state(self.setting.folder, position.epoch, self._state())
        self._record(row)
        position.epoch, position.batch, position.seconds, position.sums = position.epoch + 1, 0, 0.0, [0.0] * 4
        position.finished = position.epoch > self.params.epochs or self._stops_early(row)
        self._save()

    def _stops_early(self, row: EpochRow) -> bool:
        if not math.isfinite(row.train_loss or 0.0) or not math.isfinite(row.selection_loss):
            self.position.warnings.append(
                f"training diverged in epoch {row.epoch} (loss not finite) and was stopped; lower the learning rates"
            )
            return True
        waited = row.epoch - self._tuned_epoch()
        if self.params.patience and waited >= self.params.patience:
            self.position.warnings.append(f"stopped after epoch {row.epoch}: no better for {waited} epochs")
            return True
        return False

    # -- steps -------------------------------------------------------------------------------------------------------

    def _prepare(self, batches: list[Batch]) -> Iterator[Tensor]:
        epoch, seed = self.position.epoch, self.params.seed

        def pixels_of(row: int) -> NDArray[np.uint8]:
            digest = self.source.digest(row)
            return self.augment.pixels(self.source.image(row), seed=seed, epoch=epoch, digest=digest)

        return prepare_batches(
            [batch.rows for batch in batches],
            pixels_of,
            size=self.augment.size,
            workers=self.workers,
            pin=self.device.type == "cuda",
        )

    def _backward(self, batch: Batch, pixels: Tensor) -> Tensor:
        """Add the batch's gradients; its sums of (loss, weights, correct, images)."""
        params, rank, epoch = self.params, self.world.rank, self.position.epoch
        torch.manual_seed(derive_seed(params.seed, "batch", epoch, batch.index, rank))  # dropout
        images = self.transform.normalise(pixels.to(self.device, non_blocking=True), torch.float32)
        images = images.contiguous(memory_format=torch.channels_last)
        targets = torch.from_numpy(self.targets[batch.rows]).to(self.device, non_blocking=True)
        mix = mix_images(
            images,
            mixup=params.mixup,
            cutmix=params.cutmix,
            seed=params.seed,
            epoch=epoch,
            batch=batch.index,
            rank=rank,
        )
        with self.network.gradient_sync(batch.closes):
            with autocast(self.device, self.setting.dtype):
                logits = self.network.forward(images if mix is None else mix.images)
            loss = self.objective.loss_sum(logits.float(), targets, mix)
            # Processes average their gradients; a borrowed image has no say.
            share = self.world.size / self.objective.weight_sum(self.targets[batch.step_rows]) if batch.counts else 0.0
            self.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
        weight = self.objective.weight_sum(self.targets[batch.rows])
        sums = [loss.detach(), weight, correct_sum(logits, targets, mix), len(batch.rows)]
        total = torch.stack([torch.as_tensor(value, device=self.device).to(self._sum_dtype) for value in sums])
        return total * float(batch.counts)

    def _step(self) -> None:
        optimizer = self._optimizer
        set_rates(optimizer, self.schedule(self.position.step))
        if self.params.clip_norm:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters, self.params.clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()

    def _share(self, sums: Tensor) -> bool:
        """Add up the sums of all processes in place; whether any of them was asked to stop."""
        stop = bool(self.watch.interruption)
        if self.world.size == 1:
            return stop
        message = torch.cat([sums, sums.new_tensor([float(stop)])])
        torch.distributed.all_reduce(message)
        sums.copy_(message[:4])
        return bool(message[4] > 0)

    # -- states ------------------------------------------------------------------------------------------------------

    def _resume(self) -> bool:
        content = load_checkpoint(self.setting.folder, fingerprint=self.fingerprint)
        if content is None:
            return False
        self.position = Position(**content["position"])
        self.history = [EpochRow(**row) for row in content["history"]]
        self.network.advance(content["open"])
        self.network.classifier.load_state_dict(content["model"])
        self._optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.average:
            self.average.restore(content["average"], content["average_steps"])
        return True

    def _save_in_epoch(self, sums: Tensor, *, stop: bool) -> None:
        due = time.monotonic() - self.last_saved >= 60 * self.params.checkpoint_minutes
        if due or stop:
            self.position.sums = sums.tolist()
            self._save()
        if stop:
            raise Interrupted(
                f"Fine-tuning was stopped in epoch {self.position.epoch} of {self.params.epochs}.",
                where=self.setting.folder,
                remedy="go on with --resume",
            )

    def _save(self) -> None:
        self.last_saved = time.monotonic()
        if not self.world.is_main:
            return
        content = {
            "fingerprint": self.fingerprint,
            "position": asdict(self.position),
            "history": [asdict(row) for row in self.history],
            "open": self.network.epoch,
            "model": self.network.classifier.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state() if self.average else {},
            "average_steps": self.average.steps if self.average else 0,
        }
        save_checkpoint(self.setting.folder, content, states={0, self._tuned_epoch()})

    def _state(self) -> State:
        state = self.network.classifier.state_dict()
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()
        }

    def _outcome(self) -> Outcome:
        start, tuned = load_state(self.setting.folder, 0), load_state(self.setting.folder, self._tuned_epoch())
        best = max((row.epoch for row in self.history if row.best), default=0)
        outcome = Outcome(start, tuned, best, self._tuned_epoch(), tuple(self.history), tuple(self.position.warnings))
        self.network.classifier.load_state_dict(outcome.best)
        self.network.classifier.eval()
        return outcome

    # -- small things ------------------------------------------------------------------------------------------------

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        assert self.network.optimizer is not None
        return self.network.optimizer

    @property
    def _sum_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied() if self.average else nullcontext()

    def _score(self) -> Score:
        with self._averaged():
            return self.selection.score(self.network.classifier, self.setting.dtype)

    def _best_row(self, first: int) -> EpochRow:
        return max(self.history[first:], key=lambda row: row.score.key)

    def _best_score(self, first: int) -> Score:
        return self._best_row(first).score

    def _tuned_epoch(self) -> int:
        return self._best_row(1).epoch if len(self.history) > 1 else 0

    def _record(self, row: EpochRow) -> None:
        self.history.append(row)
        self.watch.on_epoch(row)
