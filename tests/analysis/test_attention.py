"""Heads of which is known what they do, and sums over attention weights one by one."""

import math
from itertools import product

import pandas as pd
import pytest
import torch
from analysis.induction import NUM_CLASSES, balanced, induction
from torch import Tensor

from metalearn.analysis.attention import attention_scores, head_ablation
from metalearn.base import Batch
from metalearn.models.recurrent import LSTM
from metalearn.models.tokens import FORMATS, Tokens
from metalearn.models.transformer import POSITIONS, Transformer

PAPER = Tokens("paper", 8, NUM_CLASSES)


def small(num_inputs: int, num_outputs: int, positions: str = "rope") -> Transformer:
    torch.manual_seed(0)
    sizes = dict(width=24, depth=2, heads=3, head_width=10, positions=positions)
    return Transformer(num_inputs, num_outputs, **sizes).double().eval()


def of_heads(frame: pd.DataFrame, value: str) -> dict[tuple[int, int], float]:
    return {(row["layer"], row["head"]): row[value] for _, row in frame.iterrows()}


@pytest.mark.parametrize("positions", POSITIONS)
def test_weights_match_what_attention_hands_on(positions: str) -> None:
    learner, tokens_BTD = small(7, 5, positions), torch.randn(3, 12, 7, dtype=torch.float64)
    handed, values = [], []
    for block in learner.blocks:
        block.project_out.register_forward_pre_hook(lambda _, inputs: handed.append(inputs[0]))
        block.project_in.register_forward_hook(lambda _, inputs, out: values.append(out[..., 2 * 30 :]))
    learner(tokens_BTD)
    ours = [out.clone() for out in handed], [v.unflatten(-1, (3, 10)).transpose(1, 2) for v in values]
    a_BLHTT = learner.attention(tokens_BTD)
    assert a_BLHTT.shape == (3, 2, 3, 12, 12) and bool((a_BLHTT.triu(1) == 0).all())
    for layer, (out_BTA, v_BHTE) in enumerate(zip(*ours, strict=True)):
        torch.testing.assert_close((a_BLHTT[:, layer] @ v_BHTE).transpose(1, 2).flatten(2), out_BTA)


def test_induction_by_hand_is_found_head_by_head() -> None:
    learner, batch = induction(), balanced(6)
    frame = attention_scores(learner, PAPER, batch, num_last=4)
    kinds = {kind: frame[frame["kind"] == kind] for kind in frame["kind"].unique()}
    weight, excess = of_heads(kinds["previous token"], "weight"), of_heads(kinds["previous token"], "excess")
    uniform = sum(1 / (t + 1) for t in range(1, 16)) / 15
    assert weight[1, 0] == pytest.approx(1, abs=1e-12) and excess[1, 0] == pytest.approx(1 - uniform, abs=1e-6)
    assert of_heads(kinds["own token"], "weight")[1, 0] == pytest.approx(0, abs=1e-12)
    for kind, right in (("label copy", lambda j: 3 / (j + 1)), ("label choice", lambda j: 3 / j)):
        assert of_heads(kinds[kind], "weight")[2, 0] == pytest.approx(1, abs=1e-12)
        baseline = sum(right(j) for j in range(12, 16)) / 4  # three earlier examples of each class
        assert of_heads(kinds[kind], "baseline")[2, 0] == pytest.approx(baseline)
    for kind, head in product(kinds, ((1, 1), (2, 1))):  # without weights they attend to all alike
        assert of_heads(kinds[kind], "excess")[head] == pytest.approx(0, abs=1e-6)
        assert of_heads(kinds[kind], "standard_error")[head] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_scores_match_sums_one_by_one(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, generator = Tokens(format, 4, 3), torch.Generator().manual_seed(3)
    batch = Batch(
        torch.randn(5, 6, 4, dtype=torch.float64, generator=generator), torch.randint(3, (5, 6), generator=generator)
    )
    learner = small(tokens.width, 3)
    encoded = tokens.encode(*batch)
    # Where the label of an example, and where its input, goes: found by changing it.
    queries = [
        int((tokens.encode(batch.x + _at(batch.x, j), batch.y) != encoded).any(-1)[0].nonzero()[0]) for j in range(6)
    ]
    labels = [
        int((tokens.encode(batch.x, (batch.y + _at(batch.y, i)) % 3) != encoded).any(-1)[0].nonzero()[0])
        for i in range(5)
    ]
    a = learner.attention(encoded)[:, 1, 2].detach()
    sums = {kind: [0.0, 0.0] for kind in ("previous token", "own token", "label copy", "label choice")}
    steps = range(1, encoded.shape[1])
    for b in range(5):
        for t, (kind, back) in product(steps, (("previous token", 1), ("own token", 0))):
            sums[kind][0] += float(a[b, t, t - back]) / (5 * len(steps))
            sums[kind][1] += 1 / (t + 1) / (5 * len(steps))
        for j in (3, 4, 5):
            right = [i for i in range(j) if batch.y[b, i] == batch.y[b, j]]
            given = float(sum(a[b, queries[j], labels[i]] for i in right)) / 15
            anywhere = float(sum(a[b, queries[j], labels[i]] for i in range(j))) / 15
            for kind, blind in (
                ("label copy", len(right) / (queries[j] + 1) / 15),
                ("label choice", anywhere * len(right) / j),
            ):
                sums[kind][0], sums[kind][1] = sums[kind][0] + given, sums[kind][1] + blind
    monkeypatch.setattr("metalearn.analysis.attention._WEIGHTS_AT_ONCE", 2000)  # several parts
    frame = attention_scores(learner, tokens, batch, num_last=3)
    found = frame[(frame["layer"] == 2) & (frame["head"] == 2)].set_index("kind")
    assert list(found.index) == list(sums) and set(found["sequences"]) == {5}
    for kind, (weight, baseline) in sums.items():
        assert found.loc[kind, "weight"] == pytest.approx(weight)
        assert found.loc[kind, "baseline"] == pytest.approx(baseline, rel=1e-6)
        assert found.loc[kind, "excess"] == pytest.approx(weight - baseline, abs=1e-7)


def _at(like: Tensor, position: int) -> Tensor:
    one = torch.zeros_like(like)
    one[:, position] = 1
    return one


def test_without_either_head_of_the_circuit_induction_is_lost() -> None:
    learner, batch = induction(), balanced(64)
    before = learner(PAPER.encode(*batch))
    zero = head_ablation(learner, PAPER, batch, num_last=4, replacement="zero")
    drop = of_heads(zero, "accuracy_drop")
    assert set(zero["accuracy"]) == {1.0}
    # Without the copied label all logits are 0: class 0, which one in four is, and a loss of ln 4.
    assert drop[2, 0] == 0.75
    assert (zero["loss"] + zero["loss_rise"])[2] == pytest.approx(math.log(4))
    assert drop[1, 0] > 0.5 and drop[1, 1] == drop[2, 1] == 0
    mean = of_heads(head_ablation(learner, PAPER, batch, num_last=4), "accuracy_drop")
    assert min(mean[1, 0], mean[2, 0]) > 0.5 and mean[1, 1] == mean[2, 1] == 0
    assert torch.equal(learner(PAPER.encode(*batch)), before)  # nothing stays replaced


def test_mean_replacement_spares_what_a_head_says_to_all_alike() -> None:
    learner, batch = induction(), balanced(8)
    with torch.no_grad():  # the silent head of layer 2 now shifts the logits by a constant
        learner.blocks[1].project_in.bias.unflatten(0, (3, 2, 40))[2, 1, :8] = 1.0
        learner.blocks[1].project_out.weight[24:32, 40:48] = torch.eye(8).double()
        learner.blocks[1].project_out.weight[24, 40] = 3.0
    rises = {
        kind: of_heads(head_ablation(learner, PAPER, batch, 4, kind), "loss_rise")[2, 1] for kind in ("mean", "zero")
    }
    assert rises["mean"] == pytest.approx(0, abs=1e-12) and abs(rises["zero"]) > 1e-4


def test_regression_has_positional_kinds_and_losses_only() -> None:
    tokens, generator = Tokens("paper", 4, 1), torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randn(4, 6, 4, dtype=torch.float64, generator=generator), torch.randn(4, 6, dtype=torch.float64)
    )
    learner = small(tokens.width, 1)
    assert set(attention_scores(learner, tokens, batch, 2)["kind"]) == {"previous token", "own token"}
    frame = head_ablation(learner, tokens, batch, 2)
    squared = (learner(tokens.encode(*batch)).detach().squeeze(-1) - batch.y).square()[:, -2:].mean()
    assert "accuracy" not in frame and frame["loss"][0] == pytest.approx(float(squared))


def test_refuses_what_it_cannot_measure() -> None:
    batch = balanced(4)
    with pytest.raises(ValueError, match=r"learner is a LSTM.*accepted: a Transformer"):
        attention_scores(LSTM(12, 4, 8), PAPER, batch)
    with pytest.raises(ValueError, match="num_last is 16; accepted: 1 <= num_last <= 15"):
        head_ablation(induction(), PAPER, batch, num_last=16)
    with pytest.raises(ValueError, match="replacement is 'noise'; accepted: 'mean', 'zero'"):
        head_ablation(induction(), PAPER, batch, replacement="noise")
    with pytest.raises(ValueError, match="sequences is 1"):
        head_ablation(induction(), PAPER, Batch(batch.x[:1], batch.y[:1]))
