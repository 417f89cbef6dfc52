"""Windows of a text file, and an optimizee that learns to continue it."""

import functools

import pytest
import torch
from problems.conftest import opened
from problems.learned_rules import Scaled, keys

from metalearn.models.language import CharacterMLP
from metalearn.problems.baselines import curves
from metalearn.problems.optimizees import Optimizee
from metalearn.tasks.characters import CharacterSource


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(["abcd" * 6] * 8 + ["bcdz"] + ["dcba"]))
    return tmp_path / "text.txt"


def test_windows_spell_the_text(text):
    source = CharacterSource(str(text), context=3)
    inputs, targets = source.read("train")
    assert source.alphabet == "\nabcd" and source.num_classes == 5
    spelled = ["".join(source.alphabet[int(n)] for n in row) for row in inputs]
    following = [source.alphabet[int(n)] for n in targets]
    whole = ("abcd" * 6 + "\n") * 8
    assert [s + f for s, f in zip(spelled, following, strict=True)] == [whole[i : i + 4] for i in range(len(whole) - 3)]
    assert inputs.dtype == torch.float32 and targets.dtype == torch.int64
    unseen, _ = source.read("validation")
    assert unseen.shape[1] == 3 and (unseen == 0).any()  # z is not in the training part's alphabet
    assert source.fingerprint() != CharacterSource(str(text), context=4).fingerprint()


def test_documents_by_themselves_share_no_window(text):
    apart = CharacterSource(str(text), context=3, joined=False).read("train")
    assert len(apart.targets) == 8 * 21 and not (apart.inputs == 4).all()  # no line break in the alphabet


def test_a_context_longer_than_all_documents_is_refused(text):
    with pytest.raises(ValueError, match="context is 24, and no text of train is longer"):
        CharacterSource(str(text), context=24, joined=False).read("train")
    with pytest.raises(ValueError, match="context is 0"):
        CharacterSource(str(text), context=0)


def test_a_model_learns_to_continue_a_periodic_text(text):
    model = functools.partial(CharacterMLP, width=4, hidden=(8,))
    rule = Scaled(log_rate=0.0)
    problem = opened(Optimizee(CharacterSource(str(text), context=3), model, rule, horizon=80, batch_size=16))
    losses = curves(problem, rule, rule.weights, keys(2), 80)
    assert losses[:, 0].mean() > 1.3 and losses[:, -10:].mean() < 0.3
