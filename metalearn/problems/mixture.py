"""Several inner problems with the same meta-parameters: what is learned is to serve all of them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from metalearn import random
from metalearn.base import (
    Batches,
    Estimator,
    InnerProblem,
    InnerState,
    MetaGradient,
    Params,
    Source,
    StepOutput,
    Tree,
    require_choice,
    require_range,
)
from metalearn.models.vision import ACTIVATIONS, MLP
from metalearn.optim.learned import LearnedRule
from metalearn.problems.optimizees import Optimizee
from metalearn.unroll import Tasks


class Mixture(InnerProblem):
    """Problems of unlike shapes, whose meta-objectives are averaged: the mean over ``problems`` of each one's own.

    Its runs cannot be one run: an estimator is wrapped in ``OverMixture``, which asks it for each problem in turn.

    Args:
        problems: at least one, all with the same meta-parameters.

    Raises:
        ValueError: for no problem.
    """

    terminal = False

    def __init__(self, problems: Sequence[InnerProblem]):
        require_range("number of problems", len(problems), 1)
        self.problems = list(problems)

    @property
    def rank(self) -> int:
        return self.problems[0].rank

    @rank.setter
    def rank(self, rank: int) -> None:
        for problem in self.problems:
            problem.rank = rank

    @property
    def world(self) -> int:
        return self.problems[0].world

    @world.setter
    def world(self, world: int) -> None:
        for problem in self.problems:
            problem.world = world

    @property
    def differentiable(self) -> bool:
        return all(problem.differentiable for problem in self.problems)

    @property
    def global_generator(self) -> bool:
        """Known when the data are open, and the modules with them."""
        return any(problem.global_generator for problem in self.problems)

    def open(self, *, test: bool) -> None:
        for problem in self.problems:
            problem.open(test=test)

    def record(self) -> dict[str, Any]:
        records = {f"{number}": problem.record() for number, problem in enumerate(self.problems)}
        return {
            "fingerprint": {number: record["fingerprint"] for number, record in records.items()},
            "division": {number: record["division"] for number, record in records.items()},
        }

    def init_meta(self, key: Tensor) -> Params:
        return self.problems[0].init_meta(key)

    def init(self, meta: Params, key: Tensor) -> InnerState:
        raise NotImplementedError("a mixture has no run of its own: OverMixture asks for each problem's")

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        raise NotImplementedError("a mixture has no run of its own: OverMixture asks for each problem's")

    def batches(self, key: Tensor, steps: int) -> Batches:
        """Lists of each problem's."""
        each = [problem.batches(random.fold(key, n), steps) for n, problem in enumerate(self.problems)]
        return Batches(lambda k: [batches.inner(k) for batches in each], [batches.outer for batches in each], steps)


class OptimizeeFamily(Mixture):
    """Multi-layer perceptrons of sampled sizes on one source: ``groups`` configurations, drawn once, each an ``Optimizee``.

    Width, depth, activation and batch size are a group's; initialisations, batches, scales and lengths of episodes are
    drawn anew in every episode.

    Args:
        source: as in ``Optimizee``.
        rule: the learned rule.
        horizon: as in ``Optimizee``.
        groups: number of configurations, at least 1.
        widths: of which one is drawn for all hidden layers of a group, each at least 1.
        depths: numbers of hidden layers, each at least 0.
        activations: names that ``MLP`` accepts.
        batch_sizes: examples of a step, each at least 1.
        shortest: as in ``Optimizee``.
        multiple_of: as in ``Optimizee``.
        rescale: as in ``Optimizee``.
        family_seed: of the configurations.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        source: Source,
        rule: LearnedRule,
        horizon: int = 100,
        groups: int = 4,
        widths: Sequence[int] = (16, 32, 64),
        depths: Sequence[int] = (1, 2),
        activations: Sequence[str] = ("relu", "tanh"),
        batch_sizes: Sequence[int] = (32, 64, 128),
        shortest: int | None = None,
        multiple_of: int = 1,
        rescale: float = 1.0,
        family_seed: int = 0,
    ):
        require_range("groups", groups, 1)
        for name, choices, least in (("widths", widths, 1), ("depths", depths, 0), ("batch_sizes", batch_sizes, 1)):
            require_range(f"number of {name}", len(choices), 1)
            require_range(name, min(choices), least)
        require_range("number of activations", len(activations), 1)
        for activation in activations:
            require_choice("activations", activation, ACTIVATIONS)
        self.configurations = []
        for group in range(groups):
            key = random.key(family_seed, "family", group)

            def chosen(name: str, choices: Sequence[Any], key: Tensor = key) -> Any:
                return choices[int(random.integers(random.fold(key, name), (), len(choices)))]

            self.configurations.append(
                {
                    "hidden": (chosen("width", widths),) * chosen("depth", depths),
                    "activation": chosen("activation", activations),
                    "batch_size": chosen("batch", batch_sizes),
                }
            )
        super().__init__(
            [
                Optimizee(
                    source,
                    perceptron(configuration["hidden"], configuration["activation"]),
                    rule,
                    horizon,
                    shortest=shortest,
                    multiple_of=multiple_of,
                    batch_size=configuration["batch_size"],
                    rescale=rescale,
                )
                for configuration in self.configurations
            ]
        )


def perceptron(hidden: Sequence[int], activation: str) -> Callable[[int, int], nn.Module]:
    """What builds an ``MLP`` of these hidden layers."""
    return lambda num_inputs, num_outputs: MLP(num_inputs, num_outputs, hidden, activation)


class OverMixture(Estimator):
    """An estimator of one run, for every problem of a mixture: the mean of its estimates.

    Args:
        estimator: what each problem is differentiated with. Its state is kept for each.
    """

    def __init__(self, estimator: Estimator):
        self.estimator = estimator
        self.shards = estimator.shards

    def refusal(self, problem: InnerProblem) -> str | None:
        if not isinstance(problem, Mixture):
            return "it is no mixture"
        return next(filter(None, map(self.estimator.refusal, problem.problems)), None)

    def init(self, problem: InnerProblem, meta: Params, key: Tensor) -> Tree:
        return {
            f"{number}": self._own(each).init(each, meta, random.fold(key, number))
            for number, each in enumerate(_members(problem))
        }

    def estimate(self, problem: InnerProblem, meta: Params, state: Tree, batches: Batches, key: Tensor) -> MetaGradient:
        found = []
        for number, each in enumerate(_members(problem)):
            own = Batches(lambda k, n=number: batches.inner(k)[n], batches.outer[number], batches.steps)
            found.append(self._own(each).estimate(each, meta, state[f"{number}"], own, random.fold(key, number)))
        mean = {name: sum(each.grad[name] for each in found) / len(found) for name in meta}
        diagnostics = {
            f"{name}/{number}": value for number, each in enumerate(found) for name, value in each.diagnostics.items()
        }
        losses = {f"loss/{number}": each.loss for number, each in enumerate(found)}
        states = {f"{number}": each.state for number, each in enumerate(found)}
        loss = sum(each.loss for each in found) / len(found)
        return MetaGradient(mean, loss, states, diagnostics | losses)  # pyright: ignore[reportArgumentType]

    def _own(self, problem: InnerProblem) -> Estimator:
        """The estimator for one of the problems, as this rank has it."""
        self.estimator.rank, self.estimator.world = self.rank, self.world
        self.estimator.reduce = None if isinstance(problem, Tasks) else self.reduce  # ranks have tasks of their own
        return self.estimator


def _members(problem: InnerProblem) -> list[InnerProblem]:
    assert isinstance(problem, Mixture)
    return problem.problems
