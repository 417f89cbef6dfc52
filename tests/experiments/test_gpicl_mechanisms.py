"""The experiment on runs that were never trained: light checkpoints and a configuration are all that it reads."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from experiments.gpicl_mechanisms import main
from metalearn.models.saving import describe, save_learner
from metalearn.models.tokens import Tokens
from metalearn.models.transformer import Transformer


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokens = Tokens("paper", 6, 3)
    for name in ("step=00000001", "left_plateau_step=00000002"):
        learner = Transformer(tokens.width, 3, width=8, depth=1, heads=2, head_width=4)
        card = {"learner": describe(learner), "tokens": "paper", "num_features": 6, "num_classes": 3, "length": 8}
        save_learner(tmp_path / "checkpoints" / "steps" / f"{name}.safetensors", learner, card)
    for version, num_tasks in ((9, 2), (10, 4)):
        source = {
            "class_path": "metalearn.tasks.synthetic.RandomSource",
            "init_args": {"num_classes": 3, "num_features": 9},
        }
        tasks = {"num_features": 6, "num_tasks": num_tasks, "seed": 0, "source": source}
        data = {"length": 8, "tasks": {"class_path": "metalearn.tasks.images.ProjectedImages", "init_args": tasks}}
        folder = tmp_path / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": data}}))
    return tmp_path


def test_writes_tables_and_a_figure_and_prints_the_order(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = main([str(run_dir), "--sequences", "64", "--last", "3"])
    printed = capsys.readouterr().out
    assert "64 sequences of stream unseen_held_out, last 3 of 8 positions" in printed
    assert "left the plateau at step 2; half way at step" in printed and "reads nearest label" in printed
    assert set(frames["task"]["classes"]) == {4}  # of the newest start, whose number sorts last as a number only
    assert set(frames["distances"]["other"]) == {"truth", "1-nearest-neighbour", "ridge", "one gradient step"}
    folder = run_dir / "mechanisms"
    assert (folder / "mechanisms.png").read_bytes().startswith(b"\x89PNG")
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{name.replace(' ', '_')}.csv"), frame, check_dtype=False)


def test_refuses_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no logs/version_"):
        main([str(tmp_path)])
