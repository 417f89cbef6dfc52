"""A member of an ensemble behind its own Trainer's face, so that its log and checkpoints are those of a run of its own."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch import Tensor
from torch.optim import Optimizer

from metalearn.training.data import TaskBatches
from metalearn.training.in_context import InContextLearning

PARAMETERS = ("params", "param_names")  # of a parameter group


class Member(NamedTuple):
    """A run as it would be on its own, built and not yet set up."""

    model: InContextLearning
    data: TaskBatches
    run_dir: Path
    seed: int  # its ``seed_everything``, from which the weights are drawn
    callbacks: Sequence[Callback] = ()  # of its Trainer: run record, budget, checkpoints


class MemberTrainer:
    """The ensemble's Trainer with the member's own data, module, optimizer, folder, log, callbacks and checkpoints.

    Of the callbacks, ``setup``, ``on_train_start``, ``on_train_batch_end`` and ``on_train_end`` are called.
    """

    def __init__(self, trainer: Trainer, member: Member):
        self._trainer, self._seed, self._fresh = trainer, member.seed, {}
        self.lightning_module, self.datamodule, self.default_root_dir = member.model, member.data, str(member.run_dir)
        own = [*member.callbacks, *member.model.configure_callbacks()]
        self.callbacks = sorted(own, key=lambda callback: isinstance(callback, Checkpoint))  # as Lightning does
        self.loggers = [CSVLogger(member.run_dir, name="logs", flush_logs_every_n_steps=1)]
        self.callback_metrics: dict[str, float] = {}
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        self.places: list[int] = []  # of its parameter groups among the ensemble's
        self.strategy = MemberStrategy(trainer.strategy, member.model)
        self._checkpoint_connector = _CheckpointConnector(self)  # type: ignore[arg-type]
        member.model.trainer = member.data.trainer = self  # type: ignore[assignment]
        member.model.log = self.log  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, self.lightning_module, *arguments)

    # -- log ---------------------------------------------------------------------------------------------------------

    @property
    def log_dir(self) -> str:
        return self.loggers[0].log_dir

    def log(self, name: str, value: Tensor, **options: Any) -> None:
        """In the place of the module's own, which belongs to a running loop."""
        if not self.sanity_checking:
            self._fresh[name] = value

    def write_log(self) -> None:
        """A row of what was logged since the last one, under the number of the step just taken."""
        numbers = {name: float(value) for name, value in self._fresh.items()}
        self._fresh.clear()
        self.callback_metrics |= numbers
        for logger in self.loggers if numbers else ():
            logger.log_metrics({"epoch": self.current_epoch, **numbers}, self.global_step - 1)
            logger.save()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must not change when the ensemble is resumed: builtins."""
        model, learner = self.lightning_module, self.lightning_module.learner
        assert learner is not None
        groups = model.build_optimizer(learner.named_parameters()).param_groups
        optimizer = [settings_of(group) for group in groups]
        schedule = {"warmup_steps": model.warmup_steps, "decay": model.decay}
        data = {name: value for name, value in self.datamodule.state_dict().items() if name in ("seed", "fingerprint")}
        run = {"run": Path(self.default_root_dir).name, "seed_everything": self._seed}
        return run | {"card": model.card(), "data": data, "optimizer": optimizer} | schedule

    def save_checkpoint(self, path: str | Path, weights_only: bool | None = None) -> None:
        """What its own Trainer would save."""
        self._take_optimizer_state()
        Trainer.save_checkpoint(self, path, weights_only)  # type: ignore[arg-type]

    def _take_optimizer_state(self) -> None:
        """Bring the member's optimizer and schedule, which are never stepped, to where the ensemble's are."""
        (optimizer,), (config,) = self.optimizers, self.lr_scheduler_configs
        (joint,), (joint_config,) = self._trainer.optimizers, self._trainer.lr_scheduler_configs
        for own, place in zip(optimizer.param_groups, self.places, strict=True):
            own.update(settings_of(joint.param_groups[place]))
            optimizer.state.update({p: joint.state[p] for p in own["params"] if p in joint.state})
        schedule, joint_schedule = config.scheduler, joint_config.scheduler
        schedule.last_epoch, schedule._step_count = joint_schedule.last_epoch, joint_schedule._step_count
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


class MemberStrategy:
    """The ensemble's strategy, but for whose weights it gathers."""

    def __init__(self, strategy: Any, module: InContextLearning):
        self._strategy, self._module = strategy, module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Copies: a file of views would hold the weights of all members."""
        return {name: value.clone() for name, value in self._module.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {name: value for name, value in group.items() if name not in PARAMETERS}
