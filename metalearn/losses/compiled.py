"""Losses as torch code: a function of target ``y``, output ``p`` and weights ``w``, entry by entry, and its derivative by ``p``.

Code is generated from a validated program and the rows of the operator table; no text from outside reaches the compiler.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metalearn.losses.operators import OPERATORS, Operator
from metalearn.losses.program import Program

Elementwise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (y, p, w) -> a value per entry of p


def compile_loss(program: Program) -> Elementwise:
    """``f(y, p, w)``: the loss of every entry; y and p have one shape, w is (num_weights,) or empty for all ones."""
    weighted, plain = _compiled(_function(*_lines(program, "w"))), _compiled(_function(*_lines(program, None)))
    return lambda y, p, w: weighted(y, p, w) if len(w) else plain(y, p, w)


@functools.lru_cache(maxsize=4096)
def compile_gradient(program: Program, weighted: bool = True) -> Elementwise | None:
    """``g(y, p, w)``: the derivative of every entry by ``p``, taken symbolically; None where it is proven to be 0. Remembered.

    Args:
        program: the loss.
        weighted: whether ``w`` (num_weights,) is used; else all weights are 1, whatever ``w`` is.
    """
    from metalearn.losses import symbolic

    slope = symbolic.derivative(program, weighted)
    return None if slope == 0 else _compiled(_function(*symbolic.torch_lines(slope)))


def source(program: Program, weights: Sequence[float] | None = None) -> str:
    """Python code of the loss, entry by entry, that needs torch alone."""
    lines, result = _lines(program, weights)
    body = "\n".join(f"    {line}" for line in lines)
    return f"import torch\n\n\ndef loss(y, p):\n{body}\n    return {result}.expand(p.shape)\n"


def interpret(program: Program, y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """The loss of every entry, node by node: what compiled code must agree with."""
    values: list[Tensor] = []
    for place in reversed(range(len(program))):
        name, children = program.nodes[place]
        if name in OPERATORS:
            value = _applied(OPERATORS[name])(*(values.pop() for _ in children))
        else:
            value = {"y": y, "p": p}[name] if name in "yp" else p.new_tensor(float(name))
        values.append(value * w[place - 1] if place and len(w) else value)
    return values[0].expand(p.shape)


@functools.cache
def _applied(row: Operator) -> Callable[..., Tensor]:
    return _compiled(f"def f({', '.join(row.arguments)}):\n    return {row.code(*row.arguments)}\n", "f")


def _lines(program: Program, weights: Sequence[float] | str | None) -> tuple[list[str], str]:
    """Assignments that compute the program, and the name of the result; weights are in variable ``w``, given, or all 1."""
    lines: list[str] = []
    constants: dict[str, str] = {"y": "y", "p": "p"}

    def assign(code: str) -> str:
        lines.append(f"t{len(lines)} = {code}")
        return f"t{len(lines) - 1}"

    values: list[str] = []
    for place in reversed(range(len(program))):
        name, children = program.nodes[place]
        if name in OPERATORS:
            value = assign(OPERATORS[name].code(*(values.pop() for _ in children)))
        elif name not in constants:
            value = constants[name] = assign(f"torch.full((), {float(name)}, dtype=p.dtype, device=p.device)")
        else:
            value = constants[name]
        if place and weights is not None:
            weight = f"w[{place - 1}]" if weights == "w" else repr(float(weights[place - 1]))
            value = value if weight == "1.0" else assign(f"{value} * {weight}")
        values.append(value)
    return lines, values[0]


def _function(lines: list[str], result: str) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    weights = "    w = w.unbind()\n" if "w[" in body else ""
    value = result if result[0].isalpha() else f"torch.full((), {result}, dtype=p.dtype, device=p.device)"
    return f"def f(y, p, w):\n{weights}{body}    return ({value}).expand(p.shape)\n"


@functools.lru_cache(maxsize=4096)
def _compiled(code: str, name: str = "f") -> Callable[..., Tensor]:
    namespace: dict[str, object] = {"torch": torch}
    exec(compile(code, "<loss>", "exec"), namespace)
    return namespace[name]  # pyright: ignore[reportReturnType]
