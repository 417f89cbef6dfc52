"""What a run folder says of every start: resolved config, versions, machine, git state, data."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import functools
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback

RESULT = "result.json"


class RunRecord(SaveConfigCallback):
    """Beside the resolved config of every start: ``run.json`` with versions, git state, machine and data fingerprint.

    Written when training starts, not in Lightning's ``setup``, so that a refused start leaves nothing behind.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.log_dir = trainer.log_dir  # asks every rank, and save_config runs on the first one alone
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule
        record = {
            "versions": {
                name: version(name) for name in ("metalearn", "torch", "pytorch-lightning", "datasets", "numpy")
            },
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
            "git": _git_state(),
            "data": data.state_dict(),
        }
        assert self.log_dir is not None
        (Path(self.log_dir) / "run.json").write_text(json.dumps(record, indent=1))
        (Path(trainer.default_root_dir) / RESULT).unlink(missing_ok=True)  # of a shorter run that now goes on


@functools.cache  # an ensemble leaves one record per member
def _git_state() -> dict[str, Any]:
    """Commit and whether the tree differs from it; empty where the package does not stand in a git checkout."""
    here = Path(__file__).parent
    try:
        if not subprocess.run(["git", "ls-files", __file__], cwd=here, capture_output=True, text=True).stdout:
            return {}  # installed inside somebody else's checkout
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.stdout.strip(), "changed": bool(changes.stdout.strip())}
