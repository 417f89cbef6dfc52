"""``metalearn fit|validate|test``: one run, in a folder of its own."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import json
import logging
import math
import pickle
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only

import metalearn.cli.short_names  # noqa: F401
from metalearn.base import require_choice
from metalearn.files import locked, write_whole
from metalearn.training.callbacks import Budget, Progress, RunCheckpoint
from metalearn.training.learned_optimizer import LearnedOptimizerTraining
from metalearn.training.meta_gradient import Evaluated
from metalearn.training.record import RESULT, RunRecord

PRECISIONS = ("32", "32-true", "bf16", "bf16-mixed")
_EXPECTED_WARNINGS = (
    "LightningCLI's args parameter is intended to run from within Python",  # main() is called by tests and sweeps
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning 2.6
    ".*does not have many workers which may be a bottleneck",  # loaders carry requests, not data
    "Checkpoint directory .* exists and is not empty",  # every resume
    "The dirpath has changed from",  # evaluation, or a start from another run's checkpoint
    "It is recommended to use `self.log.* sync_dist=True`",  # every rank evaluates the same
    "You're resuming from a checkpoint that ended before the epoch ended",  # streams start at the step, whatever the epoch
)


def run_lightning(arguments: list[str], cli: Callable[..., LightningCLI] | None = None) -> LightningCLI:
    """Build what the config says and run the subcommand, or what another ``cli`` makes of it. Returns: the latter."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_advertisement)
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        return (cli or MetalearnCLI)(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunRecord,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            args=arguments,
        )


class MetalearnCLI(LightningCLI):
    """LightningCLI with a run folder: fixed places for checkpoints and logs, one process at a time, nothing overwritten."""

    def __init__(self, *args: Any, **kwargs: Any):
        with ExitStack() as self.held:  # the lock of the run folder, until the command is done
            super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def _setup_parser_kwargs(self, parser_kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return parser_kwargs, {name: dict(parser_kwargs) for name in self.subcommands()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, help="Folder of this run: checkpoints, logs, tables.")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Budget, "budget")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "checkpoint.run_dir")

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's: it would let the checkpoint's hyper-parameters override the command line."""

    def _dump_config(self) -> None:
        """Not Lightning's: it would write the whole config out at every start, for ``save_hyperparameters`` alone."""
        self.config_dump: dict[str, Any] = {}

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        if not config.run_dir:
            raise ValueError("run_dir is missing; accepted: --run_dir and the folder of this run, new or to resume")
        self.run_dir = Path(config.run_dir)
        if self.subcommand == "fit" and rank_zero_only.rank == 0:
            refusal = (
                f"another process is training in {self.run_dir}; accepted: wait for it, or choose another --run_dir"
            )
            self.held.enter_context(locked(self.run_dir, refusal))
        config.ckpt_path = self._checkpoint(config.ckpt_path)
        for file in config.config or []:
            refuse_other_class(yaml.safe_load(Path(file).read_text()), config, "")
        if self.subcommand == "fit":
            _check_trainer(config.trainer)
        else:
            config.verbose = False  # our table, not Lightning's
        data = config.data.get("init_args", {})
        for seeded in (data, (data.get("tasks") or {}).get("init_args", {})):
            if "seed" in seeded and seeded["seed"] is None:
                seeded["seed"] = config.seed_everything

    def _checkpoint(self, asked: str | None) -> str | None:
        """The checkpoint to start from: ``last`` is the run's own if there is one; only ``fit`` may go without."""
        last = self.run_dir / "checkpoints" / "last.ckpt"
        if self.subcommand == "fit":
            if asked is None and last.exists():
                raise ValueError(
                    f"{self.run_dir} has checkpoints; add --ckpt_path last to resume, or choose another --run_dir"
                )
            if asked is None or (asked == "last" and not last.exists()):
                rank_zero_info(f"{self.run_dir} has no checkpoint yet: starting at step 0")
                return None
        elif asked is None:
            raise ValueError(
                f"ckpt_path is missing; accepted for {self.subcommand}: 'last' or the path of a checkpoint"
            )
        path = last if asked == "last" else Path(asked)
        _require_checkpoint(path)
        return str(path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        callbacks = settings.callbacks or []
        if settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            settings.callbacks = [*callbacks, Progress()]
        if self.subcommand != "fit":
            self.save_config_callback = None
            kwargs["logger"] = False
        elif settings.logger is None:
            kwargs["logger"] = CSVLogger(self.run_dir, name="logs", flush_logs_every_n_steps=1)
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Say that the run is finished: sweeps trust this file, because an exit code does not tell."""
        trainer, result = self.trainer, self.run_dir / RESULT
        ended = getattr(self.model, "finished", trainer.global_step >= trainer.max_steps)
        unfinished = trainer.fast_dev_run or not ended
        if unfinished or result.exists() or not trainer.is_global_zero:
            return
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        numbers |= getattr(self.model, "sizes", {})
        metrics = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        seconds = sum(callback.seconds for callback in trainer.callbacks if isinstance(callback, Budget))
        record = {"global_step": trainer.global_step, "seconds": seconds, "metrics": metrics}
        write_whole(result, json.dumps(record, indent=1))

    def after_validate(self) -> None:
        self._show("validation")

    def after_test(self) -> None:
        self._show("test")

    def _show(self, stage: str) -> None:
        """Print what an evaluation has written into the run folder, and draw its curves."""
        if not self.trainer.is_global_zero:
            return
        if isinstance(self.model, LearnedOptimizerTraining):
            self._show_optimizers(stage)
        elif isinstance(self.model, Evaluated):
            self._show_numbers(stage)
        else:
            self._show_learning_curves(stage)

    def _show_numbers(self, stage: str, wanted: str = "") -> None:
        for name, value in json.loads((self.run_dir / f"{stage}.json").read_text()).items():
            if name.endswith(wanted):
                print(f"{stage}/{name:<40}{value:>12.4f}")

    def _show_optimizers(self, stage: str) -> None:
        from metalearn.analysis.training_curves import format_training, read_training_curves, save_training_runs

        frame, picture = read_training_curves(self.run_dir, stage), self.run_dir / f"{stage}.png"
        print(f"\nloss of training runs ({stage} examples), mean over all steps and over the last tenth\n")
        print(format_training(frame) + "\n")
        for wanted in ("/ratio", "/speed_up"):
            self._show_numbers(stage, wanted)
        save_training_runs(frame, picture)
        print(f"\n{picture}")

    def _show_learning_curves(self, stage: str) -> None:
        from metalearn.analysis.compare import format_table, summarise_evaluation
        from metalearn.analysis.curves import save_learning_curves
        from metalearn.analysis.runs import quantity_of, read_evaluation

        frame = read_evaluation(self.run_dir, stage)
        print(f"\n{quantity_of(frame).replace('_', ' ')} after n examples ± standard error ({stage} tasks)\n")
        print(format_table(summarise_evaluation(frame)))
        picture = self.run_dir / f"{stage}.png"
        classes = self.datamodule.tasks.num_classes
        save_learning_curves(frame, picture, chance=1 / classes if classes > 1 else None)
        print(f"\n{picture}")


def _check_trainer(trainer: Any) -> None:
    """Refuse Trainer settings under which a stream of tasks does not end, is not logged, or is not computed as meant."""
    if trainer.max_steps < 1 and not trainer.fast_dev_run:
        raise ValueError(f"trainer.max_steps is {trainer.max_steps}; accepted: at least 1 (task streams have no end)")
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 1:
        raise ValueError(f"trainer.log_every_n_steps is {trainer.log_every_n_steps}; accepted: at least 1")
    if trainer.precision is not None:
        require_choice("trainer.precision", str(trainer.precision), PRECISIONS)


def refuse_other_class(written: Any, config: Any, place: str) -> None:
    """Raise ``ValueError`` where a class of a config file gave way to another, whose settings would keep the first's values."""
    if not isinstance(written, dict) or config is None:
        return
    own, chosen = written.get("class_path"), getattr(config, "class_path", None)
    if isinstance(own, str) and isinstance(chosen, str) and own.split(".")[-1] != chosen.split(".")[-1]:
        raise ValueError(
            f"{place or 'the config'} is {own} in a config file and {chosen} after it, which would keep settings of "
            f"{own}; accepted: to change the class in a config file of its own"
        )
    for name, inner in written.items():
        child = config.get(name) if hasattr(config, "get") else None
        refuse_other_class(inner, child, f"{place}.{name}".removeprefix("."))


def one_line(error: Exception) -> str:
    """The message without what jsonargparse wraps around it: the types it tried, and the whole configuration."""
    message = " ".join(str(error).split())
    if wrapped := re.search(r"Errors: - (.*) - Expected a <class 'NoneType'>", message):
        message = wrapped[1]
    return re.sub(r"\.? Got value: Namespace\(.*\)$", "", message)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _require_checkpoint(path: Path) -> None:
    """Raise ``ValueError`` unless ``path`` is a Lightning checkpoint of tensors and builtins; reads no weights."""
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint at {path}; accepted: 'last' after a fit in this --run_dir, or an existing file"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        content = None
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise ValueError(f"{path} is no checkpoint of a run; accepted: a .ckpt file that metalearn fit wrote")
