"""Random programs and points, and the operator table as it was after every test."""

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from metalearn.losses import operators
from metalearn.losses.program import Program


def random_program(draws: random.Random, height: int) -> Program:
    """A program that grows to at most ``height``, of all operators and terminals."""

    def grow(left: int) -> list[str]:
        if left == 0 or draws.random() < 0.15:
            return [draws.choice(list(operators.TERMINALS))]
        name = draws.choice(list(operators.OPERATORS))
        return [name, *(part for _ in range(operators.OPERATORS[name].arity) for part in grow(left - 1))]

    return Program(tuple(grow(height)))


def random_programs(count: int, seed: int = 0) -> list[Program]:
    """Programs of heights 2 to 5."""
    draws = random.Random(seed)
    return [random_program(draws, 2 + number % 4) for number in range(count)]


def points(program: Program, seed: int = 0, count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Targets and outputs (count,), and weights away from 1, in float64."""
    generator = torch.Generator().manual_seed(seed + len(program))
    y = torch.rand(count, generator=generator, dtype=torch.float64)
    p = torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 0.7
    w = 0.5 + torch.rand(program.num_weights, generator=generator, dtype=torch.float64)
    return y, p, w * torch.where(torch.rand(len(w), generator=generator) < 0.2, -1.0, 1.0)


def programs(max_height: int = 6) -> strategies.SearchStrategy[Program]:
    """Programs for hypothesis."""
    seeds = strategies.integers(0, 2**32)
    return strategies.builds(
        lambda seed, height: random_program(random.Random(seed), height), seeds, strategies.integers(0, max_height)
    )


def assert_same_with_gradient(ours, theirs, z, target) -> None:
    """Values and derivatives by the prediction agree."""
    z = z.clone().requires_grad_()
    found, wanted = ours(z, target), theirs(z, target)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    slopes = [torch.autograd.grad(value.sum(), z)[0] for value in (found, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)


@pytest.fixture
def table() -> Iterator[dict[str, operators.Operator]]:
    """The table, which is put back as it was."""
    before = dict(operators.OPERATORS)
    yield operators.OPERATORS
    operators.OPERATORS.clear()
    operators.OPERATORS.update(before)
