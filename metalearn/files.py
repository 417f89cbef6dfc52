"""Files that are whole at any moment, whenever the process is killed."""

from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all: a partial one is put in its place when it is complete."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)
