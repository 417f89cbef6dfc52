"""A multilevel program: problems, the edges between them, and one step of all that they do to each other."""

from itertools import islice

import torch
from torch import Tensor

from metalearn.base import Estimator, InnerState, Params, Tree
from metalearn.estimators.unrolled import Unrolled
from metalearn.estimators.windowed import Responsive
from metalearn.multilevel.edges import Edges, Lists
from metalearn.multilevel.level import Level, Reduce
from metalearn.multilevel.problem import Net, Nets, Problem
from metalearn.multilevel.rounds import Round
from metalearn.multilevel.whole import Whole
from metalearn.random import fold
from metalearn.unroll import differentiable_kernels

NUM_SHOWN = 20  # paths of a problem in the picture


class Graph:
    """Optimisation problems that see each other, on any number of levels.

    A problem steps when each of its children (those that see its parameters) has made ``unroll_steps`` steps since the
    problem's own last one; problems without children step whenever those above them wait; a top that has stepped waits
    for the other tops, as do those that serve it alone. The gradient of an upper U is

        d loss_U/d theta_U + sum over paths U, L_1, ..., L_n, U of  R_n^T ... R_1^T d loss_U/d theta_{L_1}

    with R_i = d theta_{L_i}/d theta_{L_{i+1}} the response of L_i's estimator, taken right to left, a vector at a time:
    O(d^2) per path, no matrix product. Paths go down one ``upper_to_lower`` edge and then up ``lower_to_upper`` edges.
    What they share is done once: cotangents are summed at each problem, whose response is asked once per hypergradient.

    A response is that of the window (start, batches, parameters above) since any problem above last stepped, at most
    ``unroll_steps`` long; the Hessian of a level is that of its own loss with lower levels held fixed. When a problem and
    one above it step at once, the windows below the first were made under its parameters before that step.

    State is one explicit tree, a checkpoint by ``tree.pack``: a step is a function of (state, key), and a resumed run is
    equal bit by bit.

    Args:
        problems: of different names.
        upper_to_lower: upper -> lowers; the upper's loss sees the lower's solution.
        lower_to_upper: lower -> uppers; the lower's loss sees the upper's parameters.
        roll_back: after a problem's step, put the levels below back to the start of their windows, and take the first
            step of each once more under the new parameters above. What came to a step through levels below is
            kept from the first time.

    Raises:
        ValueError: as ``Edges``; or an estimator that cannot be used where it stands.

    Source: Choe et al. 2023, "Betty: An automatic differentiation library for multilevel optimization", section 3.
    Differs from the paper: shared parts of paths are taken once; inner runs may be unrolled exactly, at any depth; the
    gradients of ``accumulate`` batches are of one and the same state of the levels below.
    """

    reduce: Reduce | None = None

    def __init__(self, problems: list[Problem], upper_to_lower: Lists, lower_to_upper: Lists, roll_back: bool = False):
        self.edges = Edges([problem.name for problem in problems], upper_to_lower, lower_to_upper)
        self.problems = {problem.name: problem for problem in problems}
        self.roll_back = roll_back
        self.responsive = {name: self._responsive(name) for name in self.edges.names if name not in self.edges.tops}
        self.wholes = [name for name in self.edges.tops if self.problems[name].estimator is not None]
        for name in self.wholes:
            self._require_whole(name)

    def distribute(self, rank: int, world: int, reduce: Reduce) -> None:
        """Share every batch among ``world`` ranks ("sharded inner"): each sees its rows, and all take the mean step.

        Gradients, cotangents and batch statistics are averaged where they arise, so that unrolled responses, and those that
        are linear in a level's loss, are those of the joined batch. Estimators that solve with a Hessian (conjugate
        gradients, Neumann, Nystrom) solve with each rank's own; the mean is taken of their solutions.

        Args:
            rank: of this process, 0 ... world - 1.
            world: number of processes.
            reduce: the mean over ranks, entry by entry.

        Raises:
            ValueError: a response is unrolled in mixed mode, whose steps are not averaged, or a top has an estimator.
        """
        for name, estimator in self.responsive.items():
            if isinstance(estimator, Unrolled) and estimator.mode == "mixed":
                raise ValueError(
                    f"{name} is unrolled in mode 'mixed' on {world} ranks; accepted: 'store', 'checkpoint', 'graph'"
                )
        if self.wholes:
            raise ValueError(
                f"{self.wholes[0]} has an estimator, on {world} ranks; accepted: one rank, or no estimator at the top"
            )
        self.reduce = reduce
        for problem in self.problems.values():
            problem.rank, problem.world = rank, world

    def init(self, key: Tensor) -> Tree:
        """The state before the first step, drawn from the key."""
        with torch.no_grad():
            levels = {name: self.level(name).init({}, fold(key, "init", name)) for name in self.edges.names}
        estimators = {}
        for name in self.wholes:
            estimator = self.problems[name].estimator
            assert estimator is not None
            estimators[name] = estimator.init(
                self.whole(name, levels), levels[name].params, fold(key, "estimator", name)
            )
        step = torch.zeros((), dtype=torch.int64, device=key.device)
        return {"step": step, "levels": levels, "estimators": estimators}

    def step(self, state: Tree, key: Tensor) -> tuple[Tree, dict[str, Tensor]]:
        """Every top steps at least once, in a program with one top exactly once; the state after, and scalars to log.

        Draws come from the key and ``state["step"]``: a run keeps one key. The log has "problem/loss" and whatever else losses
        return, for lower levels on the last batch; "problem/gradient_norm" of those with levels below.
        """
        done = self._round(state, key)
        done.log_leaves()
        after = {"step": state["step"] + 1, "levels": done.states, "estimators": done.estimators}
        return after, done.log

    def gradients(self, state: Tree, key: Tensor) -> dict[str, Params]:
        """The gradients of the tops that ``step`` would give to their rules, of a top with several steps the last one's."""
        return self._round(state, key).top_gradients

    def nets(self, state: Tree) -> Nets:
        """All networks, as they are in this state."""
        levels: dict[str, InnerState] = state["levels"]
        nets = {n: Net(problem.module, levels[n].params, levels[n].buffers) for n, problem in self.problems.items()}
        return Nets("the program", nets)

    def validate(self, state: Tree) -> dict[str, float]:
        """What the problems' ``validate`` say, by "problem/name"."""
        training = [part for problem in self.problems.values() for part in problem.module.modules() if part.training]
        try:
            for part in training:
                part.training = False
            with torch.no_grad():
                found = {n: problem.validate(self.nets(state)) for n, problem in self.problems.items()}
        finally:
            for part in training:
                part.training = True
        return {f"{name}/{what}": value for name, values in found.items() for what, value in values.items()}

    def level(self, name: str) -> Level:
        """A problem as estimators see it."""
        edges = self.edges
        uppers, lowers = ([self.problems[other] for other in of[name]] for of in (edges.uppers, edges.sees))
        return Level(self.problems[name], uppers, lowers, self.reduce)

    def whole(self, top: str, levels: dict[str, InnerState]) -> Whole:
        """All levels below a top as one inner problem, from these states on."""
        return Whole(self, top, levels)

    def __str__(self) -> str:
        """The levels from the top down, what each sees and how it responds, and the first ``NUM_SHOWN`` paths of each."""
        edges, lines = self.edges, []
        for name in reversed(self.edges.upwards):
            problem = self.problems[name]
            about = [type(problem.rule).__name__]
            about += [] if name in edges.tops else [f"{problem.unroll_steps} steps to one above"]
            about += [f"{problem.accumulate} batches a step"] if problem.accumulate > 1 else []
            about += [problem.precision] if problem.precision != "32" else []
            about += [f"all below by {_shown(problem.estimator)}"] if name in self.wholes else []
            lines.append(f"level {edges.level[name]}  {name}  ({', '.join(about)})")
            lines += [f"    sees the solution of {lower}" for lower in edges.sees[name]]
            lines += [f"    responds to {upper} by {_shown(self.responsive[name])}" for upper in edges.uppers[name]]
        paths = [f"path  {' -> '.join(path)}" for name in edges.names for path in islice(edges.paths(name), NUM_SHOWN)]
        return "\n".join([*lines, *paths, *(["roll back"] if self.roll_back else [])])

    def _round(self, state: Tree, key: Tensor) -> Round:
        done = Round(self, state["levels"], state["estimators"], fold(key, state["step"]))
        with differentiable_kernels():
            done.run(self.edges.tops)
        return done

    def _responsive(self, name: str) -> Responsive:
        estimator = self.problems[name].estimator or Unrolled("store")
        if not isinstance(estimator, Responsive):
            raise ValueError(
                f"{name} is below the top and has the estimator {type(estimator).__name__}, which knows no response; "
                "accepted: Unrolled or an implicit estimator"
            )
        if getattr(estimator, "reuse_solution", False):
            raise ValueError(
                f"{name} is below the top and has reuse_solution=True; accepted: False, since a response keeps no state"
            )
        if reason := estimator.refusal(self.level(name)):
            raise ValueError(f"{type(estimator).__name__} cannot be used on {name}: {reason}")
        return estimator

    def _require_whole(self, name: str) -> None:
        """Raise ``ValueError`` where the estimator of a top cannot take all levels below it as one inner problem."""
        estimator = self.problems[name].estimator
        assert estimator is not None
        label = f"{name} has the estimator {type(estimator).__name__}"
        if len(self.edges.tops) > 1 or self.roll_back or not self.edges.children[name]:
            raise ValueError(f"{label}; accepted: at the only top, with levels below it, without roll_back")
        whole = self.whole(name, {})
        if reason := estimator.refusal(whole):
            raise ValueError(f"{label}, which cannot be used: {reason}")
        batched = getattr(estimator, "vectorised", getattr(estimator, "chunk", 1) != 1)
        if batched and not whole.differentiable:
            raise ValueError(
                f"{label}, which batches runs that have hypergradients inside; accepted: vectorised=False, or chunk=1"
            )


def _shown(estimator: Estimator | None) -> str:
    """An estimator with its settings, those that say something."""
    silent = {"warm_start"} if isinstance(estimator, Responsive) else set()  # a level below the top always goes on
    settings = {name: value for name, value in vars(estimator).items() if name not in silent and name[0] != "_"}
    shown = [f"{name}={value!r}" for name, value in settings.items() if value not in (None, False)]
    return f"{type(estimator).__name__}({', '.join(shown)})"
