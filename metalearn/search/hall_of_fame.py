"""The best losses of a search, as a table on disk that is whole at any moment."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metalearn.base import require_range
from metalearn.files import write_whole
from metalearn.search.candidates import Scored
from metalearn.search.operators import is_trained, standing

COLUMNS = ("rank", "error", "complexity", "verdict", "program", "weights", "pareto")


class HallOfFame:
    """The best distinct losses of a search, and those of the Pareto front of (error, complexity).

    Losses that are the same but for the order of arguments, or have one gradient after tuning, are one, written in the
    simplest way that was met; losses that were never trained are none.

    Args:
        size: how many of the best are listed, at least 1.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, size: int = 20):
        require_range("size", size, 1)
        self.size = size
        self._kept: dict[str, tuple[Scored, dict[str, Any]]] = {}  # by family, the best first

    @property
    def entries(self) -> list[tuple[Scored, dict[str, Any]]]:
        """The best losses, the best first, each with what was noted of it."""
        return list(self._kept.values())[: self.size]

    def add(self, scored: Scored, columns: Mapping[str, Any] | None = None) -> None:
        """Take a loss in, if it is good enough.

        Args:
            scored: the loss.
            columns: builtins to be noted of it. What is known already keeps the notes of the first time.
        """
        if not is_trained(scored):
            return
        known, noted = self._kept.get(scored.family, (scored, dict(columns or {})))
        self._kept[scored.family] = (min(known, scored, key=standing), noted)
        ranked = sorted(self._kept.items(), key=lambda item: standing(item[1][0]))
        self._kept = dict(ranked)
        front = set(map(id, self.pareto()))
        self._kept = {name: one for place, (name, one) in enumerate(ranked) if place < self.size or id(one[0]) in front}

    def pareto(self) -> list[Scored]:
        """Of all losses ever seen those that none beats in error and complexity, by rising error."""
        front: list[Scored] = []
        for scored, _ in self._kept.values():
            if not front or scored.candidate.complexity < front[-1].candidate.complexity:
                front.append(scored)
        return front

    def rows(self, extra: Mapping[str, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
        """The table: rank, error, complexity, verdict, program, weights (a JSON list), pareto, then what was noted.

        ``pareto`` is 1 where no loss is better in error without being more complex, else 0.

        Args:
            extra: further columns of some losses, by the ``name`` of their canonical candidate.
        """
        rows, front = [], set(map(id, self.pareto()))
        for rank, (scored, noted) in enumerate(self.entries, start=1):
            best, more = scored.best, (extra or {}).get(scored.candidate.canonical.name, {})
            weights = best.weights or (1.0,) * (best.program.num_weights if best.program else 0)
            known = (
                rank,
                scored.error,
                best.complexity,
                scored.verdict,
                best.text,
                json.dumps(weights),
                int(id(scored) in front),
            )
            rows.append(dict(zip(COLUMNS, known, strict=True)) | noted | dict(more))
        return rows

    def write(self, path: str | Path, extra: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Write ``rows`` as CSV, whole or not at all; equal tables are equal bytes."""
        rows = self.rows(extra)
        names = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, text.getvalue())

    def to_builtins(self) -> list[dict[str, Any]]:
        """As a checkpoint holds it."""
        return [{"scored": scored.to_builtins(), "columns": columns} for scored, columns in self._kept.values()]

    def load_builtins(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Hold the losses that ``to_builtins`` gave, and no others."""
        loaded = [(Scored.from_builtins(one["scored"]), dict(one["columns"])) for one in saved]
        self._kept = {scored.family: (scored, columns) for scored, columns in loaded}
