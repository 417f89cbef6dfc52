import dataclasses
import re

import pytest
import torch

from metalearn.losses import compiled, symbolic
from metalearn.losses.learned import load_loss
from metalearn.losses.operators import OPERATORS, Operator, add_operator
from metalearn.losses.program import Program

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
