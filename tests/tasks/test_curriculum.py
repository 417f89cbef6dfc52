"""Curriculum against its definition, step by step."""

import pytest

from metalearn.tasks.curriculum import Curriculum


def test_matches_a_table_of_steps():
    curriculum = Curriculum("tasks", {5: 64, 2: 8}, 1)
    assert [curriculum.at(step, None) for step in range(7)] == [8, 8, 64, 64, 64, None, None]
    assert curriculum.at(None, 7) == 7  # evaluation has no step


def test_without_stages_there_is_the_last_value_alone():
    assert {Curriculum("tasks", {}, 1).at(step, 9) for step in (None, 0, 1000)} == {9}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({0: 3}, "a step of tasks is 0; accepted: 1 <="),
        ({5: 0}, "tasks before step 5 is 0; accepted: 1 <= tasks before step 5 <= 10"),
        ({5: 3, 9: 11}, "tasks before step 9 is 11; accepted: 1 <= tasks before step 9 <= 10"),
    ],
)
def test_refuses_steps_and_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Curriculum("tasks", values, 1, 10)


def test_refuses_a_value_above_a_bound_that_is_known_late():
    curriculum = Curriculum("classes", {5: 4}, 1)
    curriculum.require_at_most(4)
    with pytest.raises(ValueError, match="classes before step 5 is 4; accepted: 1 <= classes before step 5 <= 3"):
        curriculum.require_at_most(3)
