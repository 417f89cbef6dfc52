"""Tiny training runs in float64, and central differences of their meta-objectives."""

import functools
import hashlib

import torch
from torch import nn

from metalearn import random
from metalearn.base import Examples, Source
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import MLP

PARTS = ("train", "validation", "test")


class Clusters(Source):
    """Normal clusters, one of each class, the classes in turn, that differ in their first ``informative`` features."""

    def __init__(self, num_examples=40, num_features=6, num_classes=3, spread=1.0, seed=0, informative=None):
        self.num_examples, self.num_features, self.num_classes = num_examples, num_features, num_classes
        self.spread, self.seed, self.informative, self.opened = spread, seed, informative, []

    def read(self, part):
        self.opened.append(part)
        centres = random.normal(random.key(self.seed, "centres"), (self.num_classes, self.num_features))
        if self.informative is not None:
            centres[:, self.informative :] = 0
        targets = torch.arange(self.num_examples) % self.num_classes
        noise = random.normal(random.key(self.seed, part), (self.num_examples, self.num_features))
        return Examples(centres[targets] + self.spread * noise, targets)

    def fingerprint(self):
        return hashlib.sha256(repr((self.num_examples, self.num_features, self.seed)).encode()).hexdigest()


def double(num_inputs, num_outputs, hidden=(5,)):
    """A small network in float64."""
    return MLP(num_inputs, num_outputs, hidden).double()


wide = functools.partial(MLP, hidden=(32,))


class WithDropout(nn.Sequential):
    def __init__(self, num_inputs, num_outputs):
        super().__init__(nn.Dropout(0.5), nn.Linear(num_inputs, num_outputs))


def opened(problem, test=False):
    problem.open(test=test)
    return problem


def estimate(problem, meta, steps, seed=0, key=None):
    key, estimator = random.key(seed) if key is None else key, Unrolled("store")
    state = estimator.init(problem, meta, key)
    return estimator.estimate(problem, meta, state, problem.batches(key, steps), key)


def assert_matches_central_differences(problem, meta, steps, rtol=1e-6, width=1e-5):
    """The meta-gradient against differences of the meta-objective along two random directions and the gradient's own."""
    found = estimate(problem, meta, steps)
    scale = float(sum(g.square().sum() for g in found.grad.values()) ** 0.5)
    assert scale > 1e-6
    drawn = [
        {n: random.normal(random.key(i, n), (v.numel(),)).reshape(v.shape).to(v) for n, v in meta.items()}
        for i in range(2)
    ]
    for direction in [*drawn, {n: g / scale for n, g in found.grad.items()}]:
        ends = [
            estimate(problem, {n: v + sign * width * direction[n] for n, v in meta.items()}, steps).loss
            for sign in (1, -1)
        ]
        slope = sum((found.grad[n] * direction[n]).sum() for n in meta)
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * width), slope, rtol=rtol, atol=1e-6 * scale)
