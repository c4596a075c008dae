from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import HeadError
from pipeline.heads import Selection, make_head, standardisation
from pipeline.heads.minibatch import Optimizer, Trainer
from pipeline.heads.network import NetworkHead
from pipeline.params import HeadParams, NetworkParams

from .conftest import make_features

NAMES = ["a", "b", "c"]


def network(kind: str = "mlp", search: dict[str, list[object]] | None = None, **values: object) -> NetworkHead:
    values = {"epochs": 40, "batch_size": 32, "lr": 0.01, **values}
    section = {"hidden": [16], "dropout": 0.2, **values} if kind == "mlp" else values
    made = make_head(kind, HeadParams(kind=kind, search=search or {}, **{kind: section}), class_names=NAMES)  # type: ignore[arg-type]
    assert isinstance(made, NetworkHead)
    return made


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_it_learns_and_says_how(kind: str, optimizer: str) -> None:
    X, y = make_features(spread=2.0)
    fitted = network(kind, optimizer=optimizer).fit(X, y)
    assert (fitted.predict(X) == y).mean() > 0.9
    search = [row for row in fitted.history if row["phase"] == "search"]
    refit = [row for row in fitted.history if row["phase"] == "refit"]
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= set(search[0])
    best = min(search, key=lambda row: row["val_loss"])
    assert len(refit) == fitted.selected["epochs"] == best["epoch"]
    assert fitted.selected["val_loss"] == best["val_loss"]
    assert fitted.selections == (Selection("the number of epochs", "on a held-out part", "train"),)


def test_patience_stops_the_search() -> None:
    X, y = make_features(spread=0.1)
    fitted = network(lr=0.1, patience=3, epochs=200).fit(X, y)
    searched = sum(row["phase"] == "search" for row in fitted.history)
    assert searched == fitted.selected["epochs"] + 3 < 200


def test_one_seed_gives_the_same_bits_and_another_does_not() -> None:
    X, y = make_features()
    torch.manual_seed(1)
    first = network().fit(X, y).predict_proba(X)
    torch.manual_seed(2)
    assert network().fit(X, y).predict_proba(X).tobytes() == first.tobytes()
    other = NetworkHead("mlp", network().params.model_copy(update={"seed": 1}), class_names=NAMES).fit(X, y)
    assert other.predict_proba(X).tobytes() != first.tobytes()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_layers_are_what_was_trained_on_raw_features(kind: str) -> None:
    X, y = make_features()
    fitted = network(kind, epochs=3).fit(X, y)
    layers = fitted.as_layers()
    assert layers.dropout == fitted.network.dropout
    assert fitted.parameter_count() == (24 * 3 + 3 if kind == "linear" else 24 * 16 + 16 + 16 * 3 + 3)
    mean, scale = standardisation(X, True)
    trainer = Trainer(fitted, X, y, np.ones(3), (mean, scale), "refit")
    for _ in range(fitted.selected["epochs"]):
        trainer.epoch()
    trained = trainer._forward(trainer.X, training=False).detach().numpy()
    assert np.allclose(trained, layers.logits(X), atol=1e-3)


def test_duplicates_do_not_cross_into_the_held_out_part() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 10)).astype(np.float32), rng.integers(0, 3, 40)
    y[:3] = [0, 1, 2]
    X, y, groups = np.repeat(X, 5, axis=0), np.repeat(y, 5), np.repeat(np.arange(40), 5)
    torn, kept = network(epochs=60).fit(X, y), network(epochs=60).fit(X, y, groups)
    assert kept.selected["val_accuracy"] < torn.selected["val_accuracy"]


def test_class_weights_move_the_prediction() -> None:
    X, y = make_features(200, 8, 2, spread=0.2)
    params = HeadParams(linear=NetworkParams(epochs=30, lr=0.01), class_weight={"b": 20.0})
    plain, weighted = (
        NetworkHead("linear", chosen, class_names=NAMES).fit(X, y)
        for chosen in (params.model_copy(update={"class_weight": None}), params)
    )
    assert (weighted.predict(X) == 1).sum() > (plain.predict(X) == 1).sum()


def test_one_image_a_class_trains_without_early_stopping() -> None:
    X, y = np.eye(3, 8, dtype=np.float32), np.arange(3)
    fitted = network("linear", epochs=5).fit(X, y)
    assert fitted.selected["epochs"] == 5 and "without early stopping" in fitted.warnings[0]
    assert fitted.selections == ()


def test_search_takes_the_better_rate_and_refuses_unknown_names() -> None:
    X, y = make_features(spread=2.0)
    fitted = network("linear", {"lr": [1e-7, 0.01]}, epochs=10).fit(X, y)
    assert fitted.selected["params"] == {"lr": 0.01} and len(fitted.selected["search"]) == 2
    with pytest.raises(HeadError, match="no parameter 'rate'"):
        network("linear", {"rate": [1.0]})
    with pytest.raises(HeadError, match="impossible"):
        network("linear", {"lr": [-1.0]})


def test_calibration_is_recorded_and_keeps_predictions() -> None:
    X, y = make_features()
    section = NetworkParams(epochs=20, lr=0.01)
    plain, cooled = (
        NetworkHead("linear", HeadParams(calibrate=mode, folds=3, linear=section), class_names=NAMES).fit(X, y)
        for mode in ("none", "temperature")
    )
    assert {"temperature", "ece_before", "ece_after"} <= set(cooled.selected)
    assert (plain.predict(X) == cooled.predict(X)).all()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_optimisers_are_those_of_torch(name: str) -> None:
    params = NetworkParams(optimizer=name, lr=0.05, weight_decay=0.1)  # type: ignore[arg-type]
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    reference = kind([theirs], lr=0.05, weight_decay=0.1, **({"momentum": 0.9} if name == "sgd" else {}))
    own = Optimizer([ours], params)
    for _ in range(5):
        for value in (ours, theirs):
            value.grad = None
            (value.pow(4) + value).sum().backward()
        own.step()
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)
