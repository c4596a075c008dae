"""The head as a module and back as layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.finetune.classifier import Standardise, fold_head, make_head_module, make_random_head
from pipeline.heads import Layers


@pytest.mark.parametrize("widths", [(5, 3), (5, 7, 3)])
def test_head_module_and_folded_layers_agree(widths: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    pairs = zip(widths[1:], widths[:-1], strict=True)
    layers = [(random.normal(size=pair), random.normal(size=pair[0])) for pair in pairs]
    mean, scale = random.normal(size=5), random.uniform(0.5, 2, size=5)
    stacked = Layers(*(tuple(arrays) for arrays in zip(*layers, strict=True)))
    head = make_head_module(stacked, moments=(mean, scale), dropout=0.3).eval()
    assert "mean" not in dict(head.named_parameters()) and any(isinstance(part, Standardise) for part in head)
    X = random.normal(size=(6, 5))
    expected = (X - mean) / scale
    for position, (weight, bias) in enumerate(layers):
        expected = expected @ weight.T + bias
        if position < len(layers) - 1:
            expected = np.maximum(expected, 0)
    with torch.no_grad():
        np.testing.assert_allclose(head(torch.tensor(X, dtype=torch.float32)).numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(fold_head(head).logits(X), expected, atol=1e-4)


def test_random_heads_depend_on_their_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (make_random_head(4, 2, hidden=[3], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.linear0.weight, again.linear0.weight)
    assert not torch.equal(first.linear0.weight, other.linear0.weight)
