"""Losses as a reader wants them in a terminal: infix, with the weights of the edges multiplied out.

A part of a formula is a number times a text, so that factors and constants gather as they move up.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from metalearn.losses.operators import OPERATORS
from metalearn.losses.program import Program

_INFIX = re.compile(r"a ([-+*]) b")


class _Part(NamedTuple):
    """``factor * text``; a number has no text. ``is_sum``: whether the text needs brackets in a product."""

    factor: float
    text: str
    is_sum: bool = False

    @property
    def bracketed(self) -> str:
        return f"({self.text})" if self.is_sum else self.text


def formula(program: Program, weights: Sequence[float] = (), digits: int = 3) -> str:
    """The loss in ``y`` and ``p`` on one line, as ``-1.05 y*log(p)``; operators without a sign of their own keep their names.

    ``log``, ``sqrt`` and ``div`` are the table's protected ones.

    Args:
        program: the loss.
        weights: of its edges, (num_weights,); none for ones.
        digits: significant digits of numbers, at least 1.
    """
    parts: list[_Part] = []
    for place in reversed(range(len(program))):
        name, children = program.nodes[place]
        part = _applied(name, [parts.pop() for _ in children], digits) if name in OPERATORS else _terminal(name)
        weight = weights[place - 1] if place and len(weights) else 1.0
        parts.append(part._replace(factor=part.factor * weight))
    return _shown(parts[0], digits)


def _terminal(name: str) -> _Part:
    return _Part(1.0, name) if name in ("y", "p") else _Part(float(name), "")


def _applied(name: str, arguments: list[_Part], digits: int) -> _Part:
    if any(part.factor == 0 for part in arguments):
        arguments = [part if part.factor else _Part(0.0, "") for part in arguments]
    found = _INFIX.fullmatch(OPERATORS[name].formula)
    if found and found[1] == "*":
        return _product(*arguments)
    if found:
        return _sum(arguments[0], arguments[1], -1.0 if found[1] == "-" else 1.0, digits)
    if name == "square" and arguments[0].text:
        return _Part(arguments[0].factor ** 2, f"{_base(arguments[0])}^2")
    return _Part(1.0, f"{name}({', '.join(_shown(part, digits) for part in arguments)})")


def _base(part: _Part) -> str:
    return part.text if re.fullmatch(r"\w+(\([^()]*\))?", part.text) else f"({part.text})"


def _product(left: _Part, right: _Part) -> _Part:
    texts = [part for part in (left, right) if part.text]
    factor = left.factor * right.factor
    if len(texts) == 1:
        return texts[0]._replace(factor=factor)
    return _Part(factor, "*".join(part.bracketed for part in texts))


def _sum(left: _Part, right: _Part, sign: float, digits: int) -> _Part:
    right = right._replace(factor=sign * right.factor)
    if left.text == right.text:
        return left._replace(factor=left.factor + right.factor)
    terms = [part for part in (left, right) if part.factor]
    if len(terms) < 2:
        return terms[0] if terms else _Part(0.0, "")
    first, second = (_shown(part, digits) for part in terms)
    joined = f"{first} - {second[1:]}" if second.startswith("-") else f"{first} + {second}"
    return _Part(1.0, joined, is_sum=True)


def _shown(part: _Part, digits: int) -> str:
    number = f"{part.factor:.{digits}g}"
    if not part.text or part.factor == 0:
        return number
    if number == "1":
        return part.text
    return f"-{part.bracketed}" if number == "-1" else f"{number}*{part.bracketed}"
