"""All levels below a top as one inner problem, for estimators that differentiate the program from outside."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metalearn import tree
from metalearn.base import Batches, InnerProblem, InnerState, Params, StepOutput
from metalearn.multilevel.level import Record, by_problem
from metalearn.multilevel.rounds import Round
from metalearn.random import fold
from metalearn.unroll import advance, seeded

if TYPE_CHECKING:
    from metalearn.multilevel.graph import Graph


class Whole(InnerProblem):
    """What a top waits for, as one step: ``meta`` are the top's parameters, ``outer`` is its loss, and the run is endless.

    A run begins where the levels are. What ``outer`` draws (dropout) comes from a key that its batch holds. With levels
    that have others below, a step has hypergradients inside, which cannot be differentiated once more: zeroth-order
    estimators only, which loop over their runs.

    Args:
        graph: the program.
        top: the problem whose estimator asks.
        levels: states of all problems at the start of a run.
    """

    def __init__(self, graph: "Graph", top: str, levels: dict[str, InnerState]):
        self.graph, self.top, self._start = graph, top, levels
        below = graph.edges.below(top)
        self.below = [name for name in graph.edges.upwards if name in below]
        self.differentiable = not any(graph.edges.children[name] for name in below)
        self.global_generator = any(graph.level(name).global_generator for name in self.below)

    def init_meta(self, key: Tensor) -> Params:
        return tree.initialise(self.graph.problems[self.top].module, key)[0]

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return self._joined(self._start, torch.zeros_like(self._start[self.top].step))

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        states = self._states(meta, state)
        if self.differentiable:
            states |= {name: self._window(name, states, batch[name], fold(key, name)) for name in self.below}
        else:
            inside = Round(self.graph, tree.detach(states), {}, key)
            inside.prepare(self.top)
            states = inside.states
        zero = next(iter(meta.values())).new_zeros(())
        return self._joined(states, state.step + 1), StepOutput(zero, torch.zeros_like(state.step, dtype=torch.bool))

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        states, (key, batches) = self._states(meta, state), batch
        record = self._record(self.top, states, batches)
        with seeded(self, key):
            return self.graph.level(self.top).inner_loss({}, states[self.top], record, key)[0]

    def batches(self, key: Tensor, steps: int) -> Batches:
        """The batches of every level below, step by step, and the top's with the key of what its loss draws."""
        drawn = [{name: self._draw_window(name, fold(key, k, name)) for name in self.below} for k in range(steps)]
        top_key = fold(key, 0, 0)  # as ``Round`` keys the top's own step, so that an estimator sees the same draws
        return Batches(drawn.__getitem__, (top_key, self._draw(self.top, top_key)), steps)

    def levels(self, state: InnerState) -> dict[str, InnerState]:
        """The states of the levels below."""
        params, buffers = by_problem(state.params), by_problem(state.buffers)
        return {
            name: InnerState(
                params[name], buffers.get(name, {}), state.rule[name]["rule"], state.rule[name]["step"], {}
            )
            for name in self.below
        }

    def _states(self, meta: Params, state: InnerState) -> dict[str, InnerState]:
        return self.levels(state) | {self.top: self._start[self.top]._replace(params=meta)}

    def _joined(self, states: dict[str, InnerState], step: Tensor) -> InnerState:
        params = {f"{name}/{of}": value for name in self.below for of, value in states[name].params.items()}
        buffers = {f"{name}/{of}": value for name in self.below for of, value in states[name].buffers.items()}
        rule = {name: {"rule": states[name].rule, "step": states[name].step} for name in self.below}
        return InnerState(params, buffers, rule, step, {})

    def _window(self, name: str, states: dict[str, InnerState], batches: list[tuple], key: Tensor) -> InnerState:
        """All steps of a level that a step of the top waits for; what ``unroll`` reports would need a mask under ``vmap``."""
        level = self.graph.level(name)
        meta = level.meta({other: state.params for other, state in states.items()})
        records = tuple(self._record(name, states, each) for each in batches)
        state = states[name]
        for k in range(len(records)):
            state, _ = advance(level, meta, state, Batches(records.__getitem__, None, len(records)), key, k)
        return state

    def _record(self, name: str, states: dict[str, InnerState], batches: tuple) -> Record:
        sees, seen_by = self.graph.edges.sees[name], self.graph.edges.uppers[name]
        lowers = {lower: states[lower].params for lower in sees}
        return Record(batches, lowers, {other: states[other].buffers for other in (*sees, *seen_by)}, {})

    def _draw_window(self, name: str, key: Tensor) -> list[tuple]:
        """The batches of all steps of a level that a step of the top waits for."""
        return [self._draw(name, fold(key, k)) for k in range(self.graph.problems[name].unroll_steps)]

    def _draw(self, name: str, key: Tensor) -> tuple:
        problem = self.graph.problems[name]
        return tuple(problem.data(fold(key, "data", i)) for i in range(problem.accumulate))
