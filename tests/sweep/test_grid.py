import pytest

from metalearn.sweep.grid import column, read_sweep_file

BASE = {"model": {"init_args": {"learner": {"class_path": "A", "init_args": {"width": 4}}, "lr": 1}}}


def test_a_grid_is_every_combination_with_the_seed_outermost(write):
    grid = {"model.init_args.lr": [1, 2], "seed_everything": [5, 6], "data.tasks": [None, 3]}
    cells = list(read_sweep_file(write(grid, BASE)).cells())
    assert [tuple(cell.point.values()) for cell in cells] == [
        (seed, lr, tasks) for seed in (5, 6) for lr in (1, 2) for tasks in (None, 3)
    ]
    assert list(cells[0].point) == ["seed", "lr", "tasks"]
    last = cells[-1].config
    assert (last["seed_everything"], last["model"]["init_args"]["lr"], last["data"]["tasks"]) == (6, 2, 3)
    assert len({cell.name for cell in cells}) == 8


def test_bundles_replace_whole_classes_and_leave_the_base_alone(write):
    learner = "model.init_args.learner"
    grid = {"kind": {"small": {}, "other": {learner: {"class_path": "B"}, "model.init_args.lr": 7}}}
    sweep = read_sweep_file(write(grid, BASE))
    small, other = sweep.cells()
    assert small.config["model"] == BASE["model"] == sweep.base["model"]
    assert other.config["model"]["init_args"] == {"learner": {"class_path": "B"}, "lr": 7}
    assert other.point == {"kind": "other"} and other.name.startswith("kind=other-")


def test_the_name_of_a_cell_is_that_of_its_whole_config(write):
    names = [
        next(read_sweep_file(write({"seed_everything": [1]}, base), overrides).cells()).name
        for base, overrides in ((BASE, ()), (BASE | {"z": 1}, ()), (BASE, ["z=1"]), (BASE, ["z=2"]))
    ]
    assert names[1] == names[2] and len(set(names)) == 3


def test_a_setting_of_every_run_is_read_as_yaml(write):
    sweep = read_sweep_file(write({"seed_everything": [1]}, BASE), ["model.init_args.lr=1.0e-3", "new.flag=null"])
    assert sweep.base["model"]["init_args"]["lr"] == 1e-3 and sweep.base["new"] == {"flag": None}


def test_columns_are_the_last_part_of_a_path():
    assert column("data.init_args.num_tasks") == "num_tasks" and column("seed_everything") == "seed"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "neither grid nor search"),
        ({"grid": {"a": [1]}, "search": {"a": {"choices": [1]}}}, "both grid and search"),
        ({"grid": {"a": []}}, r"grid.a is \[\]"),
        ({"grid": {"a": [1, 1]}}, "different values"),
        ({"grid": {"a": {"x": 3}}}, "named bundles"),
        ({"grid": {"a.x": [1], "b.x": [2]}}, "two axes 'x'"),
        ({"grid": {"a": [1]}, "grids": 1}, "has 'grids'; accepted: config, grid"),
        ({"grid": {"seed_everything.x": [1]}}, "leads through seed_everything"),
        ({"grid": {"a": [1]}, "report": {"x": "b"}}, "report has x: b"),
        ({"grid": {"a": [1]}, "objective": {"metric": "m"}}, "none without search"),
        ({"search": {"a": {"low": 2, "high": 1}}, "trials": 3}, "low < high"),
        ({"search": {"a": {"low": 0, "high": 1, "log": True}}, "trials": 3}, "low < high"),
        ({"search": {"a": {"choices": [1]}}}, "trials is 0"),
        ({"search": {"a": {"choices": [1]}}, "trials": 1, "objective": {"metric": "m"}}, "objective is"),
        ({"grid": {"a": [1]}, "config": "none.yaml"}, "none.yaml does not exist"),
    ],
)
def test_refuses_by_name(write, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_sweep_file(write(**content)).cells())
