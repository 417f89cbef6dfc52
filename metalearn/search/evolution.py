"""What proposes losses, what survives and when to stop: genetic programming, random search, CMA-ES."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from deap import cma
from torch import Tensor

from metalearn.base import require_choice, require_range
from metalearn.losses.learned import LearnedLoss, load_loss
from metalearn.losses.program import MAX_HEIGHT, MAX_NODES, Program
from metalearn.losses.taylor import NUM_WEIGHTS
from metalearn.random import fold
from metalearn.search import operators
from metalearn.search.candidates import Candidate, Scored
from metalearn.search.operators import Fitness, Limits, distinct, drawing_from, is_trained, standing

SELECTIONS = ("double_tournament", "nsga2", "epsilon_lexicase")


class Strategy(ABC):
    """Proposes a generation of candidates and says which scored ones go on.

    Both are functions of their arguments, of the constructor's settings and of ``state``, which is empty but for
    strategies that learn a distribution.
    """

    population_size: int

    @abstractmethod
    def ask(self, generation: int, population: Sequence[Scored], key: Tensor) -> list[Candidate]:
        """``population_size`` candidates.

        Args:
            generation: from 0; the key is folded by it.
            population: what survived so far; empty at first.
            key: scalar; the only source of randomness.
        """

    def example(self) -> Candidate:
        """A loss of the kind that is proposed, to see beforehand what can be done with it."""
        return Candidate(Program.parse("sub(y,p)"))

    @abstractmethod
    def survive(self, population: Sequence[Scored], children: Sequence[Scored]) -> list[Scored]:
        """The next population."""

    def state(self) -> dict[str, Any]:
        """What is learned beside the population, in builtins."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state``: goes on as if there had been no interruption, bit by bit."""
        if state:
            raise ValueError(f"state has {', '.join(state)}; accepted: none, {type(self).__name__} having no state")


class GeneticProgramming(Strategy):
    """Evolution of programs: parents are selected, then each child is a crossover, a mutant or a copy (DEAP's varOr).

    Args:
        population_size: losses of a generation, at least 2.
        crossover: probability of a one-point crossover of two parents, of which the first child is kept.
        mutation: probability of a new subtree of height 0 to 2 in the place of a random one.
        reproduction: probability of a copy. The three sum to 1.
        elites: how many of the best distinct losses survive whatever their children are, 0 to population_size. NSGA-II
            chooses from parents and children alike, and needs none.
        fitness_size: losses of a double tournament's fitness tournaments, at least 1.
        parsimony_size: 1 to 2; the smaller loss wins a double tournament's size tournament with half this probability.
        init_heights: least and greatest height of the first losses.
        max_height: of any loss, above init_heights, at most 63; children beyond it are replaced by a parent.
        max_nodes: of any loss, at most 510, and at least what the first losses may need.
        selection: "double_tournament" by error, then complexity; "nsga2" by (error, complexity); "epsilon_lexicase" over
            the errors of several tasks.
        seeds: texts of losses, or JSON files of saved ones, that the first generation begins with.
        initial_size: losses of the first generation, of which the best survive, at least ``population_size``; null for as
            many. Half of what is drawn at random is screened out, at no cost: more of them leave more to begin with.

    Raises:
        ValueError: for values out of range, and seeds that are no symbolic loss of y and p within the limits.

    Source: Raymond et al. 2023, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", section 3.1 and
    appendix. Differs from the paper: there is an elite, ties in error go to the simpler loss, and losses have at most
    ``max_nodes`` nodes.
    """

    def __init__(
        self,
        population_size: int = 25,
        crossover: float = 0.7,
        mutation: float = 0.25,
        reproduction: float = 0.05,
        elites: int = 1,
        fitness_size: int = 4,
        parsimony_size: float = 1.0,
        init_heights: tuple[int, int] = (2, 4),
        max_height: int = 10,
        max_nodes: int = 64,
        selection: str = "double_tournament",
        seeds: list[str] | None = None,
        initial_size: int | None = None,
    ):
        require_range("population_size", population_size, 2)
        for name, value in dict(crossover=crossover, mutation=mutation, reproduction=reproduction).items():
            require_range(name, value, 0, 1)
        require_range("crossover + mutation + reproduction", round(crossover + mutation + reproduction, 9), 1, 1)
        require_range("elites", elites, 0, population_size)
        require_range("fitness_size", fitness_size, 1)
        require_range("parsimony_size", parsimony_size, 1, 2)
        require_choice("selection", selection, SELECTIONS)
        _require_heights(init_heights)
        require_range("max_height", max_height, init_heights[1] + 1, MAX_HEIGHT - 1)
        require_range("max_nodes", max_nodes, 2 ** (init_heights[1] + 1) + 1, MAX_NODES - 2)
        self.population_size, self.crossover, self.mutation, self.elites = population_size, crossover, mutation, elites
        self.fitness_size, self.parsimony_size, self.selection = fitness_size, parsimony_size, selection
        self.init_heights, self.limits = init_heights, Limits(max_height, max_nodes)
        self.initial_size = population_size if initial_size is None else initial_size
        require_range("initial_size", self.initial_size, population_size)
        self.seeds = [_seed(seed, self.limits) for seed in seeds or []]
        require_range("number of seeds", len(self.seeds), 0, self.initial_size)

    def ask(self, generation: int, population: Sequence[Scored], key: Tensor) -> list[Candidate]:
        with drawing_from(fold(key, generation)):
            if not population:
                drawn = operators.ramped(self.initial_size - len(self.seeds), self.init_heights)
                return [*self.seeds, *map(Candidate, drawn)]
            parents = [scored.candidate for scored in self._select(population)]
            return [self._child(parents) for _ in range(self.population_size)]

    def _select(self, population: Sequence[Scored]) -> list[Scored]:
        match self.selection:
            case "nsga2":
                return operators.crowded_tournament(population, self.population_size)
            case "epsilon_lexicase":
                return operators.epsilon_lexicase(population, self.population_size)
        sizes = self.fitness_size, self.parsimony_size
        return operators.double_tournament(population, self.population_size, *sizes)

    def _child(self, parents: Sequence[Candidate]) -> Candidate:
        choice = random.random()
        if choice < self.crossover:
            first, second = (_program(parent) for parent in random.sample(parents, 2))
            return Candidate(operators.crossover(first, second, self.limits)[0])
        parent = random.choice(parents)
        if choice < self.crossover + self.mutation:
            return Candidate(operators.mutate(_program(parent), self.limits))
        return parent

    def survive(self, population: Sequence[Scored], children: Sequence[Scored]) -> list[Scored]:
        if self.selection == "nsga2":
            different = list(distinct([*population, *children]))
            kept = operators.nondominated(different, self.population_size)
            return kept + sorted(children, key=standing)[: self.population_size - len(kept)]
        elite = list(distinct(scored for scored in population if is_trained(scored)))[: self.elites]
        known = {scored.candidate.canonical for scored in children if is_trained(scored)}  # a copy may have been halved
        missing = [scored for scored in elite if scored.candidate.canonical not in known]
        return missing + sorted(children, key=standing)[: self.population_size - len(missing)]


class RandomSearch(Strategy):
    """Every generation is drawn anew, repaired like the first of ``GeneticProgramming``; the best of all survive.

    Args:
        population_size: losses of a generation, at least 1.
        heights: least and greatest height of the losses before repair.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, population_size: int = 25, heights: tuple[int, int] = (2, 4)):
        require_range("population_size", population_size, 1)
        _require_heights(heights)
        self.population_size, self.heights = population_size, heights

    def ask(self, generation: int, population: Sequence[Scored], key: Tensor) -> list[Candidate]:
        with drawing_from(fold(key, generation)):
            return [Candidate(program) for program in operators.ramped(self.population_size, self.heights)]

    def survive(self, population: Sequence[Scored], children: Sequence[Scored]) -> list[Scored]:
        return list(distinct([*population, *children]))[: self.population_size]


class TaylorEvolution(Strategy):
    """CMA-ES on the eight numbers of a third-order Taylor polynomial, from a mean of zeros.

    A generation in which nothing could be trained leaves the distribution as it is.

    Args:
        population_size: polynomials of a generation, at least 4.
        sigma: first standard deviation of every number, above 0.

    Raises:
        ValueError: for values out of range.

    Source: Gonzalez and Miikkulainen 2021, "Optimizing Loss Functions Through Multivariate Taylor Polynomial
    Parameterization"; Hansen and Ostermeier 2001 for CMA-ES, which is DEAP's.
    """

    LEARNED = ("centroid", "sigma", "C", "pc", "ps", "diagD", "B", "update_count")

    def __init__(self, population_size: int = 25, sigma: float = 1.2):
        require_range("population_size", population_size, 4)
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma is {sigma!r}; accepted: 0 < sigma < inf")
        self.population_size = population_size
        self.distribution = cma.Strategy([0.0] * NUM_WEIGHTS, sigma, lambda_=population_size)

    def example(self) -> Candidate:
        return Candidate(None, (0.0,) * NUM_WEIGHTS)

    def ask(self, generation: int, population: Sequence[Scored], key: Tensor) -> list[Candidate]:
        with drawing_from(fold(key, generation)):
            drawn = self.distribution.generate(numpy.ndarray.tolist)
        return [Candidate(None, tuple(numbers)) for numbers in drawn]

    def survive(self, population: Sequence[Scored], children: Sequence[Scored]) -> list[Scored]:
        if any(is_trained(scored) for scored in children):
            self.distribution.update([_Point(scored) for scored in children])  # ties stay in the order of the draws
        return list(children)

    def state(self) -> dict[str, Any]:
        values = {name: getattr(self.distribution, name) for name in self.LEARNED}
        return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name in self.LEARNED:
            value = state[name]
            setattr(self.distribution, name, numpy.array(value) if isinstance(value, list) else value)
        self.distribution.BD = self.distribution.B * self.distribution.diagD


class _Point(list[float]):
    """The numbers of a polynomial with the fitness that DEAP sorts by."""

    def __init__(self, scored: Scored):
        super().__init__(scored.candidate.weights)
        self.fitness = Fitness(standing(scored)[:1])


def _require_heights(heights: Sequence[int]) -> None:
    if len(heights) != 2 or not 1 <= heights[0] <= heights[1] <= 7:
        raise ValueError(f"heights are {heights}; accepted: two, the first at most the second, from 1 to 7")


def _program(candidate: Candidate) -> Any:
    assert candidate.program is not None, "a polynomial does not breed with programs"
    return candidate.program


def _seed(text: str, limits: Limits) -> Candidate:
    loss = load_loss(text)
    if not isinstance(loss, LearnedLoss) or not loss.program.is_loss:
        raise ValueError(f"seed is {text!r}; accepted: a symbolic loss with both y and p in it, or its JSON file")
    program = loss.program
    if program.height > limits.height or len(program) > limits.nodes:
        raise ValueError(
            f"seed {text!r} has height {program.height} and {len(program)} nodes; accepted: at most "
            f"max_height = {limits.height} and max_nodes = {limits.nodes}"
        )
    weights = tuple(loss.weights.tolist())
    return Candidate(program, () if set(weights) <= {1.0} else weights)


class Stopping:
    """When a search ends: at the first of these; null for never.

    Args:
        generations: of the search, at least 1.
        evaluations: scored candidates, duplicates among them, at least 1.
        seconds: spent in generations, at least 0.
        plateau: generations in a row that brought no lower error, at least 1.

    Raises:
        ValueError: for values out of range, or where all are null.
    """

    def __init__(
        self,
        generations: int | None = 50,
        evaluations: int | None = None,
        seconds: float | None = None,
        plateau: int | None = None,
    ):
        limits = {"generations": generations, "evaluations": evaluations, "seconds": seconds, "plateau": plateau}
        for name, value in limits.items():
            if value is not None:
                require_range(name, value, 0 if name == "seconds" else 1)
        if all(value is None for value in limits.values()):
            raise ValueError(f"{', '.join(limits)} are all null; accepted: at least one number")
        self.generations, self.evaluations, self.seconds, self.plateau = limits.values()

    def reason(
        self, generation: int, evaluations: int, seconds: float, best_by_generation: Sequence[float]
    ) -> str | None:
        """Why the search ends now, or None where it goes on.

        Args:
            generation: generations that are done.
            evaluations: candidates scored in them.
            seconds: spent in them.
            best_by_generation: the least error after each, (generation,); whether of the generation or so far.
        """
        if self.generations is not None and generation >= self.generations:
            return f"{generation} generations"
        if self.evaluations is not None and evaluations >= self.evaluations:
            return f"{evaluations} evaluations"
        if self.seconds is not None and seconds >= self.seconds:
            return f"{seconds:.0f} seconds"
        bests, wait = best_by_generation, self.plateau
        if wait is not None and len(bests) > wait and min(bests[-wait:]) >= min(bests[:-wait]):
            return f"{wait} generations without a lower error than {min(bests):.6g}"
        return None
