"""A search where the answer is known: targets with gross outliers, under which losses must forgive what is far off."""

import torch

from metalearn import random
from metalearn.losses.compiled import compile_gradient
from metalearn.losses.standard import STANDARD
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.search.candidates import gradients_of
from metalearn.search.evaluation import Evaluation
from metalearn.search.evolution import GeneticProgramming
from metalearn.search.hall_of_fame import HallOfFame
from metalearn.search.population import PopulationTraining
from metalearn.search.screening import Screening
from metalearn.tasks.synthetic import HeavyTailedRegression

STEPS, RATE = 150, 0.02
KEY = random.key(0, "planted")


def test_search_finds_a_robust_loss_that_beats_squared_error_at_its_best_rate():
    source = HeavyTailedRegression(num_train=500, num_validation=400, num_test=1000)
    rule = SGD(RATE, momentum=0.9)
    task = LossTask(source, lambda d, k: MLP(d, k, (16,)), rule, batch_size=50, scale_targets=False)
    task.open(test=True)
    evaluation = Evaluation([task], PopulationTraining(STEPS), Screening(), None, KEY)
    strategy, population, hall = GeneticProgramming(24, initial_size=72), [], HallOfFame()
    for generation in range(5):
        children = evaluation.score(strategy.ask(generation, population, random.fold(KEY, "ask")))
        population = strategy.survive(population, children)
        for scored in children:
            hall.add(scored)
    best = hall.entries[0][0].best

    # On examples and with a start and batches that the search has not seen; squared error at the best of nine rates.
    rates = torch.tensor([RATE] + [RATE * 10 ** (place / 4) for place in range(-6, 3)])
    rivals = [best, *(STANDARD["mse"](output="identity") for _ in rates[1:])]
    training = PopulationTraining(STEPS)
    trained = training.train(task, gradients_of(rivals, "identity"), random.fold(KEY, "fresh"), rates)
    errors = training.errors(task, trained, "test")
    assert errors[0] < 0.8 * errors[1:].min()

    # Where squared error pushes ten times as hard at ten times the distance, what was found does not.
    slope = compile_gradient(best.program, weighted=False)
    y, p = torch.zeros(2), torch.tensor([1.0, 10.0])
    near, far = slope(y, p, torch.empty(0)).abs() + slope(y, -p, torch.empty(0)).abs()
    assert far < 5 * near
