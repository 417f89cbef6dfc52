"""A problem of twelve meta-parameters: one learning rate for each tensor of a network with five hidden layers."""

from functools import partial

import torch
from torch import Tensor

from experiments.bench.peers import Digits
from metalearn.base import Params
from metalearn.models.vision import MLP
from metalearn.optim.first_order import PER_PARAMETER, SGD
from metalearn.problems.training_runs import TrainingRun


class LearningRates(TrainingRun):
    """Training with a learned logarithm of the learning rate of every tensor of the module."""

    def init_meta(self, key: Tensor) -> Params:
        names = [name for name, _ in self.module.named_parameters()]
        return {"log_lr": torch.full((len(names),), 0.1, device=key.device).log()}

    def rule_meta(self, meta: Params) -> Params:
        names = [name for name, _ in self.module.named_parameters()]
        return {PER_PARAMETER + name: rate for name, rate in zip(names, meta["log_lr"].exp(), strict=True)}


def learning_rates(width: int, batch_size: int | None = None) -> LearningRates:
    """On 1000 digits, the same run every time."""
    model = partial(MLP, hidden=[width] * 5)
    problem = LearningRates(Digits(), model, SGD(0.1), batch_size=batch_size, init_seed=0)
    problem.open(test=False)
    return problem
