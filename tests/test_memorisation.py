"""Few tasks are memorised, many are learned from: both ends of the paper's transition, at the size of quick.yaml."""

from pathlib import Path

import pytest

from metalearn.analysis.runs import read_run
from metalearn.cli import main

QUICK = Path(__file__).parents[1] / "configs" / "in_context" / "quick.yaml"


def final_metrics(run_dir: Path, num_tasks: int, seed: int) -> dict[str, float]:
    options = {
        "seed_everything": seed,
        "trainer.max_steps": 500,
        "trainer.val_check_interval": 500,
        "data.init_args.tasks.init_args.num_tasks": num_tasks,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert main(["fit", "-c", str(QUICK), "--run_dir", str(run_dir), *arguments]) == 0
    frame = read_run(run_dir)
    return frame.sort_values("step").groupby("metric").value.last().to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_four_tasks_are_memorised_and_256_are_learned_from(tmp_path, seed):
    few, many = final_metrics(tmp_path / "few", 4, seed), final_metrics(tmp_path / "many", 256, seed)
    assert few["validation/seen_train/accuracy_last"] > 0.9  # it fits the tasks it was trained on
    assert few["validation/unseen_held_out/accuracy_last"] < 0.35  # and knows nothing else
    assert many["validation/unseen_held_out/accuracy_last"] > 0.60
    for metrics in (few, many):  # no label leaks into the token that asks for it
        assert metrics["validation/unseen_held_out/accuracy_first"] == pytest.approx(0.2, abs=0.08)
