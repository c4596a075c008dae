"""Bring the outcomes of torchrun's processes together on every rank."""

from __future__ import annotations

import torch.distributed as dist

from ..features.ledger import Outcome, merge_outcomes
from ..runtime.distributed import World


def gather_outcomes(outcome: Outcome, world: World) -> Outcome:
    """The merged outcome of all processes that torchrun started; a shard of a job array has only its own."""
    if world.size == 1 or not dist.is_torchelastic_launched():
        return outcome
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    outcomes: list[Outcome | None] = [None] * world.size
    dist.all_gather_object(outcomes, outcome)
    dist.destroy_process_group()
    return merge_outcomes([each for each in outcomes if each is not None])
