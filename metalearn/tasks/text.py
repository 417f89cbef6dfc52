"""Documents, from whatever the one door to data opens."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metalearn.tasks.examples import DataSource
from metalearn.tasks.sources import open_dataset

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(eq=False)
class TextSource(DataSource):
    """Documents, cut into parts in their own order: first "train", then "validation", then "test".

    Args:
        text_column: by default the only text column, or one named text. A row is a document; of a text file, a line.
    """

    text_column: str | None = None

    def read(self, part: str) -> tuple[str, ...]:
        """The documents of one part.

        Raises:
            ValueError: where there is no such data set, column or part, or the part has no rows.
        """
        dataset = self._open(self.test if part == "test" and isinstance(self.test, str) else self.split)
        rows = self._part_rows(part, len(dataset), seed=None)
        self._require_rows(part, len(rows))
        return tuple(self._documents(dataset.select(range(rows[0], rows[-1] + 1))))

    def fingerprint(self) -> str:
        """SHA-256 of every constructor argument but ``path``, and of all documents of ``split``."""
        return self._digest(json.dumps(self._documents(self._open(self.split))).encode())

    def _open(self, split: str) -> "Dataset":
        return open_dataset(self.path, name=self.name, revision=self.revision, split=split, also=self._separate_test)

    def _documents(self, dataset: "Dataset") -> list[str]:
        texts = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", "").endswith("string")]
        found = self.text_column or ("text" if "text" in texts else texts[0] if len(texts) == 1 else "")
        if found not in texts:
            raise ValueError(f"text_column is {self.text_column!r}; accepted: {', '.join(texts) or 'none holds text'}")
        return list(dataset.with_format(None)[found])
