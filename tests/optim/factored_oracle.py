"""The 39 features of the factored MLP, its network and its statistics in float64 numpy, one tensor at a time."""

import numpy as np

SCALES = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])
DECAYS = np.array([0.9, 0.99, 0.999])


def moved(decays, offsets):
    return 1 - np.exp(10 * (np.log(1 - np.asarray(decays)) / 10 + offsets))


class Tensor:
    """One tensor's statistics after any number of gradients."""

    def __init__(self, shape, meta):
        self.shape = shape or (1,)
        self.kept = moved(DECAYS, meta["momentum_decay"])
        self.kept_square = np.clip(moved([0.999], meta["square_decay"]), 0, 1)[0]
        self.kept_factored = np.clip(moved(DECAYS, meta["factored_decay"]), 0, 1)
        self.m = [np.zeros(self.shape) for _ in range(3)]
        self.v = np.zeros(self.shape)
        self.axes = (0, 0) if len(shape) < 2 else tuple(np.argsort(shape, kind="stable")[-2:])
        self.rows, self.columns, self.taken = [0.0] * 3, [0.0] * 3, 0

    def add(self, gradient):
        self.g = gradient.reshape(self.shape)
        square = self.g**2
        self.m = [d * m + (1 - d) * self.g for d, m in zip(self.kept, self.m, strict=True)]
        self.v = self.kept_square * self.v + (1 - self.kept_square) * square
        square = square + 1e-30
        second, largest = self.axes
        for i, d in enumerate(self.kept_factored):
            row = square if len(self.shape) < 2 else square.mean(largest, keepdims=True)
            column = square if len(self.shape) < 2 else square.mean(second, keepdims=True)
            self.rows[i] = d * self.rows[i] + (1 - d) * row
            self.columns[i] = d * self.columns[i] + (1 - d) * column
        self.taken += 1

    def rates(self, i):
        """What multiplies g and what multiplies m."""
        if len(self.shape) < 2:
            return 1 / np.sqrt(np.maximum(self.rows[i] + 1e-9, 1e-9)), 1 / np.sqrt(self.rows[i] + 1e-6)
        relative = self.rows[i] / (self.rows[i].mean(self.axes[0], keepdims=True) + 1e-9)
        both = 1 / np.sqrt(np.maximum(relative, 1e-9)) / np.sqrt(np.maximum(self.columns[i], 1e-9))
        return both, both

    def scaled_momenta(self):
        return [m / np.sqrt(self.v + 1e-6) for m in self.m]

    def features(self, p):
        """(*shape, 39), those but of time divided by their root mean squares."""
        three = range(3)
        raw = [self.g, p.reshape(self.shape), *self.m, self.v, *self.scaled_momenta(), 1 / np.sqrt(self.v + 1e-6)]
        raw += [self.g * self.rates(i)[0] for i in three]
        raw += [*self.rows, *self.columns]
        raw += [1 / np.sqrt(x + 1e-8) for x in (*self.rows, *self.columns)]
        raw += [self.m[i] * self.rates(i)[1] for i in three]
        stacked = np.stack([np.broadcast_to(x, self.shape) for x in raw], -1)
        normal = stacked / np.sqrt(1e-5 + (stacked**2).mean(tuple(range(len(self.shape)))))
        time = np.broadcast_to(np.tanh((self.taken - 1) / SCALES - 1), (*self.shape, len(SCALES)))
        return np.concatenate([normal, time], -1)


def network(meta, x):
    """(*shape, outputs)."""
    layers = sum(name.startswith("weight_") for name in meta)
    for k in range(layers):
        x = x @ meta[f"weight_{k}"] + meta[f"bias_{k}"]
        x = np.maximum(x, 0) if k < layers - 1 else x
    return x
