"""Programs of several optimisation problems at once, each of which sees the others: bilevel, multilevel, any shape.

``Problem`` says what one level trains, ``Graph`` who sees whom; ``Graph.step`` is one step of the top.
"""

from metalearn.multilevel.graph import Graph
from metalearn.multilevel.problem import Net, Nets, Problem
from metalearn.multilevel.program import Program

__all__ = ["Graph", "Net", "Nets", "Problem", "Program"]
