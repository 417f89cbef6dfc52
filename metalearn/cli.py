"""The command line: ``metalearn fit|validate|test -c config.yaml --run_dir runs/x --ckpt_path last``, and other commands."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import argparse
import fcntl
import json
import logging
import math
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only

# Imported so that configs can name their classes by short names.
import metalearn.estimators.evolution
import metalearn.estimators.forward
import metalearn.estimators.implicit
import metalearn.estimators.recurrent
import metalearn.estimators.unrolled
import metalearn.losses.learned
import metalearn.losses.network
import metalearn.losses.standard
import metalearn.losses.taylor
import metalearn.models.recurrent
import metalearn.models.transformer
import metalearn.models.vision
import metalearn.multilevel.reweighting
import metalearn.optim.first_order
import metalearn.problems.data_weights
import metalearn.problems.distillation
import metalearn.problems.few_shot
import metalearn.problems.hyperparameters
import metalearn.problems.learned_loss
import metalearn.problems.opaque
import metalearn.problems.schedules
import metalearn.problems.toys
import metalearn.tasks.images
import metalearn.tasks.sources
import metalearn.tasks.synthetic
import metalearn.training.data
import metalearn.training.in_context
import metalearn.training.loss_search
import metalearn.training.loss_tuning
import metalearn.training.meta_gradient
import metalearn.training.multilevel  # noqa: F401
from metalearn import commands
from metalearn.base import require_choice
from metalearn.files import write_whole
from metalearn.training.callbacks import Budget, Progress, RunCheckpoint
from metalearn.training.meta_gradient import Evaluated, MetaGradientLearning
from metalearn.training.record import RESULT, RunRecord

HELP = """usage: metalearn COMMAND ...

  fit       meta-train, resume or finish a run:  metalearn fit -c configs/in_context/quick.yaml --run_dir runs/x
  --ckpt_path last
  validate  evaluate a run on meta-validation tasks (same arguments); writes validation.csv and validation.png, or
  validation.json, into the run folder
  test      evaluate a run on meta-test tasks (same arguments); writes test.csv and test.png, or test.json
  diagnose  a dozen estimators of meta-gradients on a config's own problem, at a shortened horizon, and what follows:
  metalearn diagnose -c configs/meta_gradient/data_cleaning.yaml
  compare   paired statistics over runs:  metalearn compare runs/a runs/b --metric NAME
  loss      show: the best losses of a search, table and picture:  metalearn loss show runs/x
            transfer: losses beside standard ones on other data and models, learning rates tuned alike:
  metalearn loss transfer runs/x --data fashion_mnist --model lenet --seeds 5
            landscape: planes around the models that losses lead to, beside the standard loss:
  metalearn loss landscape runs/x --data digits --model mlp

'metalearn COMMAND --help' lists the options of a command, 'metalearn fit -c FILE --print_config' the resolved config.
METALEARN_DEBUG=1 shows the traceback of an error."""


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns: the exit code; what the user got wrong is one line on stderr and code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except (ValueError, ArgumentError, MisconfigurationException, OSError) as error:
        if os.environ.get("METALEARN_DEBUG"):
            raise
        print(f"metalearn: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    """The message without what jsonargparse wraps around it: the types it tried, and the whole configuration."""
    message = " ".join(str(error).split())
    if wrapped := re.search(r"Errors: - (.*) - Expected a <class 'NoneType'>", message):
        message = wrapped[1]
    return re.sub(r"\.? Got value: Namespace\(.*\)$", "", message)


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP)
    elif command in ("compare", "loss"):
        getattr(commands, command)(arguments[1:])
    elif command == "diagnose":
        _diagnose(arguments[1:])
    elif command in MetalearnCLI.subcommands():
        _run_lightning(arguments)
    else:
        raise ValueError(f"command is {command!r}; accepted: fit, validate, test, diagnose, compare, loss")
    return 0


def _diagnose(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="metalearn diagnose",
        description="Bias, deviation, cosine to the exact meta-gradient, time and memory of the configured estimator and of a "
        "dozen others on the problem of a config, and advice. Other arguments are those of 'metalearn fit'.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, help="inner steps of a window; default: the config's, at most 20")
    parser.add_argument("--draws", type=int, default=4, help="windows, at least 2")
    parser.add_argument("--device", default="cpu", help="where to compute, as cuda")
    options, rest = parser.parse_known_args(arguments)
    _run_lightning(["fit", *rest], partial(DiagnoseCLI, options))


def _run_lightning(arguments: list[str], cli: Callable[..., LightningCLI] | None = None) -> None:
    options = {"exit_on_error": False, "allow_abbrev": False}
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_advertisement)
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        (cli or MetalearnCLI)(
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
            parser_kwargs=options | {name: dict(options) for name in MetalearnCLI.subcommands()},
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

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, help="Folder of this run: checkpoints, logs, tables.")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Budget, "budget")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "checkpoint.run_dir")

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's: it would let the checkpoint's hyper-parameters override the command line."""

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        if not config.run_dir:
            raise ValueError("run_dir is missing; accepted: --run_dir and the folder of this run, new or to resume")
        self.run_dir = Path(config.run_dir)
        if self.subcommand == "fit" and rank_zero_only.rank == 0:
            self.held.enter_context(_lock(self.run_dir))
        config.ckpt_path = self._checkpoint(config.ckpt_path)
        for file in config.config or []:
            _refuse_other_class(yaml.safe_load(Path(file).read_text()), config, "")
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
        write_whole(result, json.dumps({"global_step": trainer.global_step, "metrics": metrics}, indent=1))

    def after_validate(self) -> None:
        self._show("validation")

    def after_test(self) -> None:
        self._show("test")

    def _show(self, stage: str) -> None:
        """Print the numbers of ``<stage>.json``, or the table of ``<stage>.csv``, and draw its curves."""
        if not self.trainer.is_global_zero:
            return
        if isinstance(self.model, Evaluated):
            for name, value in json.loads((self.run_dir / f"{stage}.json").read_text()).items():
                print(f"{stage}/{name:<40}{value:>12.4f}")
            return
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


class DiagnoseCLI(MetalearnCLI):
    """Builds what ``fit`` would train, and compares estimators on it instead."""

    def __init__(self, options: argparse.Namespace, *args: Any, **kwargs: Any):
        self.options = options
        super().__init__(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        for file in config.config or []:
            _refuse_other_class(yaml.safe_load(Path(file).read_text()), config, "")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[])

    def _run_subcommand(self, subcommand: str) -> None:
        from metalearn.analysis.compare import format_table
        from metalearn.analysis.diagnose import diagnose

        if not isinstance(self.model, MetaGradientLearning):
            raise ValueError(
                f"the model is {type(self.model).__name__}; accepted for diagnose: a config of MetaGradientLearning"
            )
        self.model.problem.open(test=False)
        steps = min(self.model.steps, 20) if self.options.steps is None else self.options.steps
        own, device = {"as configured": self.model.estimator}, self.options.device
        seed = self.datamodule.seed or 0
        found = diagnose(self.model.problem, steps, self.options.draws, seed, configured=own, device=device)
        print(format_table(found.table))
        print("\n" + ", ".join(f"{name} {value:g}" for name, value in found.facts.items()))
        print("\n".join(f"- {sentence}" for sentence in found.advice))


def _check_trainer(trainer: Any) -> None:
    """Refuse Trainer settings under which a stream of tasks does not end, is not logged, or is not computed as meant."""
    if trainer.max_steps < 1 and not trainer.fast_dev_run:
        raise ValueError(f"trainer.max_steps is {trainer.max_steps}; accepted: at least 1 (task streams have no end)")
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 1:
        raise ValueError(f"trainer.log_every_n_steps is {trainer.log_every_n_steps}; accepted: at least 1")
    if trainer.precision is not None:
        require_choice("trainer.precision", str(trainer.precision), PRECISIONS)


def _refuse_other_class(written: Any, config: Any, place: str) -> None:
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
        _refuse_other_class(inner, child, f"{place}.{name}".removeprefix("."))


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Hold ``<run_dir>/.lock``; the system lets go of it when the process ends, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {run_dir}; accepted: wait for it, or choose another --run_dir"
            ) from None
        yield


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
