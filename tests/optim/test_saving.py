import json
import socket
from typing import ClassVar

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from metalearn import files, random
from metalearn.optim import saving
from metalearn.optim.learned import LearnedRule
from metalearn.optim.mlp import MLPRule
from metalearn.optim.saving import CARD, describe, load_rule, save_rule
from metalearn.optim.small_mlp import SmallMLP


class Foreign(LearnedRule):
    version: ClassVar[int] = 3

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def init_meta(self, key):
        return {"scale": random.normal(key, (self.size,))}

    def start(self, meta, layout, params_P):
        return {}

    def direction(self, meta, layout, grads_P, state, params_P, loss):
        return meta["scale"].sum() * grads_P, state


@pytest.fixture
def rule():
    rule = SmallMLP(hidden_sizes=[5], step_mult=0.02)
    rule.weights = rule.init_meta(random.key(7, "other"))
    return rule


@pytest.fixture
def rewritten(tmp_path, rule):
    """A file whose card or tensors were changed after it was saved."""

    def rewritten(change_card=lambda card: None, change_tensors=lambda tensors: None):
        path = tmp_path / "rule.safetensors"
        save_rule(path, rule)
        with safetensors.safe_open(path, framework="pt") as file:
            card = json.loads(file.metadata()[CARD])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change_card(card)
        change_tensors(tensors)
        save_file(tensors, path, {CARD: json.dumps(card)})
        return path

    return rewritten


def test_a_saved_rule_comes_back_with_class_settings_and_weights(tmp_path, rule, monkeypatch):
    path = tmp_path / "new" / "rule.safetensors"
    save_rule(path, rule, seed=3, data={"digits": "abc"})
    monkeypatch.setattr(socket, "socket", None)  # nothing is fetched
    loaded = load_rule(str(path))
    assert type(loaded) is SmallMLP and describe(loaded) == describe(rule)
    assert loaded.settings["hidden_sizes"] == [5] and loaded.settings["step_mult"] == 0.02
    assert loaded.weights.keys() == rule.weights.keys()
    assert all(torch.equal(value, rule.weights[name]) for name, value in loaded.weights.items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()[CARD])["provenance"] == {"seed": 3, "data": {"digits": "abc"}}
    assert [file.name for file in path.parent.iterdir()] == ["rule.safetensors"]


def test_other_weights_are_saved_without_touching_the_rule(tmp_path, rule):
    """As they come from meta-training: with gradients, and as pieces of one vector."""
    own = {name: value.clone() for name, value in rule.weights.items()}
    vector = torch.arange(float(sum(value.numel() for value in own.values())), requires_grad=True)
    pieces = vector.split([value.numel() for value in own.values()])
    meta = {name: piece.reshape(own[name].shape) for name, piece in zip(own, pieces, strict=True)}
    save_rule(tmp_path / "rule.safetensors", rule, meta)
    loaded = load_rule(tmp_path / "rule.safetensors")
    assert all(torch.equal(value, meta[name]) for name, value in loaded.weights.items())
    assert all(torch.equal(value, own[name]) for name, value in rule.weights.items())


def test_a_bare_name_is_a_rule_of_the_package(tmp_path, rule, monkeypatch):
    monkeypatch.setattr(saving, "PACKAGED", tmp_path)
    save_rule(tmp_path / "mine.safetensors", rule)
    assert torch.equal(load_rule("mine").weights["weight_0"], rule.weights["weight_0"])
    with pytest.raises(ValueError, match="rule is 'others'; accepted: 'mine', or the path of"):
        load_rule("others")


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path, rule, monkeypatch):
    path = tmp_path / "rule.safetensors"
    save_rule(path, rule)
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_rule(path, SmallMLP())
    assert path.read_bytes() == before


def test_a_class_from_elsewhere_must_be_trusted(tmp_path):
    path = tmp_path / "rule.safetensors"
    save_rule(path, Foreign(4))
    with pytest.raises(ValueError, match="Foreign'; accepted: a LearnedRule under"):
        load_rule(path)
    assert load_rule(path, trusted_classes=[Foreign]).settings == {"size": 4}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", 99, r"version 99 of .*SmallMLP; accepted: version 1"),
        ("class_path", "os.system", "class is 'os.system'"),
        ("class_path", "metalearn.optim.layout.Layout", "accepted: a LearnedRule"),
        ("class_path", "metalearn.optim.nothing.Rule", "accepted: a LearnedRule"),
        ("settings", {"hidden_sizes": [5], "speed": 1}, "which fails"),
        ("settings", {"hidden_sizes": [6]}, "have shapes"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(rewritten, name, value, message):
    with pytest.raises(ValueError, match=message):
        load_rule(rewritten(lambda card: card["rule"].update({name: value})))


def test_weights_that_do_not_fit_are_refused(rewritten):
    with pytest.raises(ValueError, match=r"have shapes \{'weight_0': None\}"):
        load_rule(rewritten(change_tensors=lambda tensors: tensors.pop("weight_0")))


def test_other_files_are_refused(tmp_path, rule):
    with pytest.raises(ValueError, match=r"no file .*rule\.safetensors'"):
        load_rule(tmp_path / "rule.safetensors")
    (tmp_path / "text.safetensors").write_text("not a rule")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_rule(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="does not say which rule"):
        load_rule(tmp_path / "bare.safetensors")


def test_what_cannot_be_read_back_is_not_written(tmp_path, rule):
    path = tmp_path / "rule.safetensors"
    with pytest.raises(ValueError, match=r"path is .*rule\.pt'; accepted"):
        save_rule(tmp_path / "rule.pt", rule)
    with pytest.raises(ValueError, match="have shapes"):
        save_rule(path, rule, MLPRule().weights)
    with pytest.raises(ValueError, match="provenance is"):
        save_rule(path, rule, problem=rule)
    assert not list(tmp_path.iterdir())
