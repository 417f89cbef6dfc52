import functools
import math

import pytest
import torch
from estimators.conftest import relative

from experiments.bench import memory, meta_gpu, meta_matrix, ranks
from experiments.bench import meta_gradients as bench
from experiments.bench.peers import data_weights, estimated
from experiments.bench.rates import learning_rates
from experiments.bench.timing import UnequalError
from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.forward import ForwardMode, ZerothOrder
from metalearn.estimators.implicit import Nystrom
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.first_order import SGD
from metalearn.problems.hyperparameters import RandomRidge
from metalearn.problems.schedules import LearningRateSchedule
from metalearn.problems.toys import InfluenceBalancing

ONCE = bench.Effort(pairs=1, seconds=5)


def test_rise_is_that_of_what_is_held_at_once():
    def hold(mebibytes):
        return lambda: torch.ones(mebibytes * 2**18).sum()

    memory.rise(hold(1))
    assert memory.rise(hold(64)) == pytest.approx(64, abs=4)


def test_bar_is_on_the_median_ratio():
    row = bench.Bounded("name", [3.0, 1.0, 1.0], [1.0, 2.0, 4.0], "ms", bar=0.5)
    assert row.ratio == 0.5 and "0.50 [0.25, 3.00]" in str(row) and str(row).endswith("ok")
    assert str(bench.Bounded("name", [2.0], [1.0], "ms", bar=1.0)).endswith("ABOVE")
    assert str(bench.Bounded("name", [1.0], [1.0], "1/s", bar=1.7, at_least=True)).endswith("BELOW")


def test_sixteen_tasks_match_higher_one_by_one(monkeypatch):
    monkeypatch.setattr(bench, "TASKS", 3)
    problem = data_weights(SGD(0.1), 8, batch_size=10)
    tasks = bench.Tasks(problem, 3)
    ours = estimated(Unrolled(), tasks, 2)
    theirs = functools.partial(bench.one_by_one, problem, 2)
    row = bench.compared("tasks", ONCE, lambda: ours().grad, theirs, None)
    assert row.ratio > 0
    with pytest.raises(UnequalError, match="gradients"):
        bench.compared("tasks", ONCE, lambda: {"weights": 2 * ours().grad["weights"]}, theirs, None)


def test_learning_rates_are_twelve_and_differentiated_exactly():
    problem = learning_rates(8, batch_size=50)
    exact, found = (estimated(way, problem, 3)().grad for way in (Unrolled("graph"), ForwardMode()))
    assert exact["log_lr"].shape == (12,) and exact["log_lr"].all()
    assert relative(found, exact) <= 1e-4


@pytest.mark.slow
def test_two_ranks_share_the_work():
    assert ranks.seconds("fg2u", 2, total=2, calls=1) > 0


def test_matrix_has_a_number_or_a_reason_in_every_cell():
    problems = {
        "ridge": (lambda: RandomRidge(SGD(0.3)), 5),
        "balancing": (lambda: InfluenceBalancing(horizon=5), 5),
        "accuracy": (
            lambda: LearningRateSchedule(meta_matrix.Digits(), meta_matrix.SMALL, SGD(0.1), 5, objective="accuracy"),
            5,
        ),
    }
    estimators = {
        "store": lambda: Unrolled("store"),
        "nystrom": lambda: Nystrom(5),
        "zeroth": lambda: ZerothOrder(4),
        "pes": lambda: PersistentES(4),
    }
    rows, reasons = meta_matrix.matrix(problems, estimators)
    store, nystrom, zeroth, pes = rows
    assert store[0].startswith("1.000, ") and store[1].startswith("1.000, ")
    assert store[2] == "refused [2]" and "cannot be differentiated" in reasons[1]
    assert nystrom[1] == "refused [1]" and "inner_loss" in reasons[0]
    assert zeroth[2].startswith("no exact, ") and pes[2].startswith("no exact, ")


def test_a_child_that_fails_or_takes_too_long_is_noticed():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        meta_matrix.in_child(20, lambda: 1 / 0)
    assert meta_matrix.in_child(0.2, lambda: __import__("time").sleep(5)) is None
    assert meta_matrix.in_child(20, lambda: 7) == 7


def test_matrix_is_large_enough():
    assert len(meta_matrix.PROBLEMS) >= 6 and len(meta_matrix.ESTIMATORS) >= 12


def test_slope_of_dense_responses_is_a_number():
    assert all(math.isfinite(slope) for _, slope in meta_matrix.slopes((16, 32)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_gpu_says_that_it_is_not_measured(capsys):
    assert list(bench.gpu(ONCE)) == []
    assert capsys.readouterr().out == "gpu: not measured: no GPU\n"


def test_estimators_of_the_gpu_table_agree_on_a_small_network(monkeypatch):
    eager = {name: e for name, e in meta_gpu.estimators().items() if "compiled" not in name}
    monkeypatch.setattr(meta_gpu, "estimators", lambda: eager)
    monkeypatch.setattr(meta_gpu, "measured", lambda call, device: meta_gpu.Cost(1.0, 1.0))
    found = {name: grads for name, _, grads in meta_gpu.costs(width=16, rows=8, steps=2, device="cpu")}
    assert relative(found["store"], found["graph"]) <= 0.02 and relative(found["mixed"], found["graph"]) <= 0.02
    assert found.keys() == eager.keys() and all(grads["weights"].isfinite().all() for grads in found.values())
