"""Which estimator suits a problem: every one of them against the exact meta-gradient, on a shortened inner run."""

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.func import jvp

from metalearn import random, tree
from metalearn.base import Batches, Estimator, InnerProblem, Params, require_range
from metalearn.estimators.evolution import FullES, PersistentES
from metalearn.estimators.forward import ForwardGradient, ForwardMode, ZerothOrder
from metalearn.estimators.implicit import SAMA, ConjugateGradient, FiniteDifference, Identity, Neumann, Nystrom
from metalearn.estimators.unrolled import Unrolled
from metalearn.training.callbacks import peak_memory_bytes
from metalearn.unroll import advance, differentiable_kernels, unroll

FEW = 64  # meta-parameters up to which forward mode over the basis is cheap
DIFFERENCE = 1e-3  # of central differences
EXPLODES = 1e3  # growth of a perturbation over an episode
LARGE_MIB = 1024
GOOD = 0.95
COLUMNS = ["estimator", "cosine", "bias", "deviation", "seconds", "peak_mib", "remark"]


def candidates(num_meta: int, steps: int, differentiable: bool) -> dict[str, Estimator]:
    """The estimators that are compared by default, by name: those that look at one window from its start.

    A window that is a whole episode is the same to GPES, NRES and truncated ES as to PES, and online ones (RTRL, UORO)
    differ from forward mode only where meta changes meanwhile.
    """
    implicit: dict[str, Estimator] = {
        "ConjugateGradient(10)": ConjugateGradient(10, warm_start=False),
        "Neumann(10)": Neumann(10, warm_start=False),
        "Nystrom(10)": Nystrom(10, warm_start=False),
        "Identity": Identity(warm_start=False),
        "FiniteDifference": FiniteDifference(warm_start=False),
        "SAMA": SAMA(warm_start=False),
    }
    reverse = {f"Unrolled({mode})": Unrolled(mode) for mode in ("store", "checkpoint", "mixed")}
    half = max(1, steps // 2)
    forward: dict[str, Estimator] = {"ForwardMode": ForwardMode()} if num_meta <= FEW else {}
    draws: dict[str, Estimator] = {
        "ForwardGradient(8)": ForwardGradient(8),
        "ZerothOrder(8)": ZerothOrder(8, chunk=None if differentiable else 1),
        "FullES(8)": FullES(pairs=8, std=1e-2, vectorised=differentiable),
        "PersistentES(8)": PersistentES(pairs=8, std=1e-2, vectorised=differentiable),
    }
    return reverse | {f"Unrolled(truncate={half})": Unrolled(truncate=half)} | implicit | forward | draws


class Draw(NamedTuple):
    """One window: its key, its data, and the exact meta-gradient as one vector, where it is known."""

    key: Tensor
    batches: Batches
    exact: Tensor | None


class Diagnosis(NamedTuple):
    """A row per estimator (``COLUMNS``; what was refused says why), facts about the run, and what follows."""

    table: pd.DataFrame
    facts: dict[str, float]
    advice: list[str]


def diagnose(
    problem: InnerProblem,
    steps: int,
    draws: int = 4,
    seed: int = 0,
    estimators: dict[str, Estimator] | None = None,
    configured: dict[str, Estimator] | None = None,
    device: torch.device | str = "cpu",
) -> Diagnosis:
    """Compare estimators at the initial meta-parameters, over windows of ``steps`` steps that each begin an episode.

    Of draw i, g_i is the exact meta-gradient of its window, by backpropagation, or by central differences where the
    run cannot be differentiated and has few meta-parameters; e_i is the estimate less g_i. With |g| the root mean
    square of |g_i|: cosine is the mean of cos(estimate, g_i), bias |mean e_i| / |g|, deviation
    sqrt(mean |e_i - mean e_i|^2) / |g|. The bias of a random estimator is known up to deviation / sqrt(draws).

    Args:
        problem: the problem, its data read.
        steps: the horizon of the comparison, at least 1.
        draws: windows, at least 2.
        seed: of everything that is drawn.
        estimators: by name; None takes ``candidates``.
        configured: further ones, whose rows come first.
        device: where to compute.

    Raises:
        ValueError: for values out of range.
    """
    require_range("steps", steps, 1)
    require_range("draws", draws, 2)
    whole = problem.horizon
    try:
        problem.horizon = None if whole is None else steps
        return _diagnose(problem, steps, draws, seed, estimators, configured, device, whole or steps)
    finally:
        problem.horizon = whole


def _diagnose(
    problem: InnerProblem,
    steps: int,
    draws: int,
    seed: int,
    estimators: dict[str, Estimator] | None,
    configured: dict[str, Estimator] | None,
    device: torch.device | str,
    whole: int,
) -> Diagnosis:
    meta = problem.init_meta(random.key(seed, "meta", device=device))
    keys = [random.key(seed, "diagnose", draw, device=device) for draw in range(draws)]
    windows = [Draw(key, problem.batches(random.fold(key, "data"), steps), None) for key in keys]
    windows = [draw._replace(exact=_exact(problem, meta, draw)) for draw in windows]
    facts = _facts(problem, meta, windows[0])
    estimators = (configured or {}) | (
        estimators or candidates(int(facts["meta_parameters"]), steps, problem.differentiable)
    )
    rows = [{"estimator": name} | _row(problem, meta, windows, each) for name, each in estimators.items()]
    table = pd.DataFrame(rows, columns=pd.Index(COLUMNS))
    return Diagnosis(table, facts, advice(table, facts, problem, whole))


def _facts(problem: InnerProblem, meta: Params, draw: Draw) -> dict[str, float]:
    start = problem.init(meta, random.fold(draw.key, "episode"))
    facts = {
        "steps": float(draw.batches.steps),
        "meta_parameters": float(sum(value.numel() for value in meta.values())),
        "inner_parameters": float(sum(value.numel() for value in start.params.values())),
        "state_bytes": float(sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(start))),
    }
    return facts | ({"growth": growth(problem, meta, draw)} if problem.differentiable else {})


def growth(problem: InnerProblem, meta: Params, draw: Draw, iterations: int = 8) -> float:
    """Spectral radius of d(end)/d(start) of a window to the power 1 / steps, by power iteration in forward mode."""
    floats, merge = tree.split(tree.detach(problem.init(meta, random.fold(draw.key, "episode"))))

    def end(*leaves: Tensor) -> tuple[Tensor, ...]:
        state = merge(leaves)
        for k in range(draw.batches.steps):
            state, _ = advance(problem, meta, state, draw.batches, random.fold(draw.key, "steps"), k)
        return tuple(tree.split(state)[0])

    tangents = tuple(random.normal(random.fold(draw.key, n), tuple(x.shape)).to(x) for n, x in enumerate(floats))
    radius = 0.0
    with differentiable_kernels(), torch.no_grad():
        for _ in range(iterations):
            size = torch.stack([tangent.square().sum() for tangent in tangents]).sum().sqrt()
            tangents = tuple((tangent / size).to(x.dtype) for tangent, x in zip(tangents, floats, strict=True))
            tangents = jvp(end, tuple(floats), tangents)[1]
            radius = float(torch.stack([tangent.square().sum() for tangent in tangents]).sum().sqrt())
            if not 0 < radius < math.inf:
                break
    return radius ** (1 / draw.batches.steps)


def _exact(problem: InnerProblem, meta: Params, draw: Draw) -> Tensor | None:
    if problem.differentiable:
        return _estimate(Unrolled("store"), problem, meta, draw)
    vector, unravel = tree.ravel(meta)
    if len(vector) > FEW:
        return None

    def value(moved: Tensor) -> Tensor:
        start = problem.init(unravel(moved), random.fold(draw.key, "episode"))
        window = unroll(problem, unravel(moved), start, draw.batches, random.fold(draw.key, "steps"))
        return window.loss + problem.outer(unravel(moved), window.end, draw.batches.outer)

    steps = torch.eye(len(vector)).to(vector) * DIFFERENCE
    with torch.no_grad():
        return torch.stack([(value(vector + e) - value(vector - e)) / (2 * DIFFERENCE) for e in steps])


def _estimate(estimator: Estimator, problem: InnerProblem, meta: Params, draw: Draw) -> Tensor:
    state = estimator.init(problem, meta, draw.key)
    with torch.no_grad():
        return tree.ravel(estimator.estimate(problem, meta, state, draw.batches, draw.key).grad)[0]


def _row(problem: InnerProblem, meta: Params, windows: list[Draw], estimator: Estimator) -> dict[str, Any]:
    if reason := estimator.refusal(problem):
        return {"remark": f"refused: {reason}"}
    started = time.perf_counter()
    try:
        found = [_estimate(estimator, problem, meta, draw) for draw in windows]
    except (ValueError, RuntimeError) as error:  # torch says by the latter what it cannot batch or differentiate
        return {"remark": f"refused: {' '.join(str(error).split())}"}
    seconds = (time.perf_counter() - started) / len(windows)
    first = windows[0]
    small = first._replace(batches=first.batches._replace(steps=1))
    peak = peak_mib(*(partial(_estimate, estimator, problem, meta, draw) for draw in (small, first)))
    measured = {"seconds": seconds, "peak_mib": peak}
    exact = [draw.exact for draw in windows if draw.exact is not None]
    if not exact:
        return measured | {"remark": f"no exact gradient: the run is opaque and has more than {FEW} meta-parameters"}
    errors = torch.stack(found) - torch.stack(exact)
    size = torch.stack(exact).square().sum(-1).mean().sqrt()
    spread = (errors - errors.mean(0)).square().sum(-1).mean().sqrt()
    cosines = [torch.cosine_similarity(f, e, dim=0) for f, e in zip(found, exact, strict=True)]
    relative = {"bias": float(errors.mean(0).norm() / size), "deviation": float(spread / size)}
    return {"cosine": float(torch.stack(cosines).mean())} | relative | measured | {"remark": ""}


def peak_mib(warm_up: Callable[[], object], work: Callable[[], object]) -> float:
    """Rise of the peak memory from ``warm_up`` to ``work``: allocated on a GPU, else resident in a forked process (MiB)."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            with suppress(ValueError):  # of those that take nothing but a whole episode
                warm_up()
            gc.collect()
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator kept would hide what the work needs
            before = peak_memory_bytes(torch.device("cpu"))
            work()
            os.write(write, f"{(peak_memory_bytes(torch.device('cpu')) - before) / 2**20}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return float(answer) if answer else math.nan


def _length(row: dict[Any, Any]) -> str:
    return f", but its length is wrong (bias {row['bias']:.2f})" if row["bias"] > 0.2 else ""


def advice(table: pd.DataFrame, facts: dict[str, float], problem: InnerProblem, horizon: int) -> list[str]:
    """What the numbers say, in sentences."""
    said = []
    if not problem.differentiable:
        said.append(
            "The run cannot be differentiated: ZerothOrder or, for long episodes, PersistentES or NoiseReuseES."
        )
    elif (log_growth := horizon * math.log(max(rate := facts["growth"], 1e-12))) > math.log(EXPLODES):
        said.append(
            f"A perturbation grows by {rate:.3f} a step, {rate:.3f}^{horizon} over an episode: gradients through all of it "
            "explode. Smooth the objective (PersistentES, NoiseReuseES) or truncate and accept the bias."
        )
    elif log_growth < -math.log(EXPLODES):
        said.append(f"The start is forgotten ({rate:.3f}^{horizon}): truncation, Neumann and warm starts cost little.")
    if problem.differentiable and facts["meta_parameters"] <= FEW:
        said.append(
            f"{facts['meta_parameters']:.0f} meta-parameters: ForwardMode is exact, its memory free of the horizon."
        )
    stored = facts["state_bytes"] * horizon / 2**20
    if problem.differentiable and stored > LARGE_MIB:
        said.append(
            f"Storing {horizon} states takes {stored:.0f} MiB: Unrolled(checkpoint), an implicit estimator, or ForwardGradient."
        )
    measured = table.dropna(subset=["cosine"]).to_dict("records")
    if good := [row for row in measured if row["cosine"] >= GOOD and row["deviation"] < 1]:
        fastest = min(good, key=itemgetter("seconds"))
        said.append(f"Fastest with cosine >= {GOOD}: {fastest['estimator']}{_length(fastest)}.")
        if max(row["peak_mib"] for row in good) >= 1:
            smallest = min(good, key=itemgetter("peak_mib"))
            said.append(f"Least memory with cosine >= {GOOD}: {smallest['estimator']}{_length(smallest)}.")
    elif measured:
        best = max(measured, key=itemgetter("cosine"))
        said.append(f"None has cosine >= {GOOD}; the best is {best['estimator']} ({best['cosine']:.2f}).")
    return said
