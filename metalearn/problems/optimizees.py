"""Training runs that a learned optimizer is meta-trained on, and is judged on.

Shape letters: N examples, D input features, K outputs.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

from metalearn import random, tree
from metalearn.base import (
    Batches,
    Examples,
    InnerState,
    Params,
    Source,
    StepOutput,
    require_choice,
    require_range,
)
from metalearn.optim.learned import LearnedRule
from metalearn.problems.training_runs import TrainingRun
from metalearn.unroll import inner_gradient, update

OBJECTIVES = ("train", "validation")
TARGETS = ("class", "input")
HELD_OUT = "/held out"


class Optimizee(TrainingRun):
    """A module trained by a learned rule, whose weights are the meta-parameters.

    The meta-objective of an episode of T steps is the sum over its steps of L_t / ``horizon``: with "train", L_t is the
    loss of the step's batch before the update; with "validation" the loss, after the update, of as many examples that
    no step of the run is trained on. Before its update a loss tells nothing of that update: with "train", an estimator that
    credits a window's losses to its own updates alone (truncated backpropagation, truncated evolution) sees no use of the
    window's last, and of a window of one step nothing at all.

    A task is an initialisation and a stream of batches, drawn (with repetition) from the keys of the run, so that runs at
    different ages need no common batch. Examples never mix: runs in meta-training see the source's "train" part only, runs in
    an evaluation the "validation" part, in the final test the "test" part; ``on`` says which. Of each part, the objective
    "validation" sets a share ``inner_validation`` aside, on which no run is trained.

    Args:
        source: as in ``TrainingRun``; its three parts should be of like size.
        model: as in ``TrainingRun``.
        rule: the learned rule; its weights before meta-training are where meta-training begins.
        horizon: T, the steps of an episode, at least 1.
        shortest: T is drawn anew for each episode, log-uniformly from shortest ... horizon; null for always horizon.
        nominal_horizon: what comparisons with other optimizers count in, 1 ... horizon; null for horizon.
        multiple_of: T is rounded to a multiple of this, 1 ... shortest, which divides horizon: of the window, for estimators
            that need whole ones.
        objective: "train" or "validation".
        target: what outputs are compared with: "class" by cross-entropy, "input" by the mean squared difference.
        batch_size: examples of a step, at least 1.
        inner_validation: share of each part in [0, 1), above 0 for the objective "validation" and 0 else.
        rescale: c >= 1: a run is trained on w / s instead of the module's parameters w, with s drawn for each tensor,
            log-uniformly from 1/c ... c. The function computed at the start is the same.
        init_seed: as in ``TrainingRun``.
        second_derivatives: whether estimators differentiate through the gradients that the rule is given.

    Raises:
        ValueError: for values out of range; by ``open``, where a part is empty.

    Source: Andrychowicz et al. 2016, "Learning to Learn by Gradient Descent by Gradient Descent", section 2; ``rescale``:
    Metz et al. 2022, "Practical Tradeoffs between Memory, Compute, and Performance in Learned Optimizers", appendix.
    """

    terminal = False

    def __init__(
        self,
        source: Source,
        model: Callable[[int, int], nn.Module],
        rule: LearnedRule,
        horizon: int = 100,
        shortest: int | None = None,
        nominal_horizon: int | None = None,
        multiple_of: int = 1,
        objective: str = "train",
        target: str = "class",
        batch_size: int = 64,
        inner_validation: float = 0.0,
        rescale: float = 1.0,
        init_seed: int | None = None,
        second_derivatives: bool = False,
    ):
        super().__init__(source, model, rule, horizon, init_seed=init_seed)
        self.equal_lengths = shortest is None
        require_range("batch_size", batch_size, 1)
        require_range("shortest", horizon if shortest is None else shortest, 1, horizon)
        self.nominal_horizon = horizon if nominal_horizon is None else nominal_horizon
        require_range("nominal_horizon", self.nominal_horizon, 1, horizon)
        require_range("multiple_of", multiple_of, 1, horizon if shortest is None else shortest)
        if horizon % multiple_of:
            raise ValueError(f"multiple_of is {multiple_of} with horizon {horizon}; accepted: what divides the horizon")
        require_range("rescale", rescale, 1.0)
        require_choice("objective", objective, OBJECTIVES)
        require_choice("target", target, TARGETS)
        if not (0 < inner_validation < 1 if objective == "validation" else inner_validation == 0):
            accepted = "0 < share < 1" if objective == "validation" else "0"
            raise ValueError(f"inner_validation is {inner_validation} with objective {objective}; accepted: {accepted}")
        self.shortest, self.multiple_of = shortest, multiple_of
        self.objective, self.target, self.num_drawn = objective, target, batch_size
        self.inner_validation, self.rescale, self.second_derivatives = inner_validation, rescale, second_derivatives
        self.part = "train"

    # -- data --------------------------------------------------------------------------------------------------------

    def read(self, parts: list[str]) -> dict[str, Examples]:
        found = super().read(parts)
        if not self.inner_validation:
            return found
        return {name: examples for part in parts for name, examples in self._divided(part, found[part]).items()}

    def _divided(self, part: str, examples: Examples) -> dict[str, Examples]:
        held = round(self.inner_validation * len(examples.targets))
        require_range(f"inner_validation's number of examples of {part}", held, 1, len(examples.targets) - 1)
        order = random.permutation(random.key(0, HELD_OUT), len(examples.targets))
        chosen = {part: order[held:], part + HELD_OUT: order[:held]}
        return {name: Examples(*(leaf[rows] for leaf in examples)) for name, rows in chosen.items()}

    @property
    def num_outputs(self) -> int:
        return self.source.num_classes if self.target == "class" else self.parts["train"].inputs.shape[1]

    def division(self) -> dict[str, Any]:
        return {"inner_validation": self.inner_validation}

    def batches(self, key: Tensor, steps: int) -> Batches:
        for part in (self.part, self.part + HELD_OUT if self.inner_validation else self.part):
            self.examples(part, key.device)  # moved there now, not within a step and whatever transforms it
        return Batches(lambda k: None, None, steps)

    def on(self, part: str) -> Self:
        """The same runs trained, and measured, on another part: "train", "validation" or "test"."""
        copied = copy.copy(self)
        copied.part = part
        return copied

    def _drawn(self, part: str, key: Tensor) -> Examples:
        inputs, targets = self.examples(part, key.device)
        rows = random.integers(random.fold(key, part), (self.num_drawn,), len(targets))
        return Examples(*(leaf.index_select(0, rows.flatten()).unflatten(0, rows.shape) for leaf in (inputs, targets)))

    # -- the run -----------------------------------------------------------------------------------------------------

    def init_meta(self, key: Tensor) -> Params:
        assert isinstance(self.rule, LearnedRule)
        return self.rule.init_meta(key)

    def rule_meta(self, meta: Params) -> Params:
        return meta

    def init(self, meta: Params, key: Tensor) -> InnerState:
        params, buffers = self.initial(key)
        extra = {"horizon": self._horizon(random.fold(key, "horizon"))}
        if self.rescale > 1:
            scales = (
                (random.uniform(random.fold(key, "scales"), (len(params),)) * 2 - 1).mul(math.log(self.rescale)).exp()
            )
            extra |= {f"scale/{name}": scale for name, scale in zip(params, scales.unbind(), strict=True)}
            params = {name: value / extra[f"scale/{name}"].to(value.dtype) for name, value in params.items()}
        return self.start(meta, params, buffers, extra)

    def _horizon(self, key: Tensor) -> Tensor:
        assert self.horizon is not None
        if self.shortest is None:
            return torch.full((), self.horizon, dtype=torch.int64, device=key.device)
        low, high = math.log(self.shortest), math.log(self.horizon)
        steps = (low + (high - low) * random.uniform(key)).exp()
        least = -(-self.shortest // self.multiple_of)
        return (steps / self.multiple_of).round().clamp(min=least).long() * self.multiple_of

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        assert self.horizon is not None
        grads, loss, buffers = inner_gradient(self, meta, state, self._drawn(self.part, key), key)
        if not self.second_derivatives:
            grads = tree.detach(grads)
        state = update(self, meta, state, grads, loss.detach(), buffers)
        if self.objective == "validation":
            loss = self._held_out(state, self._drawn(self.part + HELD_OUT, key))
        return state, StepOutput(loss / self.horizon, state.step >= state.extra["horizon"])

    def step_runs(
        self, metas_R: Params, states_R: InnerState, batch: Any, keys_R: Tensor
    ) -> tuple[InnerState, StepOutput]:
        """Only the network goes through ``vmap``, whose every operation is dear; rules and draws know of many runs.

        The whole step does where it may be differentiated, and in inference mode, which has no other gradient.
        """
        whole = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        if whole or not isinstance(self.rule, LearnedRule):
            return super().step_runs(metas_R, states_R, batch, keys_R)
        assert self.horizon is not None
        grads, losses_R, buffers = self._gradients(states_R, self._drawn(self.part, keys_R), keys_R)
        given = states_R.rule, states_R.params
        params, rule = self.rule.update_runs(metas_R, grads, *given, loss=losses_R)
        states_R = InnerState(params, buffers, rule, states_R.step + 1, states_R.extra)
        if self.objective == "validation":
            losses_R = vmap(self._held_out)(states_R, self._drawn(self.part + HELD_OUT, keys_R))
        return states_R, StepOutput(losses_R / self.horizon, states_R.step >= states_R.extra["horizon"])

    def _gradients(self, states_R: InnerState, examples_R: Examples, keys_R: Tensor) -> tuple[Params, Tensor, Params]:
        """The gradient of each run's loss, the losses (R,), and the buffers after; no loss depends on ``meta``.

        By plain differentiation of their sum: of the two, ``torch.func.grad`` under ``vmap`` takes half as long again.
        """
        others_R = states_R._replace(params={}, rule={})

        def loss(params: Params, others: InnerState, examples: Examples, key: Tensor) -> tuple[Tensor, Params]:
            return self.inner_loss({}, others._replace(params=params), examples, key)

        with torch.enable_grad():
            params = {name: value.detach().requires_grad_() for name, value in states_R.params.items()}
            losses_R, buffers = vmap(loss, randomness="error")(params, others_R, examples_R, keys_R)
            grads = torch.autograd.grad(losses_R.sum(), list(params.values()), materialize_grads=True)
        return dict(zip(params, grads, strict=True)), losses_R.detach(), tree.detach(buffers)

    def _held_out(self, state: InnerState, examples: Examples) -> Tensor:
        return self._loss(self.predict(state, examples.inputs), examples)

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        outputs, buffers = tree.call(self.module, self._unscaled(state), state.buffers, batch.inputs)
        return self._loss(outputs, batch), buffers

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return torch.zeros((), device=state.step.device)

    def predict(self, state: InnerState, inputs: Tensor) -> Tensor:
        return super().predict(state._replace(params=self._unscaled(state)), inputs)

    def score(self, state: InnerState, part: str) -> dict[str, float]:
        if self.target == "class":
            return super().score(state, part)
        examples = self.examples(part, state.step.device)
        with torch.no_grad():
            return {"loss": float(self._loss(self.predict(state, examples.inputs), examples))}

    def _loss(self, outputs: Tensor, examples: Examples) -> Tensor:
        if self.target == "class":
            # Under vmap a third of the time of functional.cross_entropy, which is slow over few classes.
            outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
            chosen_N = outputs.gather(-1, examples.targets.unsqueeze(-1)).squeeze(-1)
            return (outputs.logsumexp(-1) - chosen_N).mean()
        return functional.mse_loss(outputs, examples.inputs)

    def _unscaled(self, state: InnerState) -> Params:
        """The module's own parameters w."""
        if self.rescale == 1:
            return state.params
        scale = {name: state.extra[f"scale/{name}"] for name in state.params}
        return {name: value * scale[name].to(value.dtype) for name, value in state.params.items()}
