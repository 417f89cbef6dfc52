import sympy
import torch
from hypothesis import given, settings
from losses.conftest import points, programs, random_programs

from metalearn.losses import compiled, symbolic
from metalearn.losses.program import Program


def test_evaluated_expression_matches_compiled_on_1000_programs():
    for number, program in enumerate(random_programs(1000)):
        y, p, w = points(program, number, count=1)
        expr = symbolic.expression(program, w.tolist())
        value = expr.subs({symbolic.TARGET: sympy.Float(y.item(), 17), symbolic.OUTPUT: sympy.Float(p.item(), 17)})
        found = torch.tensor([float(value.evalf())], dtype=torch.float64)
        torch.testing.assert_close(found, compiled.compile_loss(program)(y, p, w), rtol=1e-10, atol=1e-10)


def test_derivative_of_the_written_out_formula_matches_the_table():
    """sympy differentiates its own functions; the table's derivatives are ours."""
    y, p = 0.3, 0.6
    for text in ("square(tanh(sub(y,p)))", "div(log(p),sub(y,square(p)))", "mul(sqrt(p),abs(sub(p,y)))", "div(1,p)"):
        program = Program.parse(text)
        formula = symbolic.expression(program).doit()
        wanted = formula.diff(symbolic.OUTPUT).doit().subs({symbolic.TARGET: y, symbolic.OUTPUT: p}).evalf()
        at = [torch.tensor([value], dtype=torch.float64) for value in (y, p)]
        gradient = compiled.compile_gradient(program, weighted=False)
        assert gradient is not None
        assert abs(gradient(*at, torch.ones(0)).item() - float(wanted)) < 1e-10


def test_what_is_called_dead_is_dead():
    """Under a softmax, too: the gradient by raw outputs is p (g - sum p g)."""
    dead = {"plain": 0, "softmax": 0}
    for number, program in enumerate(random_programs(400, seed=2)):
        for weighted in (True, False):
            slope = symbolic.derivative(program, weighted)
            under = [name for name in dead if symbolic.is_dead(slope, softmax=name == "softmax")]
            for name in under:
                y, _, w = points(program, number, count=6)
                z = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3).requires_grad_()
                p = z.softmax(-1) if name == "softmax" else z
                value = compiled.compile_loss(program)(y.view(2, 3), p, w if weighted else w[:0])
                found = torch.autograd.grad(value.sum() + 0 * z.sum(), z)[0]
                assert found.abs().max() < 1e-10, (name, program)
                dead[name] += 1
    assert dead["softmax"] > dead["plain"] > 40


def test_live_losses_are_not_called_dead():
    for text in ("mul(-1,mul(y,log(p)))", "square(sub(y,p))", "mul(y,p)"):
        for weighted in (True, False):
            assert not symbolic.is_dead(symbolic.derivative(Program.parse(text), weighted), softmax=True)
    assert not symbolic.is_dead(symbolic.derivative(Program.parse("add(y,p)")), softmax=False)


@given(programs())
@settings(max_examples=200, deadline=None)
def test_expression_and_program_round_trip(program: Program):
    assert symbolic.program_of(symbolic.expression(program)) == program


def test_key_does_not_depend_on_the_order_of_commutative_arguments():
    one, other = (symbolic.derivative(Program.parse(text), False) for text in ("mul(y,log(p))", "mul(log(p),y)"))
    assert symbolic.key(one) == symbolic.key(other)
    assert symbolic.key(one) != symbolic.key(symbolic.derivative(Program.parse("mul(y,tanh(p))"), False))


def test_latex_has_brackets_where_they_are_needed():
    shown = {
        "mul(-1,mul(y,log(p)))": r"-y \cdot \log\left|p\right|",
        "div(1,mul(y,p))": r"\frac{1}{\sqrt{1 + \left(y \cdot p\right)^2}}",
        "sub(y,sub(p,1))": r"y - \left(p - 1\right)",
        "mul(add(y,p),add(1,p))": r"\left(y + p\right) \cdot \left(1 + p\right)",
        "square(square(p))": r"\left(p^2\right)^2",
        "mul(p,-1)": r"p \cdot \left(-1\right)",
        "log(add(y,p))": r"\log\left|y + p\right|",
    }
    assert {text: symbolic.latex(symbolic.expression(Program.parse(text))) for text in shown} == shown
    weighted = symbolic.expression(Program.parse("square(add(y,p))"), [-0.5, 1.0, 2.0])
    assert symbolic.latex(weighted) == r"\left(- 0.5 \left(y + 2.0 p\right)\right)^2"
