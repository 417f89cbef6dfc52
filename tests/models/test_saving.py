"""Learners on disk: what is written comes back, and strangers' files do no more than fail with a clear message."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from metalearn.models.recurrent import LSTM
from metalearn.models.saving import CARD, PREFIX, describe, load_learner, rebuild, save_learner
from metalearn.models.tokens import Tokens
from metalearn.models.transformer import POSITIONS, Transformer

SMALL = dict(width=12, depth=1, heads=2, head_width=4)
LEARNERS = [(Transformer, SMALL | dict(positions=p, max_length=9)) for p in POSITIONS] + [
    (LSTM, dict(width=6, depth=2))
]


class Stranger(LSTM):
    """A learner outside metalearn.models."""


def card_of(learner, tokens="shift"):
    return {"learner": describe(learner), "tokens": tokens, "num_features": 4, "num_classes": 3, "length": 8}


def build(kind=LSTM, **arguments):
    return kind(Tokens("shift", 4, 3).width, 3, **arguments)


@pytest.fixture
def lstm():
    return build(width=6)


def save_lightning(path, learner, **changes):
    """A file as Lightning writes it, with changed entries."""
    weights = {PREFIX + name: value for name, value in learner.state_dict().items()}
    torch.save({"state_dict": weights, CARD: card_of(learner), "epoch": 0} | changes, path)
    return path


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize(("kind", "arguments"), LEARNERS)
def test_brings_back_the_same_function_in_evaluation_mode(tmp_path, kind, arguments, suffix):
    learner, path = build(kind, **arguments), tmp_path / "folder" / f"learner.{suffix}"
    if suffix == "ckpt":
        path.parent.mkdir()
        save_lightning(path, learner)
    else:
        save_learner(path, learner, card_of(learner))
    again, card, further = load_learner(path)
    x = torch.randn(2, 5, learner.num_inputs)
    assert type(again) is kind and not again.training and card == card_of(learner) and further == {}
    assert torch.equal(again(x), learner(x))


def test_keeps_further_tensors_and_numpys_integers_and_leaves_no_partial_file(tmp_path, lstm):
    path = tmp_path / "learner.safetensors"
    save_learner(path, lstm, card_of(lstm) | {"step": np.int64(3)}, {"fit.a": torch.arange(3)})
    _, card, further = load_learner(path)
    assert card["step"] == 3 and torch.equal(further["fit.a"], torch.arange(3))
    assert os.listdir(tmp_path) == ["learner.safetensors"]


def test_leaves_the_callers_random_numbers_alone(tmp_path, lstm):
    save_learner(tmp_path / "a.safetensors", lstm, card_of(lstm))
    before = torch.get_rng_state()
    load_learner(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "metalearn.base.Learner",
        "metalearn.models.transformer.math",
        "metalearn.models.transformer.torch.hub.load",
        "metalearn.models.transformer.Learner",
        "metalearn.models.transformer.Block",
        "metalearn.models.transformer.sinusoids",
        "metalearn.models.absent.Transformer",
        "metalearn.models..transformer.Transformer",
        "metalearn.models.Transformer",
        "metalearn.models.../os.system",
        "metalearn.models",
        "",
        None,
        3,
        ["os", "system"],
    ],
)
def test_builds_nothing_but_own_learners(path):
    with pytest.raises(ValueError, match=r"accepted: a Learner under metalearn\.models, or one passed"):
        rebuild({"class_path": path, "init_args": {}})


def test_builds_a_stranger_only_when_trusted(tmp_path):
    learner, path = build(Stranger, width=6), tmp_path / "stranger.safetensors"
    save_learner(path, learner, card_of(learner))
    with pytest.raises(ValueError, match=r"Stranger'; accepted"):
        load_learner(path)
    assert type(load_learner(path, [Stranger])[0]) is Stranger


SIZES = dict(num_inputs=11, num_outputs=3)
BAD_WIDTHS = ("6", 0, 2.5, None, 2**62, [6])


@pytest.mark.parametrize(
    "arguments", [None, 3, [6], {}, {"width": 6}, SIZES | {"extra": 1}, *(SIZES | {"width": w} for w in BAD_WIDTHS)]
)
def test_refuses_arguments_that_the_learner_does_not_take(arguments):
    with pytest.raises(ValueError, match=r"LSTM with .* which fails"):
        rebuild({"class_path": "metalearn.models.recurrent.LSTM", "init_args": arguments})


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learner": "metalearn.models.recurrent.LSTM"}, "does not say which learner"),
        ({"learner": {}}, "learner is 'None'"),
        ({"tokens": 3}, "does not say"),
        ({"tokens": "words"}, "'words'; accepted: 'paper'"),
        ({"num_features": "4"}, "does not say"),
        ({"num_features": 10**15}, "takes 11 inputs to 3 outputs; accepted with its tokens"),
        ({"num_features": -4}, "num_features is -4"),
        ({"num_classes": 2}, "accepted with its tokens: 10 to 2"),
        ({"length": None}, "does not say"),
    ],
)
def test_refuses_a_card_that_does_not_fit(tmp_path, lstm, suffix, change, message):
    card, path = card_of(lstm) | change, tmp_path / f"bad.{suffix}"
    if suffix == "ckpt":
        save_lightning(path, lstm, **{CARD: card})
    else:
        save_learner(path, lstm, card)
    with pytest.raises(ValueError, match=message):
        load_learner(path)


@pytest.mark.parametrize("card", ["", "null", "[]", "{", "[" * 100_000, '"card"'])
def test_refuses_a_header_that_is_no_card(tmp_path, card):
    save_file({"learner.w": torch.zeros(1)}, tmp_path / "bad.safetensors", metadata={CARD: card})
    with pytest.raises(ValueError, match=r"not a readable safetensors file|does not say which learner"):
        load_learner(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("broken", ["shape", "missing", "unexpected"])
def test_refuses_the_weights_of_another_learner(tmp_path, lstm, broken):
    weights = {PREFIX + name: value.clone() for name, value in lstm.state_dict().items()}
    if broken == "shape":
        weights[PREFIX + "head.bias"] = torch.zeros(7)
    elif broken == "missing":
        del weights[PREFIX + "head.bias"]
    else:
        weights[PREFIX + "tail.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "bad.safetensors", metadata={CARD: json.dumps(card_of(lstm))})
    with pytest.raises(ValueError, match=r"weights are of another learner.*(?s:.*)(head|tail)\.bias"):
        load_learner(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("weights", [None, [1], {3: torch.zeros(1)}, {"learner.head.bias": "zeros"}])
def test_refuses_a_lightning_file_without_tensors(tmp_path, lstm, weights):
    with pytest.raises(ValueError, match="does not say which learner"):
        load_learner(save_lightning(tmp_path / "bad.ckpt", lstm, state_dict=weights))


class Attack:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return open, (os.environ["METALEARN_ATTACK"], "w")


def test_runs_no_code_from_a_pickle(tmp_path, lstm, monkeypatch):
    monkeypatch.setenv("METALEARN_ATTACK", str(tmp_path / "owned"))
    save_lightning(tmp_path / "attack.ckpt", lstm, payload=Attack())
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Attack()))
    for name in ("attack.ckpt", "raw.ckpt"):
        with pytest.raises(ValueError, match="not a checkpoint that loads with weights_only=True"):
            load_learner(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["absent.ckpt", "absent.safetensors", "."])
def test_names_a_missing_file(tmp_path, name):
    with pytest.raises(ValueError, match=r"no checkpoint at .*; accepted: a \.ckpt or \.safetensors file"):
        load_learner(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"garbage" * 9])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_refuses_other_files(tmp_path, content, suffix):
    path = tmp_path / f"other.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.\w+' is not a"):
        load_learner(path)
