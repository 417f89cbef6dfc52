"""Many small in-context learners trained as one: their weights are stacked, and one pass reads every member's own batch.

M members, B sequences, T examples, S tokens, D features, W token width, K classes, N = M·B.
"""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from metalearn.base import Batch, Learner
from metalearn.models.saving import describe
from metalearn.models.tokens import Tokens
from metalearn.tasks.images import ProjectedImages
from metalearn.training.callbacks import RunCheckpoint
from metalearn.training.ensemble_batches import MemberBatches
from metalearn.training.ensemble_checkpoints import PARAMETERS, Member, MemberTrainer, settings_of
from metalearn.training.in_context import InContextLearning, losses


def fit_together(
    members: Sequence[Member],
    trainer_settings: dict[str, Any],
    run_dir: str | Path,
    every_n_train_steps: int = 250,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, Any]]:
    """Train all members under one Trainer; go on from ``<run_dir>/checkpoints/last.ckpt`` where there is one.

    Args:
        members: what is trained, each with a run folder of its own.
        trainer_settings: arguments of the Trainer, the same for every member, but for ``logger``, ``callbacks`` and
            ``default_root_dir``.
        run_dir: where the ensemble keeps its own resume point.
        every_n_train_steps: optimizer steps between two of them, at least 1.
        callbacks: of the one Trainer, as a progress bar.

    Returns:
        For each member ``global_step`` and ``metrics``, the last value of all that it logged and its sizes, None
        where that is not finite.

    Raises:
        ValueError: for members that cannot be stacked, several devices, or a checkpoint of other members.
    """
    if reason := refusal(members):
        raise ValueError(reason)
    ensemble = Ensemble(members)
    trainer = Trainer(
        **trainer_settings,
        default_root_dir=run_dir,
        logger=False,
        callbacks=[*callbacks, MemberCallbacks(), RunCheckpoint(str(run_dir), every_n_train_steps)],
    )
    last = Path(run_dir) / "checkpoints" / "last.ckpt"
    trainer.fit(ensemble, ckpt_path=last if last.exists() else None, weights_only=True)
    return [_result(member) for member in ensemble.trainers]


def _result(member: MemberTrainer) -> dict[str, Any]:
    numbers = member.callback_metrics | member.lightning_module.sizes
    metrics = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
    return {"global_step": member.global_step, "metrics": metrics}


class Ensemble(LightningModule):
    """J(θ_1, …, θ_M) = J(θ_1) + … + J(θ_M), so that every member's gradient is its own.

    Each member's parameters are views of the stacked ones, and one optimizer steps them all, in one group for all
    members whose settings agree. Training batches are ``MemberBatches``; evaluation, log and checkpoints are each
    member's own module's, one after the other. ``budget/seconds`` and ``budget/peak_memory_bytes`` of a member are of
    the whole ensemble. All else is a run of its own up to rounding, which stays below 1e-4 for a hundred steps in
    float32; only a parameter on which no output depends, as the bias of a transformer's keys, drifts, because Adam
    takes the rounding of its gradient for a gradient.

    Args:
        members: of which ``refusal`` says nothing.
    """

    def __init__(self, members: Sequence[Member]):
        super().__init__()
        self.members = list(members)
        self.trainers: list[MemberTrainer] = []
        self._grads: dict[str, Tensor] = {}

    # -- set-up ------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        first = self.members[0].data.tasks
        for member in self.members:
            tasks = member.data.tasks
            if isinstance(tasks, ProjectedImages) and isinstance(first, ProjectedImages):
                tasks.share(first)
            member.data.prepare_data()

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise ValueError(f"the ensemble runs on {self.trainer.world_size} devices; accepted: 1")
        self.trainers = [MemberTrainer(self.trainer, member) for member in self.members]
        for member in self.trainers:
            member.datamodule.setup(stage)
            member.call("setup", stage)
        self.batches = MemberBatches([member.data for member in self.members])
        self.batches.trainer = self.trainer
        self._streams = [
            (m, stream) for m, member in enumerate(self.members) for stream in range(len(member.data.tasks.streams()))
        ]

    def configure_model(self) -> None:
        learners = []
        for member in self.members:
            torch.manual_seed(member.seed)  # as its own run's seed_everything
            member.model.configure_model()
            learners.append(member.model.learner)
        self.learners = nn.ModuleList(learners)

    def configure_optimizers(self) -> Any:
        self._stack()
        groups: list[dict[str, Any]] = []
        models: list[InContextLearning] = []  # the first of every group, whose schedule is that of all
        for member in self.trainers:
            built: dict[str, Any] = member.lightning_module.configure_optimizers()
            member.optimizers = [built["optimizer"]]
            member.lr_scheduler_configs = [LRSchedulerConfig(built["lr_scheduler"]["scheduler"], interval="step")]
            own_groups = built["optimizer"].param_groups
            member.places = [_place(own, member.lightning_module, groups, models) for own in own_groups]
        joint: Optimizer = self.members[0].model.configure_optimizers()["optimizer"]
        joint.param_groups.clear()
        for group in groups:
            joint.add_param_group(group)
        schedule = LambdaLR(joint, [model._learning_rate_factor for model in models])
        return {"optimizer": joint, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _stack(self) -> None:
        """Stack the weights, now that they are on their device, and make parameters and gradients views of the stacks."""
        self._params, self._buffers = stack_module_state(list(self.learners))
        self._grads = {name: torch.zeros_like(stacked) for name, stacked in self._params.items()}
        for name, stacked in self._params.items():
            stacked.grad = self._grads[name]
        for m, (member, learner) in enumerate(zip(self.members, self.learners, strict=True)):
            member.model.to(self.device)  # its weights are there; this tells the module
            for name, parameter in learner.named_parameters():
                parameter.data, parameter.grad = self._params[name].data[m], self._grads[name][m]

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["members"] = [member.identity() for member in self.trainers]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, own = checkpoint.get("members", []), [member.identity() for member in self.trainers]
        if len(saved) != len(own):
            raise ValueError(f"the checkpoint is of {len(saved)} members; accepted: {len(own)}")
        for before, now in zip(saved, own, strict=True):
            if differing := [name for name in now if before.get(name) != now[name]]:
                name = differing[0]
                raise ValueError(
                    f"the checkpoint is of other members: {name} of {now['run']} was {before.get(name)}; accepted: {now[name]}"
                )

    # -- meta-training -----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        return self.batches.train_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches by their data: in training of all members, in evaluation of the one whose stream it is."""
        if self.trainer.training:
            return self.batches.transfer_batch_to_device(batch, device, 0)
        member, stream = self._streams[dataloader_idx]
        return self.members[member].data.transfer_batch_to_device(batch, device, stream)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        x_MBTD, y_MBT = batch
        y_NT, tokens = y_MBT.flatten(0, 1), self.members[0].model.tokens
        tokens_MBSW = tokens.encode(x_MBTD.flatten(0, 1), y_NT).unflatten(0, y_MBT.shape[:2])
        logits_MBSK = self._read(tokens_MBSW)
        losses_NT = losses(tokens.at_examples(logits_MBSK.flatten(0, 1)), y_NT)
        losses_M = losses_NT.view_as(y_MBT).mean((1, 2))
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", losses_M.detach().mean().cpu(), prog_bar=True)
            self._log_members(batch, batch_idx, logits_MBSK.detach())
        return {"loss": losses_M.sum(), "losses": losses_M.detach()}

    def _read(self, tokens_MBSW: Tensor) -> Tensor:
        """Logits (M, B, S, K) of every member for its own tokens."""

        def read(params: dict[str, Tensor], buffers: dict[str, Any], tokens_BSW: Tensor) -> Tensor:
            return functional_call(self.learners[0], (params, buffers), (tokens_BSW,))

        # The CPU's own attention kernel cannot be batched: torch would call it member by member, and warn.
        plain = sdpa_kernel(SDPBackend.MATH) if tokens_MBSW.device.type == "cpu" else nullcontext()
        with plain:
            return vmap(read)(self._params, self._buffers, tokens_MBSW)

    def _log_members(self, batch: Batch, batch_idx: int, logits_MBSK: Tensor) -> None:
        """Each module's own training step says what is logged, of the logits that are there already."""
        for member, x_BTD, y_BT, logits_BSK in zip(self.members, *batch, logits_MBSK, strict=True):
            member.model._run = lambda _, logits_BSK=logits_BSK: logits_BSK
            member.model.training_step(Batch(x_BTD, y_BT), batch_idx)
            member.model.__dict__["_run"] = member.model.learner

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """In place, whatever Lightning asks for: the members' gradients are views."""
        for grad in self._grads.values():
            grad.zero_()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Every member's gradient by its own norm."""
        if gradient_clip_algorithm == "value" or not gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        norms_M = torch.stack([grad.flatten(1).norm(dim=1) for grad in self._grads.values()]).norm(dim=0)
        factors_M = (gradient_clip_val / (norms_M + 1e-6)).clamp(max=1)
        for grad in self._grads.values():
            grad.mul_(factors_M.view(-1, *[1] * (grad.ndim - 1)))

    # -- evaluation --------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> list[DataLoader]:
        return [loader for member in self.members for loader in member.data.val_dataloader()]

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        member, stream = self._streams[dataloader_idx]
        self.members[member].model.validation_step(batch, batch_idx, stream)

    def on_validation_epoch_end(self) -> None:
        for member in self.trainers:
            member.lightning_module.on_validation_epoch_end()
            member.write_log()


def _place(
    own: dict[str, Any], model: InContextLearning, groups: list[dict[str, Any]], models: list[InContextLearning]
) -> int:
    """Put a member's parameter group into the first of the same settings and schedule, or a new one; returns which."""
    settings = settings_of(own) | {"lr": own["initial_lr"]}
    for place, (group, first) in enumerate(zip(groups, models, strict=True)):
        same_schedule = (first.warmup_steps, first.decay) == (model.warmup_steps, model.decay)
        if same_schedule and settings_of(group) == settings:
            group.update({name: group[name] + own[name] for name in PARAMETERS if name in own})
            return place
    groups.append(settings | {name: own[name] for name in PARAMETERS if name in own})
    models.append(model)
    return len(groups) - 1


class MemberCallbacks(Callback):
    """Calls every member's callbacks as its own Trainer would."""

    def state_dict(self) -> dict[str, Any]:
        return {"members": [{c.state_key: c.state_dict() for c in m.callbacks} for m in self.ensemble.trainers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member, states in zip(self.ensemble.trainers, state_dict["members"], strict=True):
            for callback in member.callbacks:
                callback.load_state_dict(states[callback.state_key])

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.ensemble: Ensemble = pl_module

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for member in self.ensemble.trainers:
            member.loggers[0].save()  # makes its folder, as Lightning does, before a callback writes there
            member.call("on_train_start")
            member.lightning_module.on_train_start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        own_losses = (outputs["losses"] / trainer.accumulate_grad_batches).unbind()
        for member, loss, x_BTD, y_BT in zip(self.ensemble.trainers, own_losses, *batch, strict=True):
            member.call("on_train_batch_end", {"loss": loss}, Batch(x_BTD, y_BT), batch_idx)
            if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                member.write_log()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        for member in self.ensemble.trainers:
            member.call("on_train_end")


# -- what cannot be stacked --------------------------------------------------------------------------------------------


def refusal(members: Sequence[Member]) -> str | None:
    """Why the members cannot be trained as one, in a sentence that names what differs; None where they can.

    They may differ in seed, tasks of the same sizes, the optimizer's settings, warm-up and decay, and in all that
    concerns evaluation. Whatever the Trainer is told is theirs in common. The optimizer must treat every parameter by
    itself, as all of torch do but L-BFGS.
    """
    if not members:
        return "there are no members; accepted: at least 1"
    traits = [_traits(member) for member in members]
    for member, own in zip(members, traits, strict=True):
        if own["model"] is not InContextLearning:
            return f"{member.run_dir} trains {own['model'].__name__}; accepted in an ensemble: InContextLearning"
        if own["compile"]:
            return f"compile is True in {member.run_dir}; accepted in an ensemble: False"
        if not own["stackable"]:
            return f"{own['learner']} of {member.run_dir} cannot be stacked; accepted: a learner with can_be_stacked"
        if own["optimizer"] is torch.optim.LBFGS:
            return f"optimizer is LBFGS in {member.run_dir}; accepted in an ensemble: any other of torch's"
        if differing := [name for name in own if own[name] != traits[0].get(name)]:
            values = (
                f"{own[differing[0]]} in {member.run_dir} and {traits[0].get(differing[0])} in {members[0].run_dir}"
            )
            return f"{differing[0]} is {values}; accepted in one ensemble: the same"
    return None


def _traits(member: Member) -> dict[str, Any]:
    """Whatever decides whether a member can be stacked; the learner is built for it, on random numbers that nobody misses."""
    model, data = member.model, member.data
    if not isinstance(model, InContextLearning):
        return {"model": type(model)}
    tokens = Tokens(model.format, data.tasks.num_features, data.tasks.num_classes)
    with torch.random.fork_rng(devices=[]):
        learner: Learner = model.build_learner(tokens.width, data.tasks.num_classes)
    optimizer, described = model.build_optimizer(learner.named_parameters()), describe(learner)
    return {
        "model": type(model),
        "compile": model.compile_learner,
        "stackable": type(learner).can_be_stacked,
        "tokens": model.format,
        "num_features": data.tasks.num_features,
        "num_classes": data.tasks.num_classes,
        "length": data.length,
        "meta_batch_size": data.meta_batch_size,
        "learner": described["class_path"],
        **{f"learner.{name}": value for name, value in described["init_args"].items()},
        "optimizer": type(optimizer),
    }
