import dataclasses
import time

import pytest
import torch

from experiments.bench import in_context as bench
from experiments.bench.timing import Comparison, UnequalError, compare, require_equal, seconds_per_call
from metalearn.base import MetaTrain

ONCE = bench.Effort(pairs=1, seconds=5)


@pytest.fixture(scope="module")
def digits() -> bench.InMemory:
    return bench._source({"path": "digits", "normalise": "per_pixel"})


def test_compare_matches_ratio_of_known_sleeps() -> None:
    measured = compare(lambda: time.sleep(0.01), lambda: time.sleep(0.03), pairs=3)
    assert len(measured.ratios) == 3
    assert measured.ratio == pytest.approx(3, rel=0.2)


def test_compare_begins_no_pair_past_its_time() -> None:
    assert len(compare(lambda: 1.0, lambda: 2.0, pairs=5, seconds=-1).ratios) == 1


def test_seconds_per_call_believes_a_way_that_times_itself() -> None:
    assert seconds_per_call(lambda: 12.0, repeats=3) == 12.0


@pytest.mark.parametrize(
    "other", [torch.tensor([1.1]), torch.tensor([torch.nan]), torch.ones(2), torch.ones(1).double()]
)
def test_require_equal_finds_differences(other: torch.Tensor) -> None:
    require_equal("ones", torch.ones(1), torch.ones(1), 0)
    with pytest.raises(UnequalError, match="ones"):
        require_equal("ones", torch.ones(1), other, 0.01)


@pytest.mark.parametrize("rank", [None, 20])
def test_batch_matches_dense_projection_of_whole_images(digits: bench.InMemory, rank: int | None) -> None:
    tasks = bench.projected(digits, 5, rank)
    batch = tasks.batch(0, 0, 3, bench.LENGTH, MetaTrain())
    require_equal("projected examples", batch.x, bench.dense_batch(tasks, 3), 1e-4)


def test_law_of_both_sides_is_the_same(digits: bench.InMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.check_law(digits.examples, num_features=16)
    plain = bench.PlainTasks.__getitem__
    monkeypatch.setattr(bench.PlainTasks, "__getitem__", lambda tasks, k: (2 * plain(tasks, k)[0], plain(tasks, k)[1]))
    with pytest.raises(UnequalError, match="variance"):
        bench.check_law(digits.examples, num_features=16)


def test_lightning_matches_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = bench.against_bare_loop(bench._config("quick"), 3, ONCE)
    assert len(measured.ours) == len(measured.theirs) == 1
    monkeypatch.setattr(bench, "train", lambda *_: torch.tensor(1.0))
    with pytest.raises(UnequalError, match="losses"):
        bench.against_bare_loop(bench._config("quick"), 3, ONCE)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_of_plain_tasks_trains(digits: bench.InMemory, workers: int) -> None:
    loader = bench.DataLoader(bench.PlainTasks(digits.examples, 8), bench.SEQUENCES, num_workers=workers)
    assert bench.seconds_per_batch(loader, bench.training_step(8), count=1) > 0


def test_classifier_matches_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    [row] = bench.classifier(ONCE, rows=300, subset=4)
    assert row.measured.ratio > 1
    answer = bench.Uncached._answer
    monkeypatch.setattr(bench.Uncached, "_answer", lambda self, x: answer(self, -x))
    with pytest.raises(UnequalError, match="probabilities"):
        next(bench.classifier(ONCE, rows=300, subset=4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_gpu_says_that_it_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bench.gpu(ONCE)) == []
    assert capsys.readouterr().out == "gpu: not run: no GPU\n"


def test_row_compares_median_with_bar() -> None:
    row = bench.Row("name", Comparison([1.0, 1.0, 1.0], [2.0, 3.0, 9.0]), bar=3, amount=100, unit="tokens/s")
    assert "3.00 [2.00, 9.00]" in str(row)
    assert str(row).endswith("ok")
    assert str(dataclasses.replace(row, bar=3.1)).endswith("BELOW")
