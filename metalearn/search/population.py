"""Training runs that differ in their loss alone, all at once: one batched run on shared minibatches.

Only the gradient of the loss by the raw outputs is a candidate's own; forward and backward pass through the stacked models
are shared, and so is the rule, which is applied to stacked parameters.

Shape letters: P candidates, N examples, D input features, H units, K classes or outputs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from metalearn import random, tree
from metalearn.base import Examples, InnerState, Params, Rule, Tree, require_choice, require_range
from metalearn.optim.first_order import PER_PARAMETER, SGD, Adam, AdamW, RMSProp, Tunable
from metalearn.problems.learned_loss import LossTask
from metalearn.problems.training_runs import draw
from metalearn.search.gradients import CandidateGradients, tabulated
from metalearn.search.halving import Halving, survivors

CHECKED_EVERY = 10  # steps between looks for rows that are lost
ENTRYWISE = (SGD, RMSProp, Adam, AdamW)  # rules that treat every entry alike; any other is given one row at a time
AT_A_TIME = 2**14  # predictions, candidates times examples, of an evaluation

Pullback = Callable[[Tensor], Params]  # from the gradient by predictions (P, N, K) to that by stacked parameters


class Trained(NamedTuple):
    """What became of a population. Leaves have a first axis P; a row that was stopped early is as it was then."""

    params: Params
    buffers: Params
    finite_P: Tensor  # bool: whether the run stayed finite
    steps_P: Tensor  # int64: steps that each row was given: fewer than all where it was halved, and there alone


def rows(trained: Trained, chosen: Sequence[int] | Tensor) -> Trained:
    """Those of some candidates, in this order."""
    index = torch.as_tensor(chosen, dtype=torch.int64, device=trained.steps_P.device)
    return tree.index(trained, index)


class PopulationTraining:
    """Trains one model per candidate, from the same start on the same minibatches, as a loop over candidates would.

    Step k sees ``task.inner_batch(fold(key, "batch", k))``; the start is ``task.initial(fold(key, "init"))``. A row that is
    no longer finite is dropped, and never touches another. Under autocast matrix products are of its precision; losses
    and the rule are in the parameters'.

    Args:
        steps: of a run, at least 1.
        mode: "exact", or "tabulated" for programs' gradients from tables (classification only); other losses stay exact.
        halving: what stops bad runs early; null for none.
        path: "stacked" for forward and backward passes written out for stacked linear layers and activations, as in
            ``MLP``; "vmap" for any module; "auto" for the first where it can be.

    Raises:
        ValueError: for values out of range, or rungs that are not below ``steps``.
    """

    def __init__(self, steps: int = 500, mode: str = "exact", halving: Halving | None = None, path: str = "auto"):
        require_range("steps", steps, 1)
        require_choice("mode", mode, ("exact", "tabulated"))
        require_choice("path", path, ("auto", "stacked", "vmap"))
        if halving and halving.rungs[-1] >= steps:
            raise ValueError(f"rungs is {halving.rungs} with steps = {steps}; accepted: rungs below steps")
        self.steps, self.mode, self.halving, self.path = steps, mode, halving, path

    def tables(self, gradients: CandidateGradients, device: torch.device | str = "cpu") -> CandidateGradients:
        """The gradients that runs are made with in this mode: made once, they serve any number of runs."""
        return tabulated(gradients, device) if self.mode == "tabulated" else gradients

    def train(
        self,
        task: LossTask,
        gradients: CandidateGradients,
        key: Tensor,
        rates_P: Tensor | None = None,
        start: tuple[Params, Params] | None = None,
        choose: Callable[[Tensor, float], Tensor] = survivors,
    ) -> Trained:
        """The population after its runs.

        Args:
            task: opened.
            gradients: of the candidates' losses, P of them.
            key: of the start and the minibatches.
            rates_P: each candidate's own learning rate, in place of the rule's.
            start: parameters and buffers of one model to begin with, in place of the task's.
            choose: the rows that survive a rung, from scores (P,), infinite for rows that were stopped before, and the
                share of all P that may go on. Ranks that share a population decide together here.

        Raises:
            ValueError: for a module that draws random numbers, a rule or a module that cannot be batched, tables in regression.
        """
        self._require(task)
        network, gradients = _network(task, self.path), self.tables(gradients, key.device)
        rule = _StackedRule(task.rule, rates_P, gradients.count, key.device)
        params, buffers = start or task.initial(random.fold(key, "init"))
        with torch.no_grad():
            run = _Run(params, buffers, gradients, rule, key.device)
            for step in range(1, self.steps + 1):
                if len(run.alive):
                    batch = task.inner_batch(random.fold(key, "batch", step - 1))
                    prediction_PNK = run.advance(network, batch.inputs, task.target_matrix(batch.targets))
                    if step % CHECKED_EVERY == 0:
                        run.keep(prediction_PNK.isfinite().flatten(1).all(1), lost=True)
                if self.halving and step in self.halving.rungs:
                    share = self.halving.keep ** (1 + self.halving.rungs.index(step))
                    chosen = choose(self._scores(task, network, run, key), share)
                    run.keep(torch.isin(run.alive, chosen.to(run.alive)))
            return run.finish(self.steps)

    def errors(self, task: LossTask, trained: Trained, part: str, chunk: int = AT_A_TIME) -> Tensor:
        """The task's error of each candidate on all examples of a part, float64 (P,); infinite where it is not finite.

        Args:
            task: what they were trained on.
            trained: the candidates.
            part: "validation", "untouched", …
            chunk: predictions at a time, candidates times examples, at least 1.
        """
        require_range("chunk", chunk, 1)
        examples = task.examples(part, trained.steps_P.device)
        with torch.no_grad():
            error_P = _errors(task, _network(task, self.path), trained.params, trained.buffers, examples, chunk)
        return torch.where(trained.finite_P & error_P.isfinite(), error_P, math.inf)

    def _require(self, task: LossTask) -> None:
        if task.global_generator:
            raise ValueError(
                "the module draws random numbers, as dropout does; accepted: one that draws none in training"
            )
        if task.rule.needs_loss:
            raise ValueError(
                f"rule is {type(task.rule).__name__}, which needs the loss; accepted: rules of gradients alone"
            )
        if self.mode == "tabulated" and task.regression:
            raise ValueError("mode is 'tabulated' with numbers as targets; accepted in regression: 'exact'")

    def _scores(self, task: LossTask, network: "_Network", run: "_Run", key: Tensor) -> Tensor:
        """Validation errors (P,) at a rung, infinite for rows that were stopped before."""
        examples, count = task.examples("validation", key.device), self.halving.examples if self.halving else None
        chosen = draw(examples, count, random.fold(key, "halving"))
        scores_P = torch.full((run.count,), math.inf, dtype=torch.float64, device=key.device)
        if len(run.alive):
            scores_P[run.alive] = _errors(task, network, run.params, run.buffers, chosen, AT_A_TIME)
        return scores_P


class _StackedRule:
    """A task's rule for stacked parameters, with a learning rate of each row where there are any."""

    def __init__(self, rule: Rule, rates_P: Tensor | None, count: int, device: torch.device):
        self.rule, self.rates_P, self.entrywise = rule, None, type(rule) in ENTRYWISE
        if rates_P is not None:
            if rates_P.shape != (count,):
                raise ValueError(f"rates_P has shape {tuple(rates_P.shape)}; accepted: ({count},), one per candidate")
            if not isinstance(rule, Tunable) or "lr" not in rule.settings:
                raise ValueError(f"rule is {type(rule).__name__}; accepted with rates_P: a rule with a setting 'lr'")
            self.rates_P = rates_P.to(device)

    def init(self, params: Params) -> Tree:
        if self.entrywise:
            return self.rule.init(self._entrywise_meta(params), params)
        return vmap(self.rule.init)(self._meta(), params)

    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        if self.entrywise:
            return self.rule.update(self._entrywise_meta(params), grads, state, params)
        return vmap(self.rule.update)(self._meta(), grads, state, params)

    def keep(self, kept: Tensor) -> None:
        """Forget the other rows."""
        self.rates_P = None if self.rates_P is None else self.rates_P[kept]

    def _meta(self) -> Params:
        return {} if self.rates_P is None else {"lr": self.rates_P}

    def _entrywise_meta(self, params: Params) -> Params:
        if self.rates_P is None:
            return {}
        shaped = {name: self.rates_P.reshape(-1, *[1] * (p.ndim - 1)) for name, p in params.items()}
        return {PER_PARAMETER + name: rates.to(params[name].dtype) for name, rates in shaped.items()}


class _Run:
    """A population on its way: the rows that are alive, and those that were stopped."""

    def __init__(
        self, params: Params, buffers: Params, gradients: CandidateGradients, rule: _StackedRule, device: torch.device
    ):
        self.count, self.gradients, self.rule = gradients.count, gradients, rule
        self.params, self.buffers = (
            tree.map(lambda leaf: leaf.detach().to(device).expand(self.count, *leaf.shape).contiguous(), part)
            for part in (params, buffers)
        )
        self.state, self.step = rule.init(self.params), 0
        self.alive = torch.arange(self.count, device=device)
        self.stopped: list[tuple[Tensor, Params, Params, Tensor, Tensor]] = []  # as in _stop

    def advance(self, network: "_Network", inputs: Tensor, target_NK: Tensor) -> Tensor:
        """One step of every row that is alive; its predictions before the step, (P, N, K)."""
        prediction_PNK, self.buffers, pullback = network.train(self.params, self.buffers, inputs)
        grads = pullback(self.gradients.gradient(prediction_PNK, target_NK))
        self.params, self.state = self.rule.update(grads, self.state, self.params)
        self.step += 1
        return prediction_PNK

    def keep(self, kept_P: Tensor, lost: bool = False) -> None:
        """Go on with these of the rows that are alive alone: bool, one per row; ``lost`` says why the others do not."""
        if kept_P.all():
            return
        self._stop(~kept_P, lost)
        self.gradients = self.gradients.select(kept_P.nonzero().flatten().tolist())
        self.alive, self.params, self.buffers = tree.index((self.alive, self.params, self.buffers), kept_P)
        self.state = tree.map(lambda leaf: leaf[kept_P] if leaf.ndim else leaf, self.state)
        self.rule.keep(kept_P)

    def finish(self, steps: int) -> Trained:
        """All rows, in their first order, of a run of so many steps."""
        self._stop(torch.ones_like(self.alive, dtype=torch.bool), lost=False)
        places, params, buffers, taken, lost = zip(*self.stopped, strict=True)
        order = torch.cat(places).argsort()
        params, buffers = (tree.map(lambda *same: torch.cat(same)[order], *part) for part in (params, buffers))
        finite = [leaf.isfinite().reshape(self.count, -1).all(1) for leaf in params.values()]
        finite_P = torch.stack(finite).all(0) & ~torch.cat(lost)[order]
        return Trained(params, buffers, finite_P, torch.where(finite_P, torch.cat(taken)[order], steps))

    def _stop(self, rows_P: Tensor, lost: bool) -> None:
        places, params, buffers = tree.index((self.alive, self.params, self.buffers), rows_P)
        taken, flags = torch.full_like(places, self.step), torch.full_like(places, lost, dtype=torch.bool)
        self.stopped.append((places, params, buffers, taken, flags))


def _errors(
    task: LossTask, network: "_Network", params: Params, buffers: Params, examples: Examples, chunk: int
) -> Tensor:
    """The task's errors (P,) on examples, ``chunk`` predictions at a time. Sums are float64: exact, whatever the chunk."""
    at_a_time = max(1, chunk // len(next(iter(params.values()))))
    total_P: Tensor | float = 0.0
    for inputs, targets in zip(examples.inputs.split(at_a_time), examples.targets.split(at_a_time), strict=True):
        prediction_PNK = network.predict(params, buffers, inputs)
        total_P = total_P + task.error(prediction_PNK.double(), targets) * len(targets)
    assert isinstance(total_P, Tensor), "parts are not empty"
    return total_P / len(examples.targets)


# -- stacked models --------------------------------------------------------------------------------------------------


class _Network(ABC):
    """P modules of one kind."""

    @abstractmethod
    def train(self, params: Params, buffers: Params, inputs: Tensor) -> tuple[Tensor, Params, Pullback]:
        """Predictions (P, N, K) in training mode, the buffers after, and how gradients go back to the parameters."""

    @abstractmethod
    def predict(self, params: Params, buffers: Params, inputs: Tensor) -> Tensor:
        """Predictions (P, N, K) in evaluation mode."""


class _Vmapped(_Network):
    """Any module, by ``vmap``; autograd goes through the network once for all."""

    def __init__(self, task: LossTask):
        self.task = task
        for part in task.module.modules():
            if isinstance(part, _BatchNorm) and part.momentum is None and part.track_running_stats:
                raise ValueError("a batch norm has momentum None, a count it reads; accepted: a number, or GroupNorm")

    def train(self, params: Params, buffers: Params, inputs: Tensor) -> tuple[Tensor, Params, Pullback]:
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
            prediction_PNK, after = vmap(lambda one, own: tree.call(self.task.module, one, own, inputs))(
                leaves, buffers
            )

        def pullback(cotangent_PNK: Tensor) -> Params:
            cotangent = cotangent_PNK.to(prediction_PNK.dtype)
            grads = torch.autograd.grad(prediction_PNK, list(leaves.values()), cotangent, materialize_grads=True)
            return dict(zip(leaves, grads, strict=True))

        return prediction_PNK.detach(), tree.detach(after), pullback

    def predict(self, params: Params, buffers: Params, inputs: Tensor) -> Tensor:
        step = torch.zeros((), dtype=torch.int64, device=inputs.device)
        return vmap(lambda one, own: self.task.predict(InnerState(one, own, {}, step, {}), inputs))(params, buffers)


class _Stacked(_Network):
    """Linear layers with activations between them, forward and backward as batched products of (P, H, N) tensors.

    All rows see the same inputs, so that the first layer is one product of P H rows.
    """

    def __init__(self, names: list[str], activations: list[nn.Module]):
        self.names, self.activations = names, activations

    def train(self, params: Params, buffers: Params, inputs: Tensor) -> tuple[Tensor, Params, Pullback]:
        prediction_PKN, kept = self._forward(params, inputs)
        return prediction_PKN.transpose(1, 2), buffers, lambda given: self._backward(params, inputs, kept, given)

    def predict(self, params: Params, buffers: Params, inputs: Tensor) -> Tensor:
        return self._forward(params, inputs)[0].transpose(1, 2)

    def _forward(self, params: Params, inputs_ND: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Predictions (P, K, N); of every hidden layer, before and after its activation, (P, H, N)."""
        kept: list[tuple[Tensor, Tensor]] = []
        for place, name in enumerate(self.names):
            weight, bias = params[f"{name}.weight"], params[f"{name}.bias"].unsqueeze(2)
            if place == 0:
                z = torch.addmm(bias.flatten(0, 1), weight.flatten(0, 1), inputs_ND.T).unflatten(0, weight.shape[:2])
            else:
                z = torch.baddbmm(bias, weight, kept[-1][1])
            if place < len(self.activations):
                kept.append((z, _ACTIVATIONS[type(self.activations[place])].forward(z)))
        return z, kept

    def _backward(
        self, params: Params, inputs_ND: Tensor, kept: list[tuple[Tensor, Tensor]], gradient_PNK: Tensor
    ) -> Params:
        grads: Params = {}
        delta = gradient_PNK.transpose(1, 2).contiguous()
        for place in reversed(range(len(self.names))):
            name = self.names[place]
            weight = params[f"{name}.weight"]
            grads[f"{name}.bias"] = delta.sum(2, dtype=weight.dtype)
            if place == 0:
                grads[f"{name}.weight"] = torch.mm(delta.flatten(0, 1), inputs_ND).view_as(weight).to(weight.dtype)
                break
            before, after = kept[place - 1]
            grads[f"{name}.weight"] = torch.bmm(delta, after.transpose(1, 2)).to(weight.dtype)
            above = torch.bmm(weight.transpose(1, 2), delta)
            delta = _ACTIVATIONS[type(self.activations[place - 1])].backward(above, before, after)
        return {name: grads[name] for name in params}


class _Activation(NamedTuple):
    """In place where it can be: fresh memory for megabytes costs as much as the arithmetic."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]  # of the gradient, and what was before and after


_ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    nn.Tanh: _Activation(
        torch.tanh_, lambda grad, _, after: torch.ops.aten.tanh_backward.grad_input(grad, after, grad_input=grad)
    ),
    nn.ReLU: _Activation(
        torch.relu_,
        lambda grad, _, after: torch.ops.aten.threshold_backward.grad_input(grad, after, 0, grad_input=grad),
    ),
    nn.GELU: _Activation(functional.gelu, lambda grad, before, _: torch.ops.aten.gelu_backward(grad, before)),
}


def _network(task: LossTask, path: str) -> _Network:
    parts = list(task.module.named_children()) if isinstance(task.module, nn.Sequential) else []
    linear, between = parts[::2], parts[1::2]
    fits = len(parts) % 2 == 1 and all(type(part) is nn.Linear and part.bias is not None for _, part in linear)
    fits = fits and all(
        type(part) in _ACTIVATIONS and getattr(part, "approximate", "none") == "none" for _, part in between
    )
    if path == "stacked" and not fits:
        raise ValueError(
            f"path is 'stacked' with a {type(task.module).__name__}; accepted: linear layers, biases among them, with tanh, "
            "relu or gelu between them, as in MLP; other modules with 'vmap'"
        )
    if fits and path != "vmap":
        return _Stacked([name for name, _ in linear], [part for _, part in between])
    return _Vmapped(task)
