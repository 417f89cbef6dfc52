"""The pipeline from proposals to scores: each candidate once, the same in any company, on any day."""

import copy
import functools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from metalearn import random
from metalearn.losses.program import Program
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.search.cache import settings_hash
from metalearn.search.candidates import Candidate, gradients_of
from metalearn.search.evaluation import Evaluation, evaluation_settings
from metalearn.search.halving import Halving
from metalearn.search.local import LocalSearch
from metalearn.search.population import PopulationTraining
from metalearn.search.processes import mapped
from metalearn.search.screening import Screening
from metalearn.tasks.sources import ImageSource

CROSS_ENTROPY, SWAPPED = "mul(-1,mul(y,log(p)))", "mul(mul(log(p),y),-1)"
DEAD, WRONG = "add(y,sign(p))", "mul(y,log(p))"
SQUARE, ABSOLUTE = "square(sub(y,p))", "abs(sub(y,p))"


def candidates(*texts):
    return [Candidate(Program.parse(text)) for text in texts]


@pytest.fixture(scope="module")
def task():
    source = ImageSource("digits", classes=[0, 1, 2], validation=0.4)
    task = LossTask(source, lambda d, k: MLP(d, k, (8,)), SGD(0.1, momentum=0.9), batch_size=32, outer_batch_size=32)
    task.open(test=False)
    return task


@pytest.fixture
def make(task):
    def make(cache=None, steps=12, local=3, halving=None, tasks=1, seed=0, **divided):
        screening, search = Screening(rejection_steps=30, rejection_examples=30), LocalSearch(local, lr=0.01)
        training = PopulationTraining(steps, halving=halving)
        key = random.key(seed, "test")
        return Evaluation([task] * tasks, training, screening, search if local else None, key, cache, **divided)

    return make


def test_matches_the_parts_called_one_by_one(make, task):
    evaluation = make()
    (scored,) = evaluation.score(candidates(SQUARE))
    key, one = random.key(0, "test"), candidates(SQUARE)[0].canonical
    (weights,) = LocalSearch(3, lr=0.01).tune(task, [one], random.fold(key, "local"))
    training = PopulationTraining(12)
    gradients = gradients_of([one._replace(weights=weights)], "softmax")
    trained = training.train(task, gradients, random.fold(key, "train", 0))
    assert scored.tuned == weights and weights != (1.0,) * len(weights)
    assert scored.errors == (float(training.errors(task, trained, "validation")[0]),)


def test_every_proposal_has_its_verdict_and_equal_ones_are_trained_once(make):
    evaluation = make()
    scores = evaluation.score(candidates(CROSS_ENTROPY, DEAD, SQUARE, SWAPPED, WRONG, CROSS_ENTROPY))
    assert [scored.verdict for scored in scores] == ["scored", "dead", "scored", "scored", "wrong sign", "scored"]
    assert scores[0] == scores[3] == scores[5] and scores[0].error < 0.5 and scores[1].error == torch.inf
    assert evaluation.counts == {"unique": 4, "rejected": 2, "known": 0, "trained": 2}
    again = evaluation.score(candidates(SQUARE, DEAD))
    assert again == [scores[2], scores[1]]
    assert evaluation.counts["trained"] == 0 and evaluation.counts["known"] == 2


def test_scores_do_not_depend_on_company_or_order(make):
    texts = (CROSS_ENTROPY, SQUARE, ABSOLUTE, "div(sub(y,p),p)", "tanh(abs(sub(p,y)))")
    together = dict(zip(texts, make().score(candidates(*texts)), strict=True))
    for text in reversed(texts):
        (alone,) = make().score(candidates(text))
        assert alone == together[text]


@pytest.mark.parametrize("options", [{}, {"local": 0, "tasks": 2}])
def test_matches_one_process_bit_by_bit_when_shards_are_pickled(make, options):
    texts = (CROSS_ENTROPY, DEAD, SQUARE, ABSOLUTE, "div(sub(y,p),p)", "tanh(abs(sub(p,y)))", "mul(p,add(y,-1))")
    whole = make(**options)
    with ThreadPoolExecutor(1) as executor:
        divided = make(map=functools.partial(mapped, executor), shards=3, **options)
        assert divided.score(candidates(*texts)) == whole.score(candidates(*texts))
        (late,) = candidates("square(square(sub(y,p)))")  # fewer candidates than shards
        assert divided.score([late]) == whole.score([late])
    assert divided.counts == whole.counts and divided.state() == whole.state()
    assert whole.counts["trained"] == 1 and len({one.error for one in whole.cache.known.values()}) > 3


def test_halving_is_refused_with_several_shards(make):
    with pytest.raises(ValueError, match="halving is given with 2 workers"):
        make(halving=Halving((4,), 0.4), shards=2)


def test_the_file_spares_training_and_survives_a_torn_line(make, tmp_path, monkeypatch):
    path = tmp_path / "cache.jsonl"
    first = make(path).score(candidates(CROSS_ENTROPY, DEAD, SQUARE))
    with open(path, "a") as file:
        file.write('{"settings": "abc", "scored": [{"prog')
    (more,) = make(path).score(candidates(ABSOLUTE))
    evaluation = make(path)
    monkeypatch.setattr(PopulationTraining, "train", lambda *_: pytest.fail("trained again"))
    assert evaluation.score(candidates(SQUARE, ABSOLUTE, CROSS_ENTROPY, DEAD)) == [first[2], more, first[0], first[1]]


def test_a_saved_state_needs_no_file(make, tmp_path, monkeypatch):
    begun = make(tmp_path / "cache.jsonl")
    first = begun.score(candidates(SQUARE, ABSOLUTE))
    resumed = make()
    resumed.load_state(json.loads(json.dumps(begun.state())))
    assert list(resumed.cache.known) == list(begun.cache.known) and resumed.known == begun.known
    monkeypatch.setattr(PopulationTraining, "train", lambda *_: pytest.fail("trained again"))
    # Of equal derivatives, so that screening names the first, which is known from the state alone.
    assert resumed.score(candidates("square(sub(y,p))", ABSOLUTE)) == first


def test_what_screening_knew_of_losses_that_are_lost_is_not_used(make):
    evaluation = make(local=0)
    evaluation.load_state({"known": dict(begun_knowledge(make)), "scored": []})
    (scored,) = evaluation.score(candidates("mul(sub(y,p),sub(y,p))"))
    assert scored.verdict == "scored" and scored.candidate.text == "mul(sub(y,p),sub(y,p))"


def begun_knowledge(make):
    begun = make(local=0)
    begun.score(candidates(SQUARE))
    assert begun.known
    return begun.known


@pytest.mark.parametrize("change", [{"steps": 13}, {"local": 4}, {"seed": 1}])
def test_scores_of_other_settings_are_not_used(make, tmp_path, change):
    path = tmp_path / "cache.jsonl"
    make(path).score(candidates(SQUARE))
    evaluation = make(path, **change)
    evaluation.score(candidates(SQUARE))
    assert evaluation.counts["trained"] == 1
    assert len({json.loads(line)["settings"] for line in path.read_text().splitlines()}) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda task: setattr(task, "outer_batch_size", 16),
        lambda task: setattr(task, "scale_targets", False),
        lambda task: setattr(task, "_modules", tuple(MLP(64, 3, (8,), "relu") for _ in range(2))),
    ],
)
def test_settings_of_the_task_are_told_apart(task, change):
    def settings(task, precision="32-true"):
        return evaluation_settings([task], PopulationTraining(5), Screening(), None, random.key(0), precision)

    other = copy.copy(task)
    assert settings(other) == settings(task) != settings(task, "bf16-mixed")
    change(other)
    assert settings(other) != settings(task)


def test_settings_are_told_apart_by_what_is_in_them():
    assert settings_hash(SGD(0.1)) == settings_hash(SGD(0.1)) != settings_hash(SGD(0.2))
    assert settings_hash(torch.zeros(2)) != settings_hash(torch.ones(2))
    assert settings_hash([1], [2]) != settings_hash([1, 2])
    assert settings_hash(Screening()) != settings_hash(Screening(wrong_sign="keep"))


def test_losses_that_fall_behind_are_halved_and_not_scored(make):
    texts = (CROSS_ENTROPY, SQUARE, ABSOLUTE, "div(sub(y,p),mul(1,p))", "mul(-1,mul(tanh(p),y))")
    scores = make(local=0, halving=Halving((4,), 0.4)).score(candidates(*texts))
    verdicts = [scored.verdict for scored in scores]
    assert verdicts.count("scored") == 2 and verdicts.count("halved") + verdicts.count("rejected") == 3
    assert all(scored.error == torch.inf for scored in scores if scored.verdict == "halved")


def test_a_loss_whose_gradient_after_tuning_is_known_takes_over_the_error(make, monkeypatch):
    evaluation = make(local=0)
    evaluation.local_search = LocalSearch(0, weight_std=0.0)  # weights of exactly 1, which stay so
    # Equal only under these weights: the second has one more factor of 1, a parameter of its own.
    first, second = evaluation.score(candidates(SQUARE, "mul(square(sub(y,p)),1)"))
    assert first.errors == second.errors and first.candidate != second.candidate
    assert len(second.tuned) == len(first.tuned) + 2


def test_errors_are_one_for_each_task(make):
    (scored,) = make(tasks=2).score(candidates(SQUARE))
    assert len(scored.errors) == 2 and scored.error == pytest.approx(sum(scored.errors) / 2)
