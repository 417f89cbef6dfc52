"""Planted codes, known tasks, a gradient that autograd takes, and learners that are the oracle."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from analysis.induction import NUM_CLASSES, balanced, induction
from torch import Tensor, nn

from metalearn.analysis.mechanisms import (
    best_rate,
    decodability,
    distances,
    half_way,
    one_gradient_step,
    order_of_formation,
    residual_stream,
    snapshots,
    summarise,
    tasks_of,
    through_training,
    transition_step,
)
from metalearn.base import Batch, Learner, MetaTrain
from metalearn.models.recurrent import LSTM
from metalearn.models.saving import CARD, describe, save_learner
from metalearn.models.tokens import Tokens
from metalearn.models.transformer import Transformer
from metalearn.tasks.images import ProjectedImages
from metalearn.tasks.oracles import nearest_neighbour
from metalearn.tasks.synthetic import RandomSource

PAPER = Tokens("paper", 8, NUM_CLASSES)
TINY = dict(width=8, depth=1, heads=2, head_width=4)


class Says(nn.Module):
    """Answers what it is told, whatever the tokens."""

    def __init__(self, logits_BTK: Tensor):
        super().__init__()
        self.logits_BTK = logits_BTK

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return self.logits_BTK


def says(answers_BT: Tensor, num_classes: int) -> Learner:
    if num_classes == 1:
        return Says(answers_BT.unsqueeze(-1))  # type: ignore[return-value]
    return Says(nn.functional.one_hot(answers_BT, num_classes).double())  # type: ignore[return-value]


def draw(batch: int, length: int, num_features: int, num_classes: int) -> Batch:
    generator = torch.Generator().manual_seed(7)
    x_BTD = torch.randn(batch, length, num_features, dtype=torch.float64, generator=generator)
    if num_classes > 1:
        return Batch(x_BTD, torch.randint(num_classes, (batch, length), generator=generator))
    return Batch(x_BTD, torch.randn(batch, length, dtype=torch.float64, generator=generator))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Light checkpoints of steps 1, 2, 8 and 12, where the plateau was left, and a later last one, told apart by a bias."""
    torch.manual_seed(0)
    for step, name in (
        (2, "step=00000002"),
        (12, "left_plateau_step=00000012"),
        (8, "step=00000008"),
        (1, "step=00000001"),
    ):
        learner = Transformer(PAPER.width, NUM_CLASSES, **TINY)
        nn.init.constant_(learner.head.bias, step)
        card = {
            "learner": describe(learner),
            "tokens": "paper",
            "num_features": 8,
            "num_classes": NUM_CLASSES,
            "length": 16,
        }
        save_learner(tmp_path / "checkpoints" / "steps" / f"{name}.safetensors", learner, card)
    nn.init.constant_(learner.head.bias, 20)
    weights = {f"learner.{name}": value for name, value in learner.state_dict().items()}
    torch.save({"state_dict": weights, CARD: card, "global_step": 20}, tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path


def test_measures_every_checkpoint_in_order_of_its_step(run_dir: Path) -> None:
    def bias(learner: Learner, tokens: Tokens) -> pd.DataFrame:
        assert isinstance(learner, Transformer)
        return pd.DataFrame({"bias": learner.head.bias.tolist()[:2], "format": tokens.format, "width": tokens.width})

    frame = through_training(run_dir, bias)
    assert list(frame.columns) == ["step", "bias", "format", "width"]
    assert list(frame["step"]) == list(frame["bias"]) == [1, 1, 2, 2, 8, 8, 12, 12, 20, 20]
    assert set(frame["format"]) == {"paper"} and set(frame["width"]) == {12}
    assert transition_step(run_dir) == 12


def test_knows_runs_that_never_left_or_kept_nothing(run_dir: Path) -> None:
    steps = run_dir / "checkpoints" / "steps"
    (steps / "left_plateau_step=00000012.safetensors").rename(steps / "step=00000020.safetensors")
    assert transition_step(run_dir) is None
    assert [path.name for _, path in snapshots(run_dir)][-1] == "step=00000020.safetensors"  # not read twice
    with pytest.raises(ValueError, match=r"holds no checkpoints.*checkpoint_steps: log"):
        snapshots(run_dir / "elsewhere")


def test_half_way_finds_planted_steps_in_order() -> None:
    steps = [1, 2, 4, 8, 16, 32]
    late = pd.DataFrame({"step": steps, "head": 0, "score": [0.1, 0.1, 0.1, 0.1, 0.9, 1.0]})
    early = pd.DataFrame({"step": steps, "head": 1, "score": [0.0, 0.4, 0.6, 0.9, 0.8, 0.2]})
    never = pd.DataFrame({"step": steps, "head": 2, "score": [0.2, 0.21, 0.2, 0.22, 0.24, 0.2]})
    frame = half_way(pd.concat([late, early, never]).sample(frac=1, random_state=0), "score", ["head"])
    assert frame.iloc[2].tolist() == [2, pd.NA, 0.2, 0.24]
    assert frame.iloc[:2].to_dict("records") == [
        {"head": 1, "step": 4, "start": 0.0, "most": 0.9},
        {"head": 0, "step": 16, "start": 0.1, "most": 1.0},
    ]


# -- decodability ----------------------------------------------------------------------------------------------------


def test_label_is_read_after_the_layer_that_copies_it_and_not_before() -> None:
    learner, batch = induction(), balanced(600)
    frame = decodability(learner, PAPER, batch, batch.y[:, 12], position=12).set_index("layer")
    assert list(frame.index) == [0, 1, 2] and set(frame["sequences"]) == {150} and set(frame["classes"]) == {4}
    assert frame.loc[2, "accuracy"] == 1 and frame.loc[2, "standard_error"] == 0
    assert all(abs(frame.loc[layer, "accuracy"] - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 150) for layer in (0, 1))


def test_planted_linear_code_is_read_at_its_position_and_random_targets_are_not() -> None:
    batch = draw(800, 5, 6, 3)
    target_B = (batch.x[:, 3] @ torch.tensor([1.0, -1, 2, 0, 0, 1], dtype=torch.float64) > 0).long()
    tokens = Tokens("interleaved", 6, 3)
    learner = Transformer(tokens.width, 3, **TINY | {"width": 16}).double()
    read = {place: decodability(learner, tokens, batch, target_B, place)["accuracy"][0] for place in (-2, 3, 0)}
    assert read[3] == read[-2] > 0.96 and abs(read[0] - 0.5) < 4 * 0.5 / np.sqrt(200)
    generator = torch.Generator().manual_seed(0)
    frame = decodability(learner, tokens, batch, torch.randint(5, (800,), generator=generator), held_out=0.5)
    assert all(abs(frame["accuracy"] - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 400)) and set(frame["position"]) == {4}


def test_chance_is_the_commonest_target_of_those_fitted_on() -> None:
    batch = draw(40, 3, 6, 3)
    target_B = torch.tensor([0] * 20 + [1] * 10 + [1] * 9 + [0])
    frame = decodability(Transformer(9, 3, **TINY).double(), Tokens("paper", 6, 3), batch, target_B)
    assert set(frame["chance"]) == {0.1} and set(frame["sequences"]) == {10}


def test_residual_stream_begins_with_the_embedding_and_ends_before_the_head() -> None:
    learner, tokens_BTD = Transformer(5, 3, **TINY | {"depth": 3}, positions="none"), torch.randn(2, 4, 5)
    stream = residual_stream(learner, tokens_BTD)
    assert len(stream) == 4
    torch.testing.assert_close(stream[0], learner.embed(tokens_BTD))
    torch.testing.assert_close(learner.head(learner.norm(stream[-1])), learner(tokens_BTD))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in learner.blocks)


def test_decodability_refuses_what_it_cannot_read() -> None:
    batch = balanced(8)
    with pytest.raises(ValueError, match=r"learner is a LSTM.*accepted: one with blocks"):
        decodability(LSTM(12, 4, 8), PAPER, Batch(batch.x.float(), batch.y), batch.y[:, 0])
    with pytest.raises(ValueError, match="target is 1 in all sequences"):
        decodability(induction(), PAPER, batch, torch.ones(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="position is 16"):
        decodability(induction(), PAPER, batch, batch.y[:, 0], position=16)
    with pytest.raises(ValueError, match="probe is fitted on is 8"):
        decodability(induction(), PAPER, batch, batch.y[:, 0], held_out=0.01)


def projected(num_tasks: int | None, seed: int) -> ProjectedImages:
    tasks = ProjectedImages(RandomSource(30, 12, 3), num_features=8, num_tasks=num_tasks, seed=seed)
    tasks.open(test=False)
    return tasks


def test_tasks_match_known_ones() -> None:
    each = [projected(1, seed).batch(5, 0, 24, 6, MetaTrain()).x for seed in range(3)]
    order = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    found, known = tasks_of(torch.cat(each)[order]), torch.arange(3).repeat_interleave(24)[order]
    assert sorted(found.unique().tolist()) == [0, 1, 2]
    assert len(torch.unique(torch.stack([found, known]), dim=1).T) == 3  # the same division under other numbers
    assert len(tasks_of(projected(4, 0).batch(0, 0, 128, 6, MetaTrain()).x).unique()) == 4


def test_tasks_that_share_no_input_are_refused() -> None:
    with pytest.raises(ValueError, match="none of 16 sequences shares an input"):
        tasks_of(projected(None, 0).batch(0, 0, 16, 6, MetaTrain()).x)


# -- distances -------------------------------------------------------------------------------------------------------


def test_one_gradient_step_matches_autograd() -> None:
    batch, positions = draw(3, 7, 4, 5), (0, 1, 3, 6)
    found = one_gradient_step(*batch, positions, 5)
    assert found[:, 0].tolist() == [0, 0, 0]
    for b in range(3):
        for column, t in enumerate(positions[1:], 1):
            weight, bias = torch.zeros(5, 4).double().requires_grad_(), torch.zeros(5).double().requires_grad_()
            loss = nn.functional.cross_entropy(batch.x[b, :t] @ weight.T + bias, batch.y[b, :t])
            grads = torch.autograd.grad(loss, [weight, bias])
            assert int((-grads[0] @ batch.x[b, t] - grads[1]).argmax()) == found[b, column]


def test_one_gradient_step_of_regression_matches_autograd_and_its_rate_is_the_best() -> None:
    batch, positions = draw(40, 9, 4, 1), (0, 2, 6, 7, 8)
    batch = Batch(batch.x, (batch.x @ torch.randn(40, 4, 1, dtype=torch.float64)).squeeze(-1))
    found = one_gradient_step(*batch, positions, 1, rate=0.3)
    weight = torch.zeros(4).double().requires_grad_()
    loss = (batch.x[5, :6] @ weight - batch.y[5, :6]).square().mean() / 2
    torch.testing.assert_close(-0.3 * torch.autograd.grad(loss, weight)[0] @ batch.x[5, 6], found[5, 2])
    assert found[:, 0].tolist() == [0] * 40
    rate = best_rate(batch, 3)
    error = {
        r: (one_gradient_step(*batch, (6, 7, 8), 1, r) - batch.y[:, 6:]).square().sum()
        for r in (0.99 * rate, rate, 1.01 * rate)
    }
    assert min(error, key=error.__getitem__) == rate


def test_learner_that_is_an_oracle_has_no_distance_from_it() -> None:
    batch = draw(30, 6, 4, 3)
    nearest_BT = nearest_neighbour(*batch, range(6))
    last = nearest_BT[:, -2:]
    frame = distances(says(nearest_BT, 3), Tokens("shift", 4, 3), batch, {"nearest": last, "other": (last + 1) % 3})
    frame = frame.set_index("other")
    right = float((last == batch.y[:, -2:]).double().mean())
    assert frame.loc["nearest", ["agreement", "agreement_on_errors", "standard_error"]].tolist() == [1, 1, 0]
    assert frame.loc["other", "agreement"] == frame.loc["other", "agreement_on_errors"] == 0
    assert frame.loc["truth", "agreement"] == pytest.approx(right) and np.isnan(
        frame.loc["truth", "agreement_on_errors"]
    )
    assert set(frame["positions"]) == {2} and set(frame["sequences"]) == {30}


def test_agreement_on_errors_counts_only_where_the_other_errs() -> None:
    y_BT = torch.tensor([[0, 0, 0, 0]])
    other, own = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 2, 0]])
    frame = distances(says(own, 3), Tokens("paper", 2, 3), Batch(torch.zeros(1, 4, 2), y_BT), {"other": other})
    assert frame["agreement"].tolist() == [0.5, 0.5] and frame["agreement_on_errors"][1] == pytest.approx(1 / 3)


def test_squared_difference_matches_a_planted_shift() -> None:
    batch = draw(10, 6, 4, 1)
    others = {"itself": batch.y[:, -3:] + 1, "shifted": batch.y[:, -3:] + 1.5}
    frame = distances(says(batch.y + 1, 1), Tokens("paper", 4, 1), batch, others).set_index("other")
    assert frame["squared_difference"].to_dict() == pytest.approx({"truth": 1, "itself": 0, "shifted": 0.25})


def test_distances_refuse_answers_of_other_shapes() -> None:
    batch = draw(10, 6, 4, 3)
    for others in ({}, {"a": batch.y[:5]}, {"a": batch.y, "b": batch.y[:, -2:]}):
        with pytest.raises(ValueError, match="answers have shapes"):
            distances(says(batch.y, 3), Tokens("paper", 4, 3), batch, others)


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def frames() -> dict[str, pd.DataFrame]:
    heads = [
        (step, layer, head, "label copy", (step == 8) * 0.5 * layer - 0.01 * head)
        for step in (1, 8)
        for layer in (1, 2)
        for head in (0, 1)
    ]
    attention = pd.DataFrame(heads, columns=["step", "layer", "head", "kind", "excess"])
    ablation = attention[["step", "layer", "head"]].assign(accuracy_drop=attention["excess"] / 2)
    probe = pd.DataFrame({"step": [1, 1, 8, 8], "layer": [0, 1, 0, 1], "accuracy": [0.2, 0.2, 0.3, 0.9]})
    near = pd.DataFrame(
        {"step": [1, 8, 1, 8], "other": ["truth"] * 2 + ["ridge"] * 2, "agreement": [0.2, 0.8, 0.1, 0.4]}
    )
    return {"attention": attention, "ablation": ablation, "task": probe, "distances": near}


def test_summary_has_a_row_per_checkpoint_and_the_strongest_of_each(frames: dict[str, pd.DataFrame]) -> None:
    table = summarise(frames)
    assert table.to_dict("list") == {
        "step": [1, 8],
        "label copy": [0, 1],
        "largest accuracy drop": [0, 0.5],
        "reads task": [0.2, 0.9],
        "agreement with truth": [0.2, 0.8],
        "agreement with ridge": [0.1, 0.4],
    }


def test_order_names_the_strongest_heads_and_every_layer(frames: dict[str, pd.DataFrame]) -> None:
    order = order_of_formation(frames)
    assert set(order["step"]) == {8}
    copying = order[order["what"] == "label copy"].iloc[0]
    assert (copying["layer"], copying["head"], copying["most"]) == (2, 0, 1)
    assert list(order[order["what"] == "reads task"]["layer"]) == [0, 1]
    assert [(row.layer, row.head) for row in order[order["what"] == "accuracy_drop"].itertuples()] == [(2, 0), (2, 1)]
    assert {"agrees with truth", "agrees with ridge"} <= set(order["what"])
