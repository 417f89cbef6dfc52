"""What becomes of the best candidates after a search: weights tuned at a long horizon, errors on data and seeds of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metalearn import tree
from metalearn.base import Estimator, Loss, Tree, require_range
from metalearn.losses.learned import load_loss
from metalearn.optim.first_order import Adam
from metalearn.problems.learned_loss import UNTOUCHED, LossTask
from metalearn.random import fold
from metalearn.search.candidates import Candidate, gradients_of
from metalearn.search.population import PopulationTraining


class Tuning:
    """Gradient descent on the weights of the best losses, through training runs of a long horizon.

    Each finalist's weights take ``steps`` steps of Adam along the meta-gradient of ``estimator``, every step through a
    window of its own minibatches, in the parameters' precision. An estimate that is not finite is not followed.

    Args:
        estimator: of meta-gradients; ``ForwardMode`` is exact, and cheap for a dozen weights; PES for windows.
        finalists: how many losses are tuned, at least 1.
        steps: outer steps of each, at least 1.
        horizon: inner steps of an episode, at least 1.
        window: inner steps of an estimate, at least 1; null for the whole horizon.
        lr: learning rate of Adam, at least 0.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        estimator: Estimator,
        finalists: int = 5,
        steps: int = 50,
        horizon: int = 500,
        window: int | None = None,
        lr: float = 1e-2,
    ):
        for name, value in dict(finalists=finalists, steps=steps, horizon=horizon).items():
            require_range(name, value, 1)
        require_range("window", horizon if window is None else window, 1, horizon)
        self.estimator, self.finalists, self.steps, self.horizon = estimator, finalists, steps, horizon
        self.window, self.rule = horizon if window is None else window, Adam(lr)

    def problem(self, task: LossTask, candidate: Candidate) -> LossTask:
        """The inner problem of one finalist."""
        problem = task.with_loss(candidate.loss(task.output, trainable=True))
        problem.horizon = self.horizon
        if reason := self.estimator.refusal(problem):
            raise ValueError(
                f"{type(self.estimator).__name__} cannot be used on {type(problem).__name__}: {reason}; "
                "accepted: another estimator"
            )
        return problem

    def begin(self, problem: LossTask, key: Tensor) -> Tree:
        """The state before the first step: weights, Adam's, the estimator's."""
        meta = problem.init_meta(key)
        own = self.estimator.init(problem, meta, fold(key, "estimator"))
        return {"meta": meta, "rule": self.rule.init({}, meta), "estimator": own}

    def step(self, problem: LossTask, state: Tree, key: Tensor) -> tuple[Tree, Tensor]:
        """The state after one step, and the meta-objective before it."""
        batches = problem.batches(fold(key, "data"), self.window)
        with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
            found = self.estimator.estimate(problem, state["meta"], state["estimator"], batches, fold(key, "estimate"))
            after = {"meta": state["meta"], "rule": state["rule"], "estimator": found.state}
            if tree.norm(found.grad).isfinite():
                meta, rule = self.rule.update({}, found.grad, state["rule"], state["meta"])
                after |= {"meta": meta, "rule": rule}
        return tree.detach(after), found.loss


class Rescoring:
    """Errors of finished losses that the search has not seen: fresh seeds, every step exact, float32, untouched examples.

    The best loss of a run is the one with the least of these errors; they are then no longer free of choice, and its error
    is measured on "test".

    Args:
        finalists: losses of the hall of fame that are scored, at least 1.
        seeds: training runs of each, at least 1, whose errors are averaged.
        steps: of each run, at least 1; null for as many as the search's.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, finalists: int = 5, seeds: int = 5, steps: int | None = None):
        for name, value in dict(finalists=finalists, seeds=seeds, steps=1 if steps is None else steps).items():
            require_range(name, value, 1)
        self.finalists, self.seeds, self.steps = finalists, seeds, steps

    def errors(
        self, task: LossTask, losses: Sequence[Candidate | Loss], steps: int, key: Tensor, part: str = UNTOUCHED
    ) -> Tensor:
        """Errors (P + 1, seeds) under the losses and, last, under the task's own, all at the task's learning rate."""
        training, columns = PopulationTraining(steps=self.steps or steps), []
        own = load_loss(task.own_loss, output=task.output)
        with torch.autocast(key.device.type, enabled=False):
            for seed in range(self.seeds):
                gradients = gradients_of([*losses, own], task.output)
                trained = training.train(task, gradients, fold(key, seed))
                columns.append(training.errors(task, trained, part))
        return torch.stack(columns, 1)
