"""``metalearn diagnose``: estimators compared on the problem of a config."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning import Trainer

from metalearn.cli.run import MetalearnCLI, refuse_other_class, run_lightning
from metalearn.training.meta_gradient import MetaGradientLearning


def diagnose(arguments: list[str]) -> None:
    """``metalearn diagnose -c CONFIG``."""
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
    run_lightning(["fit", *rest], partial(DiagnoseCLI, options))


class DiagnoseCLI(MetalearnCLI):
    """Builds what ``fit`` would train, and compares estimators on it instead."""

    def __init__(self, options: argparse.Namespace, *args: Any, **kwargs: Any):
        self.options = options
        super().__init__(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        for file in config.config or []:
            refuse_other_class(yaml.safe_load(Path(file).read_text()), config, "")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[])

    def _run_subcommand(self, subcommand: str) -> None:
        from metalearn.analysis.compare import format_table
        from metalearn.analysis.diagnose import diagnose as compare_estimators

        if not isinstance(self.model, MetaGradientLearning):
            raise ValueError(
                f"the model is {type(self.model).__name__}; accepted for diagnose: a config of MetaGradientLearning"
            )
        self.model.problem.open(test=False)
        steps = min(self.model.steps, 20) if self.options.steps is None else self.options.steps
        own, device = {"as configured": self.model.estimator}, self.options.device
        seed = self.datamodule.seed or 0
        found = compare_estimators(self.model.problem, steps, self.options.draws, seed, configured=own, device=device)
        print(format_table(found.table))
        print("\n" + ", ".join(f"{name} {value:g}" for name, value in found.facts.items()))
        print("\n".join(f"- {sentence}" for sentence in found.advice))
