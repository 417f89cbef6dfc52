"""One round of a multilevel program: who steps when, on what, and by which gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metalearn import tree
from metalearn.base import Batches, InnerState, Params, Response, Tree
from metalearn.estimators.windowed import Implicit
from metalearn.multilevel.level import Level, Record, Slopes, by_problem
from metalearn.random import fold
from metalearn.unroll import Window, advance, seeded, update

if TYPE_CHECKING:
    from metalearn.multilevel.graph import Graph


@dataclass
class Trail:
    """The steps of a level since any problem above it last stepped: what a response needs, or is made of."""

    start: InnerState
    meta: Params
    key: Tensor
    records: list[Record] = field(default_factory=list)
    window: Window | None = None  # of the same steps, by the level's estimator
    response: Response | None = None
    closed: bool = False  # because a problem above has stepped

    @property
    def batches(self) -> Batches:
        """The records, by reference."""
        records = tuple(self.records)
        return Batches(records.__getitem__, None, len(records))


class Round:
    """What happens from one step of the tops to the next; made anew for each, so that ``Graph.step`` is pure.

    Args:
        graph: the program.
        states: of all levels; not changed.
        estimators: states of the estimators of tops.
        key: of this round.
    """

    def __init__(self, graph: "Graph", states: dict[str, InnerState], estimators: dict[str, Tree], key: Tensor):
        self.graph, self.edges, self.key = graph, graph.edges, key
        self.states, self.estimators = dict(states), dict(estimators)
        self.levels: dict[str, Level] = {name: graph.level(name) for name in self.edges.names}
        self.log: dict[str, Tensor] = {}
        self.top_gradients: dict[str, Params] = {}
        self._trails: dict[str, Trail] = {}
        self._num_trails = dict.fromkeys(self.edges.names, 0)
        self._since = {(child, name): 0 for name in self.edges.names for child in self.edges.children[name]}
        self._goals: set[str] = set()
        self._begun = states

    def run(self, tops: Sequence[str]) -> None:
        """Step until each of ``tops`` has stepped."""
        self._goals = set(tops)
        while self._goals:
            self._sweep()

    def prepare(self, top: str) -> None:
        """Step until ``top`` could."""
        self._goals = {top}
        while not self._is_ready(top):
            self._sweep(excluded=top)

    def log_leaves(self) -> None:
        """Log the losses of the levels that have none below, on their last batch, at their parameters now."""
        for name, trail in self._trails.items():
            if f"{name}/loss" not in self.log and trail.records:
                level, record = self.levels[name], trail.records[-1]
                with torch.no_grad(), seeded(level, fold(trail.key, "log")):
                    self.log |= level.evaluate(trail.meta, self.states[name], record, record.batches[-1])[2]

    def _sweep(self, excluded: str = "") -> None:
        """Every problem that is ready and waited for steps, lower levels first; one without children makes a whole window."""
        stepped, wanted = [], self._wanted()
        for name in self.edges.upwards:
            if name != excluded and name in wanted and self._is_ready(name):
                self._step(name)
                stepped.append(name)
        assert stepped, "the lowest problem that is waited for is always ready"
        if self.graph.roll_back:
            self._roll_back(stepped)

    def _wanted(self) -> set[str]:
        """The goals, and all whose steps one of them waits for."""
        wanted = set(self._goals)
        for name in reversed(self.edges.upwards):
            steps = self.graph.problems[name].unroll_steps
            uppers = [upper for upper in self.edges.uppers[name] if upper in wanted and not self._carries_levels(upper)]
            if any(self._since[name, upper] < steps for upper in uppers):
                wanted.add(name)
        return wanted

    def _is_ready(self, name: str) -> bool:
        problems, children = self.graph.problems, self.edges.children[name]
        return self._carries_levels(name) or all(
            self._since[child, name] >= problems[child].unroll_steps for child in children
        )

    def _carries_levels(self, name: str) -> bool:
        """Whether the levels below a top are run by its estimator, which takes them from one estimate to the next."""
        return "inner" in self.estimators.get(name, {})

    def _step(self, name: str) -> None:
        made = 1
        if name in self.graph.wholes:
            self._step_whole(name)
        elif self.edges.uppers[name] and not self.edges.children[name]:
            made = self._make_window(name)
        else:
            self._step_once(name)
        self._goals.discard(name)
        for upper in self.edges.uppers[name]:
            self._since[name, upper] += made
        for child in self.edges.children[name]:
            self._since[child, name] = 0
            if child in self._trails:
                self._trails[child].closed = True

    def _make_window(self, name: str) -> int:
        """All steps of a window of a level with none below, by its estimator."""
        trail, steps = self._new_trail(name), self.graph.problems[name].unroll_steps
        trail.records = [self._record(name, fold(trail.key, k)) for k in range(steps)]
        self.states[name] = tree.detach(self._window(name).end)
        return steps

    def _step_once(self, name: str) -> None:
        """One step by the gradient of the problem's own loss and all that comes through the levels below."""
        trail, level = self._trails.get(name), self.levels[name]
        if trail is None or trail.closed or len(trail.records) == self.graph.problems[name].unroll_steps:
            trail = self._new_trail(name)
        trail.window = trail.response = None
        key = fold(trail.key, len(trail.records))
        record, state = self._record(name, key), self.states[name]
        slopes = level.slopes(trail.meta, state, record, key)
        slope = self._hypergradient(name, slopes)
        trail.records.append(record._replace(slope=slope))
        total = level.averaged(level.total(slopes.own, slope))
        self._take(name, total, slopes.loss, level.averaged_buffers(slopes.buffers))
        self.log |= slopes.log

    def _take(self, name: str, grads: Params, loss: Tensor, buffers: Params) -> None:
        """The rule's step by a gradient."""
        if name in self.edges.tops:
            self.top_gradients[name] = grads
        self.log[f"{name}/gradient_norm"] = tree.norm(grads)
        with torch.no_grad():
            self.states[name] = update(self.levels[name], {}, self.states[name], grads, loss, buffers)

    def _hypergradient(self, upper: str, slopes: Slopes) -> Params:
        """The part of an upper's gradient that comes through the levels below: one vector-Jacobian product for each.

        Lower levels go first, so that every problem has its whole cotangent before its response is asked.
        """
        between, cotangents, total = self.edges.between[upper], dict(slopes.lowers), {}
        for name in self.edges.upwards:
            if name not in between:
                continue
            cotangent = self.levels[name].averaged(cotangents.pop(name))
            response, estimator = self._response(name), self.graph.responsive[name]
            pulled = by_problem(tree.detach(response.vjp(cotangent)))
            if isinstance(estimator, Implicit):
                self.log |= {f"{name}/{of}": value for of, value in estimator.diagnostics(response).items()}
            for above, part in pulled.items():
                if above == upper:
                    total = tree.add(part, total) if total else part
                elif above in between:
                    cotangents[above] = tree.add(part, cotangents[above]) if above in cotangents else part
        return total

    def _response(self, name: str) -> Response:
        trail = self._trails[name]
        if trail.response is None:
            trail.response = self.graph.responsive[name].response(self.levels[name], self._window(name))
        return trail.response

    def _window(self, name: str) -> Window:
        """A level's trail by its estimator: made now, or the steps that were made one by one taken again."""
        trail = self._trails[name]
        if trail.window is None:
            estimator, level = self.graph.responsive[name], self.levels[name]
            trail.window = estimator.run(level, trail.meta, trail.start, trail.batches, trail.key)
        return trail.window

    def _new_trail(self, name: str) -> Trail:
        key = fold(self.key, name, self._num_trails[name])
        self._num_trails[name] += 1
        self._trails[name] = Trail(self.states[name], self._meta(name), key)
        return self._trails[name]

    def _meta(self, name: str) -> Params:
        return self.levels[name].meta({other: state.params for other, state in self.states.items()})

    def _record(self, name: str, key: Tensor) -> Record:
        problem, sees, seen_by = self.graph.problems[name], self.edges.sees[name], self.edges.uppers[name]
        batches = tuple(problem.data(fold(key, "data", i)) for i in range(problem.accumulate))
        lowers = {lower: self.states[lower].params for lower in sees}
        return Record(batches, lowers, {other: self.states[other].buffers for other in (*sees, *seen_by)}, {})

    def _roll_back(self, stepped: list[str]) -> None:
        """Take the first steps of the windows below again, from their starts, under the new parameters above."""
        for name in reversed(self.edges.upwards):
            if name in self._trails and not set(stepped).isdisjoint(self.edges.uppers[name]):
                trail, level = self._trails[name], self.levels[name]
                stepped.append(name)
                trail.closed = True
                with torch.no_grad():
                    self.states[name], _ = advance(level, self._meta(name), trail.start, trail.batches, trail.key, 0)

    def _step_whole(self, top: str) -> None:
        """A step by an estimator that is given all levels below as one inner problem."""
        state, estimator = self.states[top], self.graph.problems[top].estimator
        assert estimator is not None
        whole, key = self.graph.whole(top, self._begun), fold(self.key, top)
        found = estimator.estimate(whole, state.params, self.estimators[top], whole.batches(key, 1), key)
        self.estimators[top] = found.state
        if self._carries_levels(top):
            self.states |= whole.levels(found.state["inner"])
        self._take(top, found.grad, found.loss, state.buffers)
        self.log |= {f"{top}/loss": found.loss} | {f"{top}/{name}": value for name, value in found.diagnostics.items()}
