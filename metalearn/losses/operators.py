"""The table of operators that losses are made of: everything else about an operator is generated from its row.

A formula is a Python expression in the arguments ``a`` and ``b``; calls by a plain name are of other operators of the
table. Rows are code of this package or of its user, never of a file that holds a loss.
"""

import ast
import keyword
import re
from dataclasses import dataclass
from functools import cached_property

from metalearn.base import require_choice, require_range

MAX_NAME = 24  # characters of an operator's name


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Args:
        name: a Python identifier of at most 24 ASCII characters, a letter first.
        arity: number of arguments, 1 or 2.
        torch: the operator on tensors ``a`` (and ``b``), as "torch.tanh(a)"; finite for all finite arguments.
        derivatives: by each argument, in terms of ``a`` and ``b``. Sums, products, whole powers, numbers and calls of
            other operators are seen through by the symbolic derivative; any other call, as "torch.sigmoid(a)", is
            kept as it is.
        formula: what sympy makes of it, in sympy's own functions, as "log(Max(Abs(a), 1e-7))". Whether sympy has them is
            found out when the formula is first written out, not by ``add_operator``, which does without sympy.
        latex: how it is typeset: a product or what needs no brackets within one. ``{a}`` and ``{b}`` are the arguments;
            ``{a:factor}`` has brackets around sums and negative values, ``{a:base}`` around all but names and numbers.
        complexity: what it adds to a loss's complexity, at least 0.
        protect: what arguments are replaced by before ``torch``, in terms of ``a``, as "torch.abs(a).clamp(min=1e-7)".
        commutative: whether the arguments may change places.
        searched: whether evolution uses it, or only losses that were written down.
    """

    name: str
    arity: int
    torch: str
    derivatives: tuple[str, ...]
    formula: str
    latex: str
    complexity: int = 1
    protect: str = "a"
    commutative: bool = False
    searched: bool = True

    @property
    def arguments(self) -> tuple[str, ...]:
        """``("a",)`` or ``("a", "b")``."""
        return ("a", "b")[: self.arity]

    def code(self, *arguments: str) -> str:
        """torch code of the operator applied to variables of these names."""
        return substitute(self.torch, *(substitute(self._guard, name) for name in arguments))

    @cached_property
    def _guard(self) -> str:
        """``protect`` with the brackets that it needs within any expression."""
        alone = isinstance(ast.parse(self.protect, mode="eval").body, ast.Name | ast.Call)
        return self.protect if alone else f"({self.protect})"


def substitute(formula: str, a: str, b: str = "b") -> str:
    """The formula with its arguments replaced."""
    return _ARGUMENT.sub(lambda found: a if found[0] == "a" else b, formula)


_ARGUMENT = re.compile(r"(?<![\w.])[ab](?!\w)")

_MIN = ("0.5 + 0.5 * sign(b - a)", "0.5 + 0.5 * sign(a - b)")
_MAGNITUDE = "torch.abs(a).clamp(min=1e-7)"
_ROWS = (
    Operator("add", 2, "a + b", ("1", "1"), "a + b", r"\left({a} + {b:factor}\right)", commutative=True),
    Operator("sub", 2, "a - b", ("1", "-1"), "a - b", r"\left({a} - {b:factor}\right)"),
    Operator("mul", 2, "a * b", ("b", "a"), "a * b", r"{a:factor} \cdot {b:factor}", commutative=True),
    Operator(  # the analytic quotient (Ni, Drieberg and Rockett 2013), smooth and never singular
        "div",
        2,
        "a * torch.rsqrt(1 + b * b)",
        ("torch.rsqrt(1 + b * b)", "-a * b * torch.rsqrt(1 + b * b) ** 3"),
        "a / sqrt(1 + b**2)",
        r"\frac{{{a}}}{{\sqrt{{1 + {b:base}^2}}}}",
        complexity=2,
    ),
    Operator("sign", 1, "torch.sign(a)", ("0",), "sign(a)", r"\mathrm{{sgn}}\left({a}\right)"),
    Operator("square", 1, "a * a", ("2 * a",), "a**2", r"{a:base}^2"),
    Operator("abs", 1, "torch.abs(a)", ("sign(a)",), "Abs(a)", r"\left|{a}\right|"),
    Operator("tanh", 1, "torch.tanh(a)", ("1 - tanh(a) ** 2",), "tanh(a)", r"\tanh\left({a}\right)", complexity=2),
    Operator(
        "log",
        1,
        "torch.log(a)",
        ("torch.where(torch.abs(a) >= 1e-7, torch.sign(a) / torch.abs(a).clamp(min=1e-7), 0.0)",),
        "log(Max(Abs(a), 1e-7))",
        r"\log\left|{a}\right|",
        complexity=2,
        protect=_MAGNITUDE,
    ),
    Operator(
        "sqrt",
        1,
        "torch.sqrt(a)",
        ("torch.where(torch.abs(a) >= 1e-7, 0.5 * torch.sign(a) * torch.rsqrt(torch.abs(a).clamp(min=1e-7)), 0.0)",),
        "sqrt(Max(Abs(a), 1e-7))",
        r"\sqrt{{\left|{a}\right|}}",
        complexity=2,
        protect=_MAGNITUDE,
    ),
    Operator("min", 2, "torch.minimum(a, b)", _MIN, "Min(a, b)", r"\min\left({a}, {b}\right)", commutative=True),
    Operator("max", 2, "torch.maximum(a, b)", _MIN[::-1], "Max(a, b)", r"\max\left({a}, {b}\right)", commutative=True),
)
OPERATORS: dict[str, Operator] = {row.name: row for row in _ROWS}
TERMINALS: dict[str, str] = {"y": "y", "p": "p", "1": "1", "-1": "-1"}  # names and how they are typeset


def add_operator(row: Operator) -> None:
    """Add a row, so that losses can be written with it, differentiated, typeset and searched for.

    Raises:
        ValueError: for a name that is taken, too long or no identifier, a number of derivatives that is not the arity, a
            negative complexity, and formulas that are no expressions of the arguments.
    """
    if row.name in OPERATORS or row.name in TERMINALS or not row.name.isidentifier() or keyword.iskeyword(row.name):
        raise ValueError(f"name is {row.name!r}; accepted: an identifier that is not among {', '.join(OPERATORS)}")
    if not row.name.isascii() or row.name.startswith("_") or len(row.name) > MAX_NAME:
        wanted = f"at most {MAX_NAME} ASCII letters, digits and underscores, a letter first"
        raise ValueError(f"name is {row.name!r}; accepted: {wanted}")
    require_choice("arity", row.arity, (1, 2))
    require_range("complexity", row.complexity, 0)
    if not isinstance(row.derivatives, tuple) or len(row.derivatives) != row.arity:
        raise ValueError(f"derivatives is {row.derivatives!r}; accepted: {row.arity} formulas, one per argument")
    called = {"torch", row.name, *OPERATORS}
    for formula in (row.torch, *row.derivatives):
        _require_expression(formula, called | set(row.arguments))
    _require_expression(row.protect, {"a", "torch"})
    _require_expression(row.formula, None)
    OPERATORS[row.name] = row


def _require_expression(formula: str, names: set[str] | None) -> None:
    try:
        parsed = ast.parse(formula, mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"formula is {formula!r}: {error}; accepted: a Python expression") from None
    found = {node.id for node in ast.walk(parsed) if isinstance(node, ast.Name)}
    if names is not None and not found <= names:
        raise ValueError(f"formula is {formula!r}; accepted: an expression of {', '.join(sorted(names))}")
