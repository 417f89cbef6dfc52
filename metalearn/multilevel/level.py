"""A problem of a multilevel program as an ``InnerProblem``: pure, its meta-parameters those of the levels above."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn import tree
from metalearn.base import InnerState, Params, StepOutput
from metalearn.estimators.windowed import gradients, tracked
from metalearn.multilevel.problem import Net, Nets, Problem, scalar_and_log
from metalearn.unroll import Descent, ended, inner_gradient, seeded, update

Reduce = Callable[[Params], Params]


class Record(NamedTuple):
    """What one step of a level was given beside parameters of those above, so that it can be taken again bit by bit."""

    batches: tuple[Any, ...]  # one per gradient that was accumulated
    lowers: dict[str, Params]  # parameters of the levels below that the loss sees, constants here
    buffers: dict[str, Params]  # of all other levels that the loss sees
    slope: (
        Params  # the part of the gradient that came through the levels below, a constant here; {} where there is none
    )


class Slopes(NamedTuple):
    """The gradient of a level's loss by its own parameters and by those of the levels below that it sees."""

    own: Params
    lowers: dict[str, Params]
    loss: Tensor
    buffers: Params
    log: Params


class Level(Descent):
    """One problem, given the parameters of its uppers as ``meta`` under "upper/parameter" and a ``Record`` as batch.

    ``inner_loss`` is the problem's loss plus ``<slope, params>`` less its own value: what came through the levels below
    moves the parameters and leaves value, Hessian and mixed derivatives alone. So the Hessian of a level is that of its
    loss with the levels below held fixed, exact where the loss does not see them.

    Args:
        problem: whose parameters are the inner ones.
        uppers: problems whose parameters its loss sees from below.
        lowers: problems whose solutions its loss sees from above.
        reduce: mean over the ranks of a distributed run, null for one process.
    """

    def __init__(self, problem: Problem, uppers: list[Problem], lowers: list[Problem], reduce: Reduce | None = None):
        super().__init__(problem.rule)
        self.problem, self.reduce = problem, reduce
        self.uppers, self.lowers = ({other.name: other for other in others} for others in (uppers, lowers))
        self.global_generator = any(other.draws for other in [problem, *uppers, *lowers])

    def init_meta(self, key: Tensor) -> Params:
        return self.meta({name: tree.initialise(upper.module, key)[0] for name, upper in self.uppers.items()})

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return self.start(meta, *tree.initialise(self.problem.module, key))

    def meta(self, params: dict[str, Params]) -> Params:
        """The uppers' parameters by "upper/parameter", of the parameters of every problem."""
        return {f"{upper}/{name}": value for upper in self.uppers for name, value in params[upper].items()}

    def inner_loss(self, meta: Params, state: InnerState, batch: Record, key: Tensor) -> tuple[Tensor, Params]:
        losses, buffers = [], state.buffers
        for single in batch.batches:
            loss, buffers, _ = self.evaluate(meta, state._replace(buffers=buffers), batch, single)
            losses.append(loss)
        loss = torch.stack(losses).mean()
        if not batch.slope:
            return loss, buffers
        along = tree.dot(batch.slope, state.params)
        return loss + (along - along.detach()), buffers

    def step(self, meta: Params, state: InnerState, batch: Record, key: Tensor) -> tuple[InnerState, StepOutput]:
        parts, losses, buffers = [], [], state.buffers
        for single in batch.batches:
            one = batch._replace(batches=(single,), slope={})
            grads, loss, buffers = inner_gradient(self, meta, state._replace(buffers=buffers), one, key)
            parts.append(grads)
            losses.append(loss)
        grads, loss = self.averaged(self.total(mean(parts), batch.slope)), torch.stack(losses).mean()
        state = update(self, meta, state, grads, loss, self.averaged_buffers(buffers))
        return state, StepOutput(loss.new_zeros(()), ended(self, state))

    def slopes(self, meta: Params, state: InnerState, record: Record, key: Tensor) -> Slopes:
        """Value and gradients of the loss, ``record.slope`` aside, one batch at a time."""
        sees = {name: tracked(params) for name, params in record.lowers.items()}
        own, buffers, found, logs = tracked(state.params), state.buffers, [], []
        leaves = [*own.values(), *(leaf for params in sees.values() for leaf in params.values())]
        with seeded(self, key), torch.enable_grad():
            for single in record.batches:
                here = state._replace(params=own, buffers=buffers)
                loss, buffers, log = self.evaluate(meta, here, record._replace(lowers=sees), single)
                found.append(gradients([loss], leaves))
                logs.append(log | {"": loss.detach()})
        average = iter(mean([dict(enumerate(each)) for each in found]).values())
        log = {name: torch.stack([log[name].double() for log in logs]).mean() for name in logs[0]}
        by_own = {name: next(average) for name in own}
        by_lowers = {lower: {name: next(average) for name in params} for lower, params in sees.items()}
        return Slopes(by_own, by_lowers, log.pop(""), tree.detach(buffers), log)

    def evaluate(self, meta: Params, state: InnerState, record: Record, batch: Any) -> tuple[Tensor, Params, Params]:
        """The loss on one batch, the buffers after, and the log."""
        name = self.problem.name
        nets = {name: Net(self.problem.module, state.params, state.buffers)}
        for upper, params in by_problem(meta).items():
            nets[upper] = Net(self.uppers[upper].module, params, record.buffers[upper])
        for lower, problem in self.lowers.items():
            nets[lower] = Net(problem.module, record.lowers[lower], record.buffers[lower])
        device = state.step.device.type
        with torch.autocast(device, torch.bfloat16) if self.problem.precision == "bf16" else nullcontext():
            loss, log = scalar_and_log(name, self.problem.loss(Nets(name, nets), batch))
        return loss.float() if loss.dtype == torch.bfloat16 else loss, nets[name].buffers, log

    def total(self, own: Params, slope: Params) -> Params:
        """The whole gradient, of a level's own loss and through the levels below; added here alone, so that replays are equal."""
        return tree.add(own, slope) if slope else own

    def averaged(self, grads: Params) -> Params:
        """The mean over ranks, differentiable."""
        if self.reduce is None or not grads:
            return grads
        return dict(zip(grads, _Mean.apply(self.reduce, tuple(grads), *grads.values()), strict=True))

    def averaged_buffers(self, buffers: Params) -> Params:
        """The mean over ranks of what is not a count: without it, statistics of batches would differ from rank to rank."""
        return buffers | self.averaged({name: value for name, value in buffers.items() if value.is_floating_point()})


class _Mean(torch.autograd.Function):
    """The mean over ranks, which is its own transpose: what rank r's cotangent adds to every rank is 1/W of it."""

    @staticmethod
    def forward(ctx: Any, reduce: Reduce, names: tuple[str, ...], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.reduce, ctx.names = reduce, names
        return tuple(reduce(dict(zip(names, values, strict=True))).values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.reduce(dict(zip(ctx.names, cotangents, strict=True))).values()


def mean(parts: list[dict]) -> dict:
    """The mean of trees of the same names; of one, itself."""
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]} if parts[1:] else parts[0]


def by_problem(meta: Params) -> dict[str, Params]:
    """Parameters by problem and name, of those by "problem/name"."""
    parts: dict[str, Params] = {}
    for place, value in meta.items():
        problem, name = place.split("/", 1)
        parts.setdefault(problem, {})[name] = value
    return parts
