"""Many small learners as one stacked training run against one after the other: ``python -m experiments.bench.ensemble``.

Both sides are whole training runs of quick.yaml's model as ``metalearn fit`` sets them up, without validation; the time of a
side is from the end of its first steps to the end of its last, summed over its runs.
"""

import functools
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger

from experiments.bench.report import Effort, Row, header
from experiments.bench.timing import require_equal
from metalearn.base import MetaTrain
from metalearn.models.transformer import Transformer
from metalearn.tasks.images import ProjectedImages
from metalearn.tasks.sources import ImageSource
from metalearn.training.callbacks import Budget, RunCheckpoint
from metalearn.training.data import TaskBatches
from metalearn.training.ensemble import Member, fit_together
from metalearn.training.in_context import InContextLearning

QUICK = Path(__file__).parents[2] / "configs" / "in_context" / "quick.yaml"
WARM_UP = 5  # steps at the start of every run that are not timed
GPU_BAR = 10.0


class Clock(Callback):
    """Seconds of the steps after the first ones and, where ``parts`` is True, of the parts of a step."""

    def __init__(self, parts: bool = False):
        self.parts, self.seconds, self.by_part = parts, 0.0, defaultdict(float)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._mark(trainer, "batches, log, Lightning")

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
        self._mark(trainer, "forward")

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        self._mark(trainer, "backward")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._mark(trainer, "optimizers, schedules")
        if trainer.global_step == WARM_UP:
            self.by_part.clear()
            self.began = _now()
        elif trainer.global_step == trainer.max_steps:
            self.seconds = _now() - self.began

    def _mark(self, trainer: Trainer, part: str) -> None:
        if self.parts:
            now = _now()
            self.by_part[part] += now - getattr(self, "last", now)
            self.last = now


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_members(count: int, width: int, folder: Path) -> list[Member]:
    """Runs of quick.yaml's model that differ in seed and in the number of tasks."""
    config = yaml.safe_load(QUICK.read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    learner = functools.partial(Transformer, **model["learner"]["init_args"] | {"width": width})
    optimizer = functools.partial(torch.optim.Adam, **model["optimizer"]["init_args"])
    source = ImageSource(**data["tasks"]["init_args"]["source"]["init_args"])
    members = []
    for seed in range(count):
        tasks = ProjectedImages(
            source, data["tasks"]["init_args"]["num_features"], num_tasks=2 ** (seed % 8), seed=seed
        )
        run_dir = folder / str(seed)
        members.append(
            Member(
                InContextLearning(**model | {"learner": learner, "optimizer": optimizer}),
                TaskBatches(tasks, data["length"], data["meta_batch_size"]),
                run_dir,
                seed,
                [RunCheckpoint(str(run_dir), 10**6), Budget()],
            )
        )
    return members


def train_together(members: Sequence[Member], folder: Path, settings: dict[str, Any], clock: Clock) -> float:
    fit_together(members, settings, folder, 10**6, [clock])
    return clock.seconds


def train_one_by_one(members: Sequence[Member], folder: Path, settings: dict[str, Any]) -> float:
    total = 0.0
    for member in members:
        torch.manual_seed(member.seed)
        clock, logger = Clock(), CSVLogger(member.run_dir, name="logs", flush_logs_every_n_steps=1)
        own = {"logger": logger, "default_root_dir": member.run_dir, "callbacks": [*member.callbacks, clock]}
        Trainer(**settings, **own).fit(member.model, member.data)
        total += clock.seconds
    return total


def require_equal_learners(ours: Sequence[Member], theirs: Sequence[Member]) -> None:
    """Raise ``UnequalError`` unless all logits of a batch agree; weights may not: nothing depends on the bias of keys."""
    for one, other in zip(ours, theirs, strict=True):
        batch = one.data.tasks.batch(10**6, 0, 64, one.data.length, MetaTrain())
        with torch.inference_mode():
            logits = [member.model.cpu()(*batch) for member in (one, other)]
        require_equal(f"logits of member {one.seed}", *logits, tolerance=1e-4)


def against_one_by_one(members: int = 8, steps: int = 30, device: str = "cpu", width: int = 64, pairs: int = 3) -> Row:
    """How many times faster the ensemble takes a step of all members; prints where its time goes. See ``main``.

    Raises:
        UnequalError: if the learners of both sides differ.
    """
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = {"accelerator": "gpu" if device == "cuda" else device, "devices": 1, "max_steps": steps}
    settings |= {"log_every_n_steps": 25, "limit_val_batches": 0}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    made: list[list[Member]] = []

    def run(way: Any, *rest: Any) -> float:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.append(make_members(members, width, Path(folder)))
            return way(made[-1], Path(folder), settings, *rest)

    run(train_together, Clock())
    run(train_one_by_one)
    require_equal_learners(*made)
    measured = Effort(pairs, 600).compare(lambda: run(train_together, Clock()), lambda: run(train_one_by_one))
    run(train_together, clock := Clock(parts=True))
    for part, seconds in clock.by_part.items():
        print(f"ensemble of {members}: {part:<37}{1e3 * seconds / (steps - WARM_UP):>10.2f} ms a step", flush=True)
    bar = GPU_BAR if device == "cuda" and members >= 64 else None
    return Row(f"{members} members of width {width}, step of all", measured, bar, steps - WARM_UP, "steps/s")


def main(
    members: int = 8, steps: int = 30, device: str = "cpu", width: int = 64, threads: int = 1, pairs: int = 3
) -> None:
    """Print how many times faster the ensemble takes a step of all members, and where its time goes.

    Args:
        members: runs, at least 1; 64 for the bar on a GPU.
        steps: optimizer steps of a run, of which the first five are not timed.
        device: "cpu" or "cuda".
        width: of the learner.
        threads: of torch.
        pairs: interleaved pairs of both sides, besides the one that warms up and is checked.
    """
    torch.set_num_threads(threads)
    print(header("digits"), flush=True)
    print(against_one_by_one(members, steps, device, width, pairs), flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
