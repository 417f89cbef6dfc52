"""The inner loop, the only one in the project: pure steps, batched by ``vmap``, every draw keyed, every batch by reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from metalearn import tree
from metalearn.base import Batches, InnerProblem, InnerState, Params, Rule, StepOutput, Tree, require_range
from metalearn.random import fold


class Window(NamedTuple):
    """A piece of an inner run, with all that is needed to run it again bit by bit."""

    meta: Params
    states: dict[int, InnerState]  # before step k, those that were kept, and the end under ``batches.steps``
    loss: Tensor  # the steps' losses, summed
    done: bool  # whether the episode ended with the last step
    batches: Batches
    key: Tensor
    grads: dict[int, Params] = {}  # noqa: RUF012 (never written to) the inner gradient of step k, where it was kept

    @property
    def end(self) -> InnerState:
        """The state after the last step."""
        return self.states[self.batches.steps]


_holders = 0  # of the kernels, which are the process's and not the thread's
_kernels = ExitStack()
_lock = threading.Lock()


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """What differentiating through a run asks of torch, and what it had before afterwards; threads may hold it together.

    Attention goes by plain matrix products: its fused kernels have no second derivative, no forward mode and no
    batching rule. Autocast keeps no copies: they would outlive the step that they were made for.
    """
    global _holders
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    with _lock:
        if not _holders:
            _kernels.enter_context(sdpa_kernel([SDPBackend.MATH]))
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders:
                _kernels.close()
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def seeded(problem: InnerProblem, key: Tensor) -> Iterator[None]:
    """torch's global generator set by the key, for problems that draw from it, and put back afterwards."""
    if not problem.global_generator:
        yield
        return
    with tree.seeded(key):
        yield


def advance(
    problem: InnerProblem, meta: Params, state: InnerState, batches: Batches, key: Tensor, k: int
) -> tuple[InnerState, StepOutput]:
    """The window's k-th step. Equal arguments give equal results bit by bit, dropout included."""
    step_key = fold(key, k)
    with seeded(problem, step_key):
        return problem.step(meta, state, batches.inner(k), step_key)


Step = Callable[[InnerProblem, Params, InnerState, Batches, Tensor, int], tuple[InnerState, StepOutput]]


def unroll(
    problem: InnerProblem,
    meta: Params,
    start: InnerState,
    batches: Batches,
    key: Tensor,
    keep: Callable[[int], bool] = lambda k: False,
    step: Step = advance,
) -> Window:
    """``batches.steps`` steps from ``start``, under whatever differentiation is on.

    The state before step k is kept where ``keep(k)``. ``step`` may do more than ``advance`` does, but must do that.
    """
    require_range("steps", batches.steps, 1)
    state, states, loss, done = start, {}, torch.zeros((), device=start.step.device), None
    for k in range(batches.steps):
        if keep(k):
            states[k] = state
        generator = None if k or problem.global_generator else torch.random.get_rng_state()
        state, output = step(problem, meta, state, batches, key, k)
        if generator is not None and not torch.equal(generator, torch.random.get_rng_state()):
            raise ValueError(
                f"a step of {type(problem).__name__} draws from torch's global generator, so that it cannot be taken again; "
                "accepted: global_generator = True, or draws from its key"
            )
        loss, done = loss + output.loss, output.done
    return Window(meta, states | {batches.steps: state}, loss, bool(done), batches, key)


def asks_outer(problem: InnerProblem, done: bool) -> bool:
    """Whether the window ends with ``outer``: at the end of an episode, or of any window of an endless run."""
    return problem.horizon is None or done


class Descent(InnerProblem):
    """An inner run in which every step is ``rule`` applied to the gradient of ``inner_loss``.

    theta', s' = rule(meta, grad_theta inner_loss(meta, theta, batch), s, theta). Residents give ``inner_loss``,
    ``init_meta``, ``init`` and ``outer``.
    """

    def __init__(self, rule: Rule, horizon: int | None = None):
        if horizon is not None:
            require_range("horizon", horizon, 1)
        self.rule: Rule = rule
        self.horizon = horizon

    def start(self, meta: Params, params: Params, buffers: Params, extra: Params | None = None) -> InnerState:
        """The state at step 0 of these parameters."""
        device = next(iter(params.values())).device
        step = torch.zeros((), dtype=torch.int64, device=device)
        return InnerState(params, buffers, self.rule.init(self.rule_meta(meta), params), step, extra or {})

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        grads, loss, buffers = inner_gradient(self, meta, state, batch, key)
        state = update(self, meta, state, grads, loss, buffers)
        return state, StepOutput(loss.new_zeros(()), ended(self, state))


def ended(problem: InnerProblem, state: InnerState) -> Tensor:
    """Whether the episode is over by the problem's horizon, in every task: bool ()."""
    horizon = float("inf") if problem.horizon is None else problem.horizon
    return (state.step >= horizon).all()


def inner_gradient(
    problem: InnerProblem, meta: Params, state: InnerState, batch: Any, key: Tensor
) -> tuple[Params, Tensor, Params]:
    """Gradient of ``inner_loss`` by the parameters, its value, and the buffers after."""

    def loss(params: Params, buffers: Params) -> tuple[Tensor, Params]:
        return problem.inner_loss(meta, state._replace(params=params, buffers=buffers), batch, key)

    # Buffers, which a module writes to in place, must be an argument of the transform: it may not change what it captures.
    grads, (value, buffers) = grad_and_value(loss, has_aux=True)(state.params, state.buffers)
    return grads, value, buffers


def update(
    problem: InnerProblem, meta: Params, state: InnerState, grads: Params, loss: Tensor, buffers: Params
) -> InnerState:
    """The state after the rule has used a gradient; buffers are not differentiated through, as torch's batch norm demands."""
    assert problem.rule is not None
    buffers = {name: value.detach() for name, value in buffers.items()}
    params, rule = problem.rule.update(problem.rule_meta(meta), grads, state.rule, state.params, loss=loss)
    return InnerState(params, buffers, rule, state.step + 1, state.extra)


class TaskBatch(Rule):
    """A rule applied to each of several runs by itself: every leaf, and ``loss``, has a first axis of runs, but for ``meta``."""

    def __init__(self, rule: Rule):
        self.rule, self.needs_loss = rule, rule.needs_loss

    def init(self, meta: Params, params: Params) -> Tree:
        return vmap(self.rule.init, in_dims=(None, 0))(meta, params)

    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        if self.needs_loss and (loss is None or not loss.ndim):
            name = type(self.rule).__name__
            raise ValueError(
                f"{name} needs the loss of each of several runs, but is given their mean; accepted: another rule"
            )

        def single(grads: Params, state: Tree, params: Params, loss: Tensor | None) -> tuple[Params, Tree]:
            return self.rule.update(meta, grads, state, params, loss=loss)

        each = loss if self.needs_loss else None
        return vmap(single, in_dims=(0, 0, 0, None if each is None else 0))(grads, state, params, each)


class Tasks(InnerProblem):
    """``num_tasks`` independent runs of one problem as a single one, batched by ``vmap``; the objective is their mean.

    Leaves of the state and of the batches get a first axis of tasks. Task t draws from ``fold(key, t)``, t counted over
    all ranks, which divide the tasks among them.

    Args:
        problem: the problem of one task, whose ``batches`` draws a task from its key.
        num_tasks: tasks of a window over all ranks, at least 1 and a multiple of the ranks.

    Raises:
        ValueError: for a value out of range, and for a problem whose episodes are of unequal lengths.
    """

    def __init__(self, problem: InnerProblem, num_tasks: int):
        require_range("num_tasks", num_tasks, 1)
        if not problem.equal_lengths:
            raise ValueError(
                f"{type(problem).__name__} draws the length of each episode anew; accepted by Tasks, whose runs end together: "
                "one length for all (shortest: null)"
            )
        self.problem, self.num_tasks = problem, num_tasks
        self.terminal, self.differentiable = problem.terminal, problem.differentiable
        self.rule = TaskBatch(problem.rule) if problem.rule is not None else None

    @property
    def horizon(self) -> int | None:
        return self.problem.horizon

    @horizon.setter
    def horizon(self, steps: int | None) -> None:
        self.problem.horizon = steps

    @property
    def global_generator(self) -> bool:
        """Known when the data are open, and the module with them."""
        return self.problem.global_generator

    @property
    def has_inner_loss(self) -> bool:
        return self.problem.has_inner_loss

    def rule_meta(self, meta: Params) -> Params:
        return self.problem.rule_meta(meta)

    def init_meta(self, key: Tensor) -> Params:
        return self.problem.init_meta(key)

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return tree.stack([self.problem.init(meta, task_key) for task_key in self._keys(key)])

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        state, output = self._map(self.problem.step, meta, state, batch, self._keys(key))
        return state, StepOutput(output.loss.mean(), output.done.all())

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return self._map(self.problem.outer, meta, state, batch).mean()

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        """The sum over tasks, so that each task's gradient is its own."""
        losses_T, buffers = self._map(self.problem.inner_loss, meta, state, batch, self._keys(key))
        return losses_T.sum(), buffers

    def _map(self, function: Callable, meta: Params, state: InnerState, batch: Any, *keys_T: Tensor) -> Any:
        in_dims = (None, 0, None if batch is None else 0, *(0 for _ in keys_T))
        randomness = "different" if self.global_generator else "error"
        return vmap(function, in_dims=in_dims, randomness=randomness)(meta, state, batch, *keys_T)

    def _keys(self, key: Tensor) -> Tensor:
        share, rest = divmod(self.num_tasks, self.world)
        if rest:
            raise ValueError(f"num_tasks is {self.num_tasks}; accepted: a multiple of the {self.world} ranks")
        return fold(key, torch.arange(share, device=key.device) + share * self.rank)

    def open(self, *, test: bool) -> None:
        self.problem.open(test=test)

    def record(self) -> dict[str, Any]:
        return self.problem.record()

    def batches(self, key: Tensor, steps: int) -> Batches:
        drawn = [self.problem.batches(task_key, steps) for task_key in self._keys(key)]

        def stacked(of_task: Callable[[Batches], Any]) -> Any:
            values = [of_task(batches) for batches in drawn]
            return None if values[0] is None else tree.stack(values)

        return Batches(lambda k: stacked(lambda batches: batches.inner(k)), stacked(lambda b: b.outer), steps)

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        return self.problem.evaluate(meta, key, test=test)
