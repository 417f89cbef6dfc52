"""Variation and selection of losses: DEAP trees to and from programs. No tree outlives a call; searches hold programs.

DEAP draws from the global generators of ``random`` and numpy. Every function here that draws is to be called within
``drawing_from(key)``, which lends it a stream of the key and puts the global states back.
"""

import contextlib
import functools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy
from deap import base, gp, tools
from torch import Tensor

from metalearn.losses import symbolic
from metalearn.losses.operators import OPERATORS, TERMINALS, Operator
from metalearn.losses.program import Program
from metalearn.search.candidates import Candidate, Scored

REPAIRS = ("add", "sub", "mul", "div")
SUBTREE_HEIGHTS = (0, 2)


@contextlib.contextmanager
def drawing_from(key: Tensor) -> Iterator[None]:
    """Within it, ``random`` and ``numpy.random`` are streams of the scalar key; after it, as if nothing had been drawn."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    seed = int(key) % 2**64  # random.seed forgets the sign
    random.seed(seed)
    numpy.random.seed([seed % 2**32, seed >> 32])
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


# -- trees -----------------------------------------------------------------------------------------------------------


def primitive_set() -> gp.PrimitiveSet:
    """DEAP's grammar: the operators of the table that are searched, and the terminals, each under its own name."""
    return _grammar(tuple(row for row in OPERATORS.values() if row.searched))


@functools.lru_cache(maxsize=16)
def _grammar(rows: tuple[Operator, ...]) -> gp.PrimitiveSet:
    grammar = gp.PrimitiveSet("loss", 0)
    for row in rows:
        grammar.addPrimitive(row.code, row.arity, name=row.name)
    for name in TERMINALS:
        grammar.addTerminal(name, name=name)
    return grammar


@functools.lru_cache(maxsize=1024)
def _expression(program: Program) -> Any:
    return symbolic.expression(program)


class Fitness(base.Fitness):
    """Any number of values, all to be made small; compared in their order."""

    weights: tuple[float, ...] = ()

    def __init__(self, values: Sequence[float] = ()):
        self.weights = (-1.0,) * len(values)
        super().__init__(values)


class LossTree(gp.PrimitiveTree):
    """A loss as DEAP has it: nodes in prefix order, and a fitness.

    Args:
        nodes: primitives and terminals of ``primitive_set``, in prefix order.
        fitness: what selection compares.
    """

    def __init__(self, nodes: Sequence[gp.Primitive | gp.Terminal], fitness: Sequence[float] = ()):
        super().__init__(nodes)
        self.fitness = Fitness(fitness)

    @classmethod
    def from_program(cls, program: Program, fitness: Sequence[float] = ()) -> "LossTree":
        """The tree of a program, which may have operators that are not searched."""
        nodes = _grammar(tuple(OPERATORS.values())).mapping
        return cls([nodes[name] for name in program.names], fitness)

    @classmethod
    def from_scored(cls, scored: Scored) -> "LossTree":
        """The tree of a scored loss: its mean error, then its complexity, are its fitness."""
        program = scored.candidate.program
        assert program is not None, "a polynomial is no tree"
        return cls.from_program(program, standing(scored)[:2])

    @property
    def program(self) -> Program:
        """The program of the tree as it is now."""
        return Program(tuple(node.name for node in self))

    @property
    def expr(self) -> Any:
        """The unevaluated sympy expression of the tree as it is now."""
        return _expression(self.program)  # cached by program, because DEAP changes trees in place


def standing(scored: Scored) -> tuple[float, int, tuple[str, ...], tuple[float, ...]]:
    """What losses are ranked by: mean error (infinite where it is no number), complexity, then names and weights."""
    candidate, error = scored.best, scored.error
    names = () if candidate.program is None else candidate.program.names
    return math.inf if math.isnan(error) else error, candidate.complexity, names, candidate.weights


def is_trained(scored: Scored) -> bool:
    """Whether it has an error on every task."""
    return math.isfinite(scored.error)


def distinct(population: Iterable[Scored]) -> Iterator[Scored]:
    """The best first, and of losses that are the same but for the order of arguments only the best."""
    seen: set[Candidate] = set()
    for scored in sorted(population, key=standing):
        if (canonical := scored.candidate.canonical) not in seen:
            seen.add(canonical)
            yield scored


# -- variation -------------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """How large a child may be: levels below the root, and nodes."""

    height: int = 10
    nodes: int = 64


def ramped(count: int, heights: tuple[int, int] = (2, 4)) -> list[Program]:
    """Random losses, ramped half-and-half: each full or grown, of a height drawn from the range; repaired."""
    grammar = primitive_set()
    trees = [LossTree(gp.genHalfAndHalf(grammar, *heights)) for _ in range(count)]
    return [repair(tree.program) for tree in trees]


def repair(program: Program) -> Program:
    """The program itself where the target and the output are both in it; else with a random terminal made ``op(y, p)``.

    The operator is one of add, sub, mul, div, and its arguments come in either order.
    """
    if program.is_loss:
        return program
    place = random.choice([place for place, name in enumerate(program.names) if name in TERMINALS])
    both = (random.choice(REPAIRS), *random.sample(("y", "p"), 2))
    return Program(program.names[:place] + both + program.names[place + 1 :])


def crossover(first: Program, second: Program, limits: Limits) -> tuple[Program, Program]:
    """One-point crossover: two subtrees change places. A child beyond the limits is replaced by a parent."""
    parents = (first, second)
    one, other = gp.cxOnePoint(LossTree.from_program(first), LossTree.from_program(second))
    return _limited(one, parents, limits), _limited(other, parents, limits)


def mutate(program: Program, limits: Limits) -> Program:
    """Uniform mutation: a random subtree gives way to a new one of height 0 to 2; as ``crossover`` beyond the limits."""
    low, high = SUBTREE_HEIGHTS
    draw = functools.partial(gp.genHalfAndHalf, min_=low, max_=high)
    (child,) = gp.mutUniform(LossTree.from_program(program), draw, primitive_set())
    return _limited(child, (program,), limits)


def _limited(child: LossTree, parents: Sequence[Program], limits: Limits) -> Program:
    fits = (
        child.height <= limits.height and len(child) <= limits.nodes
    )  # before it is a program, which has its own limits
    repaired = repair(child.program) if fits else None
    if repaired is None or repaired.height > limits.height or len(repaired) > limits.nodes:
        return random.choice(parents)
    return repaired


# -- selection -------------------------------------------------------------------------------------------------------


def double_tournament(
    population: Sequence[Scored], count: int, fitness_size: int, parsimony_size: float
) -> list[Scored]:
    """``count`` winners of tournaments by fitness among winners of tournaments of two by number of nodes.

    Args:
        population: what is chosen from, with replacement.
        count: how many are chosen.
        fitness_size: candidates of a tournament by error, then complexity.
        parsimony_size: the smaller of two losses wins with probability ``parsimony_size / 2``: 1 to 2.

    Source: Luke and Panait 2002, "Fighting Bloat with Nonparametric Parsimony Pressure".
    """
    trees = [LossTree.from_scored(scored) for scored in population]
    chosen = tools.selDoubleTournament(trees, count, fitness_size, parsimony_size, fitness_first=False)
    return _scored(chosen, trees, population)


def crowded_tournament(population: Sequence[Scored], count: int) -> list[Scored]:
    """``count`` winners of tournaments of two by front of (error, complexity), then by crowding distance.

    Losses that were never trained take part only where no other is left.

    Source: Deb et al. 2002, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", section III-B.
    """
    pool = _trained_or_all(population)
    trees = [LossTree.from_scored(scored) for scored in pool]
    if not is_trained(pool[0]):
        return _scored(tools.selRandom(trees, count), trees, pool)
    for rank, front in enumerate(tools.sortNondominated(trees, len(trees))):
        tools.emo.assignCrowdingDist(front)
        for tree in front:
            tree.standing = (-rank, tree.fitness.crowding_dist)
    return _scored(tools.selTournament(trees, count, tournsize=2, fit_attr="standing"), trees, pool)


def nondominated(population: Sequence[Scored], count: int) -> list[Scored]:
    """The ``count`` that NSGA-II keeps by (error, complexity); losses that were never trained come last, the simplest first."""
    trained = [scored for scored in population if is_trained(scored)]
    trees = [LossTree.from_scored(scored) for scored in trained]
    kept = _scored(tools.selNSGA2(trees, count), trees, trained) if trained else []
    untrained = sorted((scored for scored in population if not is_trained(scored)), key=standing)
    return kept + untrained[: count - len(kept)]


def epsilon_lexicase(population: Sequence[Scored], count: int) -> list[Scored]:
    """``count`` survivors of the tasks in random order: each keeps what is within one median absolute deviation of its best.

    Losses that were never trained take part only where no other is left.

    Source: La Cava, Spector and Danai 2016, "Epsilon-Lexicase Selection for Regression", the variant in which epsilon
    is that of the losses still in the running.
    """
    pool = _trained_or_all(population)
    trees = [_with_errors(scored) for scored in pool]
    if not is_trained(pool[0]):
        return _scored(tools.selRandom(trees, count), trees, pool)
    return _scored(tools.selAutomaticEpsilonLexicase(trees, count), trees, pool)


def _with_errors(scored: Scored) -> LossTree:
    assert scored.candidate.program is not None, "a polynomial is no tree"
    return LossTree.from_program(scored.candidate.program, scored.errors)


def _trained_or_all(population: Sequence[Scored]) -> Sequence[Scored]:
    return [scored for scored in population if is_trained(scored)] or population


def _scored(chosen: Sequence[LossTree], trees: Sequence[LossTree], population: Sequence[Scored]) -> list[Scored]:
    """What the chosen trees were made of; equal trees are told apart."""
    places = {id(tree): place for place, tree in enumerate(trees)}
    return [population[places[id(tree)]] for tree in chosen]
