"""Formulas of losses: the same function as the program, and short."""

import random

import pytest
import torch

from metalearn.analysis.formulas import formula
from metalearn.losses.compiled import interpret
from metalearn.losses.operators import OPERATORS
from metalearn.losses.program import Program

FUNCTIONS = {
    "log": lambda a: torch.log(a.abs().clamp(min=1e-7)),
    "sqrt": lambda a: torch.sqrt(a.abs().clamp(min=1e-7)),
    "div": lambda a, b: a / torch.sqrt(1 + b * b),
    "sign": torch.sign,
    "abs": torch.abs,
    "tanh": torch.tanh,
    "square": torch.square,
    "min": torch.minimum,
    "max": torch.maximum,
}


def number(value: object) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def evaluated(text: str, y: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    named = {name: lambda *a, f=f: f(*map(number, a)) for name, f in FUNCTIONS.items()}
    return number(eval(text.replace("^", "**"), {"__builtins__": {}, "y": y, "p": p} | named)).expand(p.shape)


def drawn(stream: random.Random, depth: int) -> list[str]:
    if depth == 0 or stream.random() < 0.15:
        return [stream.choice(("y", "p", "p", "1", "-1"))]
    name = stream.choice([name for name, row in OPERATORS.items() if row.searched])
    return [name, *(part for _ in range(OPERATORS[name].arity) for part in drawn(stream, depth - 1))]


@pytest.mark.parametrize("weighted", [True, False])
def test_matches_the_interpreted_program(weighted: bool) -> None:
    stream = random.Random(1)
    y = torch.tensor([0.0, 1.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    p = torch.tensor([0.21, 0.83, 0.49, 0.98, 0.07], dtype=torch.float64)
    for _ in range(500):
        program = Program(tuple(drawn(stream, 5)))
        if not weighted and "sign" in program.names:
            continue  # sums that are 0 but for rounding have a sign that the order of terms decides
        weights = [stream.uniform(-2, 2) for _ in range(program.num_weights)] if weighted else []
        wanted = interpret(program, y, p, number(weights))
        found = evaluated(formula(program, weights, digits=17), y, p)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, msg=lambda text, of=program: f"{of}: {text}")


@pytest.mark.parametrize(
    ("text", "weights", "shown"),
    [
        ("mul(-1,mul(y,log(p)))", [], "-y*log(p)"),
        ("mul(-1,mul(y,log(p)))", [1.1, 1, 1, 1, 2], "-1.1*y*log(2*p)"),
        ("square(sub(y,p))", [], "(y - p)^2"),
        ("mul(mul(1,sub(y,p)),-1)", [], "-(y - p)"),
        ("sub(sub(y,y),p)", [], "-p"),
        ("add(1,mul(1,-1))", [], "0"),
        ("mul(y,square(p))", [1, 1.0004, 1], "y*p^2"),
        ("sub(mul(-1,y),p)", [1, 0.9996, 1, 0.9999], "-y - p"),
        ("tanh(sub(p,add(1,1)))", [], "tanh(p - 2)"),
    ],
)
def test_gathers_factors_and_constants(text: str, weights: list[float], shown: str) -> None:
    assert formula(Program.parse(text), weights) == shown
