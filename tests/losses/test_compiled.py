import pytest
import torch
from losses.conftest import points, random_programs

from metalearn.losses import compiled
from metalearn.losses.program import Program

PROGRAMS = random_programs(1000)
ONES = torch.ones(0, dtype=torch.float64)


def _value_and_slope(function, y, p, w):
    """The value, and its derivative by p and w."""
    p, w = p.clone().requires_grad_(), w.clone().requires_grad_()
    value = function(y, p, w)
    total = value.sum() + 0 * p.sum()
    return value.detach(), *torch.autograd.grad(total, [p, w], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("weighted", [True, False])
def test_matches_interpreter_with_gradients_on_1000_programs(weighted: bool):
    for number, program in enumerate(PROGRAMS):
        y, p, w = points(program, number)
        w = w if weighted else ONES
        found = _value_and_slope(compiled.compile_loss(program), y, p, w)
        wanted = _value_and_slope(lambda *at, of=program: compiled.interpret(of, *at), y, p, w)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighted", [True, False])
def test_symbolic_gradient_matches_autograd_and_central_differences_on_1000_programs(weighted: bool):
    compared = total = 0
    for number, program in enumerate(PROGRAMS):
        y, p, w = points(program, number)
        w = w if weighted else ONES
        loss = compiled.compile_loss(program)
        gradient = compiled.compile_gradient(program, weighted)
        found = torch.zeros_like(p) if gradient is None else gradient(y, p, w)
        assert found.shape == p.shape
        torch.testing.assert_close(found, _value_and_slope(loss, y, p, w)[1], rtol=1e-10, atol=1e-10)
        near, far = ((loss(y, p + h, w) - loss(y, p - h, w)) / (2 * h) for h in (1e-5, 2e-5))
        smooth = (near - far).abs() < 1e-6 * (1 + near.abs())
        torch.testing.assert_close(found[smooth], near[smooth], rtol=1e-5, atol=1e-5)
        compared, total = compared + int(smooth.sum()), total + len(p)
    assert compared > 0.95 * total


def test_programs_give_finite_gradients_wherever_the_loss_is_finite():
    """At the ends of the unit interval, in float32, where roots, logarithms and quotients could break."""
    edges = torch.tensor([0.0, 1.0, 1e-8, 1 - 1e-7, 0.0, 1.0])
    y = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    for program in random_programs(500, seed=1):
        value, slope, _ = _value_and_slope(compiled.compile_loss(program), y, edges, torch.ones(0))
        assert slope[value.isfinite()].isfinite().all(), program
        gradient = compiled.compile_gradient(program, weighted=False)
        if gradient is not None:
            assert gradient(y, edges, torch.ones(0))[value.isfinite()].isfinite().all(), program


def test_gradient_is_nothing_where_it_is_proven_to_be_zero():
    assert compiled.compile_gradient(Program.parse("sign(p)")) is None
    assert compiled.compile_gradient(Program.parse("sub(p,p)"), weighted=False) is None
    assert compiled.compile_gradient(Program.parse("sub(p,p)"), weighted=True) is not None


def test_compiled_functions_batch_under_vmap():
    program = Program.parse("mul(sub(y,p),max(1,log(p)))")
    y, p, w = points(program, count=12)
    batched = torch.vmap(compiled.compile_loss(program), in_dims=(0, 0, None))(y.view(3, 4), p.view(3, 4), w)
    torch.testing.assert_close(batched.reshape(-1), compiled.compile_loss(program)(y, p, w))


def test_source_runs_on_its_own_and_matches():
    for number, program in enumerate(PROGRAMS[:200]):
        y, p, w = points(program, number)
        namespace: dict = {}
        code = compiled.source(program, w.tolist())
        assert "((" not in code.replace("torch.full(()", "")
        exec(code, namespace)
        torch.testing.assert_close(
            namespace["loss"](y, p), compiled.compile_loss(program)(y, p, w), rtol=1e-12, atol=1e-12
        )
