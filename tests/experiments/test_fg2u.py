import itertools
import math

import pytest
import torch

from experiments import fg2u_black_box as black_box
from experiments import fg2u_condensation as condensation
from metalearn.analysis.trials import read_trials
from metalearn.estimators.unrolled import Unrolled
from metalearn.problems.opaque import Burgers, TransparentBurgers
from metalearn.random import key


class Counted(Burgers):
    """Counts the flows that were begun."""

    flows = 0

    def init(self, meta, key):
        self.flows += 1
        return super().init(meta, key)


@pytest.fixture(scope="module")
def problem():
    return condensation.build_problem("digits", smoke=True)


def trial(problem, name, budget, clock="wall"):
    return condensation.Trial(condensation.methods(4)[name], problem, 0, budget, clock)


# -- condensation --------------------------------------------------------------------------------------------------


def test_condensation_smoke_makes_a_row_per_method_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(condensation, "FRESH", 2)
    command = ["--smoke", "--seeds", "2", "--directions", "2", "--out", str(tmp_path)]
    condensation.main(command)
    file = tmp_path / "trials.jsonl"
    lines = file.read_text().splitlines()
    names = {condensation.START, *condensation.methods(2)}
    assert {(one["method"], one["seed"]) for one in read_trials(file)} == {(name, s) for name in names for s in (0, 1)}
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    file.write_text("".join(line + "\n" for line in lines[:-1]))
    condensation.main(command)
    assert file.read_text().splitlines()[:-1] == lines[:-1]
    assert read_trials(file)[-1]["method"] == read_trials(file)[len(names) - 1]["method"]
    assert (tmp_path / "table.csv").exists()
    assert (tmp_path / "paired.csv").exists()
    with pytest.raises(ValueError, match="trials of other directions"):
        condensation.main([*command[:-4], "--directions", "3", "--out", str(tmp_path)])


def test_trials_take_turns_and_spend_equal_time(problem, monkeypatch):
    monkeypatch.setattr(condensation, "SLICE", 0.05)
    trials = [trial(problem, name, 0.2) for name in ("full reverse", "(FG)2U, 4 directions")]
    order = []
    for one in trials:
        step = one._step
        monkeypatch.setattr(one, "_step", lambda one=one, step=step: (order.append(one), step()))
    assert set(condensation.train_in_turns(trials)) == set(trials)
    for one in trials:
        assert one.seconds >= 0.2
        assert one.seconds == one.spent["wall"]
    switches = sum(before is not after for before, after in itertools.pairwise(order))
    assert switches >= 4


def test_second_phase_begins_at_half_time_with_its_own_estimator(problem):
    two = trial(problem, "two-phase: Neumann, (FG)2U", budget=10.0)
    phases = []
    for spent in (0.0, 4.9, 5.1, 9.9):
        two.spent["wall"] = spent
        two._step()
        phases.append(two.phase)
        assert two.optimizer.param_groups[0]["lr"] == pytest.approx(two.method.rates[two.phase] * (1 - spent / 10))
    assert phases == [0, 0, 1, 1]
    own = two._estimate(two.estimator, two.state).grad["images"]
    assert torch.equal(own, two._estimate(two.estimator.second, {}).grad["images"])
    assert not torch.equal(own, two._estimate(two.estimator.first, {}).grad["images"])


def test_cosine_of_full_reverse_is_one(problem):
    one = trial(problem, "full reverse", 0.05)
    one.train(1.0)
    assert one.result()["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_training_beats_the_images_it_began_with():
    """Full reverse mode on digits, by steps and not by seconds."""
    problem = condensation.build_problem("digits", smoke=True)
    problem.horizon = 10
    problem.rule.settings["lr"] = 0.2
    one = trial(problem, "full reverse", budget=1e9)
    before = condensation.judge(problem, one.meta, 0)
    for _ in range(40):
        one._step()
    after = condensation.judge(problem, one.meta, 0)
    assert after["meta_loss"] < before["meta_loss"] - 0.1
    assert after["accuracy"] > before["accuracy"] + 0.1


def test_refuses_a_budget_of_nothing():
    with pytest.raises(ValueError, match="budget_minutes is 0"):
        condensation.main(["--budget_minutes", "0"])


# -- black box -----------------------------------------------------------------------------------------------------


def test_black_box_smoke_prints_a_row_per_way(tmp_path, capsys):
    black_box.main(["--smoke", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert all(way.name in shown for way in black_box.ways(8, 1e-2))
    assert (tmp_path / "black_box.csv").exists()


def test_calls_match_counted_flows():
    for way in black_box.ways(8, 1e-2)[1:]:
        problem = Counted(8)
        meta = problem.init_meta(key(0))
        way.estimator.estimate(problem, meta, {}, problem.batches(key(0), 5), key(0))
        assert problem.flows == way.calls


def test_coordinate_differences_match_exact_gradient():
    meta = Burgers(8).init_meta(key(0))

    def gradient(problem, estimator):
        return estimator.estimate(problem, meta, {}, problem.batches(key(0), 5), key(0)).grad["velocity"]

    exact_N = gradient(TransparentBurgers(8), Unrolled())
    found_N = gradient(Burgers(8), black_box.CoordinateDifferences(smoothing=1e-6, chunk=1))
    torch.testing.assert_close(found_N, exact_N, rtol=0, atol=1e-6)


def test_exact_descent_recovers_the_field():
    problem = TransparentBurgers(16, seed=1)
    start = problem.evaluate(problem.init_meta(key(0)), key(0), test=False)["error"]
    exact = black_box.ways(16, 1e-2)[0]
    found = black_box.recover(exact, problem, 0.4, calls=400, seed=0)
    assert found["error_100%"] < 0.5 * start
    assert found["error_100%"] < found["error_25%"] < start


def test_rate_is_picked_by_misfit_and_never_one_that_blows_up(monkeypatch):
    monkeypatch.setattr(black_box, "RATES", (1e-6, 0.4, 1e6))
    exact = black_box.ways(8, 1e-2)[0]
    assert black_box.pick_rate(exact, [TransparentBurgers(8, seed=1), TransparentBurgers(8, seed=2)], 60) == 0.4
    assert not math.isfinite(black_box.recover(exact, TransparentBurgers(8), 1e6, 60, 0)["misfit"])
