import json
import math

import pytest
import torch

from experiments.bench import loss_runs as runs
from experiments.bench import loss_search as bench
from experiments.bench import timing
from experiments.bench.loss_reference import Plan, ReferenceStyle, TreeLoss, counted_error
from experiments.bench.loss_rivals import Loop, first_weights, meta_steps, rows
from experiments.bench.timing import UnequalError
from metalearn import random
from metalearn.losses.learned import LearnedLoss
from metalearn.losses.program import Program
from metalearn.random import fold
from metalearn.search.candidates import Candidate, gradients_of
from metalearn.search.evolution import GeneticProgramming
from metalearn.search.local import LocalSearch
from metalearn.search.population import PopulationTraining
from metalearn.search.screening import Screening

KEY = random.key(3)
ONCE = bench.Effort(pairs=1, seconds=0)
RIVALS = (Loop, ReferenceStyle)


@pytest.fixture(scope="module")
def task():
    return runs.digits(torch.float64, hidden=8)


@pytest.fixture(scope="module")
def candidates():
    return runs.drawn(6, KEY)


@pytest.fixture
def small(candidates, monkeypatch):
    monkeypatch.setattr(timing, "_SHORTEST", 0.0)
    return bench.Bench(ONCE, candidates, 3, 2, 5, 6, 4, runs.Scale(4, 2, 2, 3, 12))


def in_this_process(function, *calls):
    return [function(*arguments) for arguments in calls]


@pytest.mark.parametrize("rival", RIVALS)
def test_training_of_a_rival_matches_the_population(rival, task, candidates):
    training = PopulationTraining(12)
    ours = training.train(task, gradients_of(candidates, "softmax"), KEY)
    params, errors = rival(task, 12, KEY).train(candidates)
    for row, theirs in enumerate(params):
        for name, p in theirs.items():
            torch.testing.assert_close(ours.params[name][row], p, rtol=0, atol=1e-9)
    assert training.errors(task, ours, "validation").tolist() == pytest.approx(errors, abs=1e-7)
    assert len(set(errors)) > 1


@pytest.mark.parametrize("rival", RIVALS)
def test_tuning_of_a_rival_matches_local_search(rival, task, candidates):
    search = LocalSearch(5, lr=1e-2, inner_lr=None)
    starts = [first_weights(one, KEY, torch.zeros((), dtype=torch.float64)) for one in candidates]
    theirs = rival(task, 1, KEY).tune(candidates, starts, meta_steps(task, KEY, 5), 1e-2)
    for ours, weights, start in zip(search.tune(task, candidates, KEY), theirs, starts, strict=True):
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), weights, rtol=0, atol=1e-7)
        assert (weights - start).abs().max() > 1e-3


@pytest.mark.parametrize("rival", RIVALS)
def test_rejection_by_a_rival_matches_ours(rival, task):
    mixed = [Candidate(program.program) for program in GeneticProgramming(12).ask(0, [], KEY)]
    ours = Screening(rejection_steps=20).rejected(task, gradients_of(mixed, "softmax"), KEY)
    assert rival(task, 1, KEY).rejected(mixed, task.initial(KEY)[0], 20, 0.01) == ours
    assert 0 < sum(ours) < len(ours)


def test_rows_are_the_examples_that_a_task_draws(task):
    for part, drawn in (("train", task.inner_batch(KEY)), ("validation", task.outer_batch(KEY))):
        assert torch.equal(task.examples(part, "cpu").inputs[rows(task, part, KEY)], drawn.inputs)


def test_tree_loss_matches_learned_loss_on_random_programs():
    programs = [Program.parse(one.text) for one in GeneticProgramming(150).ask(0, [], KEY)]
    logits = random.normal(KEY, (7, 4)).double().requires_grad_()
    targets = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    for number, program in enumerate(programs):
        weights = 1 + 0.3 * random.normal(fold(KEY, number), (program.num_weights,)).double()
        learned = LearnedLoss(program, trainable=True).double()
        learned.weights.data = weights.clone()
        walked = TreeLoss(program, weights)
        ours, theirs = learned(logits, targets), walked(logits, targets)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        found, wanted = (torch.autograd.grad(value, logits, materialize_grads=True)[0] for value in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_counted_error_matches_the_tasks(task):
    inputs, targets = task.examples("validation", "cpu")
    prediction = task.module(inputs).detach()
    assert float(counted_error(prediction, targets)) == pytest.approx(float(task.error(prediction, targets)), abs=1e-12)


def test_a_reference_search_remembers_what_it_trained_and_forgets_what_it_rejected(task, monkeypatch):
    good, bad = runs.parsed(["mul(-1,mul(log(p),y))", "mul(log(p),y)"])
    rival, tuned = ReferenceStyle(task, 5, KEY), []
    before = rival._tuned
    monkeypatch.setattr(rival, "_tuned", lambda loss, *rest: (tuned.append(loss.nodes[0].name), before(loss, *rest)))
    plan = Plan(
        lambda one: first_weights(one, KEY, torch.zeros((), dtype=torch.float64)),
        meta_steps(task, KEY, 2),
        1e-3,
        task.initial(KEY)[0],
        10,
        0.01,
    )
    first, second = rival.search([[good, bad], [bad, good]], plan)
    assert len(tuned) == 3 and second[1] is first[0]
    assert first[0].error < 1 and not first[0].rejected
    assert second[0].rejected and math.isinf(second[0].error)


def test_candidates_differ_and_a_bench_of_duplicates_is_refused(candidates):
    assert runs.live_and_unique(candidates) == 6
    with pytest.raises(UnequalError, match="1 of 6 candidates are live and unique"):
        runs.live_and_unique(candidates[:1] * 6)


def test_phases_are_found_equal_and_timed(small, tmp_path, capsys):
    chosen = ["fitness", "local", "rejection", "screening"]
    bench.measure(small, chosen, tmp_path / "rows.json")
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    assert "6 of 6 candidates are live and unique" in printed and "NOT MEASURED" not in printed
    assert [row["bar"] for row in written] == [2, 3, 8, 2, None, 3, 3, 0.5, 5.0]
    assert all(row["ratio"] > 0 for row in written)
    assert all(row["met"] == (row["ratio"] >= row["bar"]) for row in written[:7] if row["bar"])


def test_no_ratio_where_results_differ(small, monkeypatch, capsys):
    monkeypatch.setattr(Loop, "train", lambda rival, candidates: ([], [0.5] * len(candidates)))
    bench.measure(small, ["fitness"], None)
    assert "fitness: NOT MEASURED: fitness of 6, 3 steps: batched / loop differ by" in capsys.readouterr().out


def test_whole_searches_of_the_same_proposals_agree(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_processes", in_this_process)
    exact, fast = bench.search(small)
    printed = capsys.readouterr().out
    assert "proposals that the reference accepted" in printed and "  screened and halved  0." in printed
    assert exact.bar == 6 and fast.bar == 12 and exact.measured.theirs == fast.measured.theirs


def test_searches_with_different_results_are_unequal():
    texts = [["mul(-1,mul(log(p),y))", "square(sub(p,y))"]]
    found = runs.Outcome(1.0, texts, [[0.5, 0.25]], [["scored"] * 2], [[()] * 2])
    rejected = found._replace(errors=[[0.5, math.inf]])
    assert "errors equal of 1 proposals" in bench._require_same_search(runs.Scale(), found, rejected)
    with pytest.raises(UnequalError, match="1 of 2 errors of accepted candidates differ"):
        bench._require_same_search(runs.Scale(), found, found._replace(errors=[[0.4, 0.25]]))
    with pytest.raises(UnequalError, match="0 of 0"):
        bench._require_same_search(runs.Scale(), found, found._replace(errors=[[math.inf] * 2]))


def test_a_tenth_of_the_errors_may_be_equal_at_first_only():
    found = runs.Outcome(1.0, [["square(sub(p,y))"] * 12], [[0.5] * 12], [["scored"] * 12], [[()] * 12])
    other = found._replace(errors=[[0.4] + [0.5] * 11])
    said = bench._require_same_search(runs.Scale(12, 1, 1, 1, 12), found, other)
    assert "1 of them after 5 steps in float64 only: square(sub(p,y))" in said


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(small):
    (row,) = bench.ranks(small)
    assert row.measured.ratio > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_gpu_says_that_it_is_not_measured(small, capsys):
    assert list(bench.gpu(small)) == []
    assert capsys.readouterr().out == "gpu: not measured: no GPU\n"


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only is 'fitnes'; accepted: 'fitness', 'local'"):
        bench.main(only="fitnes")
    with pytest.raises(ValueError, match="accepted: a folder that has 'source'"):
        bench.main(reference_path=tmp_path)
