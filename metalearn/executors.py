"""Where independent pieces of work run: processes of this machine, or a Ray cluster, all ``concurrent.futures`` executors.

Sweeps, and DEAP's ``toolbox.map``, ask for nothing but ``submit(function, *arguments)`` and futures with ``done`` and
``result``, so any other executor of that kind serves as well; submitit's is one.
"""

import contextlib
import importlib
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

from pebble import ProcessExpired, ProcessPool

from metalearn.base import require_range
from metalearn.memory import keep_freed_memory

Died = ProcessExpired  # what a future raises whose process was killed or crashed


class Workers(Executor):
    """Processes of this machine, a fresh one for every piece of work, forked from one that has imported everything.

    They compute with one thread and passive waiting unless told otherwise, because two processes with two threads each
    wait for each other most of the time. They end with the process that made them, however that ends.

    Args:
        workers: processes at a time, at least 1.
        threads: of each, at least 1.
        timeout_seconds: after which a piece of work is killed and its future raises ``TimeoutError``; null for never.
        preload: the module that is imported once for all, by the process from which workers are forked.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self, workers: int, threads: int = 1, timeout_seconds: float | None = None, preload: str = "metalearn.start"
    ):
        require_range("workers", workers, 1)
        require_range("threads", threads, 1)
        _require_timeout(timeout_seconds)
        self.capacity, self.threads, self.timeout_seconds = workers, threads, timeout_seconds
        context, arguments = multiprocessing.get_context("forkserver"), (os.getpid(), threads)
        start_importing(threads, preload)
        self._pool = ProcessPool(workers, max_tasks=1, initializer=_begin, initargs=arguments, context=context)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        return self._pool.schedule(fn, args, kwargs, timeout=self.timeout_seconds)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for what was submitted, or with ``cancel_futures`` kill it."""
        if cancel_futures:
            self._pool.stop()
        else:
            self._pool.close()
        if wait:
            self._pool.join()


class RayWorkers(Executor):
    """Tasks of a Ray cluster. The future of a task whose process or node dies raises ``Died``.

    Args:
        address: of the cluster, "auto" for the one this machine belongs to; null starts one on this machine.
        threads: CPU cores of each task, at least 1.
        gpus: GPUs of each task; a fraction packs several onto one.
        timeout_seconds: from its submission, after which a task is killed and its future raises ``TimeoutError``; null
            for never.

    Raises:
        ValueError: without Ray (``pip install metalearn[ray]``), or for values out of range.
    """

    def __init__(
        self,
        address: str | None = None,
        threads: int = 1,
        gpus: float = 0.0,
        timeout_seconds: float | None = None,
    ):
        if importlib.util.find_spec("ray") is None:
            raise ValueError(
                "executor is 'ray', and Ray is not installed; accepted after: pip install 'metalearn[ray]'"
            )
        require_range("threads", threads, 1)
        require_range("gpus", gpus, 0)
        _require_timeout(timeout_seconds)
        ray = importlib.import_module("ray")  # an extra

        self._ray, self.timeout_seconds = ray, timeout_seconds
        self._started = not ray.is_initialized()
        if self._started:
            variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
            variables |= {name: value for name, value in os.environ.items() if name.startswith("METALEARN_")}
            ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": variables})
        self._options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 0}
        held = ray.cluster_resources()
        by_gpu = held.get("GPU", 0) / gpus if gpus else float("inf")
        self.capacity = max(1, int(min(held.get("CPU", 1) / threads, by_gpu)))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        reference = self._ray.remote(**self._options)(fn).remote(*args, **kwargs)
        future: Future = Future()
        future.set_running_or_notify_cancel()
        threading.Thread(target=self._await, args=(reference, future), daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._started:
            self._ray.shutdown()

    def _await(self, reference: Any, future: Future) -> None:
        try:
            future.set_result(self._ray.get(reference, timeout=self.timeout_seconds))
        except self._ray.exceptions.GetTimeoutError:
            self._ray.cancel(reference, force=True)
            future.set_exception(TimeoutError("Task timeout"))
        except self._ray.exceptions.RayTaskError as error:
            future.set_exception(error)
        except self._ray.exceptions.RayError as error:  # the process, its node or the memory it stood in
            future.set_exception(Died(str(error)))
        except Exception as error:
            future.set_exception(error)


def start_importing(threads: int = 1, preload: str = "metalearn.start") -> None:
    """Start the process from which workers are forked, which takes seconds to import everything, if it does not run yet."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, preload])
    with passive_threads(threads):
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def passive_threads(threads: int) -> Iterator[None]:
    """The environment in which processes start that are to compute with so many threads and wait without spinning."""
    wanted = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _require_timeout(seconds: float | None) -> None:
    if seconds is not None and seconds <= 0:
        raise ValueError(f"timeout_seconds is {seconds}; accepted: above 0, or null")


def _begin(parent: int, threads: int) -> None:
    """First thing in a worker: threads, memory, and a watch over the process that it works for."""
    if "torch" in sys.modules:  # it read the environment when the process from which workers are forked imported it
        sys.modules["torch"].set_num_threads(threads)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Kill this process when ``parent`` is no more."""
    try:
        if hasattr(os, "pidfd_open"):
            select.select([os.pidfd_open(parent)], [], [])
        else:
            while True:
                os.kill(parent, 0)
                time.sleep(0.5)
    except ProcessLookupError:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
