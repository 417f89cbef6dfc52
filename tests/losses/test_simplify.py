import random

import pytest
import torch
from losses.conftest import random_program

from metalearn.losses import compiled
from metalearn.losses.program import Program
from metalearn.losses.simplify import simplified

ONES = torch.ones(0)


def _fingerprint(program: Program) -> torch.Tensor:
    """Values and derivatives by p at fixed points."""
    generator = torch.Generator().manual_seed(3)
    y, p = (torch.rand(16, generator=generator, dtype=torch.float64) * 3 - 1 for _ in "yp")
    p.requires_grad_()
    value = compiled.compile_loss(program)(y, p, ONES) + 0 * p
    return torch.stack([value.detach(), torch.autograd.grad(value.sum(), p)[0]])


def test_keeps_values_and_derivatives_and_grows_nothing():
    draws = random.Random(5)
    shorter = 0
    for number in range(600):
        program = random_program(draws, 2 + number % 5)
        found = simplified(program)
        torch.testing.assert_close(
            _fingerprint(found),
            _fingerprint(program),
            rtol=1e-9,
            atol=1e-9,
            msg=f"{program} -> {found}",
            equal_nan=True,
        )
        assert len(found) <= len(program), f"{program} -> {found}"
        assert simplified(found) == found == found.canonical
        shorter += len(found) < len(program)
    assert shorter > 120


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("mul(-1,mul(p,-1))", "p"),
        ("abs(square(sub(y,p)))", "square(sub(p,y))"),
        ("square(sub(p,y))", "square(sub(p,y))"),
        ("log(abs(mul(-1,p)))", "log(p)"),
        ("max(p,mul(1,p))", "p"),
        ("max(1,-1)", "1"),
        ("sub(y,mul(p,-1))", "add(p,y)"),
        ("min(mul(-1,p),mul(y,-1))", "mul(-1,max(p,y))"),
        ("mul(-1,sub(y,p))", "sub(p,y)"),
        ("sign(sign(abs(abs(p))))", "sign(abs(p))"),
        ("div(p,mul(-1,abs(y)))", "div(p,y)"),
        ("mul(tanh(mul(-1,p)),mul(-1,y))", "mul(tanh(p),y)"),
        ("sub(p,p)", "sub(p,p)"),
        ("add(1,-1)", "add(-1,1)"),
    ],
)
def test_rules(text: str, wanted: str):
    assert str(simplified(Program.parse(text))) == wanted
