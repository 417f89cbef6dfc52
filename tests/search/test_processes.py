"""``map`` by executors: what calls take along, and what becomes of those whose process dies."""

import contextlib
import multiprocessing
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
import torch
from deap import base

from metalearn.executors import Died
from metalearn.losses.operators import OPERATORS, Operator, add_operator
from metalearn.search.processes import mapped, require_alone


class Elsewhere(Executor):
    """Makes a call when it is submitted, as a process would that knows nothing of this one. The first ``deaths`` calls die."""

    def __init__(self, deaths=0):
        self.deaths, self.calls = deaths, 0

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        self.calls += 1
        if self.calls <= self.deaths:
            future.set_exception(Died("killed", code=-9))
        else:
            with bare():
                future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def bare():
    """What torch and the table of operators are like in a new process."""
    default, operators = torch.get_default_dtype(), dict(OPERATORS)
    OPERATORS.pop("half", None)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cpu", enabled=False), torch.set_grad_enabled(True):
            yield
    finally:
        torch.set_default_dtype(default)
        OPERATORS.update(operators)


def power(base, exponent):
    return base**exponent


def surroundings(_):
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    return product.dtype, torch.zeros(()).dtype, torch.is_grad_enabled(), "half" in OPERATORS


def test_matches_map_in_a_toolbox_of_deap():
    with ThreadPoolExecutor(2) as executor:
        toolbox = base.Toolbox()
        toolbox.register("map", mapped, executor)
        assert toolbox.map(power, range(20), range(20)) == list(map(power, range(20), range(20)))


def test_calls_find_what_they_would_find_here():
    add_operator(Operator("half", 1, "0.5 * a", ("0.5",), "a / 2", r"\frac{{a}}{2}"))
    try:
        (plain,) = mapped(Elsewhere(), surroundings, [0])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            (mixed,) = mapped(Elsewhere(), surroundings, [0])
        torch.set_default_dtype(torch.float64)
        (double,) = mapped(Elsewhere(), surroundings, [0])
    finally:
        torch.set_default_dtype(torch.float32)
        del OPERATORS["half"]
    assert plain == (torch.float32, torch.float32, True, True)
    assert mixed == (torch.bfloat16, torch.float32, False, True)
    assert double == (torch.float64, torch.float64, True, True)


def test_a_call_whose_process_dies_is_made_once_more():
    executor = Elsewhere(deaths=2)
    assert mapped(executor, power, [2, 3], [3, 2]) == [8, 9]
    assert executor.calls == 4
    with pytest.raises(RuntimeError, match="died twice of the same work"):
        mapped(Elsewhere(deaths=3), power, [2, 3], [3, 2])


def test_what_cannot_travel_is_an_error_here():
    with pytest.raises(Exception, match="pickle"):
        mapped(Elsewhere(), lambda one: one, [0])


def test_processes_are_refused_where_they_cannot_work(monkeypatch):
    cpu = torch.device("cpu")
    require_alone(2, 1, cpu)
    require_alone(1, 2, torch.device("cuda"))
    with pytest.raises(ValueError, match="workers is 2 with 4 ranks"):
        require_alone(2, 4, cpu)
    with pytest.raises(ValueError, match="workers is 2 on cuda"):
        require_alone(2, 1, torch.device("cuda"))
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(ValueError, match="in a process of a sweep"):
        require_alone(2, 1, cpu)
