"""One optimisation problem of a multilevel program, and the networks that its loss is given."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metalearn import tree
from metalearn.base import Estimator, Params, Rule, require_choice, require_range

PRECISIONS = ("32", "bf16")


class Net:
    """A module with the parameters that it has at this point of the program: called like the module, pure outside.

    ``params`` and ``buffers`` are by the module's own names; calls put the buffers after them in ``buffers``.
    """

    def __init__(self, module: nn.Module, params: Params, buffers: Params):
        self.module, self.params, self.buffers = module, params, buffers

    def __call__(self, *inputs: Any) -> Any:
        output, self.buffers = tree.call(self.module, self.params, self.buffers, *inputs)
        return output


class Nets:
    """The networks that a loss may see, as attributes by the names of their problems: ``nets.classifier(x)``.

    Raises:
        ValueError: the attribute is a problem to which the loss's own has no edge, or none at all.
    """

    def __init__(self, owner: str, nets: dict[str, Net]):
        self._owner, self._nets = owner, nets

    def __getattr__(self, name: str) -> Net:
        if name.startswith("_"):  # of Python's own protocols, copying for one, which expect this error
            raise AttributeError(name)
        if name not in self._nets:
            raise ValueError(f"{self._owner} asks for the network {name!r}; accepted: {', '.join(self._nets)}")
        return self._nets[name]


class Problem:
    """What one level of a program trains, by which rule, on which data. State is elsewhere: in ``Graph.init``.

    A subclass may give ``loss``, ``data`` and ``validate`` as methods instead.

    Args:
        name: a Python identifier; losses see the module as ``nets.<name>``.
        module: what is trained; for raw parameters a module that has nothing else, read by ``nets.<name>.params``.
        rule: the optimizer of this level; ``Clipped`` clips its gradient, ``Scheduled`` schedules its learning rate.
        loss: ``(nets, batch)`` -> a scalar, or a dictionary with the scalar "loss" and what else is to be logged. What it
            detaches is cut from the hypergradient, too.
        data: ``(key)`` -> a batch, a tree of tensors and a function of the key alone, so that a resumed run sees the
            same; of several ranks, each takes its equal share of the rows (the first axis of every tensor). Null where
            the loss needs none.
        unroll_steps: steps of this problem to one step of each that it is below, >= 1.
        estimator: of how this problem's solution responds to those above, any ``Responsive`` one, null for
            ``Unrolled("store")``; a level always goes on from where it is, whatever ``warm_start`` says. At the top null for
            the graph's own hypergradient, or any estimator, to which all levels below are one inner problem.
        accumulate: batches of a step, the mean of whose gradients the rule is given, >= 1.
        precision: "32", or "bf16" for autocast in the loss; parameters and gradients stay as they are.
        validation: ``(nets)`` -> numbers by name, without gradients and with all modules in evaluation mode.

    Raises:
        ValueError: the name is no identifier, a number is out of range, or there is no loss.
    """

    rank: int = 0  # of a distributed run; set by ``Graph.distribute``
    world: int = 1

    def __init__(
        self,
        name: str,
        module: nn.Module,
        rule: Rule,
        loss: Callable[[Nets, Any], Tensor | Mapping[str, Tensor]] | None = None,
        data: Callable[[Tensor], Any] | None = None,
        unroll_steps: int = 1,
        estimator: Estimator | None = None,
        accumulate: int = 1,
        precision: str = "32",
        validation: Callable[[Nets], dict[str, float]] | None = None,
    ):
        if not name.isidentifier() or name.startswith("_"):
            raise ValueError(f"name is {name!r}; accepted: a Python identifier that does not begin with an underscore")
        if loss is None and type(self).loss is Problem.loss:
            raise ValueError(
                f"{name} has the loss None; accepted: a function of (nets, batch), or a method of a subclass"
            )
        require_range("unroll_steps", unroll_steps, 1)
        require_range("accumulate", accumulate, 1)
        require_choice("precision", precision, PRECISIONS)
        self.name, self.module, self.rule, self.estimator = name, module, rule, estimator
        self.unroll_steps, self.accumulate, self.precision = unroll_steps, accumulate, precision
        self._loss, self._data, self._validation = loss, data, validation

    def loss(self, nets: Nets, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """What this problem minimises: a scalar, or a dictionary with "loss" and what is to be logged."""
        assert self._loss is not None
        return self._loss(nets, batch)

    def data(self, key: Tensor) -> Any:
        """This rank's share of the batch of ``key``. A method in its place does its own division by ``rank`` and ``world``."""
        return None if self._data is None else tree.map(self._share, self._data(key))

    def validate(self, nets: Nets) -> dict[str, float]:
        """What a user wants to know now and then, by name."""
        return {} if self._validation is None else self._validation(nets)

    @property
    def draws(self) -> bool:
        """Whether the module draws from torch's global generator, as active dropout does."""
        return tree.draws(self.module)

    def _share(self, leaf: Any) -> Any:
        if self.world == 1 or not isinstance(leaf, Tensor):
            return leaf
        rows, rest = divmod(leaf.shape[0] if leaf.ndim else 1, self.world)
        if rest:
            raise ValueError(
                f"the data of {self.name} have a tensor of shape {tuple(leaf.shape)}; accepted: a first axis that is a "
                f"multiple of the {self.world} ranks"
            )
        return leaf[self.rank * rows : (self.rank + 1) * rows]


def scalar_and_log(name: str, result: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Params]:
    """The loss, and all that is to be logged without its graph."""
    parts = {"loss": result} if isinstance(result, Tensor) else dict(result)
    if "loss" not in parts or parts["loss"].ndim:
        shown = {key: tuple(torch.as_tensor(value).shape) for key, value in parts.items()}
        raise ValueError(
            f"the loss of {name} returned {shown}; accepted: a scalar, or a dictionary with a scalar 'loss'"
        )
    return parts["loss"], {f"{name}/{key}": torch.as_tensor(value).detach() for key, value in parts.items()}
