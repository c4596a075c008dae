"""The training loop: epochs, steps, best state, checkpoints from which a killed run goes on bit for bit."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import torch
from torch import Tensor

from ..errors import Interrupted
from ..files import file_lock
from ..params.sections import FinetuneParams
from ..runtime.memory import reuse_freed_memory
from .batchnorm import fused
from .checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from .classifier import Classifier
from .contract import Outcome, Position, Setting, State, Watch
from .ema import MovingAverage
from .history import EpochRow, Score
from .images import LabelledImages, PixelTransform
from .network import TrainingNetwork
from .parallel import by_main
from .schedule import make_schedule
from .selection import SelectionSet
from .steps import Stepper


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
        self.params, self.setting, self.watch, self.world = params, setting, watch, setting.world
        self.network = TrainingNetwork(
            classifier, params, device=setting.device, batchnorm=setting.batchnorm, world=self.world
        )
        self.stepper = Stepper(self.network, train, transform, class_weights=setting.class_weights, dtype=setting.dtype)
        self.selection = SelectionSet(selection, transform, setting.device, params, world=self.world)
        self.schedule = make_schedule(params, sum(batch.closes for batch in self.stepper.plan(1)))
        self.average = MovingAverage(self.network.classifier, params.ema) if params.ema else None
        self.fingerprint = f"{setting.fingerprint}/{self.world.size}"
        self.position, self.history = Position(), list[EpochRow]()
        self.last_saved = time.monotonic()

    # -- epochs ------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        with fused(self.network.pairs):
            if not self._resume():
                self._begin()
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
        batches = self.stepper.plan(position.epoch)[position.batch :]
        started, seconds_before = time.monotonic(), position.seconds
        sums = torch.tensor(position.sums, dtype=self.stepper.sum_dtype, device=self.setting.device)
        done = sum(len(batch.rows) for batch in batches if batch.counts)
        step_sums = torch.zeros_like(sums)
        for batch, pixels in zip(batches, self.stepper.prepare(batches, position.epoch), strict=True):
            step_sums += self.stepper.add_gradients(batch, pixels, position.epoch)
            if batch.closes:
                self.stepper.step(self.schedule(position.step))
                if self.average:
                    self.average.update()
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
        rates = self._rates()
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
        folder = self.setting.folder
        content = by_main(self.world, lambda: load_checkpoint(folder, fingerprint=self.fingerprint))
        if content is None:
            return False
        self.position = Position(**content["position"])
        self.history = [EpochRow(**row) for row in content["history"]]
        self.network.advance(content["open"])
        self.network.classifier.load_state_dict(content["model"])
        self.network.optimizer.load_state_dict(content["optimizer"])
        self.stepper.scaler.load_state_dict(content["scaler"])
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
            "optimizer": self.network.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
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
        folder, epoch = self.setting.folder, self._tuned_epoch()
        start, tuned = by_main(self.world, lambda: (load_state(folder, 0), load_state(folder, epoch)))
        best = max((row.epoch for row in self.history if row.best), default=0)
        outcome = Outcome(start, tuned, best, epoch, tuple(self.history), tuple(self.position.warnings))
        self.network.classifier.load_state_dict(outcome.best)
        self.network.classifier.eval()
        return outcome

    # -- small things ------------------------------------------------------------------------------------------------

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied() if self.average else nullcontext()

    def _score(self) -> Score:
        with self._averaged():
            return self.selection.score(self.network.classifier, self.setting.dtype)

    def _rates(self) -> dict[str, float]:
        """The highest rate of the head and of the backbone."""
        rates: dict[str, float] = {}
        for group in self.network.optimizer.param_groups:
            part = "head" if group["name"].startswith("head") else "backbone"
            rates[part] = max(rates.get(part, 0.0), group["lr"])
        return rates

    def _best_row(self, first: int) -> EpochRow:
        return max(self.history[first:], key=lambda row: row.score.key)

    def _best_score(self, first: int) -> Score:
        return self._best_row(first).score

    def _tuned_epoch(self) -> int:
        return self._best_row(1).epoch if len(self.history) > 1 else 0

    def _record(self, row: EpochRow) -> None:
        self.history.append(row)
        self.watch.on_epoch(row)
