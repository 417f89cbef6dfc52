"""Cells of a sweep that are trained as one, and end as runs of their own would."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import copy
import hashlib
import json
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer

from metalearn.cli.run import MetalearnCLI, run_lightning
from metalearn.files import locked, write_whole
from metalearn.sweep.grid import SEED, Cell
from metalearn.sweep.work import CONFIG, LOG, Outcome, failed, output_to, recalled
from metalearn.training.callbacks import Budget
from metalearn.training.ensemble import Member, fit_together
from metalearn.training.record import RESULT, RunRecord

_TASKS = "data.init_args.tasks.init_args"
OWN = (  # what members may differ in
    SEED,
    "model.init_args.optimizer.init_args",
    *(f"{_TASKS}.{name}" for name in ("num_tasks", "seed", "bias_fraction", "task_curriculum", "class_curriculum")),
    *(f"{_TASKS}.{name}" for name in ("noise", "others", "source.init_args.path", "source.init_args.normalise")),
)


class MemberCLI(MetalearnCLI):
    """Builds a run, and leaves its training to the ensemble."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.trainer_settings = {
            name: value
            for name, value in self._get(self.config_init, "trainer").as_dict().items()
            if name not in ("logger", "callbacks", "default_root_dir")
        }
        return Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[])

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    @property
    def member(self) -> Member:
        """The run as a member, with the callbacks that its own Trainer would have."""
        settings = self.config[str(self.subcommand)]
        record = RunRecord(self._parser(self.subcommand), settings, overwrite=True)
        own = self._get(self.config_init, "checkpoint"), Budget()
        return Member(self.model, self.datamodule, self.run_dir, settings.seed_everything, (record, *own))


def groups_of(cells: Sequence[Cell], members: int) -> list[list[int]]:
    """Indices of cells whose configs differ in nothing but what members may differ in, at most so many in a group."""
    groups: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault(_shared(cell.config), []).append(index)
    return [group[first : first + members] for group in groups.values() for first in range(0, len(group), members)]


def train_together(configs: Sequence[dict[str, Any]], run_dirs: Sequence[str]) -> list[Outcome]:
    """In a worker: train those of the cells that are not finished as one ensemble, with a resume point of its own.

    The resume point lies beside the runs, in a folder named after its members, until they are complete. If they fail,
    its log is copied to each.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    for folder in folders:
        with locked(folder, "", wait=True):  # a process that is still at work there, of a sweep that was killed
            pass
    left = [i for i, folder in enumerate(folders) if not (folder / RESULT).is_file()]
    names = "".join(folders[i].name for i in left)
    resume_point = folders[0].parent.parent / "ensembles" / hashlib.sha256(names.encode()).hexdigest()[:12]
    resume_point.mkdir(parents=True, exist_ok=True)
    with output_to(resume_point / LOG):
        try:
            if left:
                _train([configs[i] for i in left], [folders[i] for i in left], resume_point)
        except Exception as error:
            traceback.print_exc()
            refused = isinstance(error, ValueError | ArgumentError | MisconfigurationException)
            sys.stderr.flush()
            for i in left:
                shutil.copyfile(resume_point / LOG, folders[i] / LOG)
                if not (folders[i] / RESULT).is_file():
                    failed(folders[i], "wrong settings" if refused else "crashed")
        else:
            shutil.rmtree(resume_point)
    return [recalled(folder) or failed(folder, "ended without a result") for folder in folders]


def _train(configs: Sequence[dict[str, Any]], folders: Sequence[Path], resume_point: Path) -> None:
    built = [_member(config, folder) for config, folder in zip(configs, folders, strict=True)]
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(locked(folder, f"another process is training in {folder}"))
        every = configs[0].get("checkpoint", {}).get("every_n_train_steps", 250)
        members = [cli.member for cli in built]
        results = fit_together(members, built[0].trainer_settings, resume_point, every)
        for member, folder, result in zip(members, folders, results, strict=True):
            seconds = sum(callback.seconds for callback in member.callbacks if isinstance(callback, Budget))
            write_whole(folder / RESULT, json.dumps({"seconds": seconds, **result}, indent=1))


def _member(config: dict[str, Any], folder: Path) -> MemberCLI:
    write_whole(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    arguments = ["fit", "-c", str(folder / CONFIG), "--run_dir", str(folder), "--ckpt_path", "last"]
    cli = run_lightning([*arguments, "--trainer.enable_progress_bar", "false"], MemberCLI)
    assert isinstance(cli, MemberCLI)
    return cli


def _shared(config: dict[str, Any]) -> str:
    """What members must have in common: the config without what is their own."""
    config = copy.deepcopy(config)
    for path in OWN:
        *parents, last = path.split(".")
        place: Any = config
        for parent in parents:
            place = place.get(parent, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place.pop(last, None)
    return json.dumps(config, sort_keys=True, default=str)
