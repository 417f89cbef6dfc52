"""The smallest learned rules."""

import torch

from metalearn import random
from metalearn.optim.learned import LearnedRule, weight


class Scaled(LearnedRule):
    """p <- p - exp(log_rate) g: gradient descent whose learning rate is the only weight."""

    def __init__(self, log_rate: float = -2.0):
        super().__init__()
        self.log_rate = log_rate

    def init_meta(self, key):
        return {"log_rate": torch.full((), self.log_rate, device=key.device)}

    def start(self, meta, layout, params_P):
        return {}

    def direction(self, meta, layout, grads_P, state, params_P, loss):
        return grads_P * weight(meta, "log_rate", 0).exp().to(grads_P.dtype), state


def keys(count, seed=0):
    return random.fold(random.key(seed, "runs"), torch.arange(count))
