import contextlib
import math
import random
from collections import Counter
from collections.abc import Iterator

import numpy
import pytest
import torch

from metalearn.losses import symbolic
from metalearn.losses.compiled import compile_loss
from metalearn.losses.operators import OPERATORS, TERMINALS, Operator, add_operator
from metalearn.losses.program import Program
from metalearn.random import key
from metalearn.search.candidates import Candidate, Scored
from metalearn.search.operators import (
    REPAIRS,
    Limits,
    LossTree,
    crossover,
    crowded_tournament,
    double_tournament,
    drawing_from,
    epsilon_lexicase,
    mutate,
    nondominated,
    primitive_set,
    ramped,
    repair,
)

SOFTPLUS = Operator(
    "softplus", 1, "torch.nn.functional.softplus(a)", ("torch.sigmoid(a)",), "log(1 + exp(a))", r"\mathrm{{sp}}({a})"
)
LIMITS = Limits(height=6, nodes=40)


@contextlib.contextmanager
def softplus() -> Iterator[None]:
    add_operator(SOFTPLUS)
    try:
        yield
    finally:
        del OPERATORS["softplus"]


def scored(text: str, *errors: float) -> Scored:
    return Scored(Candidate(Program.parse(text)), (), errors)


def size(number: int) -> str:
    """A loss of 3 + number nodes, and of as much complexity."""
    return "square(" * number + "add(y,p)" + ")" * number


def leaf_depths(program: Program) -> list[int]:
    depths = [0] * len(program)
    for place, node in enumerate(program.nodes):
        for child in node.children:
            depths[child] = depths[place] + 1
    return [depth for depth, node in zip(depths, program.nodes, strict=True) if not node.children]


def within_five_sigma(count: int, total: int, probability: float) -> bool:
    return abs(count - total * probability) <= 5 * math.sqrt(total * probability * (1 - probability))


def test_draws_are_the_keys_own_and_global_generators_go_on_as_if_nothing_were_drawn():
    def draws(seed: int) -> tuple[float, float]:
        with drawing_from(key(seed)):
            return random.random(), float(numpy.random.standard_normal())

    random.seed(3)
    numpy.random.seed(3)
    expected = random.random(), numpy.random.rand()
    random.seed(3)
    numpy.random.seed(3)
    first = draws(1)
    with pytest.raises(KeyError), drawing_from(key(1)):
        random.random()
        raise KeyError("in the middle")
    assert (random.random(), numpy.random.rand()) == expected
    assert draws(1) == first
    assert len({draws(seed) for seed in range(100)}) == 100
    with drawing_from(torch.tensor(5)):
        positive = random.random()
    with drawing_from(torch.tensor(-5)):
        assert random.random() != positive


def test_matches_the_table_in_the_grammar():
    grammar = primitive_set()
    assert {node.name: node.arity for node in grammar.mapping.values()} == {
        name: row.arity for name, row in OPERATORS.items() if row.searched
    } | dict.fromkeys(TERMINALS, 0)
    with softplus():
        assert primitive_set().mapping["softplus"].arity == 1
    assert "softplus" not in primitive_set().mapping


def test_matches_program_expression_and_values_on_1000_random_trees():
    y, p = torch.tensor([0.0, 1.0, 0.0]).double(), torch.tensor([0.3, 0.6, 0.9]).double()
    with drawing_from(key(0)):
        programs = ramped(1000)
    for number, program in enumerate(programs):
        tree = LossTree.from_program(program)
        assert tree.program == program and tree.height == program.height and str(tree).replace(" ", "") == str(program)
        assert program.is_loss and 2 <= program.height <= 5 and len(program) <= 33 and min(leaf_depths(program)) >= 2
        if number % 10 == 0:
            assert symbolic.program_of(tree.expr) == program
            assert compile_loss(program)(y, p, torch.empty(0)).isfinite().all()
    assert len(set(programs)) > 900
    assert {program.height for program in programs} == {2, 3, 4, 5}
    roots = Counter(program.names[0] for program in programs)
    assert all(within_five_sigma(roots[name], 1000, 1 / 12) for name, row in OPERATORS.items() if row.searched)


def test_expression_follows_a_tree_that_deap_changes_in_place():
    tree = LossTree.from_program(Program.parse("add(y,p)"))
    before = tree.expr
    tree[tree.searchSubtree(2)] = LossTree.from_program(Program.parse("log(p)"))
    assert symbolic.program_of(tree.expr) == Program.parse("add(y,log(p))") != symbolic.program_of(before)


def test_repair_changes_one_terminal_into_an_operation_on_target_and_output():
    with drawing_from(key(2)):
        kept = Program.parse("mul(y,log(p))")
        assert repair(kept) is kept
        repaired = [str(repair(Program.parse("add(1,abs(y))"))) for _ in range(800)]
    pairs = [f"{name}({pair})" for name in REPAIRS for pair in ("y,p", "p,y")]
    expected = {form.format(pair) for form in ("add({},abs(y))", "add(1,abs({}))") for pair in pairs}
    counts = Counter(repaired)
    assert set(counts) == expected
    assert all(within_five_sigma(count, 800, 1 / 16) for count in counts.values())


def test_children_are_losses_within_the_limits_or_a_parent():
    with drawing_from(key(3)):
        parents = [program for program in ramped(60) if program.height <= LIMITS.height]
        unlike = 0
        for _ in range(400):
            first, second = random.sample(parents, 2)
            children = [*crossover(first, second, LIMITS), mutate(first, LIMITS)]
            assert all(child.is_loss and child.height <= 6 and len(child) <= 40 for child in children)
            unlike += sum(child not in (first, second) for child in children)
            parents.append(random.choice(children))
        assert unlike > 600
        tall = Program.parse(size(5))
        assert {crossover(tall, tall, Limits(0, 64))[0], mutate(tall, Limits(10, 1))} == {tall}


def test_matches_a_plain_exchange_of_subtrees():
    first, second = Program.parse("mul(y,log(p))"), Program.parse("abs(sub(p,y))")
    parts = [("sub", "p", "y"), ("p",), ("y",)]
    exchanges = {Program(("mul", *part, "log", "p")) for part in parts}  # in the place of y
    exchanges |= {Program(("mul", "y", *part)) for part in parts}  # of log(p)
    exchanges |= {Program(("mul", "y", "log", *part)) for part in parts}  # of p
    with drawing_from(key(4)):
        children = {crossover(first, second, Limits())[0] for _ in range(300)}
    assert {child for child in exchanges if child.is_loss} == children & exchanges
    assert all(repaired.is_loss and len(repaired) in (5, 6) for repaired in children - exchanges)
    assert len(children - exchanges) > 10


def test_user_operator_is_drawn_and_operators_that_are_not_searched_stay_in_a_seed():
    with softplus(), drawing_from(key(5)):
        assert sum("softplus" in program.names for program in ramped(200)) > 40
    OPERATORS["softplus"] = Operator(**{**SOFTPLUS.__dict__, "searched": False})
    try:
        seed = Program.parse("softplus(add(y,p))")
        with drawing_from(key(6)):
            assert all("softplus" not in program.names for program in ramped(200))
            mutants = [mutate(seed, Limits()) for _ in range(100)]
        assert any(mutant != seed and "softplus" in mutant.names for mutant in mutants)
    finally:
        del OPERATORS["softplus"]


def test_matches_the_probabilities_of_double_tournaments():
    population = [scored(size(number), 0.1 * number) for number in range(4)]
    dead = [scored(size(number)) for number in range(4, 6)]
    nan = [scored(size(number), math.nan) for number in range(6, 8)]
    with drawing_from(key(7)):
        wins = Counter(map(population.index, double_tournament(population, 4000, 4, 1.0)))
        with_dead = double_tournament(population + dead + nan, 4000, 3, 1.0)
        equal = [one._replace(errors=(-0.1 * place,)) for place, one in enumerate(population)]
        small = Counter(map(equal.index, double_tournament(equal, 4000, 1, 1.6)))
    for place in range(4):  # the best of four draws is at least this good
        expected = (1 - place / 4) ** 4 - (1 - (place + 1) / 4) ** 4
        assert within_five_sigma(wins[place], 4000, expected)
    assert within_five_sigma(sum(one in dead or math.isnan(one.error) for one in with_dead), 4000, 0.5**3)
    for place in range(4):  # of two independent draws the smaller wins with probability .8
        smaller, larger = (3 - place) / 4, place / 4
        assert within_five_sigma(small[place], 4000, (2 * (0.8 * smaller + 0.2 * larger) + 1 / 4) / 4)


def test_matches_dominance_counted_by_hand():
    points = [(0.1, 5), (0.2, 3), (0.3, 1), (0.2, 4), (0.4, 2), (0.15, 5), (0.6, 6)]
    fronts = [{0, 1, 2}, {3, 4, 5}, {6}]
    population = [scored(size(complexity), error) for error, complexity in points]
    untrained = [scored(size(0)), scored(size(0), math.nan)]
    everybody = untrained + population
    for count, expected in ((3, fronts[0]), (6, fronts[0] | fronts[1]), (7, set(range(7)))):
        assert {population.index(one) for one in nondominated(everybody, count)} == expected
    assert nondominated(everybody, 9)[:7] and len(nondominated(everybody, 9)) == 9
    kept = {population.index(one) for one in nondominated(everybody, 5)}  # the ends of a front are its least crowded
    assert kept == {0, 1, 2, 4, 5}
    with drawing_from(key(8)):
        wins = Counter(map(population.index, crowded_tournament(everybody, 4900)))
        assert set(crowded_tournament(untrained, 20)) <= set(untrained)
    assert within_five_sigma(wins[6], 4900, 1 / 49)  # the last wins only against itself
    assert within_five_sigma(sum(wins[place] for place in fronts[0]), 4900, 1 - (4 / 7) ** 2)


def test_lexicase_keeps_specialists_that_a_mean_would_not():
    population = [
        scored(size(n), *errors) for n, errors in enumerate([(0, 10), (10, 0), (4, 4), (4.1, 4.1), (4.2, 4.2)])
    ]
    untrained = [scored(size(9)), scored(size(9), math.nan, 0.0)]
    with drawing_from(key(9)):
        chosen = Counter(map(population.index, epsilon_lexicase(population + untrained, 1000)))
        assert set(epsilon_lexicase(untrained, 20)) <= set(untrained)
    assert set(chosen) == {0, 1} and within_five_sigma(chosen[0], 1000, 0.5)
