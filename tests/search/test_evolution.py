import functools
import json
import math
import random
import statistics
from pathlib import Path

import numpy
import pytest
import torch
from deap import base, cma

from metalearn.losses.compiled import interpret
from metalearn.losses.learned import LearnedLoss
from metalearn.losses.operators import OPERATORS, Operator, add_operator
from metalearn.losses.program import Program
from metalearn.random import fold, key
from metalearn.search.candidates import Candidate, Scored
from metalearn.search.evolution import (
    SELECTIONS,
    GeneticProgramming,
    RandomSearch,
    Stopping,
    Strategy,
    TaylorEvolution,
)
from metalearn.search.hall_of_fame import HallOfFame
from metalearn.search.operators import drawing_from

CENTRE = (0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 1.0, -2.0)
y, p = (
    axis.flatten() for axis in torch.meshgrid(torch.linspace(0, 1, 5), torch.linspace(0.05, 0.95, 9), indexing="ij")
)


def scored(text: str, *errors: float, verdict: str = "scored") -> Scored:
    return Scored(Candidate(Program.parse(text)), (), errors, verdict)


def distance(candidate: Candidate, target: str) -> Scored:
    """Scored by the root mean square difference from a target on a grid."""
    assert candidate.program is not None
    values = interpret(candidate.program, y, p, torch.empty(0)) - interpret(Program.parse(target), y, p, torch.empty(0))
    return Scored(candidate, (), (float(values.square().mean().sqrt()),))


def quadratic(candidate: Candidate) -> Scored:
    error = sum(
        (one - other) ** 2 * 2**place for place, (one, other) in enumerate(zip(candidate.weights, CENTRE, strict=True))
    )
    return Scored(candidate, (), (error,))


def searched(strategy: Strategy, seed: int, generations: int, target: str) -> tuple[float, HallOfFame]:
    population: list[Scored] = []
    hall = HallOfFame()
    for generation in range(generations):
        children = [distance(candidate, target) for candidate in strategy.ask(generation, population, key(seed))]
        population = strategy.survive(population, children)
        for child in children:
            hall.add(child, {"generation": generation})
        assert len(population) == strategy.population_size or isinstance(strategy, RandomSearch)
        assert min(one.error for one in population) == hall.entries[0][0].error  # the best is never lost
    return hall.entries[0][0].error, hall


@functools.cache
def drawn(seed: int, generations: int, target: str) -> float:
    return searched(RandomSearch(50), seed, generations, target)[0]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_decreases_the_distance_to_a_target_faster_than_random_search(selection: str):
    target, strategy = "abs(sub(y,square(square(p))))", GeneticProgramming(50, selection=selection)
    evolved = [searched(strategy, seed, 12, target)[0] for seed in range(4)]
    assert statistics.mean(evolved) < 0.9 * statistics.mean(drawn(seed, 12, target) for seed in range(4))


def test_finds_a_loss_of_the_users_own_operator():
    code, slope = "torch.nn.functional.softplus(a)", "torch.sigmoid(a)"
    add_operator(Operator("softplus", 1, code, (slope,), "log(1 + exp(a))", r"\mathrm{{sp}}({a})"))
    try:
        runs = [searched(GeneticProgramming(50, fitness_size=2), seed, 12, "softplus(sub(p,y))") for seed in range(4)]
        found = [hall.entries[0][0].candidate.text for error, hall in runs if error < 1e-6]
        assert found and all("softplus" in text for text in found)
    finally:
        del OPERATORS["softplus"]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_children_are_a_function_of_the_key_and_the_population_alone(selection: str):
    strategy = GeneticProgramming(selection=selection, seeds=["mul(-1,mul(y,log(p)))"])
    first = strategy.ask(0, [], key(1))
    population = [distance(candidate, "sub(y,p)") for candidate in first]
    random.seed(1)
    numpy.random.seed(1)
    states = random.getstate(), str(numpy.random.get_state())
    children = strategy.ask(1, population, key(1))
    assert (random.getstate(), str(numpy.random.get_state())) == states
    assert GeneticProgramming(selection=selection).ask(1, population, key(1)) == children
    again = [Scored.from_builtins(json.loads(json.dumps(one.to_builtins()))) for one in population]
    assert strategy.ask(1, again, key(1)) == children
    assert strategy.ask(1, population, key(2)) != children != strategy.ask(2, population, key(1))
    assert strategy.state() == {}


def test_operators_are_chosen_with_their_probabilities():
    parent = Candidate(Program.parse("add(y,p)"), (2.0, 3.0))
    population = [Scored(parent, (), (0.1,))] * 4

    def children(crossover: float, mutation: float, reproduction: float) -> list[Candidate]:
        strategy = GeneticProgramming(2000, crossover=crossover, mutation=mutation, reproduction=reproduction)
        return strategy.ask(1, population, key(0))

    def bred(candidate: Candidate) -> bool:
        assert candidate.program is not None
        return not candidate.weights and set(candidate.program.names) <= {"y", "p", "add", "sub", "mul", "div"}

    assert set(children(0, 0, 1)) == {parent}  # a copy keeps the weights it was proposed with
    assert all(map(bred, children(1, 0, 0)))  # add(y,p) with itself gives nothing but repairs of add(y,y) and add(p,p)
    mutants = children(0, 1, 0)
    other = sum(not bred(mutant) for mutant in mutants) / 2000
    assert not any(mutant.weights for mutant in mutants) and other > 0.3
    mixed = children(0.7, 0.25, 0.05)
    copies = sum(child == parent for child in mixed)
    assert abs(copies - 100) < 5 * math.sqrt(2000 * 0.05 * 0.95)
    mutated = sum(not child.weights and not bred(child) for child in mixed)
    assert abs(mutated - 500 * other) < 7 * math.sqrt(500 * other)


def test_elites_survive_and_the_untrained_come_last():
    parents = [scored("add(y,p)", 0.1), scored("add(p,y)", 0.1), scored("mul(y,p)", 0.2), scored("min(y,p)")]
    children = [scored("sub(y,p)", 0.5), scored("div(y,p)", math.nan), scored("max(y,p)"), scored("abs(add(y,p))", 0.3)]
    strategy = GeneticProgramming(population_size=4, elites=2)
    texts = [one.candidate.text for one in strategy.survive(parents, children)]
    assert texts == ["add(p,y)", "mul(y,p)", "abs(add(y,p))", "sub(y,p)"]  # add(y,p) is add(p,y) and no second elite
    halved = [scored("add(y,p)", verdict="halved"), *children[:3]]  # a copy of an elite that was not trained to the end
    assert strategy.survive(parents, halved)[0] == parents[1]
    known = [scored("add(y,p)", 0.1), *children[:3]]
    assert [one.candidate.text for one in strategy.survive(parents, known)].count("add(y,p)") == 1
    merged = GeneticProgramming(population_size=4, selection="nsga2").survive(parents, children)
    assert {one.candidate.text for one in merged} == {"add(p,y)", "mul(y,p)", "sub(y,p)", "abs(add(y,p))"}


def test_seeds_begin_the_first_generation_with_their_weights(tmp_path: Path):
    LearnedLoss("mul(y,log(p))", [-1.5, 2.0, 0.5]).save(tmp_path / "guess.json")
    strategy = GeneticProgramming(population_size=6, seeds=["mul(-1,mul(y,log(p)))", str(tmp_path / "guess.json")])
    asked = strategy.ask(0, [], key(0))
    assert asked[0] == Candidate(Program.parse("mul(-1,mul(y,log(p)))"))
    assert asked[1] == Candidate(Program.parse("mul(y,log(p))"), (-1.5, 2.0, 0.5))
    assert len(asked) == 6 and all(one.program and one.program.is_loss for one in asked)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seeds": ["mul(y,exp(p))"]}, "exp"),
        ({"seeds": ["log(p)"]}, "both y and p"),
        ({"seeds": ["focal"]}, "focal"),
        ({"seeds": ["nowhere.json"]}, "nowhere.json"),
        ({"seeds": ["square(" * 11 + "add(y,p)" + ")" * 11]}, "max_height = 10"),
        ({"seeds": ["add(y,p)"] * 3, "population_size": 2}, "seeds is 3"),
        ({"crossover": 0.9}, "1.2"),
        ({"parsimony_size": 2.5}, "2.5"),
        ({"selection": "roulette"}, "roulette"),
        ({"init_heights": (3, 2)}, "(3, 2)"),
        ({"max_height": 4}, "5 <= max_height"),
        ({"max_nodes": 20}, "33 <= max_nodes"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, object], named: str):
    with pytest.raises(ValueError, match=r"accepted") as refused:
        GeneticProgramming(**settings)  # pyright: ignore[reportArgumentType]
    assert named in str(refused.value)


# -- CMA-ES ----------------------------------------------------------------------------------------------------------


def test_matches_deaps_own_run_of_cma_es():
    class Minimum(base.Fitness):
        weights = (-1.0,)

    class Point(list[float]):
        fitness: Minimum

    theirs, ours, population = cma.Strategy([0.0] * 8, 1.2, lambda_=10), TaylorEvolution(10, sigma=1.2), []
    for generation in range(12):
        with drawing_from(fold(key(4), generation)):
            points = theirs.generate(Point)
        asked = ours.ask(generation, population, key(4))
        assert [list(one.weights) for one in asked] == points
        children = [quadratic(one) for one in asked]
        for point, child in zip(points, children, strict=True):
            point.fitness = Minimum(child.errors)
        theirs.update(points)
        population = ours.survive(population, children)
    assert ours.distribution.sigma == theirs.sigma and (ours.distribution.C == theirs.C).all()


def test_minimises_a_quadratic_and_goes_on_bit_by_bit_from_builtins():
    def generations(strategy: TaylorEvolution, first: int, last: int) -> list[list[Scored]]:
        asked = ([quadratic(one) for one in strategy.ask(number, [], key(0))] for number in range(first, last))
        return [strategy.survive([], children) for children in asked]

    whole, begun, resumed = TaylorEvolution(), TaylorEvolution(), TaylorEvolution(sigma=9.0)
    children = generations(whole, 0, 100)
    assert min(one.error for one in children[-1]) < 1e-6 < 1 < min(one.error for one in children[0])
    assert generations(begun, 0, 30) == children[:30]
    resumed.load_state(json.loads(json.dumps(begun.state())))
    assert generations(resumed, 30, 100) == children[30:] and resumed.state() == whole.state()
    learned = whole.state()
    whole.survive([], [Scored(Candidate(None, (0.0,) * 8)) for _ in range(25)])  # nothing could be trained
    assert whole.state() == learned


def test_equal_errors_move_a_distribution_nowhere_in_particular():
    strategy = TaylorEvolution()
    for generation in range(100):
        strategy.survive([], [Scored(one, (), (0.5,)) for one in strategy.ask(generation, [], key(2))])
    assert 0.01 < strategy.distribution.sigma < 100 and abs(strategy.distribution.centroid).max() < 100


# -- hall of fame, stopping ------------------------------------------------------------------------------------------


def test_a_larger_first_generation_leaves_its_best():
    strategy = GeneticProgramming(4, seeds=["sub(y,p)"], initial_size=12)
    first = strategy.ask(0, [], key(0))
    children = [distance(candidate, "abs(sub(y,p))") for candidate in first]
    population = strategy.survive([], children)
    assert len(first) == 12 and first[0].text == "sub(y,p)" and len(strategy.ask(1, population, key(0))) == 4
    assert sorted(one.error for one in population) == sorted(one.error for one in children)[:4]
    with pytest.raises(ValueError, match=r"initial_size is 3; accepted: 4 <= initial_size"):
        GeneticProgramming(4, initial_size=3)


def test_search_stops_at_the_first_limit_that_is_reached():
    falling, flat = [0.5, 0.4, 0.3], [0.5, 0.4, 0.4, 0.45]
    assert Stopping(3).reason(2, 10**9, 1e9, falling) is None
    assert Stopping(3).reason(3, 0, 0.0, falling) == "3 generations"
    assert Stopping(None, evaluations=75).reason(9, 74, 0.0, falling) is None
    assert Stopping(evaluations=75).reason(3, 75, 0.0, falling) == "75 evaluations"
    assert Stopping(seconds=2).reason(3, 75, 1.9, falling) is None
    assert Stopping(seconds=2).reason(3, 75, 2.1, falling) == "2 seconds"
    assert Stopping(plateau=2).reason(3, 75, 0.0, falling) is None
    assert Stopping(plateau=3).reason(4, 75, 0.0, flat) is None
    assert Stopping(plateau=2).reason(4, 75, 0.0, flat) == "2 generations without a lower error than 0.4"
    assert Stopping(plateau=2).reason(3, 75, 0.0, [math.inf] * 3) is not None
    for settings in ({"generations": None}, {"generations": 0}, {"plateau": 0}, {"seconds": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Stopping(**settings)
