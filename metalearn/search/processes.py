"""``map`` by an executor: the seam through which a search's candidates, or DEAP's ``toolbox.map``, go to other processes."""

import contextlib
import io
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from multiprocessing import forkserver
from types import ModuleType
from typing import Any, NamedTuple

import torch

from metalearn.executors import Died, Workers, passive_threads
from metalearn.losses.operators import OPERATORS, Operator

# What the process imports from which others are forked: each of them would else import it again. Besides this module and what is
# done to candidates, these are the parts of torch and sympy that they themselves import when first needed.
PRELOAD = [__name__, "metalearn.search.work", "metalearn.losses.symbolic", "sympy.tensor.tensor"]
PRELOAD += ["torch._dynamo", "torch._decomp.decompositions_for_jvp"]


def mapped(executor: Executor, function: Callable[..., Any], *iterables: Iterable[Any]) -> list[Any]:
    """``list(map(function, *iterables))``, each call by the executor; ``toolbox.register("map", mapped, executor)`` for DEAP.

    Calls see the operators, autocast, default precision and gradient mode that are in force here. A call whose process dies is
    made once more.

    Raises:
        RuntimeError: when a process dies of the same call again.
    """
    # Here, and not in a thread of the executor, where an error would be nobody's.
    packed = _packed(function)
    calls = list(zip(*iterables, strict=True))
    futures = [executor.submit(_call, packed, *arguments) for arguments in calls]
    return [_result(executor, future, packed, *arguments) for future, arguments in zip(futures, calls, strict=True)]


def by_processes(workers: int, threads: int, function: Callable[..., Any], *iterables: Iterable[Any]) -> list[Any]:
    """As ``map``, by processes of this machine, which end with the call, however that ends.

    Args:
        workers: processes at a time, at least 1.
        threads: of each, at least 1.
        function: what is called; it and its arguments are pickled.
        iterables: of arguments.

    Raises:
        RuntimeError: when a process dies of the same call twice.
    """
    executor = _started(workers, threads)
    try:
        return mapped(executor, function, *iterables)
    finally:
        executor.shutdown(cancel_futures=True)


def require_alone(workers: int, world: int, device: torch.device) -> None:
    """Refuse to start processes where others share the work, where a GPU does it, and where none can be started.

    Raises:
        ValueError: for more than one worker together with several ranks, a GPU, or a process of a sweep.
    """
    reasons = {
        f"with {world} ranks, which divide the candidates themselves": world > 1,
        f"on {device.type}, which one process has for itself": device.type != "cpu",
        "in a process of a sweep, which can start none": multiprocessing.current_process().daemon,
    }
    for reason in (reason for reason, holds in reasons.items() if holds and workers > 1):
        raise ValueError(f"workers is {workers} {reason}; accepted: 1")


def _result(executor: Executor, future: Future, packed: bytes, *arguments: Any) -> Any:
    try:
        return future.result()
    except Died:
        try:
            return executor.submit(_call, packed, *arguments).result()
        except Died as error:
            raise RuntimeError(
                "a process died twice of the same work, as it does where memory runs out; accepted: fewer workers"
            ) from error


def _started(workers: int, threads: int) -> Executor:
    # Before Workers, which would start the process from which workers are forked, if it does not run yet, with less in it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD + _modules_of_main())
    with passive_threads(threads):
        forkserver.ensure_running()
    return Workers(workers, threads)


def _modules_of_main() -> list[str]:
    """What the main script has names from: every process runs the script's imports, unless it is a package's."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name.endswith("__main__"):
        return []
    named = vars(main).values()
    names = {one.__name__ if isinstance(one, ModuleType) else str(getattr(one, "__module__", "")) for one in named}
    return sorted(name for name in names if name != "__main__" and name in sys.modules)


class _Sent(NamedTuple):
    """A function, and what it would find where it was sent from."""

    function: Callable[..., Any]
    operators: dict[str, Operator]
    autocast: tuple[bool, torch.dtype]
    default: torch.dtype
    grad: bool


def _packed(function: Callable[..., Any]) -> bytes:
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    sent = _Sent(function, dict(OPERATORS), autocast, torch.get_default_dtype(), torch.is_grad_enabled())
    buffer = io.BytesIO()
    torch.save(sent, buffer)  # plain pickle would write a tensor's memory once for each of its views
    return buffer.getvalue()


def _call(packed: bytes, *arguments: Any) -> Any:
    sent = torch.load(io.BytesIO(packed), weights_only=False)
    with _as_sent(sent):
        return sent.function(*arguments)


@contextlib.contextmanager
def _as_sent(sent: _Sent) -> Iterator[None]:
    enabled, dtype = sent.autocast
    default = torch.get_default_dtype()
    OPERATORS.update(sent.operators)
    torch.set_default_dtype(sent.default)
    try:
        with torch.autocast("cpu", dtype, enabled), torch.set_grad_enabled(sent.grad):
            yield
    finally:
        torch.set_default_dtype(default)
