"""Shorter writings of losses whose weights are all 1, for display and for finding duplicates.

Rules change neither the value nor the derivative of the protected operators, up to rounding; at kinks a derivative may
be another one of the subdifferential. Minus signs move outwards, where they meet and cancel.
"""

from __future__ import annotations

from typing import Any

from metalearn.losses.operators import OPERATORS
from metalearn.losses.program import Program

Term = tuple[Any, ...]  # (name, *arguments), arguments being terms

_ONE: Term = ("1",)
_MINUS: Term = ("-1",)
_UNITS = (_ONE, _MINUS)
_EVEN = ("square", "abs", "log", "sqrt")
_ODD = ("sign", "tanh")
_OPPOSITE = {"min": "max", "max": "min"}


def simplified(program: Program) -> Program:
    """A program of the same values and derivatives by ``p``, no longer and in canonical order; idempotent.

    It holds for weights that are all 1: with others, every edge counts.
    """
    shorter = Program(_names(_simplify(_term(program, 0)))).canonical
    return shorter if shorter == program else simplified(shorter)  # another order may make two arguments equal


def _term(program: Program, place: int) -> Term:
    name, children = program.nodes[place]
    return (name, *(_term(program, child) for child in children))


def _names(term: Term) -> tuple[str, ...]:
    return (term[0], *(name for argument in term[1:] for name in _names(argument)))


def _simplify(term: Term) -> Term:
    name, *arguments = term
    arguments = [_simplify(argument) for argument in arguments]
    if name in OPERATORS and OPERATORS[name].commutative:
        arguments.sort(key=_names)
    term = (name, *arguments)
    rule = _unary if len(arguments) == 1 else _BINARY.get(name)
    shorter = rule(name, *arguments) if rule else None
    return term if shorter is None else _simplify(shorter)


def _negated(term: Term) -> Term | None:
    """What the term is minus of, as far as it is written so."""
    if term in _UNITS:
        return _ONE if term == _MINUS else None
    return term[2] if term[:2] == ("mul", _MINUS) else None


def _unary(name: str, a: Term) -> Term | None:
    if name in _EVEN:
        if (positive := _negated(a)) is not None:
            return (name, positive)
        if a[0] == "abs":
            return (name, a[1])
        if a[0] == "sub" and _names(a[2]) < _names(a[1]):
            return (name, ("sub", a[2], a[1]))
    if a == _ONE and name in ("square", "abs", "sqrt", "sign"):
        return _ONE
    if name == "abs" and a[0] in ("square", "sqrt"):
        # The protected root is positive, too.
        return a
    if name == "sign" and a[0] == "sign":
        return a
    if name in _ODD and (positive := _negated(a)) is not None and (positive, name) != (_ONE, "tanh"):
        return ("mul", _MINUS, (name, positive))
    return None


def _add(name: str, a: Term, b: Term) -> Term | None:
    minus_a, minus_b = _negated(a), _negated(b)
    if minus_a is not None and minus_b is not None and (a, b) != (_MINUS, _MINUS):
        return ("mul", _MINUS, ("add", minus_a, minus_b))
    if minus_a is not None and a != _MINUS:
        return ("sub", b, minus_a)
    return ("sub", a, minus_b) if minus_b is not None and b != _MINUS else None


def _sub(name: str, a: Term, b: Term) -> Term | None:
    minus_a, minus_b = _negated(a), _negated(b)
    if minus_b is not None:
        return ("add", a, minus_b)
    return ("mul", _MINUS, ("add", minus_a, b)) if minus_a is not None and a != _MINUS else None


def _mul(name: str, a: Term, b: Term) -> Term | None:
    if _ONE in (a, b):
        return b if a == _ONE else a
    if a == b:
        return ("square", a)
    if b == _MINUS:
        return ("mul", b, a)
    if a == _MINUS:
        return ("sub", b[2], b[1]) if b[0] == "sub" else _negated(b)
    minus_a, minus_b = _negated(a), _negated(b)
    if minus_a is None and minus_b is None:
        return None
    product = ("mul", minus_a or a, minus_b or b)
    return product if minus_a and minus_b else ("mul", _MINUS, product)


def _div(name: str, a: Term, b: Term) -> Term | None:
    minus_a, minus_b = _negated(a), _negated(b)  # the quotient is odd in a and even in b
    if minus_b is not None:
        return ("div", a, minus_b)
    if b[0] == "abs":
        return ("div", a, b[1])
    return ("mul", _MINUS, ("div", minus_a, b)) if minus_a is not None and a != _MINUS else None


def _extreme(name: str, a: Term, b: Term) -> Term | None:
    if a == b:
        return a
    if {a, b} == set(_UNITS):
        return _ONE if name == "max" else _MINUS
    minus_a, minus_b = _negated(a), _negated(b)
    if minus_a is None or minus_b is None:
        return None
    return ("mul", _MINUS, (_OPPOSITE[name], minus_a, minus_b))


_BINARY = {"add": _add, "sub": _sub, "mul": _mul, "div": _div, "min": _extreme, "max": _extreme}
