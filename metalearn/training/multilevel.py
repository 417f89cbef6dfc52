"""Run a multilevel program: one step of its top is one training step, and every level steps by its own rule."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import warnings
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from metalearn import tree
from metalearn.base import Params, Tree
from metalearn.multilevel.graph import Graph
from metalearn.multilevel.program import Program
from metalearn.training.callbacks import Cost
from metalearn.training.meta_gradient import Evaluated, mean_over_ranks

STATE = "levels"


class MultilevelLearning(Evaluated):
    """A multilevel program under the Trainer.

    A training step is one step of the graph. Every level steps inside it by its own rule, so Lightning is given no
    optimizer, and what it would do to gradients belongs to the problems: ``Clipped`` for clipping, ``Scheduled`` for
    schedules, ``accumulate`` and ``precision`` of each problem. The Trainer's settings of these names are refused.

    Ranks share every batch and take equal steps, as ``Graph.distribute`` says. Checkpoints hold the states of all levels
    and of their estimators, and every draw is keyed by the step: a resumed run ends as one that was not stopped. The
    module's parameters are copies of those of the program's tops: what the program learns.

    Args:
        program: a ``Program``, which has data and an evaluation, or a ``Graph`` alone, which is evaluated by what its
            problems validate.

    Raises:
        ValueError: for settings of the Trainer that belong to the problems, a strategy other than one device and "ddp",
        a checkpoint of another program, or ``test`` of a graph alone.
    """

    def __init__(self, program: Program | Graph):
        super().__init__()
        self.program = program
        self.learned: nn.ParameterDict | None = None
        self.graph: Graph
        self.state: Tree = None

    # -- set-up ------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        if isinstance(self.program, Program):
            self.program.open(test=False)

    def setup(self, stage: str) -> None:
        self._refuse_settings(stage)
        if isinstance(self.program, Program):
            self.program.open(test=stage == "test")
        self.graph = self.program.graph() if isinstance(self.program, Program) else self.program
        if self.trainer.world_size > 1:
            self.graph.distribute(self.trainer.global_rank, self.trainer.world_size, mean_over_ranks)

    def _refuse_settings(self, stage: str) -> None:
        trainer, where = self.trainer, "accepted: {}, and the Trainer's left alone"
        if stage == "test" and isinstance(self.program, Graph):
            raise ValueError("a Graph alone has no test data; accepted: validate, or a Program with an evaluation")
        if stage != "fit":
            return
        if trainer.gradient_clip_val:
            raise ValueError(
                f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, and every problem has an optimizer of its "
                f"own; {where.format('a rule of the class Clipped')}"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, and every problem has an "
                f"optimizer of its own; {where.format('accumulate of a problem')}"
            )
        if trainer.precision != "32-true":
            raise ValueError(
                f"trainer.precision is {trainer.precision}, and every problem has its own; "
                f"{where.format('precision of a problem')}"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"trainer.strategy is {type(trainer.strategy).__name__}, which would shard the module's parameters and "
                "not the levels'; accepted: one device, or ddp"
            )

    def configure_model(self) -> None:
        if self.learned is None:
            self.state = self.graph.init(self._key("init"))
            values = {name: nn.Parameter(value.clone()) for name, value in self._tops().items()}
            self.learned = nn.ParameterDict(values)

    def _key(self, stage: str) -> Tensor:
        """The run's key of a stage, on the CPU: steps are counted by the state."""
        return self.trainer.datamodule.key(stage, 0, torch.device("cpu"))

    def _tops(self) -> Params:
        """The parameters of the tops; names of module parameters must not have dots."""
        levels = self.state["levels"]
        params = {top: levels[top].params for top in self.graph.edges.tops}
        return {f"{top}:{name}".replace(".", ":"): value for top in params for name, value in params[top].items()}

    def configure_optimizers(self) -> None:
        # Lightning warns right after this call. Only under automatic optimisation are steps counted without an optimizer.
        warnings.filterwarnings("ignore", message="`LightningModule.configure_optimizers` returned `None`")

    def on_fit_start(self) -> None:
        self._to_device()
        rank_zero_info(f"\n{self.graph}\n")

    def _to_device(self) -> None:
        self.state = tree.map(lambda leaf: leaf.to(self.device), self.state)

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        self.state, log = self.graph.step(self.state, self._key("step").to(self.device))
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            numbers = {f"train/{name}": value.detach().float() for name, value in log.items()}
            self.log_dict(numbers, sync_dist=True, batch_size=1)
        assert self.learned is not None
        with torch.no_grad():
            for name, value in self._tops().items():
                self.learned[name].copy_(value)
        # Lightning calls backward, and DDP waits for the gradient of every parameter: zeros, that nothing uses.
        return torch.stack([0.0 * value.sum() for value in self.learned.values()]).sum()

    @property
    def step_cost(self) -> Cost:
        """Steps and gradients of all levels to one step of the top; what responses add depends on the estimators."""
        steps = _steps(self.graph)
        gradients = {name: count * self.graph.problems[name].accumulate for name, count in steps.items()}
        return Cost(sum(steps.values()), sum(gradients.values()), None)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self._evaluate("validation")

    def test_step(self, batch: int, batch_idx: int) -> None:
        self._evaluate("test")

    def _evaluate(self, stage: str) -> None:
        self._to_device()
        with torch.inference_mode(False), torch.no_grad():  # programs train other runs to compare with
            state = tree.map(torch.clone, self.state)
            if isinstance(self.program, Program):
                key = self._key("init").to(self.device)
                self.report(stage, self.program.evaluate(state, key, test=stage == "test"))
            else:
                self.report(stage, self.graph.validate(state))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = tree.pack(self.state)
        checkpoint["program"] = self._card()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, own = checkpoint.get("program", {}), self._card()
        for name in own:
            if saved.get(name) != own[name] and (self.trainer.state.fn == "fit" or name == "program"):
                raise ValueError(
                    f"the checkpoint was trained with {name} {saved.get(name)}, not {own[name]}; accepted: the same "
                    f"{name}, or another --run_dir"
                )
        self.state = tree.unpack(self.state, checkpoint[STATE])

    def _card(self) -> dict[str, Any]:
        """What a resumed run must not change without saying so."""
        data = self.program.record() if isinstance(self.program, Program) else {}
        return {"program": type(self.program).__name__, "graph": str(self.graph), "data": data}


def _steps(graph: Graph) -> dict[str, int]:
    """Steps of every problem to one of the tops, where tops take turns."""
    steps = dict.fromkeys(graph.edges.tops, 1)
    for name in reversed(graph.edges.upwards):
        if name not in steps:
            steps[name] = graph.problems[name].unroll_steps * max(steps[upper] for upper in graph.edges.uppers[name])
    return steps
