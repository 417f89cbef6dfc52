"""The loss that a user takes home: a program with weights as a criterion, and the one function that loads any loss."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metalearn.base import require_choice
from metalearn.losses import compiled
from metalearn.losses.elementwise import OUTPUTS, ElementwiseLoss
from metalearn.losses.network import NetworkLoss
from metalearn.losses.program import MAX_NODES, Program
from metalearn.losses.standard import STANDARD
from metalearn.losses.taylor import TaylorLoss

VERSION = 1
MAX_BYTES = 2**20


class LearnedLoss(ElementwiseLoss):
    """A symbolic loss as a criterion: ``l(y_nk, p_nk)`` of a program, summed over outputs, averaged over examples.

    ``p`` is the softmax or sigmoid of the raw outputs, or the raw output itself; ``y`` the target. Its only parameter,
    ``weights``, multiplies every node but the root on the way into its parent; it takes part in training where
    ``trainable``.

    Args:
        program: the loss, or its text.
        weights: of the edges, in the program's order, (num_weights,); null for ones.
        trainable: whether ``weights`` requires a gradient.
        provenance: builtins that say where the loss comes from; kept and saved.
        options: those of ``ElementwiseLoss``.

    Raises:
        ValueError: for text that is no loss, or weights that are not finite or not as many as edges.

    Source: Raymond et al. 2023, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", section 3.2
    ("phase transformer"). Differs from the paper: its root's weight, which is never used, is left out.
    """

    def __init__(
        self,
        program: Program | str,
        weights: Sequence[float] | Tensor | None = None,
        trainable: bool = False,
        provenance: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.program = program if isinstance(program, Program) else Program.parse(program)
        count = self.program.num_weights
        values = torch.ones(count) if weights is None else torch.as_tensor(weights).detach().clone()
        if values.shape != (count,) or not values.isfinite().all():
            raise ValueError(f"weights is {str(weights)[:80]}; accepted: {count} finite numbers")
        self.weights = nn.Parameter(values.to(torch.get_default_dtype()), requires_grad=trainable)
        self.provenance = dict(provenance or {})
        self._elementwise = compiled.compile_loss(self.program)

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        return self._elementwise(target_NK, self.probabilities(prediction_NK), self.weights)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_elementwise"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._elementwise = compiled.compile_loss(self.program)

    def extra_repr(self) -> str:
        return f"{self.program}, output={self.output!r}, reduction={self.reduction!r}"

    # -- what it is, in the present weights ----------------------------------------------------------------------------

    def sympy(self) -> Any:
        """The sympy expression in ``y`` and ``p``, of functions of our own; ``.doit()`` writes out their definitions."""
        from metalearn.losses import symbolic

        return symbolic.expression(self.program, self._current())

    def latex(self) -> str:
        """LaTeX of the loss, numbers to four digits."""
        from metalearn.losses import symbolic

        return symbolic.latex(self.sympy())

    def source(self) -> str:
        """Python code of a function ``loss(y, p)``, entry by entry, that needs torch alone."""
        return compiled.source(self.program, self._current())

    def to_json(self) -> dict[str, Any]:
        """The whole loss in builtins."""
        saved = {"version": VERSION, "loss": "program", "program": list(self.program.names), "text": str(self.program)}
        return saved | {"weights": self._current(), "provenance": self.provenance} | self.options()

    def save(self, path: str | Path) -> None:
        """Write ``to_json`` to a file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_json(), indent=1))
        partial.replace(path)

    def _current(self) -> list[float]:
        return [float(weight) for weight in self.weights.detach()]


_KINDS = {"program", "taylor", "network"}


def load_loss(loss: str | Path | Program, **options: Any) -> ElementwiseLoss:
    """A criterion by its text, the JSON file that it was saved in, or the name of a standard loss.

    Args:
        loss: as "mul(-1,mul(y,log(p)))", "runs/loss/best.json" or "focal". A name with the suffix .json, or a ``Path``, is a
            file.
        options: of the criterion: ``output``, ``reduction``, ``weight``, ``ignore_index``, ``trainable``; those that are
            given take the place of what a file says.

    Raises:
        ValueError: where there is no such file, or for what is no loss. Text and files may come from anybody: nothing in
            them is executed.
    """
    if isinstance(loss, Program):
        return LearnedLoss(loss, **options)
    if isinstance(loss, Path) or (isinstance(loss, str) and loss.endswith(".json")):
        return loss_from_json(_read(Path(loss)), **options)
    if isinstance(loss, str) and loss in STANDARD:
        return STANDARD[loss](**options)
    try:
        return LearnedLoss(Program.parse(loss), **options)
    except ValueError as error:
        raise ValueError(f"{error}; or a file that ends in .json, or one of {', '.join(STANDARD)}") from None


def loss_from_json(saved: Any, **options: Any) -> ElementwiseLoss:
    """The loss that ``to_json`` described.

    Raises:
        ValueError: for what is no such description.
    """
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        version = saved.get("version") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"version is {str(version)[:40]}; accepted: a loss saved in version {VERSION}")
    kind = saved.get("loss")
    require_choice("loss", kind if isinstance(kind, str) else type(kind).__name__, tuple(_KINDS))
    settings = {name: saved[name] for name in ("output", "reduction", "ignore_index") if name in saved} | options
    require_choice("output", settings.get("output", "softmax"), OUTPUTS)
    weights = _numbers(saved.get("weights"))
    if kind == "taylor":
        return TaylorLoss(weights, **settings)
    if kind == "network":
        return NetworkLoss(weights=weights, **settings)
    names, provenance = saved.get("program"), saved.get("provenance", {})
    if not isinstance(names, list) or len(names) > MAX_NODES:
        raise ValueError(f"program is {str(names)[:40]}; accepted: a list of at most {MAX_NODES} names")
    if not isinstance(provenance, dict):
        raise ValueError(f"provenance is {str(provenance)[:40]}; accepted: named values")
    return LearnedLoss(Program(tuple(names)), weights, provenance=provenance, **settings)


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list) or not all(
        type(value) in (int, float) and math.isfinite(value) for value in values
    ):
        raise ValueError(f"weights is {str(values)[:40]}; accepted: a list of finite numbers")
    return values


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)[:200]}; accepted: a loss that was saved as JSON")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; accepted: at most {MAX_BYTES}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {str(error)[:80]}; accepted: a loss that was saved as JSON") from None
