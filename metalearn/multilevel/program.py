"""A multilevel program together with its data: what a run is of, and what is reported of it."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from metalearn.base import Tree
from metalearn.multilevel.graph import Graph


class Program(ABC):
    """A graph of problems that have data to be read, and an evaluation of its own.

    A program that needs neither is a ``Graph`` and nothing else.
    """

    @abstractmethod
    def graph(self) -> Graph:
        """The problems and their edges; asked for after ``open``."""

    def open(self, *, test: bool) -> None:
        """Read the data, those of the final test only with ``test=True``."""
        return

    def record(self) -> dict[str, Any]:
        """What checkpoints say of the data, in builtins: at least ``fingerprint``, a hash by data set."""
        return {"fingerprint": {}}

    @abstractmethod
    def evaluate(self, state: Tree, key: Tensor, *, test: bool) -> dict[str, float]:
        """What a user wants to know of a state of the graph, by name; with ``test``, on the data of the final test.

        The key is that of the run's ``Graph.init``, so that other runs can be given the same start.
        """
