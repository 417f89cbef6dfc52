"""The loss that a user takes home: a program with weights as a criterion, and the one function that loads any loss."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from metalearn.losses import compiled
from metalearn.losses.elementwise import MAX_BYTES, VERSION, ElementwiseLoss, WeightedLoss, finite_list, shown
from metalearn.losses.network import NetworkLoss
from metalearn.losses.program import Program
from metalearn.losses.standard import STANDARD
from metalearn.losses.taylor import TaylorLoss


class LearnedLoss(WeightedLoss):
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

    kind = "program"

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
        self._set_weights([1.0] * count if weights is None else weights, count, trainable)
        self.provenance = dict(provenance or {})
        self._elementwise = compiled.compile_loss(self.program)

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        return self._elementwise(target_NK, self.probabilities(prediction_NK), self.weights)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_elementwise"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._elementwise = compiled.compile_loss(self.program)

    def extra_repr(self) -> str:
        return f"{self.program}, output={self.output!r}, reduction={self.reduction!r}"

    # -- what it is, in the present weights ----------------------------------------------------------------------------

    def sympy(self) -> Any:
        """The sympy expression in ``y`` and ``p``, of functions of our own; ``.doit()`` writes out their definitions."""
        from metalearn.losses import symbolic

        return symbolic.expression(self.program, self.weights.tolist())

    def latex(self) -> str:
        """LaTeX of the loss, numbers to four digits."""
        from metalearn.losses import symbolic

        return symbolic.latex(self.sympy())

    def source(self) -> str:
        """Python code of a function ``loss(y, p)``, entry by entry, that needs torch alone; ``ValueError`` as ``to_json``."""
        return compiled.source(self.program, finite_list("weights", self.weights))

    def to_json(self) -> dict[str, Any]:
        named = {"program": list(self.program.names), "text": str(self.program), "provenance": self.provenance}
        return super().to_json() | named


KINDS: dict[str, type[ElementwiseLoss]] = {
    **STANDARD,
    **{loss.kind: loss for loss in (LearnedLoss, TaylorLoss, NetworkLoss)},
}


def load_loss(loss: str | Path | Program, **options: Any) -> ElementwiseLoss:
    """A criterion by its text, the JSON file that it was saved in, or the name of a standard loss.

    Args:
        loss: as "mul(-1,mul(y,log(p)))", "runs/loss/best.json" or "focal". A name with the suffix .json, or a ``Path``, is a
            file.
        options: of the criterion: ``output``, ``reduction``, ``weight``, ``ignore_index``, and its own, as ``trainable``
            or ``gamma``; those that are given take the place of what a file says.

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
        program = Program.parse(loss)
    except ValueError as error:
        raise ValueError(f"{error}; or a file that ends in .json, or one of {', '.join(STANDARD)}") from None
    return LearnedLoss(program, **options)


def loss_from_json(saved: Any, **options: Any) -> ElementwiseLoss:
    """The loss that ``to_json`` described; ``options`` take the place of what it says.

    Raises:
        ValueError: for what is no such description.
    """
    version = saved.get("version") if isinstance(saved, dict) else saved
    if not isinstance(saved, dict) or type(version) is not int or version != VERSION:
        raise ValueError(f"version is {shown(version)}; accepted: a loss saved in version {VERSION}")
    name = saved.get("loss")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"loss is {shown(name)}; accepted: {', '.join(KINDS)}")
    kind = KINDS[name]
    settings = {name: saved[name] for name in kind.settings if name in saved} | options
    if issubclass(kind, WeightedLoss):
        settings = {"weights": _required(saved, "weights", list)} | settings
    if kind is not LearnedLoss:
        return kind(**settings)
    program = Program(tuple(_required(saved, "program", list)))
    return LearnedLoss(program, **{"provenance": _required(saved, "provenance", dict)} | settings)


def _required(saved: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(saved.get(name), kind):
        raise ValueError(f"{name} is {shown(saved.get(name))}; accepted: a {kind.__name__}")
    return saved[name]


def _read(path: Path) -> Any:
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has over {MAX_BYTES} bytes")
        return json.loads(content.decode())
    except (ValueError, OSError, RecursionError) as error:
        reason = shown(str(error))
        raise ValueError(
            f"{shown(str(path))} cannot be read: {reason}; accepted: a loss that was saved as JSON"
        ) from None
