import builtins
import json
import os
import random
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses.conftest import points, programs

from metalearn.losses import compiled
from metalearn.losses.operators import OPERATORS
from metalearn.losses.program import MAX_HEIGHT, MAX_NODES, Program, canonical_weights

HOSTILE = [
    "",
    " ",
    "(" * 10**6,
    ")" * 10**6,
    "log(" * 10**6 + "p" + ")" * 10**6,
    "log(" * 100 + "p" + ")" * 100,
    "__import__('os').system('true')",
    "p.__class__",
    "().__class__.__bases__[0]",
    "mul(y,exec(p))",
    "eval(p)",
    "lambda: p",
    "nan",
    "mul(y,nan)",
    "inf",
    "1e999",
    "9" * 5000,
    "mul(1.5,p)",
    "mul(2,p)",
    "mul(-1-1,p)",
    "--1",
    "l\u043eg(p)",  # a Cyrillic o
    "log(\uff50)",  # a full-width p
    "\u0661",  # an Arabic 1
    "log(p)\x00",
    "\x00",
    "log(p))",
    "log p",
    "log(p,p)",
    "mul(p)",
    "mul(p,,p)",
    "p p",
    "p;p",
    "p#",
    "y\nimport os",
    "mul(y,p",
    "\ud800",
]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch):
    """Whatever runs text fails."""

    def fail(*args, **kwargs):
        raise AssertionError("text was executed")

    def switch(on: bool) -> None:
        for place, name in ((builtins, "eval"), (builtins, "exec"), (builtins, "compile"), (os, "system")):
            monkeypatch.setattr(place, name, fail) if on else monkeypatch.undo()

    return switch


def test_hostile_text_is_refused_within_a_second_and_nothing_runs(nothing_runs):
    outcomes = []
    nothing_runs(True)
    for text in HOSTILE:
        start = time.perf_counter()
        try:
            Program.parse(text)
            outcomes.append((text, "accepted", 0.0))
        except ValueError as error:
            outcomes.append((text, str(error), time.perf_counter() - start))
    nothing_runs(False)
    for text, message, seconds in outcomes:
        assert "accepted: " in message and len(message) < 400, (text[:50], message[:100])
        assert seconds < 1, text[:50]


@pytest.mark.parametrize(
    ("text", "position"), [("mul(y,lug(p))", 6), ("mul(y log(p))", 6), ("mul(y,p", 7), ("log(p) )", 7), ("  lug(p)", 2)]
)
def test_errors_name_the_position(text: str, position: int):
    with pytest.raises(ValueError, match=rf"at position {position}\b"):
        Program.parse(text)


@given(st.text(alphabet="ypalogmulsubdiv(),1-  ", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_program_that_prints_itself_or_a_value_error(text: str):
    try:
        program = Program.parse(text)
    except ValueError:
        return
    assert str(program) == re.sub(r"\s", "", text)


@given(programs())
@settings(max_examples=200, deadline=None)
def test_text_names_and_json_round_trip(program: Program):
    assert Program.parse(str(program)) == program
    assert Program.parse(str(program).replace(",", " , ").replace("(", "( ")) == program
    assert Program(tuple(json.loads(json.dumps(program.names)))) == program
    assert hash(Program(program.names)) == hash(program)


@pytest.mark.parametrize(
    "names",
    [(), ("mul",), ("p", "p"), ("mul", "y"), ("exec", "p"), (1,), (None,), (["p"],), ("p",) * (MAX_NODES + 1)],
    ids=lambda names: str(names)[:20],
)
def test_bad_names_are_refused(names: tuple):
    with pytest.raises(ValueError, match="accepted: "):
        Program(names)


def test_limits_are_those_that_are_said():
    deepest = ("abs",) * MAX_HEIGHT + ("p",)
    assert Program(deepest).height == MAX_HEIGHT
    assert Program.parse(str(Program(deepest))).names == deepest
    with pytest.raises(ValueError, match=f"deeper than {MAX_HEIGHT}"):
        Program(("abs", *deepest))
    with pytest.raises(ValueError, match=f"deeper than {MAX_HEIGHT}"):
        Program.parse("abs(" + str(Program(deepest)) + ")")


@given(programs(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_canonical_is_the_same_function_of_the_same_weights(program: Program, draws: random.Random):
    def shuffled(place: int) -> list[int]:
        node = program.nodes[place]
        children = list(node.children)
        if node.name in OPERATORS and OPERATORS[node.name].commutative:
            draws.shuffle(children)
        return [place, *(one for child in children for one in shuffled(child))]

    order = shuffled(0)
    other = Program(tuple(program.names[place] for place in order))
    assert other.canonical == program.canonical == program.canonical.canonical
    y, p, w = points(program)
    values = compiled.compile_loss(program)(y, p, w)
    ordered = torch.tensor(canonical_weights(program, w.tolist()), dtype=torch.float64)
    torch.testing.assert_close(compiled.compile_loss(program.canonical)(y, p, ordered), values, equal_nan=True)


def test_structure_of_a_known_program():
    program = Program.parse("mul(-1,mul(y,log(p)))")
    assert [node.children for node in program.nodes] == [(1, 2), (), (3, 4), (), (5,), ()]
    assert (program.height, program.num_weights, program.complexity) == (3, 5, 7)
    assert program.is_loss and not Program.parse("log(p)").is_loss
    assert program.canonical.names == ("mul", "-1", "mul", "log", "p", "y")
    assert repr(program) == "Program('mul(-1,mul(y,log(p)))')"
