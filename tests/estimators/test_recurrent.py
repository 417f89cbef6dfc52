import itertools

import pytest
import torch
from estimators.conftest import relative

from metalearn import tree
from metalearn.base import Batches, InnerProblem, InnerState, StepOutput
from metalearn.estimators import recurrent
from metalearn.estimators.recurrent import RealTimeRecurrent, UnbiasedOnlineRecurrent
from metalearn.estimators.unrolled import Unrolled
from metalearn.random import key, normal
from metalearn.unroll import ended


class Recurrent(InnerProblem):
    """A linear recurrent network h' = A h + B x, its weights and first state learned; every step has a loss."""

    terminal = False

    def __init__(self, size=3, horizon=None):
        self.size, self.horizon = size, horizon

    def init_meta(self, key):
        return {
            "A": normal(key, (self.size, self.size)).double() / 2,
            "B": normal(key + 1, (self.size,)).double(),
            "h": normal(key + 2, (self.size,)).double(),
        }

    def init(self, meta, key):
        step = torch.zeros((), dtype=torch.int64)
        extra = {"target": meta["B"].sum() + normal(key, (1,)).double().sum()}
        return InnerState({"h": meta["h"] * 2}, {}, {}, step, extra)

    def step(self, meta, state, batch, key):
        x = (state.step + 1.0).sin().double()
        h = meta["A"] @ state.params["h"] + meta["B"] * x
        loss = (h.sum() - state.extra["target"]).square() + meta["B"].square().sum() * x
        state = state._replace(params={"h": h}, step=state.step + 1)
        return state, StepOutput(loss, ended(self, state))

    def outer(self, meta, state, batch):
        return (state.params["h"] * meta["h"]).sum() if self.horizon else torch.zeros(())


def windows(estimator, problem, meta, lengths, state=None):
    """The gradients of windows of these lengths, and the state after; keys are the same for equal ``lengths``."""
    state = estimator.init(problem, meta, key(0)) if state is None else state
    found = []
    for place, steps in enumerate(lengths):
        out = estimator.estimate(problem, meta, state, Batches(lambda k: None, None, steps), key(place))
        state = out.state
        found.append(out)
    return found, state


def total(found):
    return {name: sum(out.grad[name] for out in found) for name in found[0].grad}


def exact(problem, meta, steps, init_key=None):
    """Backpropagation through the whole episode, its start included."""
    leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
    state, loss = problem.init(leaves, init_key), 0.0
    for _ in range(steps):
        state, output = problem.step(leaves, state, None, None)
        loss = loss + output.loss
    loss = loss + problem.outer(leaves, state, None)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


EPISODE = recurrent.fold(key(0), "episode")


@pytest.mark.parametrize(
    ("lengths", "horizon", "chunk"),
    [((6,), None, None), ((2, 2, 2), 6, None), ((1, 3, 2), 6, 4), ((1, 3, 2), None, 1), ((1,) * 6, 6, None)],
)
def test_windows_of_rtrl_sum_to_backpropagation_through_the_episode(lengths, horizon, chunk):
    problem = Recurrent(horizon=horizon)
    meta = problem.init_meta(key(5))
    found, state = windows(RealTimeRecurrent(chunk), problem, meta, lengths)
    wanted = exact(problem, meta, 6, EPISODE)
    assert relative(total(found), wanted) <= 1e-12
    assert bool(state["done"]) == (horizon is not None)
    truncated, _ = windows(Unrolled(warm_start=True), problem, meta, lengths)
    assert len(lengths) == 1 or relative(total(truncated), wanted) > 1e-2


@pytest.mark.parametrize("estimator", [RealTimeRecurrent(), UnbiasedOnlineRecurrent()])
def test_an_episodes_end_clears_what_is_carried(estimator):
    problem = Recurrent(horizon=4)
    meta = problem.init_meta(key(5))
    _, state = windows(estimator, problem, meta, (2, 2))
    spoilt = {**state, "carry": tree.map(lambda leaf: leaf * torch.nan, state["carry"])}
    batches = Batches(lambda k: None, None, 2)
    for_spoilt, for_state = (estimator.estimate(problem, meta, s, batches, key(7)) for s in (spoilt, state))
    torch.testing.assert_close(for_spoilt.grad, for_state.grad, rtol=0, atol=0)
    torch.testing.assert_close(tree.pack(for_spoilt.state), tree.pack(for_state.state), rtol=0, atol=0)


def test_rtrl_matches_backpropagation_in_the_second_episode():
    problem = Recurrent(horizon=4)
    meta = problem.init_meta(key(5))
    found, _ = windows(RealTimeRecurrent(), problem, meta, (2, 2, 2, 2))
    second = exact(problem, meta, 4, recurrent.fold(key(2), "episode"))
    assert relative(total(found[2:]), second) <= 1e-12


@pytest.mark.parametrize(("size", "lengths", "horizon"), [(1, (2, 1), 3), (2, (1, 1), None)])
def test_mean_of_uoro_over_all_signs_matches_rtrl(size, lengths, horizon, monkeypatch):
    problem = Recurrent(size, horizon)
    meta = problem.init_meta(key(5))
    steps = sum(lengths)
    # The start draws signs for h and the target; every step but the last one, which nothing follows, for h.
    drawn = (size + 1) + size * (steps - (horizon is None))
    grads = []
    for chosen in itertools.product((-1.0, 1.0), repeat=drawn):
        rest = list(chosen) + [1.0] * (size + 1)

        def draw(key, leaves, rest=rest):
            """Signs for the leaves that take noise; the target's, after the first draw, is put to zero anyway."""
            start = draw.first
            draw.first = False
            taken = []
            for place, leaf in enumerate(leaves):
                if place > 0 and not start:
                    taken.append(torch.ones_like(leaf))
                else:
                    taken.append(torch.tensor([rest.pop(0) for _ in range(leaf.numel())]).to(leaf).reshape(leaf.shape))
            return taken

        draw.first = True
        monkeypatch.setattr(recurrent, "draw_signs", draw)
        found, _ = windows(UnbiasedOnlineRecurrent(), problem, meta, lengths)
        grads.append(total(found))
    mean = {name: torch.stack([grad[name] for grad in grads]).mean(0) for name in meta}
    wanted, _ = windows(RealTimeRecurrent(), problem, meta, lengths)
    assert relative(mean, total(wanted)) <= 1e-10
    assert max(relative(grad, total(wanted)) for grad in grads) > 0.1


@pytest.mark.parametrize("estimator", [RealTimeRecurrent(), UnbiasedOnlineRecurrent()])
def test_state_round_trips_and_results_follow_the_key(estimator):
    problem = Recurrent()
    meta = problem.init_meta(key(5))
    before = tree.map(torch.clone, meta)
    whole, _ = windows(estimator, problem, meta, (2, 1))
    _, state = windows(estimator, problem, meta, (2,))
    kept = {name: leaf.clone() for name, leaf in tree.pack(state).items()}
    state = tree.unpack(estimator.init(problem, meta, key(8)), kept)
    again = estimator.estimate(problem, meta, state, Batches(lambda k: None, None, 1), key(1))
    torch.testing.assert_close(again.grad, whole[1].grad, rtol=0, atol=0)
    torch.testing.assert_close(tree.pack(state), kept, rtol=0, atol=0)
    torch.testing.assert_close(meta, before, rtol=0, atol=0)
    assert not any(leaf.requires_grad for leaf in tree.leaves(again.state))


def test_uoro_draws_with_a_key_of_its_own_at_every_step(monkeypatch):
    keys, draw = [], recurrent.draw_signs
    monkeypatch.setattr(recurrent, "draw_signs", lambda key, leaves: keys.append(int(key)) or draw(key, leaves))
    problem = Recurrent(horizon=4)
    windows(UnbiasedOnlineRecurrent(), problem, problem.init_meta(key(5)), (2, 2, 2))
    assert len(set(keys)) == len(keys) == 2 + 6  # two episodes' starts and six steps


def test_an_episode_that_ends_inside_a_window_is_refused():
    problem = Recurrent(horizon=5)
    meta = problem.init_meta(key(5))
    with pytest.raises(ValueError, match="steps is 3, but the episode of 5 steps has 2 left"):
        windows(RealTimeRecurrent(), problem, meta, (3, 3))
