"""Futures that tell how the work behind them ended."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from metalearn.executors import Died, RayWorkers, Workers


def twice(number):
    return 2 * number, os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]


def test_work_is_mapped_in_passive_processes_that_may_die_or_take_too_long():
    with Workers(2, timeout_seconds=3, preload="metalearn.files") as workers:
        doomed, slow = workers.submit(os.kill, os.getpid(), 0), workers.submit(time.sleep, 60)
        assert doomed.result() is None
        killed = workers.submit(_kill_oneself)
        assert list(workers.map(twice, range(3))) == [(2 * n, "1", "PASSIVE") for n in range(3)]
        with pytest.raises(Died):
            killed.result()
        with pytest.raises(TimeoutError):
            slow.result()


def _kill_oneself():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(workers=0), "workers is 0"),
        (dict(workers=1, threads=0), "threads is 0"),
        (dict(workers=1, timeout_seconds=0), "is 0"),
    ],
)
def test_refuses_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Workers(**settings)


class Ray:
    """The part of Ray that futures are made from."""

    class exceptions:  # noqa: N801
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})
        GetTimeoutError = type("GetTimeoutError", (RayError,), {})
        NodeDiedError = type("NodeDiedError", (RayError,), {})

    def __init__(self, ending):
        self.ending, self.cancelled = ending, False

    def remote(self, **options):
        return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))

    def get(self, reference, timeout):
        if self.ending is not None:
            raise self.ending
        function, arguments = reference
        return function(*arguments)

    def cancel(self, reference, force):
        self.cancelled = force


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (Ray.exceptions.NodeDiedError("gone"), Died),
        (Ray.exceptions.RayTaskError("wrong"), Ray.exceptions.RayTaskError),
        (Ray.exceptions.GetTimeoutError(), TimeoutError),
        (None, None),
    ],
)
def test_the_ends_of_a_ray_task_are_those_of_a_process(ending, expected):
    workers = object.__new__(RayWorkers)
    workers._ray, workers._options, workers.timeout_seconds = Ray(ending), {}, 5
    future = workers.submit(abs, -3)
    if expected is None:
        assert future.result(10) == 3
    else:
        with pytest.raises(expected):
            future.result(10)
    assert workers._ray.cancelled == (expected is TimeoutError)
