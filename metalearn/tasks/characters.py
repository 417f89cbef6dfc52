"""Text as labelled examples: the next character after a few others."""

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor

from metalearn.base import Examples, Source, require_range
from metalearn.tasks.text import TextSource


class CharacterSource(Source):
    """Windows of consecutive characters, and the character that follows: character-level language modelling.

    ``inputs`` (N, C) are the numbers of C characters, as float32, ``targets`` (N,) that of the next. Numbers are places in the
    sorted alphabet of the "train" part; what it lacks is number 0. No window spans two documents.

    Args:
        path: what ``TextSource`` opens: a file, a folder, a hub data set.
        context: C, characters of a window, at least 1.
        validation: share of the documents in "validation".
        test: share of the documents in "test", or the name of a split.
        text_column: as in ``TextSource``.
        joined: whether documents follow each other as one text, a line break after each; a file's lines are its documents.

    Raises:
        ValueError: for values out of range; by ``read``, for a part with no text longer than a window.
    """

    def __init__(
        self,
        path: Any,
        context: int = 16,
        validation: float = 0.1,
        test: float | str = 0.1,
        text_column: str | None = None,
        joined: bool = True,
    ):
        require_range("context", context, 1)
        self.text = TextSource(path, validation=validation, test=test, text_column=text_column)
        self.context, self.joined = context, joined

    @functools.cached_property
    def alphabet(self) -> str:
        """The characters of the "train" part, in order; the first stands for all that it lacks."""
        return "".join(sorted(set("".join(self._documents("train")))))

    @property
    def num_classes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.alphabet)

    @property
    def revision(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.text.revision

    def read(self, part: str) -> Examples:
        numbers = {character: number for number, character in enumerate(self.alphabet)}
        windows = [
            torch.tensor([numbers.get(character, 0) for character in document]).unfold(0, self.context + 1, 1)
            for document in self._documents(part)
            if len(document) > self.context
        ]
        if not windows:
            raise ValueError(
                f"context is {self.context}, and no text of {part} is longer; accepted: less than the longest document"
            )
        joined: Tensor = torch.cat(windows)
        return Examples(joined[:, :-1].float(), joined[:, -1].contiguous())

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.text.fingerprint()} {self.context} {self.joined}".encode()).hexdigest()

    def _documents(self, part: str) -> tuple[str, ...]:
        documents = self.text.read(part)
        return ("".join(document + "\n" for document in documents),) if self.joined else documents
