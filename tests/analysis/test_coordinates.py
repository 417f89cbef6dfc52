"""One coordinate does what it does in a whole tensor."""

import pytest
import torch
from torch import Tensor

from metalearn import random
from metalearn.analysis.coordinates import Coordinate
from metalearn.base import Params, Rule
from metalearn.optim.first_order import SGD, Adam, RMSProp, Scheduled
from metalearn.optim.layout import Layout
from metalearn.optim.learned import LearnedRule, count
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.schedules import Linear


class Normalised(LearnedRule):
    """Gradients over the tensor's running mean square, which is one number, with a clock and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.needs_loss = True

    def init_meta(self, key: Tensor) -> Params:
        return {"gain": torch.ones(())}

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> dict[str, Tensor]:
        zero = params_P.new_zeros(params_P.shape[:-1])
        return {"square": zero, "mean": torch.zeros_like(params_P), "step": count(params_P)}

    def direction(self, meta, layout, grads_P, state, params_P, loss):
        square = 0.5 * state["square"] + 0.5 * grads_P.square().mean(-1)
        mean = 0.5 * state["mean"] + grads_P
        step = state["step"] + 1
        direction_P = loss * meta["gain"] * mean / square.unsqueeze(-1).sqrt() / step
        return direction_P, {"step": step, "mean": mean, "square": square}


@pytest.mark.parametrize(
    "rule",
    [SGD(0.1, momentum=0.9, nesterov=True), RMSProp(centered=True), Scheduled(Adam(), Linear(9)), CoordinateLSTM([4])],
    ids=["sgd", "rmsprop", "adam", "lstm"],
)
def test_matches_a_run_of_a_whole_tensor(rule: Rule) -> None:
    grads_TP = random.normal(random.key(1), (6, 4)).double()
    params = {"p": torch.zeros(4, dtype=torch.float64)}
    state, rest, updates = rule.init({}, params), params, []
    for grads_P in grads_TP:
        after, state = rule.update({}, {"p": grads_P}, state, rest)
        updates.append(after["p"])
    found_MT, h_MN = Coordinate(rule).run(grads_TP.T, range(6))
    torch.testing.assert_close(found_MT, torch.stack(updates, 1), rtol=1e-12, atol=1e-15)
    single, h_N = Coordinate(rule)(Coordinate(rule).start, float(grads_TP[0, 2]))
    torch.testing.assert_close(single, updates[0][2])
    assert h_N.shape == h_MN[2].shape


def test_the_others_stand_for_a_tensor() -> None:
    coordinate = Coordinate(Normalised(), {"gain": torch.tensor(3.0)}, others=999, spread=2.0, loss=0.5)
    assert len(coordinate.start) == 2  # the square of all and the mean of this coordinate
    h_N = torch.tensor([7.0, 0.25], dtype=torch.float64)
    update, (square, mean) = coordinate(h_N, 1.5, step=4)
    others = float(square - 3.5) * 2 * 1000 - 1.5**2
    assert others / 999 == pytest.approx(4.0, rel=0.2)  # the mean square of 999 normal numbers of deviation 2
    assert float(mean) == 0.125 + 1.5
    assert float(update) == pytest.approx(-0.5 * 3.0 * float(mean / square.sqrt()) / 5)


def test_the_others_share_of_the_state_is_that_of_their_own_run() -> None:
    class Centred(Normalised):
        """Means of all coordinates are taken off."""

        def direction(self, meta, layout, grads_P, state, params_P, loss):
            direction_P, state = super().direction(meta, layout, grads_P, state, params_P, loss)
            return state["mean"].mean(-1, keepdim=True).expand_as(direction_P), state

    coordinate = Coordinate(Centred(), others=3, spread=2.0, seed=5)
    drawn = 2.0 * random.normal(random.key(5, "others"), (101, 3)).double()
    mean_P = torch.zeros(3, dtype=torch.float64)
    for grads_P in drawn:
        mean_P = 0.5 * mean_P + grads_P
    update, _ = coordinate(coordinate.start, 8.0)
    assert float(update) == pytest.approx(-float(mean_P.sum() + 8.0) / 4)


def test_refuses_a_state_with_two_axes_of_parameters() -> None:
    class Square(Normalised):
        def start(self, meta, layout, params_P):
            return {"square": params_P[:, None] * params_P}

    with pytest.raises(ValueError, match=r"'square' of the state is \(1, 1\); accepted: one axis of parameters"):
        Coordinate(Square())
