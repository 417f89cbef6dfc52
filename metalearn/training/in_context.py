"""Meta-train a sequence model to learn in context: the loss at every position of random tasks.

B sequences, T examples, K classes (1 in regression), P reported positions.
"""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from metalearn.base import Batch, Learner, TaskDistribution, require_choice, require_range
from metalearn.models.saving import CARD, describe
from metalearn.models.tokens import FORMATS, Tokens
from metalearn.training.callbacks import Cost, StudyCheckpoints

REPORTED_POSITIONS = (0, 1, 2, 5, 10, 20, 31, 50, 99)


class InContextLearning(LightningModule):
    """J(θ) = E_tasks mean_j loss(f_θ(D_1:j-1, x_j), y_j), the loss at every position j of a sequence.

    The loss is cross-entropy, or in regression the squared error. Sizes come from the data module's tasks, so a config
    states them once. Evaluation logs loss, accuracy (in regression ``squared_error``) at the first and last position
    and what was gained between them ("improvement") for every stream; ``validate`` and ``test`` also write
    ``<stage>.csv`` into the run folder: accuracy by number of examples seen, for the learner and for every oracle of
    the tasks on the very same sequences. ``train/`` numbers are of the step's last micro-batch on the first rank,
    before the step. Optimizers are given the learner's parameters with their names.

    Args:
        learner: class and settings of the sequence model; it is called with the token width and the number of
            classes.
        tokens: "paper" (x_j, y_{j-1}), "shift" (x_j, x_{j-1}, y_{j-1}) or "interleaved".
        optimizer: class and settings of any torch optimizer.
        warmup_steps: steps of linear warm-up of the learning rate, at least 0.
        decay: "none", or "cosine" down to zero at ``max_steps``.
        checkpoint_steps: "log" keeps light weight-only checkpoints at log-spaced steps and when the loss leaves its
            plateau; null keeps none.
        plateau_margin: nats below ln K (in regression: below the targets' mean square) at which the smoothed loss
            counts as having left the plateau, in (0, ln K).
        compile: run the learner through torch.compile (a gain on GPUs; none on CPUs).

    Raises:
        ValueError: for values out of range, or a checkpoint of another learner.

    Source: Kirsch et al. 2022, "General-Purpose In-Context Learning by Meta-Learning Transformers", Algorithm 2.
    """

    def __init__(
        self,
        learner: Callable[[int, int], Learner],
        tokens: str,
        optimizer: OptimizerCallable,
        warmup_steps: int = 0,
        decay: str = "none",
        checkpoint_steps: str | None = None,
        plateau_margin: float = 0.05,
        compile: bool = False,
    ):
        super().__init__()
        require_choice("tokens", tokens, FORMATS)
        require_range("warmup_steps", warmup_steps, 0)
        require_choice("decay", decay, ("none", "cosine"))
        require_choice("checkpoint_steps", checkpoint_steps, ("log", None))
        require_range("plateau_margin", plateau_margin, 0)
        self.build_learner, self.build_optimizer, self.format = learner, optimizer, tokens
        self.warmup_steps, self.decay, self.compile_learner = warmup_steps, decay, compile
        self.checkpoint_steps, self.plateau_margin = checkpoint_steps, plateau_margin
        self.learner: Learner | None = None
        self._run: Callable[[Tensor], Tensor] | None = None
        self._totals: dict[str, dict[str, Tensor]] = {}

    # -- set-up ------------------------------------------------------------------------------------------------------

    @property
    def data(self) -> Any:
        """The data module, which knows the tasks and the length of a sequence."""
        return self.trainer.datamodule

    def configure_model(self) -> None:
        if self.learner is not None:
            return
        tasks = self.data.tasks
        require_range("plateau_margin", self.plateau_margin, 0, tasks.chance_loss)
        self.tokens = Tokens(self.format, tasks.num_features, tasks.num_classes)
        self.learner = self.build_learner(self.tokens.width, tasks.num_classes)
        # In a dictionary of its own: a compiled module must not become a submodule a second time.
        self.__dict__["_run"] = torch.compile(self.learner) if self.compile_learner else self.learner

    def check(self, tasks: TaskDistribution) -> None:
        """Build learner and optimizer for these tasks, without memory for either. ``ValueError`` where they refuse."""
        tokens = Tokens(self.format, tasks.num_features, tasks.num_classes)
        with torch.device("meta"):
            self.build_optimizer(self.build_learner(tokens.width, tasks.num_classes).named_parameters())

    def configure_optimizers(self) -> Any:
        assert self.learner is not None
        optimizer = self.build_optimizer(self.learner.named_parameters())
        schedule = LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[Callback]:
        return [StudyCheckpoints(self.plateau_margin)] if self.checkpoint_steps == "log" else []

    def _learning_rate_factor(self, step: int) -> float:
        """min(1, (s + 1) / warm-up), times (1 + cos(pi s / S)) / 2 under "cosine"."""
        factor = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay == "cosine":
            factor *= (1 + math.cos(math.pi * min(1.0, step / self.trainer.max_steps))) / 2
        return factor

    def on_train_start(self) -> None:
        assert self.learner is not None
        for logger in self.trainer.loggers:
            logger.log_metrics(self.sizes, self.trainer.global_step)

    @property
    def sizes(self) -> dict[str, float]:
        """Parameters of the learner, and floats that its last prediction of a sequence can depend on."""
        assert self.learner is not None
        state = self.learner.state_size(self.tokens.num_tokens(self.data.length))
        return {"model/parameters": sum(p.numel() for p in self.learner.parameters()), "model/state_size": state}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def card(self) -> dict[str, Any]:
        """What ``metalearn.models.saving`` needs to rebuild the learner: builtins only."""
        assert self.learner is not None
        sizes = {"num_features": self.tokens.num_features, "num_classes": self.tokens.num_classes}
        card = {"learner": describe(self.learner), "tokens": self.format, **sizes, "length": self.data.length}
        if self.tokens.num_classes == 1:  # what a regressor scales its targets to
            card["target_scale"] = math.sqrt(self.data.tasks.chance_loss)
        return card

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CARD] = self.card()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, own = _settings(checkpoint.get(CARD, {})), _settings(self.card())
        of_data = ("length", "target_scale")
        differing = [name for name in own if name not in of_data and saved.get(name) != own[name]]
        if differing:
            name = differing[0]
            raise ValueError(
                f"the checkpoint is of another model: its {name} is {saved.get(name)}; accepted: {own[name]}"
            )
        if self.trainer.state.fn == "fit":
            self._impose_optimizer_settings(checkpoint)

    def _impose_optimizer_settings(self, checkpoint: dict[str, Any]) -> None:
        """The configuration beats the checkpoint, whose optimizer would otherwise bring back its own learning rate."""
        assert self.learner is not None
        saved = checkpoint["optimizer_states"][0]["param_groups"]
        factor = self._learning_rate_factor(checkpoint["global_step"])
        for old, own in zip(saved, self.build_optimizer(self.learner.named_parameters()).param_groups, strict=True):
            own = {name: value for name, value in own.items() if name not in ("params", "param_names")}
            if differing := own.keys() ^ (old.keys() - {"params", "param_names", "initial_lr"}):
                raise ValueError(
                    f"the checkpoint is of another optimizer, which differs in {', '.join(sorted(differing))}; accepted: "
                    "the same optimizer, or another --run_dir"
                )
            old.update(own, lr=own["lr"] * factor, initial_lr=own["lr"])
        checkpoint["lr_schedulers"][0]["base_lrs"] = [group["initial_lr"] for group in saved]

    # -- meta-training -----------------------------------------------------------------------------------------------

    def forward(self, x_BTD: Tensor, y_BT: Tensor) -> Tensor:
        """Logits (B, T, K) for every example given those before it."""
        assert self._run is not None
        return self.tokens.at_examples(self._run(self.tokens.encode(x_BTD, y_BT)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits_BTK = self(*batch)
        loss = losses(logits_BTK, batch.y).mean()
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            # On the host: the progress bar asks for the number again at every step.
            self.log("train/loss", loss.detach().cpu(), prog_bar=True)
            scores_T = scores(answers(logits_BTK.detach()), batch.y).float().mean(0).cpu()
            self.log_dict({f"train/{name}": value for name, value in self._summary(scores_T).items()})
        return loss

    @property
    def step_cost(self) -> Cost:
        """Cost of one optimizer step over all ranks; forward and backward count as three forward passes."""
        assert self.learner is not None
        tokens = self.data.meta_batch_size * self.tokens.num_tokens(self.data.length)
        flops = 3 * tokens * self.learner.flops_per_token(self.tokens.num_tokens(self.data.length))
        return Cost(tokens, self.trainer.accumulate_grad_batches * self.trainer.world_size, flops)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    @property
    def _positions(self) -> list[int]:
        last = self.data.length - 1
        return sorted({*(p for p in REPORTED_POSITIONS if p < last), last})

    def _zeros(self) -> dict[str, Tensor]:
        """Nothing seen yet: what a rank without a batch adds, so that all ranks reduce the same tensors.

        Of every method there are the sums of its scores and of their squares, by position.
        """
        oracles = self.data.tasks.oracles() if self.trainer.state.fn != "fit" else {}
        sums = {"learner": (2, self.data.length)} | dict.fromkeys(oracles, (2, len(self._positions)))
        shapes = {"sequences": (), "loss": ()} | sums
        return {name: torch.zeros(shape, dtype=torch.float64, device=self.device) for name, shape in shapes.items()}

    def _evaluate(self, batch: Batch, dataloader_idx: int) -> None:
        totals = self._totals.setdefault(self.data.tasks.streams()[dataloader_idx], self._zeros())
        logits_BTK, positions = self(*batch).float(), self._positions
        totals["sequences"] += len(batch.y)
        totals["loss"] += losses(logits_BTK, batch.y).mean(1).sum()
        totals["learner"] += _sums(scores(answers(logits_BTK), batch.y))
        with torch.autocast(self.device.type, enabled=False):  # the learner's low precision is not the oracles'
            for name, oracle in self.data.tasks.oracles().items():
                if name in totals:
                    totals[name] += _sums(scores(oracle(batch.x, batch.y, positions), batch.y[:, positions]))

    def _report(self, stage: str) -> None:
        rows = []
        for stream in self.data.tasks.streams():
            totals = self._totals.pop(stream, None) or self._zeros()
            if self.trainer.world_size > 1:
                totals = {k: self.trainer.strategy.reduce(v, reduce_op="sum") for k, v in totals.items()}
            count, loss = totals.pop("sequences"), totals.pop("loss")
            summary = {"loss": loss / count} | self._summary(totals["learner"][0] / count)
            self.log_dict({f"{stage}/{stream}/{name}": value for name, value in summary.items()}, rank_zero_only=True)
            rows += [row for name, sums in totals.items() for row in self._rows(stream, name, sums, int(count))]
        if self.trainer.state.fn != "fit" and self.trainer.is_global_zero:
            run_dir = Path(self.trainer.default_root_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            with open(run_dir / f"{stage}.csv", "w", newline="") as file:
                columns = ("stream", "method", "position", "sequences", self._quantity, "standard_error")
                csv.writer(file).writerows([columns, *rows])

    def _rows(self, stream: str, method: str, sums: Tensor, count: int) -> list[tuple]:
        positions = range(self.data.length) if method == "learner" else self._positions
        means, squares = (sums / count).tolist()
        errors = [math.sqrt(max(0.0, s - m**2) / max(1, count - 1)) for m, s in zip(means, squares, strict=True)]
        return [(stream, method, p, count, m, e) for p, m, e in zip(positions, means, errors, strict=True)]

    @property
    def _quantity(self) -> str:
        return "squared_error" if self.tokens.num_classes == 1 else "accuracy"

    def _summary(self, scores_T: Tensor) -> dict[str, Tensor]:
        first, last = scores_T[0], scores_T[-1]
        gained = first - last if self.tokens.num_classes == 1 else last - first
        return {f"{self._quantity}_first": first, f"{self._quantity}_last": last, "improvement": gained}


def losses(logits_BTK: Tensor, y_BT: Tensor) -> Tensor:
    """Loss (B, T) at every position: cross-entropy of class indices, or squared error of numbers (K = 1)."""
    if y_BT.is_floating_point():
        return (logits_BTK.squeeze(-1) - y_BT).square()
    return functional.cross_entropy(logits_BTK.flatten(0, 1), y_BT.flatten(), reduction="none").view_as(y_BT)


def answers(logits_BTK: Tensor) -> Tensor:
    """What the learner says (B, T), as y is: the likeliest class, or the number (K = 1)."""
    return logits_BTK.squeeze(-1) if logits_BTK.shape[-1] == 1 else logits_BTK.argmax(-1)


def scores(answers_BT: Tensor, y_BT: Tensor) -> Tensor:
    """Whether each answer is right, or in regression its squared error: (B, T)."""
    return (answers_BT - y_BT).square() if y_BT.is_floating_point() else answers_BT == y_BT


def _sums(scores_BP: Tensor) -> Tensor:
    """Sums over sequences of the scores and of their squares: (2, P) in float64."""
    exact = scores_BP.double()
    return torch.stack([exact.sum(0), exact.square().sum(0)])


def _settings(card: dict[str, Any]) -> dict[str, Any]:
    """A card without its levels, so that a message can name the one setting that differs."""
    learner = card.get("learner", {})
    return card | {"learner": learner.get("class_path")} | learner.get("init_args", {})
