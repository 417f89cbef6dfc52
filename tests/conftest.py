"""One thread, passive waiting, no network, no display, before torch is imported: two spinning processes on two cores crawl."""

import os

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MPLBACKEND="Agg")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from pathlib import Path

import pytest

QUICK = Path(__file__).parents[1] / "configs" / "in_context" / "quick.yaml"


@pytest.fixture(scope="session")
def meta_trained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """quick.yaml on 256 tasks for 300 steps, off the plateau and still in its youth: about eight seconds."""
    from metalearn.cli import main

    run_dir = tmp_path_factory.mktemp("meta_trained")
    shorter = ["--trainer.max_steps=300", "--trainer.val_check_interval=300", "--trainer.enable_progress_bar=false"]
    fewer = ["--data.init_args.tasks.init_args.num_tasks=256", "--data.init_args.evaluation_sequences=256"]
    assert main(["fit", "-c", str(QUICK), "--run_dir", str(run_dir), *shorter, *fewer]) == 0
    return run_dir / "checkpoints" / "last.ckpt"
