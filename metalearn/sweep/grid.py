"""What a sweep file says: a config, and the settings in which its runs differ."""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Label = str | int | float | bool | None  # how a table shows a value

SEED = "seed_everything"
COLUMN = {SEED: "seed"}
_KEYS = ("config", "grid", "search", "trials", "objective", "report")
_RANGE = ("low", "high", "log", "choices")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its place on every axis, and the whole config that it is started with."""

    point: dict[str, Label]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Readable, and different for different configs: the name of its folder."""
        text = json.dumps(self.config, sort_keys=True, default=str)
        readable = ",".join(f"{axis}={_short(label)}" for axis, label in self.point.items())
        return f"{readable[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Range:
    """What an adaptive sweep chooses a value from: an interval of numbers, or a list of values."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked.

    A file has ``config`` (the experiment, relative to the file), and either ``grid`` or ``search``:

    - ``grid``: axes, by the dotted path of a setting, with a list of values, or by any other name, with named bundles
      of settings. All combinations are run; the seed varies slowest, so that a sweep that is cut short has whole grids.
      A value replaces whatever stood at its place, whole classes included.
    - ``search``: dotted paths with ``{low, high, log}`` or ``{choices}``; ``trials`` of them are proposed by TPE to
      better ``objective: {metric, direction}``, whose metric is one of ``result.json``.
    - ``report``: ``{x: axis, y: axis}`` of the phase diagram that is drawn at the end.

    Raises:
        ValueError: for anything else.
    """

    base: dict[str, Any]
    axes: dict[str, dict[Any, dict[str, Any]]] = field(default_factory=dict)  # axis -> label -> settings by dotted path
    search: dict[str, Range] = field(default_factory=dict)
    trials: int = 0
    objective: dict[str, str] = field(default_factory=dict)
    report: dict[str, str] = field(default_factory=dict)

    def cells(self) -> Iterator[Cell]:
        """Every combination of a grid, the seed's axis outermost."""
        names = sorted(self.axes, key=lambda name: name != COLUMN[SEED])
        for labels in itertools.product(*(self.axes[name] for name in names)):
            point = dict(zip(names, labels, strict=True))
            yield self.cell(point, *(self.axes[name][label] for name, label in point.items()))

    def proposed(self, values: Mapping[str, Any]) -> Cell:
        """The cell of values that a search proposes, by dotted path."""
        return self.cell({column(path): value for path, value in values.items()}, values)

    def cell(self, point: dict[str, Label], *settings: Mapping[str, Any]) -> Cell:
        """The cell at ``point``, with the settings of each axis put into the config one after the other."""
        config = copy.deepcopy(self.base)
        for path, value in itertools.chain.from_iterable(part.items() for part in settings):
            _put(config, path, value)
        return Cell(point, config)


def read_sweep_file(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file; ``overrides``, each "dotted.path=value", are settings of every run.

    Raises:
        ValueError: if the file or its config is missing or says anything but what ``Sweep`` describes.
    """
    path = Path(path)
    content = _mapping(path)
    if unknown := content.keys() - set(_KEYS):
        raise ValueError(f"{path} has {sorted(unknown)[0]!r}; accepted: {', '.join(_KEYS)}")
    if not isinstance(content.get("config"), str):
        raise ValueError(f"{path} has config {content.get('config')!r}; accepted: the file of an experiment")
    base = _mapping(path.parent / content["config"])
    for override in overrides:
        place, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"set is {override!r}; accepted: dotted.path=value")
        _put(base, place, yaml.safe_load(value))
    grid, search = content.get("grid") or {}, content.get("search") or {}
    if bool(grid) == bool(search):
        raise ValueError(f"{path} has {'both grid and' if grid else 'neither grid nor'} search; accepted: one of them")
    axes = _axes(grid)
    sweep = Sweep(
        base=base,
        axes=axes,
        search={place: _range(place, given) for place, given in search.items()},
        trials=int(content.get("trials", 0)),
        objective=content.get("objective") or {},
        report=content.get("report") or {},
    )
    _check(sweep)
    return sweep


def column(path: str) -> str:
    """Name of an axis in tables: the last part of its dotted path; "seed" for the seed."""
    return COLUMN.get(path, path.rsplit(".", 1)[-1])


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; accepted: an existing YAML file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; accepted: a mapping of names to settings")
    return content


def _axes(grid: Mapping[str, Any]) -> dict[str, dict[Any, dict[str, Any]]]:
    axes: dict[str, dict[Any, dict[str, Any]]] = {}
    for name, values in grid.items():
        if column(name) in axes:
            raise ValueError(f"grid has two axes {column(name)!r}; accepted: bundles with names of their own")
        if isinstance(values, list) and values:
            axes[column(name)] = {_label(value): {name: value} for value in values}
            wrong = len(axes[column(name)]) < len(values)
        else:
            wrong = not isinstance(values, dict) or not values or not all(isinstance(b, dict) for b in values.values())
            axes[column(name)] = dict(values) if isinstance(values, dict) else {}
        if wrong:
            raise ValueError(
                f"grid.{name} is {values!r}; accepted: a list of different values, or named bundles of settings"
            )
    return axes


def _range(path: str, given: Any) -> Range:
    if isinstance(given, dict) and given.keys() <= set(_RANGE):
        choices, low, high, log = (given.get(name) for name in ("choices", "low", "high", "log"))
        if isinstance(choices, list) and choices and given.keys() == {"choices"}:
            return Range(choices=tuple(choices))
        numbers = isinstance(low, int | float) and isinstance(high, int | float) and choices is None
        if numbers and low < high and (low > 0 or not log):  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
            return Range(low, high, bool(log))
    raise ValueError(f"search.{path} is {given!r}; accepted: {{low, high, log}} with low < high, or {{choices: [...]}}")


def _check(sweep: Sweep) -> None:
    if sweep.search and sweep.trials < 1:
        raise ValueError(f"trials is {sweep.trials}; accepted with search: at least 1")
    wanted = {"metric", "direction"} if sweep.search else set()
    directions = ("maximize", "minimize") if sweep.search else (None,)
    if set(sweep.objective) != wanted or sweep.objective.get("direction") not in directions:
        accepted = "{metric: NAME, direction: maximize or minimize}" if sweep.search else "none without search"
        raise ValueError(f"objective is {sweep.objective}; accepted: {accepted}")
    columns = sweep.axes.keys() | {column(path) for path in sweep.search}
    for key, axis in sweep.report.items():
        if key not in ("x", "y") or axis not in columns or "x" not in sweep.report:
            raise ValueError(
                f"report has {key}: {axis}; accepted: x, and y if need be, of {', '.join(sorted(columns))}"
            )
    steps = sweep.axes.get(sweep.report.get("x", ""), {})
    wrong = [value for value in steps if value is not None and not (isinstance(value, int | float) and value > 0)]
    if wrong:
        raise ValueError(f"report has x: {sweep.report['x']}, with {wrong[0]!r}; accepted: numbers above 0, or null")


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    """Put ``value`` at the dotted path, in place of whatever is there."""
    *parents, last = path.split(".")
    for parent in parents:
        if not isinstance(config.get(parent, {}), dict):
            raise ValueError(
                f"{path} leads through {parent}, which is {config[parent]!r}; accepted: a path of settings"
            )
        config = config.setdefault(parent, {})
    config[last] = copy.deepcopy(value)


def _label(value: Any) -> Label:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _short(label: Label) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(label))
