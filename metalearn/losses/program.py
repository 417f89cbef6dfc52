"""A loss as an immutable prefix program: the one representation that text, JSON, trees, sympy and torch code are made from.

A program is a tuple of names in prefix order, ``("mul", "-1", "mul", "y", "log", "p")``; its text is
``mul(-1,mul(y,log(p)))``. ``y`` is the target, ``p`` the model's output: a probability, or the prediction itself in
regression. Every node but the root carries a weight that multiplies its value on the way into its parent; weights are
kept beside the program, in its order, weight i being that of node i + 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from metalearn.losses.operators import MAX_NAME, OPERATORS, TERMINALS

MAX_NODES = 512
MAX_HEIGHT = 64
MAX_CHARACTERS = (MAX_NAME + 2) * MAX_NODES  # a node has a name, a bracket or comma before it and a bracket after it

_TOKEN = re.compile(r"\s*(?:([A-Za-z][A-Za-z0-9_]*|-?1(?![0-9.]))|([(),]))", re.ASCII)


class Node(NamedTuple):
    """One node of a program, by its place in prefix order."""

    name: str
    children: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class Program:
    """A loss; see the module's docstring. Equal programs are equal tuples.

    Args:
        names: operators and terminals in prefix order, at most 512 of them, at most 64 levels deep.

    Raises:
        ValueError: for an unknown name, missing or superfluous nodes, or a program that is too large or too deep.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        names = tuple(self.names)
        object.__setattr__(self, "names", names)
        if not 1 <= len(names) <= MAX_NODES:
            raise ValueError(f"the program has {len(names)} nodes; accepted: 1 to {MAX_NODES}")
        open_arguments: list[int] = []
        for place, name in enumerate(names):
            if place and not open_arguments:
                raise ValueError(f"the program goes on after its end, at node {place}; accepted: one expression")
            if not isinstance(name, str) or not (name in OPERATORS or name in TERMINALS):
                raise ValueError(f"node {place} is {_short(name)}; accepted: {_vocabulary()}")
            if open_arguments:
                open_arguments[-1] -= 1
            open_arguments.append(OPERATORS[name].arity if name in OPERATORS else 0)
            if len(open_arguments) > MAX_HEIGHT + 1:
                raise ValueError(f"the program is deeper than {MAX_HEIGHT} at node {place}; accepted: at most that")
            while open_arguments and not open_arguments[-1]:
                open_arguments.pop()
        if open_arguments:
            raise ValueError(f"the program ends after {len(names)} nodes with arguments missing; accepted: a whole one")

    @classmethod
    def parse(cls, text: str) -> Program:
        """The program of a text like ``mul(-1,mul(y,log(p)))``; blanks between names are ignored.

        Raises:
            ValueError: where the text is no program, with the position of the fault.
        """
        if not isinstance(text, str):
            raise ValueError(f"the loss is {_short(text)}; accepted: a text")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"the loss has {len(text)} characters; accepted: at most {MAX_CHARACTERS}")
        return cls(tuple(_names(text)))

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        texts: list[str] = []
        for node in reversed(self.nodes):  # children come after their parent
            arguments = [texts.pop() for _ in node.children]
            texts.append(f"{node.name}({','.join(arguments)})" if arguments else node.name)
        return texts[0]

    def __repr__(self) -> str:
        return f"Program({str(self)!r})"

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every node with the places of its arguments."""
        children: list[list[int]] = []
        waiting: list[tuple[int, int]] = []  # (place, arguments still to come)
        for place, name in enumerate(self.names):
            children.append([])
            if waiting:
                parent, missing = waiting.pop()
                children[parent].append(place)
                if missing > 1:
                    waiting.append((parent, missing - 1))
            if name in OPERATORS:
                waiting.append((place, OPERATORS[name].arity))
        return tuple(Node(name, tuple(places)) for name, places in zip(self.names, children, strict=True))

    @property
    def num_weights(self) -> int:
        """Weights of the edges: one per node but the root."""
        return len(self.names) - 1

    @cached_property
    def height(self) -> int:
        """Levels below the root."""
        heights = [0] * len(self)
        for place in reversed(range(len(self))):
            heights[place] = 1 + max((heights[child] for child in self.nodes[place].children), default=-1)
        return heights[0]

    @cached_property
    def complexity(self) -> int:
        """Sum over nodes: 1 for a terminal, an operator's own complexity for an operator."""
        return sum(OPERATORS[name].complexity if name in OPERATORS else 1 for name in self.names)

    @property
    def is_loss(self) -> bool:
        """Whether both the target and the model's output are in it."""
        return "y" in self.names and "p" in self.names

    @cached_property
    def canonical_order(self) -> tuple[int, ...]:
        """Places of the nodes after the arguments of commutative operators are put in alphabetical order.

        Node i of ``canonical`` is node ``canonical_order[i]`` of this program, so that weights go along: the two are the
        same function of their weights.
        """
        texts: list[tuple[str, ...]] = [()] * len(self)
        orders: list[tuple[int, ...]] = [()] * len(self)
        for place in reversed(range(len(self))):
            node = self.nodes[place]
            children = list(node.children)
            if node.name in OPERATORS and OPERATORS[node.name].commutative:
                children.sort(key=lambda child: texts[child])
            texts[place] = (node.name, *(name for child in children for name in texts[child]))
            orders[place] = (place, *(one for child in children for one in orders[child]))
        return orders[0]

    @property
    def canonical(self) -> Program:
        """The same function of the same weights, arguments of commutative operators in alphabetical order."""
        return Program(tuple(self.names[place] for place in self.canonical_order))


def canonical_weights(program: Program, weights: Sequence[float]) -> tuple[float, ...]:
    """Weights of ``program`` in the order of ``program.canonical``."""
    return tuple(weights[place - 1] for place in program.canonical_order[1:])


def _names(text: str) -> Iterator[str]:
    """The names of a text, whose parentheses and commas are checked as they come."""
    missing: list[int] = []  # arguments still to come, of every open operator
    position, end = 0, len(text.rstrip())

    def take(expected: str) -> tuple[str, int]:
        nonlocal position
        found = _TOKEN.match(text, position)
        token = (found[1] or found[2]) if found else ""
        if not found or (token in "(),") != (expected in "(),") or (expected in "()," and token != expected):
            start = _next(text, position)
            saw = _short(token or text[start : start + 12]) if start < end else "the end"
            raise ValueError(f"the loss has {saw} at position {start}; accepted: {_expected(expected)}")
        position = found.end()
        return token, position - len(token)

    while True:
        name, start = take("name")
        if name not in OPERATORS and name not in TERMINALS:
            raise ValueError(f"the loss has {_short(name)} at position {start}; accepted: {_vocabulary()}")
        yield name
        if name in OPERATORS:
            take("(")
            missing.append(OPERATORS[name].arity)
            if len(missing) > MAX_HEIGHT:
                raise ValueError(f"the loss is deeper than {MAX_HEIGHT} at position {position}; accepted: at most that")
            continue
        while missing:
            missing[-1] -= 1
            take("," if missing[-1] else ")")
            if missing[-1]:
                break
            missing.pop()
        if not missing:
            break
    if position < end:
        start = _next(text, position)
        raise ValueError(f"the loss goes on at position {start}: {_short(text[start:end][:40])}; accepted: the end")


def _next(text: str, position: int) -> int:
    """Where the next thing that is no blank is."""
    return len(text) - len(text[position:].lstrip())


def _expected(token: str) -> str:
    return f"'{token}'" if token in "()," else _vocabulary()


def _vocabulary() -> str:
    return ", ".join([*OPERATORS, *TERMINALS])


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
