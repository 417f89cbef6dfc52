"""Who sees whom in a multilevel program: what the edge lists say, in which order levels come, along which paths they respond."""

from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

Lists = Mapping[str, Sequence[str]]
Path = tuple[str, ...]


class Edges:
    """The edges between named problems, checked. Nothing here but ``paths`` grows with the number of paths.

    Args:
        names: all problems.
        upper_to_lower: upper -> lowers; the upper's loss sees the lower's solution.
        lower_to_upper: lower -> uppers; the lower's loss sees the upper's parameters, so the lower is on a level below.

    Raises:
        ValueError: no problems, a name twice, an edge to no problem or an edge twice, a cycle of ``lower_to_upper``, a
            lower from which no ``lower_to_upper`` path leads back to the upper that sees it.
    """

    def __init__(self, names: list[str], upper_to_lower: Lists, lower_to_upper: Lists):
        if not names:
            raise ValueError("problems is []; accepted: at least one problem")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two problems have the name {twice[0]!r}; accepted: different names")
        self.names = names
        self.sees = _complete("upper_to_lower", names, upper_to_lower)
        self.uppers = _complete("lower_to_upper", names, lower_to_upper)
        self.children = {name: [child for child in names if name in self.uppers[child]] for name in names}
        self.tops = [name for name in names if not self.uppers[name]]
        self.level: dict[str, int] = {}
        self.above: dict[str, set[str]] = {}  # all that a problem is below
        for name in _downwards(self.uppers):
            self.level[name] = 1 + max((self.level[upper] for upper in self.uppers[name]), default=-1)
            self.above[name] = {far for upper in self.uppers[name] for far in {upper} | self.above[upper]}
        self.upwards = sorted(reversed(names), key=lambda name: -self.level[name])  # each before all that it is below
        self._require_paths()
        self.between = {name: self._between(name) for name in names}

    def below(self, upper: str) -> set[str]:
        """All problems on which a step of ``upper`` waits, directly or not."""
        return {name for name in self.names if upper in self.above[name]}

    def paths(self, upper: str) -> Iterator[Path]:
        """Every path from ``upper`` back to itself: one edge down, then edges up only."""

        def climb(path: Path) -> Iterator[Path]:
            for name in self.uppers[path[-1]]:
                if name == upper:
                    yield (*path, upper)
                elif upper in self.above[name]:
                    yield from climb((*path, name))

        for lower in self.sees[upper]:
            yield from climb((upper, lower))

    def _between(self, upper: str) -> set[str]:
        """The problems on ``upper``'s paths, those through which its hypergradient comes."""
        reached = {name for lower in self.sees[upper] for name in {lower} | self.above[lower]}
        return reached & self.below(upper)

    def _require_paths(self) -> None:
        for upper, lowers in self.sees.items():
            for lower in lowers:
                if upper not in self.above[lower]:
                    raise ValueError(
                        f"upper_to_lower says that {upper} sees {lower}, but no path of lower_to_upper leads from {lower} "
                        f"back to {upper}, so that its hypergradient would be 0; accepted: lower_to_upper with "
                        f"{lower} -> {upper}, or a way round"
                    )


def _complete(kind: str, names: list[str], edges: Lists) -> dict[str, list[str]]:
    """The list of every name, empty where there was none."""
    for start, ends in edges.items():
        if isinstance(ends, str):
            raise ValueError(f"{kind} has {start!r}: {ends!r}; accepted: a list of names")
        for name in (start, *ends):
            if name not in names:
                raise ValueError(f"{kind} names {name!r}; accepted: {', '.join(names)}")
        if len(set(ends)) < len(ends):
            raise ValueError(f"{kind} has {start!r}: {list(ends)}; accepted: different names")
    return {name: list(edges.get(name, [])) for name in names}


def _downwards(uppers: Lists) -> list[str]:
    """All names, each after those that it is below."""
    try:
        return list(TopologicalSorter(uppers).static_order())
    except CycleError as error:
        cycle = list(reversed(error.args[1]))[1:]  # as edges go, without the end that is the start
        first = cycle.index(min(cycle))
        shown = " -> ".join([*cycle[first:], *cycle[: first + 1]])
        raise ValueError(f"lower_to_upper has the cycle {shown}; accepted: levels that can be put in order") from None
