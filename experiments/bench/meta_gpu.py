"""The same comparison at a hundred million inner parameters in bfloat16, where there is a GPU to hold them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalearn import random, tree
from metalearn.base import Batches, Estimator, InnerState, Params
from metalearn.estimators.implicit import SAMA, Neumann
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.first_order import SGD
from metalearn.unroll import Descent


@dataclass(frozen=True)
class Cost:
    """Of one estimate: seconds, and GiB at the peak beyond what the problem itself holds."""

    seconds: float
    gibibytes: float


class WideReweighting(Descent):
    """Learned weights of random examples for a ReLU network of four layers, its loss under bfloat16 autocast."""

    def __init__(self, width: int, rows: int, device: torch.device | str):
        super().__init__(SGD(0.1))
        with torch.device(device):
            layers = [part for _ in range(3) for part in (nn.Linear(width, width), nn.ReLU())]
            self.module = nn.Sequential(*layers, nn.Linear(width, 10))
            self.inputs, self.targets = torch.randn(rows, width), torch.randint(10, (rows,))

    def init_meta(self, key: Tensor) -> Params:
        return {"weights": torch.ones(len(self.targets), device=self.targets.device)}

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return self.start(meta, {name: p.detach() for name, p in self.module.named_parameters()}, {})

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        return (meta["weights"] * self._losses(state)).mean(), {}

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return self._losses(state)[: len(self.targets) // 2].mean()

    def _losses(self, state: InnerState) -> Tensor:
        with torch.autocast(self.inputs.device.type, torch.bfloat16):
            logits, _ = tree.call(self.module, state.params, {}, self.inputs)
        return functional.cross_entropy(logits.float(), self.targets, reduction="none")


def estimators() -> dict[str, Estimator]:
    """Those that the table has, the graph of the whole run first."""
    return {
        "graph": Unrolled("graph"),
        "store": Unrolled("store"),
        "mixed": Unrolled("mixed"),
        "mixed, compiled": Unrolled("mixed", compile=True),
        "Neumann 10": Neumann(10, warm_start=False),
        "SAMA": SAMA(warm_start=False),
    }


def costs(
    width: int = 6144, rows: int = 512, steps: int = 5, device: str = "cuda"
) -> Iterator[tuple[str, Cost, Params]]:
    """Cost and gradient of every estimator: 3 width^2 inner parameters, 113 million at 6144."""
    problem = WideReweighting(width, rows, device)
    key = random.key(0, device=device)
    meta, batches = problem.init_meta(key), Batches(lambda k: None, None, steps)
    for name, estimator in estimators().items():
        state = estimator.init(problem, meta, key)

        def call(estimator: Estimator = estimator, state: Any = state) -> Params:
            return estimator.estimate(problem, meta, state, batches, key).grad

        found = call()
        yield name, measured(call, device), found


def measured(call: Callable[[], Params], device: str) -> Cost:
    """One warm call."""
    if device != "cuda":
        raise ValueError(f"device is {device!r}; accepted: 'cuda'")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    call()
    torch.cuda.synchronize()
    return Cost(time.perf_counter() - began, (torch.cuda.max_memory_allocated() - before) / 2**30)
