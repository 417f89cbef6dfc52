import random as python_random

import pytest
import torch

from metalearn import random
from metalearn.losses.operators import OPERATORS
from metalearn.losses.program import Program
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.search.candidates import Candidate
from metalearn.search.gradients import SymbolicGradients
from metalearn.search.screening import Screening, fingerprint, prove, same_gradient
from metalearn.tasks.sources import ImageSource, TableSource

CROSS_ENTROPY = "mul(-1,mul(y,log(p)))"
POLYNOMIAL = Candidate(None, (0.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0))  # -y (p - 1/2)


def candidate(text, weights=()):
    return Candidate(Program.parse(text), tuple(weights))


def grown(rng, depth, height, full):
    """Prefix names of a tree as ramped half-and-half grows them, at least two levels deep."""
    names = ["y", "p", "1", "-1"]
    stop = depth == height or (not full and depth >= 2 and rng.random() < len(names) / (len(names) + len(OPERATORS)))
    if stop:
        return [rng.choice(names)]
    name = rng.choice(list(OPERATORS))
    return [name, *(one for _ in range(OPERATORS[name].arity) for one in grown(rng, depth + 1, height, full))]


def drawn(count, seed=3):
    """Random losses in which target and output both occur."""
    rng, found = python_random.Random(seed), []
    while len(found) < count:
        program = Program(tuple(grown(rng, 0, rng.randint(2, 4), rng.random() < 0.5)))
        if program.is_loss:
            found.append(Candidate(program))
    return found


def live_and_unique(candidates, output="softmax"):
    screened = Screening(wrong_sign="keep").screen(candidates, output, weighted=False)
    pairs = zip(candidates, screened.names, screened.verdicts, strict=True)
    return list({name: one for one, name, verdict in reversed([*pairs]) if verdict is None}.values())


def gradients_of(candidates, output):
    return SymbolicGradients([one.program for one in candidates], [torch.empty(0)] * len(candidates), output)


def opened(source, **options):
    task = LossTask(source, lambda features, outputs: MLP(features, outputs, (64,)).double(), SGD(0.01), **options)
    task.open(test=False)
    return task


@pytest.fixture(scope="module")
def digits():
    return opened(ImageSource("digits", validation=0.3))


# -- fingerprints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [CROSS_ENTROPY, "square(sub(y,p))", "max(tanh(p),mul(y,sqrt(p)))"])
def test_matches_autograd_by_the_raw_output(text):
    """One sigmoid output at its logit; two softmax outputs, whose gradient is that of p under its target less 1 - p's."""
    one, z = candidate(text), torch.linspace(-9, 9, 32, dtype=torch.float64).repeat(2).requires_grad_()
    y = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(32)
    by_sigmoid = torch.autograd.grad(one.loss("sigmoid", reduction="sum")(z.unsqueeze(1), y.unsqueeze(1)), z)[0]
    torch.testing.assert_close(fingerprint(one, "sigmoid").gradient_G, by_sigmoid, rtol=1e-9, atol=1e-12)
    both = torch.stack([z, torch.zeros_like(z)], 1)
    loss = one.loss("softmax", reduction="sum")(both, torch.stack([y, 1 - y], 1))
    found_2G = fingerprint(one, "softmax").gradient_G.reshape(2, 32)
    expected = (found_2G - found_2G.flip(0, 1)).flatten()
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected, rtol=1e-8, atol=1e-10)


def test_equal_gradients_share_a_key_and_multiples_a_shape():
    square, product = candidate("square(sub(y,p))"), candidate("mul(sub(p,y),sub(p,y))")
    assert fingerprint(square, "softmax").key == fingerprint(product, "softmax").key
    doubled = fingerprint(candidate("add(square(sub(y,p)),square(sub(y,p)))"), "softmax")
    assert doubled.key != fingerprint(square, "softmax").key
    assert doubled.shape == fingerprint(square, "softmax").shape
    assert (
        fingerprint(candidate("log(p)"), "softmax").shape != fingerprint(candidate("mul(-1,log(p))"), "softmax").shape
    )
    tilted = candidate(f"add(p,{CROSS_ENTROPY})")  # p summed over classes is 1
    for output, same in (("softmax", True), ("sigmoid", False), ("identity", False)):
        assert (fingerprint(tilted, output).key == fingerprint(candidate(CROSS_ENTROPY), output).key) is same


def test_keys_do_not_depend_on_the_order_of_arguments():
    for one in drawn(50):
        canonical = one.canonical
        assert fingerprint(one, "softmax").key == fingerprint(canonical, "softmax").key
        assert prove(one, "softmax", True) == prove(canonical, "softmax", True)
    weighted = candidate("add(p,mul(y,p))", (2.0, 3.0, 4.0, 5.0))
    swapped = candidate("add(mul(p,y),p)", (3.0, 5.0, 4.0, 2.0))
    assert fingerprint(weighted, "identity").key == fingerprint(swapped, "identity").key
    given = torch.tensor([weighted.weights], dtype=torch.float64)
    unweighted = Candidate(weighted.program)
    assert fingerprint(unweighted, "identity", given).key == fingerprint(weighted, "identity").key
    assert prove(weighted, "identity", True).key != prove(unweighted, "identity", True).key


def test_what_is_proven_dead_is_dead_under_any_weights():
    dead = [one for one in drawn(200) if prove(one, "softmax", True).dead]
    assert len(dead) > 10
    for one in dead:
        weights = random.normal(random.key(1, one.name), (3, one.program.num_weights)).double()
        assert fingerprint(one, "softmax", weights).verdict == "dead"


def test_verdicts_of_known_losses():
    for output, good in (("softmax", CROSS_ENTROPY), ("sigmoid", CROSS_ENTROPY), ("identity", "abs(sub(y,p))")):
        assert fingerprint(candidate(good), output).verdict is None
        assert fingerprint(candidate(f"mul(-1,{good})"), output).verdict == "wrong sign"
        assert fingerprint(candidate(f"sign({good})"), output).verdict == "dead"
    assert fingerprint(candidate("sub(p,mul(1,y))"), "softmax").verdict == "dead"  # the outputs' sum
    assert fingerprint(candidate("sub(p,mul(1,y))"), "sigmoid").verdict == "wrong sign"
    assert fingerprint(candidate("square(square(sub(y,p)))", [1e20] * 4), "identity").verdict == "not finite"
    assert fingerprint(POLYNOMIAL, "sigmoid").key == fingerprint(candidate("mul(-1,mul(y,p))"), "sigmoid").key


# -- screening -----------------------------------------------------------------------------------------------------------


def test_shares_of_random_losses_are_those_of_the_literature():
    """About 40 % dead and 38.5 % live and unique at weights of 1, among losses drawn by the paper's grammar."""
    candidates = drawn(300)
    screened = Screening(wrong_sign="keep").screen(candidates, "softmax", weighted=False)
    unique = len(live_and_unique(candidates))
    assert 0.32 < screened.verdicts.count("dead") / 300 < 0.46
    assert 0.32 < unique / 300 < 0.46
    scaled = Screening(wrong_sign="keep", up_to_scale=True).screen(candidates, "softmax", weighted=False)
    alive = [name for name, verdict in zip(scaled.names, scaled.verdicts, strict=True) if verdict is None]
    assert 0.8 * unique < len(set(alive)) < unique


def test_trained_weights_keep_apart_what_is_equal_or_dead_at_ones():
    nothing = candidate("mul(sub(p,p),y)")
    pair = [candidate("square(sub(y,p))"), candidate("mul(sub(p,y),sub(p,y))")]
    screening = Screening(wrong_sign="keep")
    assert screening.screen([nothing], "softmax", weighted=False).verdicts == ["dead"]
    assert screening.screen([nothing], "softmax", weighted=True).verdicts == [None]
    fixed, trained = (screening.screen(pair, "softmax", weighted) for weighted in (False, True))
    assert fixed.names[0] == fixed.names[1] and trained.names[0] != trained.names[1]
    swapped = [candidate("mul(y,p)"), candidate("mul(p,y)"), candidate("mul(p,y)", (2.0, 1.0)), POLYNOMIAL]
    names = screening.screen(swapped, "softmax", weighted=True).names
    assert names[0] == names[1] and len(set(names)) == 3


def test_remembers_what_it_has_met():
    first = Screening().screen([candidate("square(sub(y,p))")], "softmax", False)
    second = Screening().screen([candidate("mul(sub(p,y),sub(p,y))")], "softmax", False, first.known)
    assert second.names == first.names == [candidate("square(sub(y,p))").canonical.name]
    assert first.known.items() < second.known.items()  # its derivative is written differently


def test_wrong_signs_are_rejected_when_asked():
    one = [candidate("mul(y,log(p))")]
    for wrong_sign, weighted, expected in (
        ("reject", True, "wrong sign"),
        ("final", True, None),
        ("final", False, "wrong sign"),
        ("keep", False, None),
    ):
        assert Screening(wrong_sign).screen(one, "softmax", weighted).verdicts == [expected]
    with pytest.raises(ValueError, match="wrong_sign is 'never'; accepted: 'reject', 'final', 'keep'"):
        Screening("never")


def test_the_same_gradient_is_found_within_the_tolerance():
    texts = ["square(sub(y,p))", CROSS_ENTROPY, "mul(sub(p,y),sub(p,y))"]
    assert same_gradient([*map(candidate, texts)], "softmax") == [0, 1, 0]
    near = candidate("square(sub(y,p))", (1.002, 1.0, 1.0))
    assert same_gradient([candidate(texts[0]), near], "softmax") == [0, 0]
    assert same_gradient([candidate(texts[0]), near], "softmax", tolerance=0.001) == [0, 1]
    broken = candidate("square(square(sub(y,p)))", [1e200] * 4)
    assert same_gradient([broken, broken], "softmax") == [0, 1]
    chain = [candidate(texts[0], (1 + 0.002 * step, 1.0, 1.0)) for step in range(5)]  # each 0.4 % greater than the last
    assert same_gradient(chain, "softmax", tolerance=0.01) == [0, 0, 0, 3, 3]


# -- the rejection protocol ------------------------------------------------------------------------------------------------


def rejected_alone(task, one, key, steps):
    """The protocol by ``torch.optim.Adam`` and autograd, for one candidate."""
    inputs, targets = (leaf[:100] for leaf in task.examples("train", "cpu"))
    first = torch.func.functional_call(task.module, task.initial(key)[0], inputs).detach()
    prediction, criterion = first.clone().requires_grad_(), one.loss(task.output)
    optimizer = torch.optim.Adam([prediction], 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(prediction, targets if task.output != "identity" else targets.reshape(prediction.shape)).backward()
        optimizer.step()
    return not float(task.error(prediction.detach(), targets)) < float(task.error(first, targets))


@pytest.mark.parametrize("output", ["softmax", "identity"])
def test_matches_a_protocol_for_each_candidate_alone(digits, output):
    table = TableSource("diabetes", validation=0.3, task="regression")
    task = digits if output == "softmax" else opened(table, batch_size=32, outer_batch_size=32)
    candidates = live_and_unique(drawn(40), output)
    key, screening = random.key(5), Screening(rejection_steps=30)
    found = screening.rejected(task, gradients_of(candidates, output), key)
    assert found == [rejected_alone(task, one, key, 30) for one in candidates]
    assert 0 < sum(found) < len(found)
    assert Screening(rejection_steps=0).rejected(task, gradients_of(candidates, output), key) == [False] * len(found)


def test_a_candidate_that_overflows_is_rejected_and_touches_no_other(digits):
    good, bad = candidate(CROSS_ENTROPY), candidate("square(square(square(sub(y,p))))")
    weights = [torch.empty(0), torch.full((5,), 1e200, dtype=torch.float64), torch.empty(0)]
    gradients = SymbolicGradients([good.program, bad.program, good.program], weights, "softmax")
    assert Screening(rejection_steps=20).rejected(digits, gradients, random.key(0)) == [False, True, False]


def test_the_sign_foresees_most_of_what_the_protocol_rejects(digits):
    candidates = live_and_unique(drawn(120))
    rejected = torch.tensor(Screening().rejected(digits, gradients_of(candidates, "softmax"), random.key(0)))
    flagged = torch.tensor([fingerprint(one, "softmax").verdict == "wrong sign" for one in candidates])
    assert flagged[rejected].float().mean() > 0.75
    assert flagged[~rejected].float().mean() < 0.25


def test_a_constant_derivative_teaches_nothing_under_a_softmax_only():
    one = candidate("add(mul(p,1),y)")
    assert prove(one, "softmax", True).dead and not prove(one, "sigmoid", True).dead
    assert fingerprint(one, "softmax").verdict == "dead" and fingerprint(one, "sigmoid").verdict == "wrong sign"
