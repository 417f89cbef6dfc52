"""Learn what an inner training run depends on: one estimate of the meta-gradient is one training step."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metalearn import random, tree
from metalearn.base import Estimator, InnerProblem, MetaGradient, Params, Tree, require_range
from metalearn.estimators.forward import TwoPhase, ZerothOrder
from metalearn.problems.mixture import Mixture, OverMixture
from metalearn.training.callbacks import Cost
from metalearn.training.data import request_loader
from metalearn.unroll import Tasks

STATE = "estimator"


class OuterSteps(LightningDataModule):
    """The numbers of the outer steps. Data belong to the inner problem, which draws them by a key made of seed and number.

    Args:
        seed: of every draw of the run; null takes ``seed_everything``.
    """

    def __init__(self, seed: int | None = None):
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        return request_loader(self._numbers)

    def val_dataloader(self) -> DataLoader:
        return request_loader(lambda: iter([0]))

    def test_dataloader(self) -> DataLoader:
        return request_loader(lambda: iter([0]))

    def _numbers(self) -> Iterator[int]:
        """Global step times accumulation plus micro-batch: a resumed run goes on with the next."""
        assert self.trainer is not None
        return itertools.count(self.trainer.global_step * self.trainer.accumulate_grad_batches)

    def key(self, stage: str, number: int, device: torch.device) -> Tensor:
        """The key of one step."""
        return random.key(self.seed or 0, stage, number, device=device)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.trainer is not None
        if self.trainer.state.fn == "fit" and state_dict["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint was trained with seed {state_dict['seed']}, not {self.seed}; accepted: the same seed, "
                "or another --run_dir"
            )


class Evaluated(LightningModule):
    """A module whose evaluation is a few named numbers: logged in ``fit``, written to ``<stage>.json`` by the commands."""

    def report(self, stage: str, values: dict[str, float]) -> None:
        """Log ``values`` under ``<stage>/``; under ``metalearn validate`` and ``test`` write them into the run folder."""
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=True, batch_size=1)
        if self.trainer.state.fn != "fit" and self.trainer.is_global_zero:
            run_dir = Path(self.trainer.default_root_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / f"{stage}.json").write_text(json.dumps(values, indent=1))


class MetaGradientLearning(Evaluated):
    """Gradient descent on the meta-objective of an inner problem, the gradient by any estimator.

    A training step is one window of the inner run (or of all particles) and returns the surrogate sum meta * g with
    the estimate g held fixed, whose gradient is g: clipping, accumulation, schedulers, precision and averaging over
    ranks are the Trainer's. Ranks divide outer examples, directions or antithetic pairs, as the estimator says, so that
    any number of ranks gives the gradient of one. Checkpoints hold the estimator's state, inner runs included, and
    every draw is keyed by the step: a resumed run ends with the weights of one that was not stopped.

    Args:
        problem: what is learned, and the inner run it is learned through.
        estimator: how that run is differentiated.
        steps: inner steps of one window, at least 1.
        optimizer: class and settings of any torch optimizer, for the meta-parameters.
        lr_scheduler: class and settings of any torch scheduler, stepped with the optimizer; null for none.

    Raises:
        ValueError: for values out of range, a pair of problem and estimator that cannot work, or a checkpoint of
        another problem or estimator.
    """

    needed_everywhere: ClassVar[tuple[str, ...]] = ("problem", "division")  # of the card, not for going on alone

    def __init__(
        self,
        problem: InnerProblem,
        estimator: Estimator,
        steps: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
    ):
        super().__init__()
        require_range("steps", steps, 1)
        self.problem, self.estimator, self.steps = problem, estimator, steps
        self.build_optimizer, self.build_scheduler = optimizer, lr_scheduler
        self.meta_parameters: nn.ParameterDict | None = None
        self.estimator_state: Tree = None
        self._saved_state: dict[str, Tensor] | None = None

    # -- set-up ------------------------------------------------------------------------------------------------------

    @property
    def key(self) -> Any:
        """``key(stage, number)`` on the module's device."""
        return functools.partial(self.trainer.datamodule.key, device=self.device)

    def prepare_data(self) -> None:
        self.problem.open(test=False)

    def setup(self, stage: str) -> None:
        self.problem.open(test=stage == "test")
        if reason := self.estimator.refusal(self.problem):
            raise ValueError(
                f"{type(self.estimator).__name__} cannot be used on {type(self.problem).__name__}: {reason}"
            )
        if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"trainer.strategy is {type(self.trainer.strategy).__name__}, which shards parameters; accepted: auto, ddp "
                "(inner runs are functional calls, which see no shards, and forward mode has no rule for them)"
            )
        if "bf16" in self.trainer.precision and _takes_differences(self.estimator):
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}, in whose rounding the differences of ZerothOrder drown; "
                "accepted: 32"
            )
        divided = self.problem if self.estimator.shards == "outer" else self.estimator
        divided.rank, divided.world = self.trainer.global_rank, self.trainer.world_size
        if divided.world > 1 and divided is self.problem and not isinstance(self.problem, Tasks):
            self.estimator.reduce = mean_over_ranks

    def configure_model(self) -> None:
        if self.meta_parameters is None:
            meta = self.problem.init_meta(self.key("meta", 0))
            named = {_stored(name): nn.Parameter(value.detach().clone()) for name, value in meta.items()}
            self.meta_parameters = nn.ParameterDict(named)

    @property
    def meta(self) -> Params:
        """The meta-parameters by name, cut from any graph."""
        assert self.meta_parameters is not None
        return {_given(name): value.detach().clone() for name, value in self.meta_parameters.items()}

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer(self.parameters())
        if self.build_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.build_scheduler(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        self.estimator_state = self.estimator.init(self.problem, self.meta, self.key("estimator", 0))
        if self._saved_state is not None:
            self.estimator_state = tree.unpack(self.estimator_state, self._own_share(self._saved_state))
            self._saved_state = None

    # -- meta-training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        found = self.estimate(batch)
        self.estimator_state = found.state
        norm, logs = tree.norm(found.grad), (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0
        if (logs or self.device.type == "cpu") and not norm.isfinite():  # a GPU is not waited for at every step
            raise ValueError(
                f"the meta-gradient of step {batch} is {float(norm)}: the inner run diverges, or its derivative does; "
                "accepted: a smaller inner learning rate, a shorter window, or an estimator that smooths"
            )
        if logs:
            self.log("train/loss", found.loss.detach().float().cpu(), prog_bar=True)
            numbers = {name: value.detach().float().cpu() for name, value in found.diagnostics.items()}
            self.log_dict({f"train/{name}": value for name, value in numbers.items()})
            self.log("train/grad_norm", norm.float().cpu())
        assert self.meta_parameters is not None
        terms = [(value * found.grad[_given(name)]).sum() for name, value in self.meta_parameters.items()]
        return torch.stack(terms).sum()

    def estimate(self, number: int) -> MetaGradient:
        """The estimate of outer step ``number`` from the present state."""
        key = self.key("step", number)
        batches = self.problem.batches(random.fold(key, "data"), self.steps)
        with torch.no_grad():
            return self.estimator.estimate(
                self.problem, self.meta, self.estimator_state, batches, random.fold(key, "estimate")
            )

    @property
    def step_cost(self) -> Cost:
        """Inner steps along one run of the window; what the estimator adds to it depends on the estimator."""
        windows = self.trainer.accumulate_grad_batches
        return Cost(self.steps * windows, windows, None)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self._evaluate("validation")

    def test_step(self, batch: int, batch_idx: int) -> None:
        self._evaluate("test")

    def _evaluate(self, stage: str) -> None:
        with torch.inference_mode(False), torch.no_grad():  # problems train inner runs to evaluate what was learned
            meta = {name: value.clone() for name, value in self.meta.items()}
            self.report(stage, self.problem.evaluate(meta, self.key("evaluate", 0), test=stage == "test"))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not all(value.isfinite().all() for value in self.meta.values()):
            raise ValueError("the meta-parameters are not finite; the last checkpoint is kept as it was")
        checkpoint[STATE] = self._all_shares(tree.pack(self.estimator_state))
        checkpoint["problem"] = self._card()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, own = checkpoint.get("problem", {}), self._card()
        for name in own:
            if saved.get(name) != own[name] and (self.trainer.state.fn == "fit" or name in self.needed_everywhere):
                raise ValueError(
                    f"the checkpoint was trained with {name} {saved.get(name)}, not {own[name]}; accepted: the same "
                    f"{name}, or another --run_dir"
                )
        self._saved_state = checkpoint.get(STATE)

    def _card(self) -> dict[str, Any]:
        """What a resumed run must not change without saying so."""
        data = self.problem.record()
        names = {"problem": type(self.problem).__name__, "estimator": type(_in_a_mixture(self.estimator)).__name__}
        return names | {"data": data, "division": data["division"], "steps": self.steps}

    def _all_shares(self, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pairs of all ranks, in their global order; what is shared is the same on each."""
        if self.trainer.world_size == 1:
            return packed
        return {
            name: self.all_gather(leaf).flatten(0, 1) if self._is_divided(name, leaf) else leaf
            for name, leaf in packed.items()
        }

    def _own_share(self, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return {
            name: leaf.chunk(world)[rank].clone() if self._is_divided(name, leaf) else leaf
            for name, leaf in packed.items()
        }

    def _is_divided(self, name: str, leaf: Tensor) -> bool:
        """Whether a leaf of the estimator's state has a first axis of antithetic pairs or tasks, which ranks divide."""
        problem, parts = self.problem, name.split("/")
        if isinstance(problem, Mixture):
            problem, parts = problem.problems[int(parts[0])], parts[1:]
        divides_tasks = self.estimator.shards == "outer" and isinstance(problem, Tasks)
        return "pairs" in parts[:2] or (divides_tasks and leaf.ndim > 0)


def _in_a_mixture(estimator: Estimator) -> Estimator:
    return estimator.estimator if isinstance(estimator, OverMixture) else estimator


def _takes_differences(estimator: Estimator) -> bool:
    estimator = _in_a_mixture(estimator)
    parts = (estimator.first, estimator.second) if isinstance(estimator, TwoPhase) else (estimator,)
    return any(isinstance(part, ZerothOrder) for part in parts)


def mean_over_ranks(params: Params) -> Params:
    """The mean over all ranks, entry by entry, in one message for each precision."""
    found = {}
    for dtype in dict.fromkeys(value.dtype for value in params.values()):  # in the same order on every rank
        joined, split = tree.ravel({name: value for name, value in params.items() if value.dtype == dtype})
        torch.distributed.all_reduce(joined)
        found |= split(joined / torch.distributed.get_world_size())
    return {name: found[name] for name in params}


def _stored(name: str) -> str:
    """Parameter names of modules must not have dots."""
    return name.replace(".", ":")


def _given(name: str) -> str:
    return name.replace(":", ".")
