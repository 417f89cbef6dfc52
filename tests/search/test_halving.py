import math

import pytest
import torch

from metalearn import random
from metalearn.search.halving import AsynchronousHalving, Halving, survivors


def test_keeps_the_better_share_in_order_and_nothing_that_is_not_finite():
    scores = torch.tensor([0.5, math.nan, 0.1, 0.5, math.inf, 0.3])
    assert survivors(scores, 0.5).tolist() == [0, 2, 5]  # of equal scores the first
    assert survivors(scores, 0.2).tolist() == [2, 5]  # ceil(1.2)
    assert survivors(scores, 1.0).tolist() == [0, 2, 3, 5]
    assert survivors(torch.full((3,), math.nan), 1.0).tolist() == []
    assert [len(survivors(torch.arange(1000.0), 0.1**i)) for i in (1, 2, 3)] == [100, 10, 1]


def test_matches_the_paper_on_ranks_that_do_not_change():
    """With eta = 3 and 9 runs whose order is the same at every rung, 3 reach rung 1 and 1 reaches rung 2: the best ones."""
    halving = AsynchronousHalving((1, 3, 9), reduction=3)
    order = random.permutation(random.key(0), 9).tolist()
    reached = dict.fromkeys(order, 0)
    started = iter(order)
    for _ in range(9 + 3 + 1):
        run, rung = halving.next() or (next(started), 0)
        reached[run] = max(reached[run], rung)
        halving.report(run, rung, run / 10 + 1 / (1 + rung))
    assert next(started, None) is None
    assert reached[0] == 2 and sorted(reached.values())[-3:-1] == [1, 1]
    assert halving.next() is None


def test_promotes_once_and_from_the_highest_rung_first():
    halving = AsynchronousHalving((1, 2, 4), reduction=2)
    assert halving.next() is None
    halving.report("a", 0, 0.4)
    assert halving.next() is None  # one of one is not among the best half: floor(1 / 2) runs are
    halving.report("b", 0, 0.2)
    assert halving.next() == ("b", 1)
    assert halving.next() is None
    halving.report("c", 0, 0.1)
    halving.report("d", 0, math.nan)
    assert halving.next() == ("c", 1)
    halving.report("b", 1, 0.3)
    halving.report("c", 1, 0.1)
    halving.report("e", 0, 0.05)
    halving.report("f", 0, 0.06)
    assert [halving.next() for _ in range(4)] == [("c", 2), ("e", 1), ("f", 1), None]


def test_stragglers_do_not_hold_others_up():
    """As soon as eta runs of a rung are done one of them goes on, whatever the other workers are at."""
    halving = AsynchronousHalving((1, 4), reduction=4)
    for run in range(4):
        halving.report(run, 0, float(run))
    assert halving.next() == (0, 1)


def test_refuses_what_makes_no_sense():
    for rungs in ((), (0, 1), (5, 5), (5, 3)):
        with pytest.raises(ValueError, match="rungs is"):
            Halving(rungs)
    with pytest.raises(ValueError, match=r"keep is 0\.0"):
        Halving(keep=0.0)
    with pytest.raises(ValueError, match="examples is 0"):
        Halving(examples=0)
    halving = AsynchronousHalving((1, 2))
    with pytest.raises(ValueError, match="that next\\(\\) sent it to"):
        halving.report("a", 1, 0.0)
    with pytest.raises(ValueError, match="rung is 2"):
        halving.report("a", 2, 0.0)
    with pytest.raises(ValueError, match="reduction is 1"):
        AsynchronousHalving((1, 2), reduction=1)
