"""What is known of candidates, in a file that survives the process: one JSON line for each batch, whole or not at all."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from metalearn.losses.program import Program
from metalearn.search.candidates import Scored


class Cache:
    """Scores by the names of candidates, in the order in which they were found; lines of other settings are not read.

    Args:
        path: the file; null keeps nothing on disk, as in all ranks but one.
        settings: a hash of everything else that a score depends on: data, model, rule, training, local search, seed.
    """

    def __init__(self, path: Path | None, settings: str):
        self.path, self.settings = path, settings
        self.known: dict[str, Scored] = {}
        for line in path.read_text().splitlines() if path is not None and path.exists() else []:
            found = [Scored.from_builtins(entry) for entry in _entries(line, settings)]
            self.known |= {scored.candidate.name: scored for scored in found}

    def add(self, found: Sequence[Scored]) -> None:
        """Remember these, in this order."""
        self.known |= {scored.candidate.name: scored for scored in found}
        if self.path is not None and found:
            line = json.dumps({"settings": self.settings, "scored": [scored.to_builtins() for scored in found]})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                torn = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
                file.write(b"\n" * torn + line.encode() + b"\n")


def _entries(line: str, settings: str) -> list[dict[str, Any]]:
    """What a line holds of these settings; nothing in the stump of one that a kill cut off."""
    try:
        batch = json.loads(line)
    except ValueError:
        return []
    return batch["scored"] if batch["settings"] == settings else []


def settings_hash(*parts: Any) -> str:
    """A hash of nested settings: objects by class and attributes, tensors by content, functions by name."""
    digest = hashlib.sha256()
    for part in parts:
        _digest(part, digest, 0)
    return digest.hexdigest()[:16]


def _digest(value: Any, digest: Any, depth: int) -> None:
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for name in sorted(value, key=repr):
            digest.update(repr(name).encode())
            _digest(value[name], digest, depth + 1)
    elif isinstance(value, list | tuple | set):
        for one in value:
            _digest(one, digest, depth + 1)
        digest.update(b"]")
    elif isinstance(value, Program):
        digest.update(str(value).encode())
    elif value is None or isinstance(value, str | int | float | bool):
        digest.update(repr(value).encode() + b";")
    elif callable(value) and not hasattr(value, "__dict__"):
        digest.update(getattr(value, "__qualname__", type(value).__qualname__).encode())
    else:
        assert depth < 20, f"settings of {type(value).__name__} are nested without end"
        digest.update(type(value).__qualname__.encode())
        _digest({name: one for name, one in vars(value).items() if not name.startswith("_")}, digest, depth + 1)
