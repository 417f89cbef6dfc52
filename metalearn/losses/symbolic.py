"""Losses as sympy expressions: derivatives, canonical keys, torch code of a derivative, LaTeX. The only file that imports sympy.

Every operator of the table becomes a sympy function of its own that sympy does not evaluate, so that an expression
keeps the program's form, clamps included, and costs little to build and to differentiate. ``doit()`` and ``evalf()``
replace it by its formula.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# (sympy's classes are made at run time, and its stubs know neither their arguments nor their results.)

import ast
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy

from metalearn.losses.operators import OPERATORS, Operator, substitute
from metalearn.losses.program import Program

TARGET, OUTPUT = sympy.symbols("y p", real=True)
_TERMINALS = {"y": TARGET, "p": OUTPUT, "1": sympy.Integer(1), "-1": sympy.Integer(-1)}
_NAMES = {symbol: name for name, symbol in _TERMINALS.items()}


@functools.lru_cache(maxsize=1024)
def _weight(place: int) -> sympy.Symbol:
    """``w0, w1, …``: the weights of a program's edges."""
    return sympy.Symbol(f"w{place}")  # no assumptions: asking for them would take most of the time


class Opaque(sympy.Function):
    """A function that sympy leaves as it is."""

    @classmethod
    def eval(cls, *arguments: Any) -> None:
        return None

    def code(self, *arguments: str) -> str:
        """torch code of this function of variables of these names."""
        raise NotImplementedError


class Applied(Opaque):
    """An operator of the table, applied."""

    row: Operator

    def code(self, *arguments: str) -> str:
        return self.row.code(*arguments)

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return _derivative_of(self.row, argindex - 1)(*self.args)

    def doit(self, **hints: Any) -> sympy.Expr:
        return _formula_of(self.row)(*(argument.doit(**hints) for argument in self.args))

    def _eval_evalf(self, prec: int) -> sympy.Expr:
        return _formula_of(self.row)(*(argument._eval_evalf(prec) for argument in self.args))

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        typeset = (_Typeset(printer._print(argument)) for argument in self.args)
        text = self.row.latex.format(**dict(zip(self.row.arguments, typeset, strict=True)))
        return text if exp is None else rf"\left({text}\right)^{{{exp}}}"


class Piece(Opaque):
    """A part of an operator's derivative that is torch code."""

    source: str

    def code(self, *arguments: str) -> str:
        return substitute(self.source, *arguments)


@functools.cache
def function(row: Operator) -> type[Applied]:
    """The sympy function of an operator."""
    return type(row.name, (Applied,), {"row": row, "nargs": row.arity})


@functools.cache
def _derivative_of(row: Operator, argument: int) -> Callable[..., sympy.Expr]:
    def opaque(node: ast.AST) -> Callable[..., sympy.Expr]:
        source = ast.unparse(node)
        named = {"nargs": row.arity, "source": f"({source})"}
        return type(f"d_{row.name}_{argument}_{node.col_offset}", (Piece,), named)

    def call(name: str) -> Callable[..., sympy.Expr] | None:
        return function(OPERATORS[name]) if name in OPERATORS else None

    tree = ast.parse(row.derivatives[argument], mode="eval").body
    return lambda *values: _algebra(tree, dict(zip(row.arguments, values, strict=True)), call, opaque)


@functools.cache
def _formula_of(row: Operator) -> Callable[..., sympy.Expr]:
    def refuse(node: ast.AST) -> Callable[..., sympy.Expr]:
        raise ValueError(
            f"formula of {row.name} has {ast.unparse(node)!r}; accepted: arithmetic and functions of sympy"
        )

    def call(name: str) -> Callable[..., sympy.Expr] | None:
        known = getattr(sympy, name, None)
        return known if callable(known) else None

    tree = ast.parse(row.formula, mode="eval").body
    return lambda *values: _algebra(tree, dict(zip(row.arguments, values, strict=True)), call, refuse)


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}


def _algebra(
    node: ast.expr,
    values: dict[str, sympy.Expr],
    call: Callable[[str], Callable[..., sympy.Expr] | None],
    opaque: Callable[[ast.AST], Callable[..., sympy.Expr]],
) -> sympy.Expr:
    """The sympy expression of an operator's formula; what is neither arithmetic nor a known call is ``opaque``."""
    inner = functools.partial(_algebra, values=values, call=call, opaque=opaque)
    match node:
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.Constant(value=int() | float() as number):
            return sympy.Rational(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -inner(operand)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _ARITHMETIC:
            return _ARITHMETIC[type(operator)](inner(left), inner(right))
        case ast.Call(func=ast.Name(id=name), args=arguments) if known := call(name):
            return known(*map(inner, arguments))
    return opaque(node)(*values.values())


def expression(program: Program, weights: Sequence[Any] | None = None) -> sympy.Expr:
    """The program's expression in ``y`` and ``p``, unevaluated; with ``weights`` (numbers or symbols) every edge has its own.

    A weight of exactly 1 is not written.
    """
    built: list[sympy.Expr] = [sympy.Integer(0)] * len(program)
    for place in reversed(range(len(program))):
        name, children = program.nodes[place]
        value = (
            function(OPERATORS[name])(*(built[child] for child in children)) if name in OPERATORS else _TERMINALS[name]
        )
        weight = weights[place - 1] if weights is not None and place else 1
        built[place] = value if weight == 1 else sympy.sympify(weight) * value
    return built[0]


def program_of(expr: sympy.Expr) -> Program:
    """The program of an expression without weights: the inverse of ``expression``.

    Raises:
        ValueError: for an expression with anything else in it.
    """
    names: list[str] = []
    waiting = [expr]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Applied):
            names.append(part.row.name)
            waiting.extend(reversed(part.args))
        elif part in _NAMES:
            names.append(_NAMES[part])
        else:
            raise ValueError(f"the expression has {part}; accepted: operators of the table, y, p, 1 and -1")
    return Program(tuple(names))


@functools.lru_cache(maxsize=4096)
def derivative(program: Program, weighted: bool = True) -> sympy.Expr:
    """The derivative by ``p``, of every weight as a symbol, or with all weights 1; remembered.

    It is 0 only where the loss is constant in p; nothing is simplified beyond sympy's own arithmetic. The chain rule is
    applied node by node, which gives what ``sympy.diff`` gives in a quarter of its time.
    """
    values: list[sympy.Expr] = [sympy.S.Zero] * len(program)
    slopes = list(values)
    for place in reversed(range(len(program))):
        name, children = program.nodes[place]
        if name in OPERATORS:
            row, arguments = OPERATORS[name], [values[child] for child in children]
            moving = [(number, slopes[child]) for number, child in enumerate(children) if slopes[child] != 0]
            value = function(row)(*arguments)
            slope = sympy.Add(*(_derivative_of(row, number)(*arguments) * inner for number, inner in moving))
        else:
            value, slope = _TERMINALS[name], sympy.S.One if name == "p" else sympy.S.Zero
        weight = _weight(place - 1) if weighted and place else sympy.S.One
        values[place], slopes[place] = weight * value, weight * slope
    return slopes[0]


def is_dead(slope: sympy.Expr, softmax: bool) -> bool:
    """Whether a loss of this derivative by ``p`` is proven to teach nothing, whatever y, p and the weights are.

    The derivative is 0; or, under a softmax, whose probabilities sum to 1, it has neither y nor p in it.
    """
    return slope == 0 or (softmax and not slope.free_symbols & {TARGET, OUTPUT})


def key(expr: sympy.Expr) -> str:
    """A text that equal expressions share, whatever the order of their terms and factors."""
    if not expr.args:
        return str(expr)
    parts = [key(argument) for argument in expr.args]
    if isinstance(expr, sympy.Add | sympy.Mul):
        parts.sort()
    return f"{type(expr).__name__}({','.join(parts)})"


# -- LaTeX -----------------------------------------------------------------------------------------------------------

_MINUS_ONE = r"\left(-1\right) \cdot "


def latex(expr: sympy.Expr) -> str:
    """LaTeX of an expression, numbers to four digits."""
    rounded = expr.xreplace({number: sympy.Float(number, 4) for number in expr.atoms(sympy.Float)})
    text = sympy.latex(rounded)
    return "-" + text.removeprefix(_MINUS_ONE) if text.startswith(_MINUS_ONE) else format(_Typeset(text), "")


class _Typeset(str):
    """LaTeX of an argument, in brackets where its place in the row's template asks for them."""

    def __format__(self, place: str) -> str:
        text = str(self)
        enclosed = _is_enclosed(text)
        if not place:
            return text.removeprefix(r"\left(").removesuffix(r"\right)") if enclosed else text
        bare = enclosed or text.isalnum() or (place == "factor" and not text.startswith("-"))
        return text if bare else rf"\left({text}\right)"


def _is_enclosed(text: str) -> bool:
    """Whether one pair of brackets is around all of it."""
    if not (text.startswith(r"\left(") and text.endswith(r"\right)")):
        return False
    depth = 0
    for found in re.finditer(r"\\(left|right)\b", text):
        depth += 1 if found[1] == "left" else -1
        if not depth:
            return found.end() + 1 == len(text)
    return False


# -- torch code ------------------------------------------------------------------------------------------------------


def torch_lines(expr: sympy.Expr) -> tuple[list[str], str]:
    """Assignments that compute ``expr`` of ``y``, ``p`` and a sequence ``w`` of weights, and the name of the result.

    Common subexpressions are computed once. Constants are tensors of no dimension.
    """
    shared, (reduced,) = sympy.cse([expr], symbols=sympy.numbered_symbols("s"), order="none")
    writer = _Writer()
    for symbol, value in shared:
        writer.names[symbol] = writer.write(value)
    return writer.lines, writer.variable(reduced)


class _Writer:
    """Writes one assignment per function or operation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[sympy.Basic, str] = {TARGET: "y", OUTPUT: "p"}

    def write(self, expr: sympy.Basic) -> str:
        """The name of the variable, or the number, that holds the value."""
        if expr in self.names:
            return self.names[expr]
        if isinstance(expr, sympy.Symbol):
            return self._assign(expr, f"w[{expr.name.removeprefix('w')}]")
        if isinstance(expr, sympy.Number):
            return repr(float(expr))
        if isinstance(expr, sympy.Add):
            return self._assign(expr, " + ".join(self.write(term) for term in expr.args))
        if isinstance(expr, sympy.Mul):
            return self._assign(expr, " * ".join(self.write(factor) for factor in expr.args))
        if isinstance(expr, sympy.Pow) and isinstance(expr.exp, sympy.Integer):
            base = self.variable(expr.base)
            return self._assign(expr, f"{base} * {base}" if expr.exp == 2 else f"{base} ** {int(expr.exp)}")
        assert isinstance(expr, Opaque), expr
        return self._assign(expr, expr.code(*(self.variable(argument) for argument in expr.args)))

    def variable(self, expr: sympy.Basic) -> str:
        """As ``write``, with numbers as tensors."""
        text = self.write(expr)
        if isinstance(expr, sympy.Number) and expr not in self.names:
            return self._assign(expr, f"torch.full((), {text}, dtype=p.dtype, device=p.device)")
        return text

    def _assign(self, expr: sympy.Basic, code: str) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {code}")
        self.names[expr] = name
        return name
