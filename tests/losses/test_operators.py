import dataclasses
import re

import pytest
import torch

from metalearn.losses import compiled, symbolic
from metalearn.losses.learned import load_loss
from metalearn.losses.operators import MAX_NAME, OPERATORS, Operator, add_operator
from metalearn.losses.program import MAX_CHARACTERS, MAX_NODES, Program

SOFTPLUS = Operator(
    "softplus",
    1,
    "torch.nn.functional.softplus(a)",
    ("torch.sigmoid(a)",),
    "log(1 + exp(a))",
    r"\mathrm{{softplus}}\left({a}\right)",
    complexity=2,
)


def test_an_operator_of_a_user_is_parsed_differentiated_typeset_compiled_and_written(table):
    add_operator(SOFTPLUS)
    loss = load_loss("mul(softplus(sub(p,y)),softplus(p))", output="identity", reduction="sum")
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = torch.rand(5, dtype=torch.float64)
    softplus = torch.nn.functional.softplus
    wanted = softplus(z - y) * softplus(z)
    slope = torch.autograd.grad(wanted.sum(), z)[0]
    assert loss(z, y).item() == pytest.approx(wanted.sum().item())
    torch.testing.assert_close(torch.autograd.grad(loss(z, y), z)[0], slope)
    gradient = compiled.compile_gradient(loss.program, weighted=False)
    torch.testing.assert_close(gradient(y, z, torch.ones(0)).detach(), slope)
    assert loss.latex() == r"\mathrm{softplus}\left(p - y\right) \cdot \mathrm{softplus}\left(p\right)"
    assert loss.program.complexity == 1 + 2 + 3 + 2 + 1
    namespace: dict = {}
    exec(loss.source(), namespace)
    torch.testing.assert_close(namespace["loss"](y, z), wanted)
    exact = loss.sympy().subs({symbolic.TARGET: y[0].item(), symbolic.OUTPUT: z[0].item()}).evalf()
    assert float(exact) == pytest.approx(wanted[0].item(), rel=1e-10)


def test_the_operator_is_gone_when_the_table_is_as_it_was():
    with pytest.raises(ValueError, match=r"softplus.*accepted: add, sub"):
        Program.parse("softplus(p)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "log"}, "name is 'log'"),
        ({"name": "y"}, "name is 'y'"),
        ({"name": "__import__"}, "a letter first"),
        ({"name": "lambda"}, "name is 'lambda'"),
        ({"name": "s\u043eftplus"}, "ASCII"),
        ({"name": "s" * (MAX_NAME + 1)}, f"at most {MAX_NAME} ASCII"),
        ({"arity": 3}, "arity is 3"),
        ({"arity": 2}, "accepted: 2 formulas"),
        ({"derivatives": ()}, "accepted: 1 formulas"),
        ({"derivatives": ("c",)}, "formula is 'c'"),
        ({"torch": "torch.softplus(a"}, "accepted: a Python expression"),
        ({"torch": "os.system(a)"}, "accepted: an expression of"),
        ({"protect": "b"}, "formula is 'b'"),
        ({"complexity": -1}, "complexity is -1"),
    ],
)
def test_bad_rows_are_refused(table, change: dict, message: str):
    before = dict(table)
    with pytest.raises(ValueError, match=re.escape(message)):
        add_operator(dataclasses.replace(SOFTPLUS, **change))
    assert before == table


def test_the_largest_programs_of_the_longest_name_round_trip_as_text(table):
    pair = dataclasses.replace(SOFTPLUS, name="p" * MAX_NAME, arity=2, derivatives=("b", "a"), formula="a * b")
    alone = dataclasses.replace(SOFTPLUS, name="s" * MAX_NAME)
    add_operator(pair)
    add_operator(alone)
    deep = (alone.name,) * 50
    broad = (pair.name,) * 8 + (*deep, "-1") * 9
    for names in (broad, ("add", *broad, *(alone.name,) * 43, "p")):
        program = Program(names)
        assert Program.parse(str(program)) == program
        assert len(str(program)) > 0.9 * MAX_CHARACTERS * len(program) / MAX_NODES
    assert len(program) == MAX_NODES


@pytest.mark.parametrize("formula", ["nosuch(a)", "core(a)", "a % 2", "c"])
def test_a_formula_that_sympy_does_not_know_is_refused_when_it_is_written_out(table, formula: str):
    add_operator(dataclasses.replace(SOFTPLUS, formula=formula))
    expression = symbolic.expression(Program.parse("mul(y,softplus(p))"))
    with pytest.raises(ValueError, match=r"formula of softplus has .*; accepted: arithmetic and functions of sympy"):
        expression.doit()
    with pytest.raises(ValueError, match=r"formula of softplus has"):
        expression.subs({symbolic.TARGET: 0.5, symbolic.OUTPUT: 0.25}).evalf()


@pytest.mark.parametrize("protect", ["a", "torch.abs(a)", "a + 1", "-a"])
def test_protected_arguments_have_the_brackets_that_they_need(table, protect: str):
    add_operator(dataclasses.replace(SOFTPLUS, name="cube", torch="a ** 3", protect=protect))
    a = torch.tensor([-2.0, 0.5])
    wanted = {"a": a, "torch.abs(a)": a.abs(), "a + 1": a + 1, "-a": -a}[protect] ** 3
    torch.testing.assert_close(compiled.compile_loss(Program.parse("cube(p)"))(a, a, torch.ones(0)), wanted)


def test_protected_operators_match_their_formulas_at_their_edges():
    a = torch.tensor([0.0, 1e-9, -1e-9, 1e-7, -2.0, 1e30], dtype=torch.float64)
    magnitude = a.abs().clamp(min=1e-7)
    wanted = {"log": magnitude.log(), "sqrt": magnitude.sqrt(), "div": a / (1 + a * a).sqrt()}
    found = {
        name: compiled.compile_loss(Program((name, *["p"] * OPERATORS[name].arity)))(a, a, torch.ones(0))
        for name in wanted
    }
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)
