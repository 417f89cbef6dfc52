"""Problems x estimators: cosine to the exact meta-gradient, time and memory of one estimate, or why the pair is refused.

Every cell is measured in a process of its own, after one call that is not counted: ms of the second call, and MiB that the
peak of the resident set rises while it runs. The exact gradient is that of ``Unrolled("graph")``.
"""

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench.memory import rise
from experiments.bench.peers import KEY, Digits, data_weights, estimated
from experiments.bench.rates import learning_rates
from experiments.bench.timing import seconds_per_call
from metalearn import tree
from metalearn.base import Batches, Estimator, InnerProblem, InnerState, Params
from metalearn.estimators.evolution import FullES, GeneralizedPersistentES, NoiseReuseES, PersistentES, TruncatedES
from metalearn.estimators.forward import ForwardGradient, ForwardMode, ZerothOrder
from metalearn.estimators.implicit import SAMA, ConjugateGradient, FiniteDifference, Identity, Neumann, Nystrom
from metalearn.estimators.recurrent import RealTimeRecurrent, UnbiasedOnlineRecurrent
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.distillation import Distillation
from metalearn.problems.few_shot import FewShot
from metalearn.problems.hyperparameters import LogisticRegression, RandomRidge
from metalearn.problems.schedules import LearningRateSchedule
from metalearn.problems.toys import InfluenceBalancing, LearningRateToy
from metalearn.unroll import Descent, unroll

SMALL = partial(MLP, hidden=[16])
# Name: how the problem is made, and its inner steps.
PROBLEMS: dict[str, tuple[Callable[[], InnerProblem], int]] = {
    "ridge": (lambda: RandomRidge(SGD(0.3)), 100),
    "logistic": (lambda: LogisticRegression(Digits(), SGD(1.0)), 30),
    "data weights": (lambda: data_weights(SGD(0.5), 16, depth=1), 20),
    "distillation": (lambda: Distillation(Digits(), SMALL, SGD(0.5), horizon=20, init_seed=0), 20),
    "few-shot": (lambda: FewShot(Digits(), SMALL, SGD(0.1), horizon=20, ways=2), 20),
    "learning rates": (lambda: learning_rates(16), 20),
    "lr schedule": (lambda: LearningRateSchedule(Digits(), SMALL, SGD(0.1), horizon=20, init_seed=0), 20),
    "lr schedule, accuracy": (
        lambda: LearningRateSchedule(Digits(), SMALL, SGD(0.1), horizon=20, objective="accuracy", init_seed=0),
        20,
    ),
    "influence balancing": (lambda: InfluenceBalancing(horizon=20), 20),
    "lr toy": (lambda: LearningRateToy(horizon=20), 20),
}
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "Unrolled graph": lambda: Unrolled("graph"),
    "Unrolled store": lambda: Unrolled("store"),
    "Unrolled checkpoint": lambda: Unrolled("checkpoint"),
    "Unrolled mixed": lambda: Unrolled("mixed"),
    "Unrolled store, last 5": lambda: Unrolled("store", truncate=5),
    "ForwardMode": lambda: ForwardMode(chunk=64),
    "ForwardGradient 64": lambda: ForwardGradient(64),
    "ZerothOrder 64": lambda: ZerothOrder(64, method="central"),
    "RealTimeRecurrent": lambda: RealTimeRecurrent(chunk=64),
    "UnbiasedOnlineRecurrent": lambda: UnbiasedOnlineRecurrent(),
    "ConjugateGradient 10": lambda: ConjugateGradient(10),
    "Neumann 10": lambda: Neumann(10, step_size=0.3),
    "Nystrom 5": lambda: Nystrom(5),
    "Identity": lambda: Identity(),
    "FiniteDifference": lambda: FiniteDifference(),
    "SAMA": lambda: SAMA(),
    "FullES 64": lambda: FullES(64),
    "TruncatedES 64": lambda: TruncatedES(64),
    "PersistentES 64": lambda: PersistentES(64),
    "GPES 64": lambda: GeneralizedPersistentES(64),
    "NoiseReuseES 64": lambda: NoiseReuseES(64),
}


def cell(problem: InnerProblem, steps: int, estimator: Estimator, exact: Params | None) -> tuple[str, str | None]:
    """What the table says of a pair, and the reason where it is refused."""
    if reason := estimator.refusal(problem):
        return "refused", reason
    try:
        call = estimated(estimator, problem, steps)
        found = call().grad
    except ValueError as refused:  # what only the meta-parameters and sizes at hand forbid
        return "refused", str(refused).split(f"on {type(problem).__name__}: ")[-1]
    began = time.perf_counter()
    mebibytes = rise(call)
    milliseconds = 1e3 * (time.perf_counter() - began)
    agreement = "no exact" if exact is None else f"{cosine(found, exact):.3f}"
    return f"{agreement}, {milliseconds:.0f} ms, {mebibytes:.1f} MiB", None


def cosine(left: Params, right: Params) -> float:
    """Between two gradients; NaN where one is zero."""
    lengths = float(tree.norm(left) * tree.norm(right))
    return float(tree.dot(left, right)) / lengths if lengths else math.nan


def in_child(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a forked process, or ``None`` where it takes longer; its exceptions are raised here."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(there, function, arguments))
    child.start()
    there.close()
    try:
        if not here.poll(seconds):
            return None
        kind, value = here.recv()
    finally:
        child.kill()
        child.join()
    if kind == "failed":
        raise RuntimeError(value)
    return value


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(("done", function(*arguments)))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def matrix(problems: dict, estimators: dict, seconds: float = 60) -> tuple[list[list[str]], list[str]]:
    """Rows of cells by estimator, and the reasons that they refer to by number."""
    columns, reasons = [], []
    for title, (make, steps) in problems.items():
        print(f"{title} ...", file=sys.stderr, flush=True)
        problem = make()
        problem.open(test=False)
        reference = Unrolled("graph")
        exact = None if reference.refusal(problem) else estimated(reference, problem, steps)().grad
        column = []
        for estimator in estimators.values():
            try:
                found = in_child(seconds, cell, problem, steps, estimator(), exact)
            except RuntimeError as error:
                found = "FAILED", str(error)
            text, reason = found or (f"over {seconds:.0f} s", None)
            if reason and reason not in reasons:
                reasons.append(reason)
            column.append(f"{text} [{reasons.index(reason) + 1}]" if reason else text)
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)], reasons


def print_matrix() -> None:
    """A Markdown table, and the reasons below it."""
    rows, reasons = matrix(PROBLEMS, ESTIMATORS)
    heads = [f"{name} (K={steps})" for name, (_, steps) in PROBLEMS.items()]
    print("\n| estimator |", " | ".join(heads), "|")
    print("|---" * (len(heads) + 1) + "|")
    for name, row in zip(ESTIMATORS, rows, strict=True):
        print(f"| {name} |", " | ".join(row), "|")
    for number, reason in enumerate(reasons, 1):
        print(f"\n[{number}] {reason}")


class DenseQuadratic(Descent):
    """w^T A w / 2 - lambda^T w with a dense positive definite A of dimension d; outer |w|^2 / 2."""

    def __init__(self, dimension: int):
        super().__init__(SGD(0.1))
        few_DR = torch.randn(dimension, 32, generator=torch.Generator().manual_seed(0))
        self.matrix_DD = (few_DR @ few_DR.T / dimension).add_(torch.eye(dimension))

    def init_meta(self, key: Tensor) -> Params:
        return {"target": torch.ones(len(self.matrix_DD))}

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return self.start(meta, {"w": torch.zeros_like(meta["target"])}, {})

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        w = state.params["w"]
        return w @ (self.matrix_DD @ w) / 2 - meta["target"] @ w, {}

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return state.params["w"].square().sum() / 2


def slopes(dimensions: tuple[int, ...] = (3072, 4096, 6144, 8192)) -> Iterator[tuple[str, float]]:
    """Log-log slope of the time of a response's product against the dimension, by estimator.

    No matrix fits a cache; where the small ones did, their products would be faster per entry, and the slope above 2.
    """
    for name, estimator in (("CG", ConjugateGradient(10, tolerance=0)), ("Neumann", Neumann(10))):
        products = [_product(estimator, dimension) for dimension in dimensions]
        # In turns, so that whatever slows the machine down slows all dimensions; the least is the least disturbed.
        rounds = [[seconds_per_call(product) for product in products] for _ in range(6)]
        times = np.min(rounds[1:], axis=0)
        yield name, float(np.polyfit(np.log(dimensions), np.log(times), 1)[0])


def _product(estimator: ConjugateGradient | Neumann, dimension: int) -> Callable[[], Params]:
    """The response's product with a vector of ones."""
    problem = DenseQuadratic(dimension)
    meta, batches = problem.init_meta(KEY), Batches(lambda k: None, None, 1)
    with torch.no_grad():
        window = unroll(problem, meta, problem.init(meta, KEY), batches, KEY)
    response = estimator.response(problem, window)
    return lambda: response.vjp({"w": torch.ones(dimension)})
