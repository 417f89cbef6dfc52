"""The table of the best losses: what it keeps, what it writes, and that it is the same after a resume."""

import csv
import json
import math
import random
from pathlib import Path

from metalearn.losses.program import Program
from metalearn.random import key
from metalearn.search.candidates import Candidate, Scored
from metalearn.search.evolution import RandomSearch
from metalearn.search.hall_of_fame import HallOfFame
from metalearn.search.operators import drawing_from

CENTRE = (0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 1.0, -2.0)


def scored(text: str, *errors: float, verdict: str = "scored") -> Scored:
    return Scored(Candidate(Program.parse(text)), (), errors, verdict)


FOUND = [
    scored("mul(y,log(p))", 0.25),
    scored("add(y,p)", 0.5),
    scored("mul(log(p),y)", 0.125),  # the first again, better
    scored("abs(sub(y,p))", 0.5),  # beaten by add(y,p): as good and less simple
    scored("square(sub(y,p))", 0.3, 0.1),
    scored("min(y,p)", verdict="rejected"),
    scored("max(y,p)", math.nan),
]


def hall_of(found: list[Scored], size: int = 2) -> HallOfFame:
    hall = HallOfFame(size)
    for number, one in enumerate(found):
        hall.add(one, {"generation": number})
    return hall


def test_hall_of_fame_matches_a_sort_of_all_that_was_found():
    hall = hall_of(FOUND)
    assert [(one.candidate.text, noted["generation"]) for one, noted in hall.entries] == [
        ("mul(log(p),y)", 0),
        ("square(sub(y,p))", 4),
    ]
    assert [one.candidate.text for one in hall.pareto()] == ["mul(log(p),y)", "square(sub(y,p))", "add(y,p)"]
    with drawing_from(key(3)):
        programs = [candidate.program for candidate in RandomSearch(300).ask(0, [], key(5))]
        found = [Scored(Candidate(program), (), (round(random.random(), 2),)) for program in programs]
    best: dict[Candidate, Scored] = {}
    names = {one.candidate: one.candidate.program.names for one in found if one.candidate.program}
    for one in sorted(found, key=lambda one: (one.error, one.candidate.complexity, names[one.candidate])):
        best.setdefault(one.candidate.canonical, one)
    points = [(one.error, one.candidate.complexity) for one in found]
    front = {
        (error, size)
        for error, size in points
        if not any(e <= error and c <= size and (e, c) != (error, size) for e, c in points)
    }
    for order in (found, found[::-1]):
        hall = hall_of(order, size=15)
        assert [one for one, _ in hall.entries] == list(best.values())[:15]
        assert {(one.error, one.candidate.complexity) for one in hall.pareto()} == front
        assert len(hall.pareto()) == len(front)


def test_table_is_the_same_bytes_after_a_resume(tmp_path: Path):
    taylor = Scored(Candidate(None, CENTRE), (), (0.1 + 0.2,))
    tuned = Scored(Candidate(Program.parse("sub(y,p)")), (1 / 3, -2.0), (0.7,))
    found = [*FOUND, taylor, tuned]
    extra = {tuned.candidate.canonical.name: {"rescored": 0.1, "rescored_tuned": None}}
    hall_of(found, size=9).write(tmp_path / "whole.csv", extra)
    for cut in range(len(found)):
        begun, resumed = hall_of(found[:cut], size=9), HallOfFame(9)
        resumed.load_builtins(json.loads(json.dumps(begun.to_builtins())))
        for number, one in enumerate(found[cut:], start=cut):
            resumed.add(one, {"generation": number})
        resumed.write(tmp_path / "resumed.csv", extra)
        assert (tmp_path / "resumed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.csv", "whole.csv"]
    with open(tmp_path / "whole.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["program"] for row in rows] == [
        "mul(log(p),y)",
        "square(sub(y,p))",
        "taylor",
        "add(y,p)",
        "abs(sub(y,p))",
        "sub(y,p)",
    ]
    assert [float(row["error"]) for row in rows] == [0.125, 0.2, 0.1 + 0.2, 0.5, 0.5, 0.7]
    assert json.loads(rows[0]["weights"]) == [1.0] * 3 and json.loads(rows[2]["weights"]) == list(CENTRE)
    assert json.loads(rows[5]["weights"]) == [1 / 3, -2.0] and rows[5]["generation"] == "8"
    assert (rows[5]["rescored"], rows[5]["rescored_tuned"], rows[0]["rescored"]) == ("0.1", "", "")


def test_losses_of_one_gradient_are_one_in_their_simplest_form():
    first = scored("mul(square(sub(y,p)),1)", 0.3)
    simpler = scored("square(sub(y,p))", 0.3)._replace(like=first.family)
    (entry,) = hall_of([first, simpler, scored("sub(p,y)", verdict="dead")]).entries
    assert entry == (simpler, {"generation": 0})
