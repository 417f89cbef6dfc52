"""Long tuning of a found loss's weights, and scores on seeds and examples that the search has not seen."""

import pytest
import torch

from metalearn import random, tree
from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.forward import ForwardMode
from metalearn.estimators.unrolled import Unrolled
from metalearn.losses.program import Program
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.search.candidates import Candidate, gradients_of
from metalearn.search.finalists import Rescoring, Tuning
from metalearn.search.population import PopulationTraining
from metalearn.tasks.sources import ImageSource

KEY = random.key(0, "finalists")
CROSS_ENTROPY = Candidate(Program.parse("mul(-1,mul(y,log(p)))"), (0.5, 0.5, 1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def task():
    source = ImageSource("digits", classes=[0, 1, 2], validation=0.4)
    task = LossTask(source, lambda d, k: MLP(d, k, (8,)), SGD(0.02), batch_size=32, outer_batch_size=32)
    task.open(test=False)
    return task


def test_weights_move_against_the_gradient_of_the_whole_horizon(task):
    tuning = Tuning(Unrolled(), steps=8, horizon=6, lr=0.05)
    problem = tuning.problem(task, CROSS_ENTROPY)
    state, losses = tuning.begin(problem, KEY), []
    for step in range(8):
        state, loss = tuning.step(problem, state, random.fold(KEY, step))
        losses.append(float(loss))
    scale = state["meta"]["weights"].prod() / 0.25
    assert scale > 1.5  # a loss that is too small for so few steps at this rate grows
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3]) and task.horizon is None


def test_the_first_step_is_adam_on_the_exact_gradient(task):
    found = [Tuning(estimator, steps=1, horizon=5, lr=0.01) for estimator in (Unrolled(), ForwardMode())]
    ends = []
    for tuning in found:
        problem = tuning.problem(task, CROSS_ENTROPY)
        state, _ = tuning.step(problem, tuning.begin(problem, KEY), KEY)
        ends.append(state["meta"]["weights"])
    torch.testing.assert_close(ends[0][:4], ends[1][:4])
    # The first step of Adam is its rate, along the sign of the gradient; the weight inside log |w p| has none.
    moved = ends[0] - torch.tensor(CROSS_ENTROPY.weights)
    torch.testing.assert_close(moved[:4], torch.full((4,), 0.01), rtol=1e-3, atol=0)


def test_windows_of_an_evolution_strategy_go_on_from_saved_state(task):
    tuning = Tuning(PersistentES(pairs=2, std=0.1), steps=4, horizon=6, window=2, lr=0.05)
    problem = tuning.problem(task, CROSS_ENTROPY)
    whole = tuning.begin(problem, KEY)
    for step in range(4):
        if step == 2:
            saved = tree.pack(whole)
        whole, _ = tuning.step(problem, whole, random.fold(KEY, step))
    resumed = tree.unpack(tuning.begin(problem, KEY), saved)
    for step in (2, 3):
        resumed, _ = tuning.step(problem, resumed, random.fold(KEY, step))
    torch.testing.assert_close(tree.pack(resumed), tree.pack(whole), rtol=0, atol=0)


def test_scores_are_those_of_runs_with_their_own_seeds_on_untouched_examples(task):
    errors = Rescoring(seeds=3).errors(task, [CROSS_ENTROPY], 15, KEY)
    assert errors.shape == (2, 3)
    training = PopulationTraining(15)
    for seed in range(3):
        trained = training.train(task, gradients_of([CROSS_ENTROPY], "softmax"), random.fold(KEY, seed))
        assert float(errors[0, seed]) == float(training.errors(task, trained, "untouched")[0])
        assert not torch.equal(trained.params["0.weight"][0], task.initial(random.fold(KEY, "init"))[0]["0.weight"])
    own = training.errors(
        task, training.train(task, gradients_of([task.loss], "softmax"), random.fold(KEY, 0)), "untouched"
    )
    assert float(errors[1, 0]) == float(own[0])


def test_values_out_of_range_are_refused(task):
    with pytest.raises(ValueError, match=r"finalists is 0; accepted: 1 <= finalists"):
        Tuning(Unrolled(), finalists=0)
    with pytest.raises(ValueError, match=r"window is 9; accepted: 1 <= window <= 5"):
        Tuning(Unrolled(), horizon=5, window=9)
    with pytest.raises(ValueError, match=r"seeds is 0"):
        Rescoring(seeds=0)
