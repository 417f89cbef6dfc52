import pytest
import torch
from torch.nn import functional

from metalearn import random
from metalearn.losses.learned import LearnedLoss
from metalearn.losses.program import Program
from metalearn.losses.standard import CrossEntropy
from metalearn.search.gradients import MixedGradients, ModuleGradients, SymbolicGradients, TabulatedGradients, tabulated

TEXTS = (
    "mul(-1,mul(y,log(p)))",
    "square(sub(y,p))",
    "div(sub(tanh(p),y),max(p,sqrt(y)))",
    "abs(sub(square(min(y,p)),log(add(p,1))))",
    "mul(sqrt(abs(sub(y,p))),sub(1,tanh(mul(y,p))))",
    "square(sign(y))",  # dead
)
PROGRAMS = [Program.parse(text) for text in TEXTS]
SMOOTH = PROGRAMS[:4]
KEY = random.key(0)


def ones(programs):
    return [torch.zeros(0)] * len(programs)


def weights(programs, dtype=torch.float64):
    return [
        (1 + 0.3 * random.normal(random.fold(KEY, i), (one.num_weights,))).to(dtype) for i, one in enumerate(programs)
    ]


def batch(output, count, num_examples=20, num_outputs=5, dtype=torch.float64):
    num_outputs = {"softmax": num_outputs, "sigmoid": 1, "identity": 2}[output]
    z = 2 * random.normal(random.fold(KEY, "z"), (count, num_examples, num_outputs)).to(dtype)
    if output == "softmax":
        return z, functional.one_hot(torch.arange(num_examples) % num_outputs, num_outputs).to(dtype)
    noise = random.normal(random.fold(KEY, "y"), (num_examples, num_outputs)).to(dtype)
    return z, (noise > 0).to(dtype) if output == "sigmoid" else noise


def by_autograd(losses, z_PNK, target_NK):
    found = []
    for loss, z_NK in zip(losses, z_PNK, strict=True):
        leaf = z_NK.clone().requires_grad_()
        found += torch.autograd.grad(loss(leaf, target_NK) + 0 * leaf.sum(), leaf)
    return torch.stack(found)


@pytest.mark.parametrize("output", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_autograd_of_each_criterion(output, weighted):
    z, target = batch(output, len(PROGRAMS))
    own = weights(PROGRAMS) if weighted else ones(PROGRAMS)
    losses = [
        LearnedLoss(program, w if len(w) else None, output=output).double()
        for program, w in zip(PROGRAMS, own, strict=True)
    ]
    for loss, w in zip(losses, own, strict=True):
        loss.weights.data = w if len(w) else loss.weights.data
    expected = by_autograd(losses, z, target)
    found = SymbolicGradients(PROGRAMS, own, output).gradient(z, target)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (found[-1] == 0).all()
    torch.testing.assert_close(ModuleGradients(losses).gradient(z, target), expected, rtol=1e-10, atol=1e-12)


def test_matches_torch_for_cross_entropy():
    z, target = batch("softmax", 2)
    leaf = z.clone().requires_grad_()
    functional.cross_entropy(leaf.flatten(0, 1), target.argmax(1).repeat(2)).backward()
    for gradients in (
        SymbolicGradients(PROGRAMS[:1] * 2, ones(PROGRAMS[:2]), "softmax"),
        ModuleGradients([CrossEntropy(reduction="sum")] * 2),
        TabulatedGradients(SymbolicGradients(PROGRAMS[:1] * 2, ones(PROGRAMS[:2]), "softmax")),
    ):
        torch.testing.assert_close(gradients.gradient(z, target), 2 * leaf.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_error_of_tables_is_first_order_in_the_distance_of_points(output):
    z, target = batch(output, len(SMOOTH), num_examples=500)
    exact = SymbolicGradients(SMOOTH, weights(SMOOTH), output)
    expected = exact.gradient(z, target)
    errors = [
        (TabulatedGradients(exact, points).gradient(z, target) - expected).norm() / expected.norm()
        for points in (4096, 8191, 16381)
    ]
    assert errors[0] < 2e-3
    assert 1.7 < errors[0] / errors[1] < 2.4 and 1.7 < errors[1] / errors[2] < 2.4


def test_tables_hold_at_certain_predictions():
    exact = SymbolicGradients(PROGRAMS, ones(PROGRAMS), "softmax")
    target = functional.one_hot(torch.tensor([0, 1]), 2).float()
    z = torch.tensor([200.0, -200.0]).expand(len(PROGRAMS), 2, 2).contiguous()
    found = TabulatedGradients(exact).gradient(z, target)
    torch.testing.assert_close(found, exact.gradient(z, target), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["symbolic", "tabulated", "module"])
def test_a_row_that_is_not_finite_touches_no_other(kind):
    z, target = batch("softmax", len(PROGRAMS), dtype=torch.float32)
    symbolic = SymbolicGradients(PROGRAMS, ones(PROGRAMS), "softmax")
    module = ModuleGradients([LearnedLoss(program) for program in PROGRAMS])
    gradients = {"symbolic": symbolic, "tabulated": tabulated(symbolic), "module": module}[kind]
    expected = gradients.gradient(z, target)
    broken = z.clone()
    broken[1, 3], broken[2, 0, 1], broken[3, :] = torch.nan, torch.inf, -torch.inf
    found = gradients.gradient(broken, target)
    assert torch.equal(found[[0, 4, 5]], expected[[0, 4, 5]])
    assert not found[1, 3].isfinite().any() and not found[2, 0].isfinite().any() and not found[3].isfinite().any()


def test_selected_and_mixed_rows_are_those_of_each_alone():
    z, target = batch("softmax", 6)
    symbolic = SymbolicGradients(PROGRAMS[:3], weights(PROGRAMS[:3]), "softmax")
    tables = TabulatedGradients(SymbolicGradients(PROGRAMS[3:5], ones(PROGRAMS[3:5]), "softmax"))
    mixed = MixedGradients([symbolic, ModuleGradients([CrossEntropy()]), tables])
    assert mixed.count == 6
    whole = mixed.gradient(z, target)
    assert torch.equal(
        whole,
        torch.cat([part.gradient(own, target) for part, own in zip(mixed.parts, z.split([3, 1, 2]), strict=True)]),
    )
    for rows in ([4, 0, 3, 1], [5], [2, 2, 5, 0], [1, 3, 4]):
        chosen = mixed.select(rows)
        assert chosen.count == len(rows)
        torch.testing.assert_close(chosen.gradient(z[rows], target), whole[rows], rtol=1e-12, atol=1e-14)
    again = mixed.select([4, 0, 3, 1]).select([3, 0, 2])
    torch.testing.assert_close(again.gradient(z[[1, 4, 3]], target), whole[[1, 4, 3]], rtol=1e-12, atol=1e-14)


def test_tables_of_a_mixture_leave_other_losses_exact_and_rows_in_order():
    z, target = batch("softmax", 4)
    symbolic = SymbolicGradients(PROGRAMS[:3], ones(PROGRAMS[:3]), "softmax")
    mixed = MixedGradients([symbolic, ModuleGradients([LearnedLoss(PROGRAMS[3]).double()])]).select([3, 2, 0, 1])
    found, exact = tabulated(mixed).gradient(z, target), mixed.gradient(z, target)
    assert torch.equal(found[0], exact[0])
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-4)


def test_computes_in_float32_whatever_predictions_and_autocast_are():
    z, target = batch("softmax", 4, dtype=torch.float32)
    symbolic = SymbolicGradients(SMOOTH, ones(SMOOTH), "softmax")
    for gradients in (symbolic, tabulated(symbolic), ModuleGradients([LearnedLoss(program) for program in SMOOTH])):
        expected = gradients.gradient(z.bfloat16().float(), target)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(gradients.gradient(z.bfloat16(), target), expected)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"accepted: \(0,\) or \(5,\)"):
        SymbolicGradients(PROGRAMS[:1], [torch.ones(4)], "softmax")
    with pytest.raises(ValueError, match="accepted: 2, one for each"):
        SymbolicGradients(PROGRAMS[:2], ones(PROGRAMS[:1]), "softmax")
    with pytest.raises(ValueError, match="'identity'; accepted: 'softmax', 'sigmoid'"):
        TabulatedGradients(SymbolicGradients(PROGRAMS[:1], ones(PROGRAMS[:1]), "identity"))
