"""What forms inside a learner as it leaves the plateau, and in which order: attention, causal heads, what can be read, answers.

    metalearn fit -c configs/in_context/quick.yaml --run_dir runs/quick
    python -m experiments.gpicl_mechanisms runs/quick

reads the light checkpoints of a run of a transformer with ``checkpoint_steps: log``, measures each on the same validation
sequences of one stream, prints a row per checkpoint and the step at which each measure is half way, and writes the
tables and the figure into ``<run_dir>/mechanisms/``. In classification a probe reads the label of the nearest
example and, where the number of training tasks is finite, the task.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from metalearn.analysis.attention import attention_scores, head_ablation
from metalearn.analysis.compare import format_table
from metalearn.analysis.mechanism_curves import save_mechanisms
from metalearn.analysis.mechanisms import (
    best_rate,
    decodability,
    distances,
    one_gradient_step,
    order_of_formation,
    summarise,
    tasks_of,
    through_training,
    transition_step,
)
from metalearn.base import Batch, MetaValidation, TaskDistribution
from metalearn.tasks.oracles import nearest_neighbour

SLOW = "logistic regression"  # scikit-learn fits it anew for every sequence and position


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run with checkpoint_steps: log")
    parser.add_argument("--stream", help="evaluation stream that is measured on; default: the first for new tasks")
    parser.add_argument("--sequences", type=int, default=512, help="sequences of the stream, default 512")
    parser.add_argument("--last", type=int, default=8, help="last positions that are averaged over, default 8")
    given = parser.parse_args(arguments)
    tasks, length = read_tasks(given.run_dir)
    stream = given.stream or next(name for name in tasks.streams() if not name.startswith("seen"))
    print(f"{given.run_dir}: {given.sequences} sequences of stream {stream}, last {given.last} of {length} positions")
    frames = measure(given.run_dir, tasks, length, stream, given.sequences, given.last)
    transition = transition_step(given.run_dir)
    print(format_table(summarise(frames)))
    left = "never left the plateau" if transition is None else f"left the plateau at step {transition}"
    print(f"\n{left}; half way at step (- where nothing rose by 0.05):")
    print(format_table(order_of_formation(frames)))
    folder = given.run_dir / "mechanisms"
    folder.mkdir(exist_ok=True)
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name.replace(' ', '_')}.csv", index=False)
    save_mechanisms(frames, folder / "mechanisms.png", transition, f"{given.run_dir.name}, stream {stream}")
    print(f"written to {folder}")
    return frames


def read_tasks(run_dir: Path) -> tuple[TaskDistribution, int]:
    """The tasks that the newest start of a run was configured with, opened, and the length of a sequence."""
    starts = sorted(
        (run_dir / "logs").glob("version_*/config.yaml"), key=lambda path: int(path.parent.name.split("_")[1])
    )
    if not starts:
        raise ValueError(f"{str(run_dir)!r} has no logs/version_*/config.yaml; accepted: the folder of a run")
    data = yaml.safe_load(starts[-1].read_text())["data"]["init_args"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TaskDistribution, "tasks")
    tasks = parser.instantiate(parser.parse_object({"tasks": data["tasks"]}))["tasks"]
    tasks.open(test=False)
    return tasks, data["length"]


def measure(run_dir: Path, tasks: TaskDistribution, length: int, stream: str, count: int, last: int) -> dict[str, Any]:
    """All tables of a run, by name."""
    batch = tasks.batch(0, 0, count, length, MetaValidation(stream))
    further = tasks.batch(0, count, count, length, MetaValidation(stream))
    positions = range(length - last, length)
    others = {name: oracle(*batch, positions) for name, oracle in tasks.oracles().items() if name != SLOW}
    rate = best_rate(further, last) if tasks.num_classes == 1 else 1.0
    others["one gradient step"] = one_gradient_step(*batch, positions, tasks.num_classes, rate)
    probes: dict[str, tuple[Batch, Tensor]] = {}
    if tasks.num_classes > 1:
        probes["nearest label"] = batch, nearest_neighbour(*batch, [length - 1])[:, 0]
    if tasks.num_classes > 1 and getattr(tasks, "num_tasks", None):
        seen = next(name for name in tasks.streams() if name.startswith("seen"))
        pool = tasks.batch(0, 0, 2 * count, length, MetaValidation(seen))
        probes["task"] = pool, tasks_of(pool.x)
    return {
        "attention": through_training(run_dir, partial(attention_scores, batch=batch, num_last=last)),
        "ablation": through_training(run_dir, partial(head_ablation, batch=batch, num_last=last)),
        **{
            name: through_training(run_dir, partial(decodability, batch=of, target_B=target_B))
            for name, (of, target_B) in probes.items()
        },
        "distances": through_training(run_dir, partial(distances, batch=batch, others=others)),
    }


if __name__ == "__main__":
    main()
