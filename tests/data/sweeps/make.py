"""Write the made-up sweeps of this folder: ``python tests/data/sweeps/make.py``. No learner was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

HERE = Path(__file__).parent
CHANCE, SEED = 0.2, 20
CRITICAL = {8: 7.5, 16: 7.0, 32: 6.5, 64: 6.0}  # log2 of the planted critical number of tasks, by width
ORACLES = {"nearest neighbour": 0.86, "logistic regression": 0.84}


def main() -> None:
    rng = np.random.default_rng(SEED)
    write("phases", phases(rng), [64])
    write("state_size", state_sizes(rng), [])
    write("interventions", interventions(rng), None)
    curves(HERE / "phases", rng)


def write(name: str, rows: list[dict[str, Any]], logged_widths: list[int] | None) -> None:
    """``cells.csv`` of the rows, and ``logs.csv`` of the training loss of those widths (None: of all)."""
    (HERE / name).mkdir(exist_ok=True)
    cells = [{"cell": f"c{i:03d}", "run_dir": f"runs/c{i:03d}"} | row for i, row in enumerate(rows)]
    pd.DataFrame(cells).drop(columns="log").round(4).to_csv(HERE / name / "cells.csv", index=False)
    logs = [
        pd.DataFrame({"cell": cell["cell"], "step": cell["log"][0], "metric": "train/loss", "value": cell["log"][1]})
        for cell in cells
        if cell["log"] is not None and (logged_widths is None or (cell["width"] in logged_widths and cell["seed"] < 3))
    ]
    if logs:
        pd.concat(logs).round(3).to_csv(HERE / name / "logs.csv", index=False)


def phases(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Tasks x width x 3 seeds, and 20 seeds at the edge of width 64; one cell failed, one waits."""
    tasks = [4, 8, 16, 32, 64, 128, 256, 512, 1024, None]
    places = [(k, width, seed) for seed in range(3) for k in tasks for width in CRITICAL]
    places += [(k, 64, seed) for seed in range(3, 20) for k in (32, 64, 128)]
    rows = [phase_cell(rng, *place) for place in places]
    metrics = dict.fromkeys([name for name in rows[0] if "/" in name] + ["step", "seconds", "log"])
    rows[5] |= metrics | {"state": "failed", "reason": "the loss became NaN at step 120"}
    rows[-1] |= metrics | {"state": "waiting"}
    return rows


def phase_cell(rng: np.random.Generator, num_tasks: int | None, width: int, seed: int) -> dict[str, Any]:
    """Either of two clusters, the likelier to learn the further above the critical number; what is seen is learned or memorised."""
    log_tasks = np.log2(num_tasks) if num_tasks else 14.0
    learned = rng.random() < expit(3 * (log_tasks - CRITICAL[width]))
    best = 0.45 + 0.35 * expit(np.log2(width) - 4)
    memorised = 0.98 * expit(np.log2(width) + 5.5 - log_tasks)
    unseen = best if learned else CHANCE
    seen_first = max(CHANCE, 0.99 - 0.13 * max(0.0, log_tasks - 2)) if memorised > 0.5 else CHANCE
    accuracy = {
        "seen_train": (seen_first, max(memorised, unseen, seen_first)),
        "seen_held_out": (seen_first, max(memorised - 0.03, unseen, seen_first - 0.03)),
        "unseen_held_out": (CHANCE, unseen),
    }
    metrics = {}
    for stream, ends in accuracy.items():
        first, last = (float(np.clip(end + 0.015 * rng.normal(), 0, 1)) for end in ends)
        known = num_tasks is not None or stream == "unseen_held_out"
        named = {"accuracy_first": first, "accuracy_last": last, "improvement": last - first, "loss": 2 * (1 - last)}
        metrics |= {f"validation/{stream}/{name}": value if known else None for name, value in named.items()}
    loss = 1.9 * (1 - max(last for _, last in accuracy.values())) + 0.05
    place = {"num_tasks": num_tasks, "width": width, "seed": seed}
    log = plateau_log(rng, 50 * 2 ** (0.15 * log_tasks) * np.exp(0.15 * rng.normal()), loss, 500)
    sizes = {"model/parameters": 24 * width**2 + 40 * width, "model/state_size": 256 * width}
    return done(place, 500) | {"train/loss": float(log[1][-1])} | metrics | sizes | {"log": log}


def state_sizes(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Kinds of learners in three sizes: accuracy follows log2 of the state, whatever the parameters."""
    sizes: dict[str, Callable[[int], tuple[int, int]]] = {  # width -> parameters, state
        "FeedForward": lambda n: (8 * n * n, 0),
        "LSTM": lambda n: (8 * n * n + 40 * n, 2 * n),
        "GRU": lambda n: (6 * n * n + 40 * n, n),
        "OuterProductLSTM": lambda n: (5 * n * n + 40 * n, n * n),
        "DeltaNet": lambda n: (24 * n * n, 32 * n),
        "Transformer": lambda n: (24 * n * n, 128 * n),
        "VSMLWithoutSymmetries": lambda n: (20_000 + n, 2 * n * n),
    }
    rows = []
    for kind, size in sizes.items():
        for width in (16, 32, 64):
            for seed in range(3):
                parameters, state = size(width)
                last = CHANCE + 0.055 * np.log2(1 + state) * (0.9 + 0.02 * rng.normal())
                metrics = {"validation/unseen_held_out/accuracy_last": float(np.clip(last, 0, 0.85))}
                place = {"learner": f"{kind} {width}", "seed": seed}
                sizes_of = {"model/parameters": parameters, "model/state_size": state}
                rows.append(done(place, 500) | metrics | sizes_of | {"log": None})
    return rows


def interventions(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Variants that leave the plateau after other numbers of steps, one of them hardly ever."""
    lengths = {"baseline": 900, "batch 256": 500, "Adam eps 1e-12": 600, "sign momentum": 420, "bias 0.9": 60}
    lengths |= {"paper tokens": 2500}
    rows = []
    for variant, length in lengths.items():
        for seed in range(5):
            log = plateau_log(rng, length * np.exp(0.2 * rng.normal()), 0.6, 2500)
            loss = float(log[1][-1])
            accuracy = 0.8 - 0.6 * (loss > 1) + 0.01 * rng.normal()
            metrics = {"train/loss": loss, "validation/unseen_held_out/accuracy_last": accuracy}
            rows.append(done({"variant": variant, "seed": seed}, 2500) | metrics | {"log": log})
    return rows


def plateau_log(rng: np.random.Generator, length: float, final: float, steps: int) -> tuple[Any, Any]:
    """Steps and losses: ln 5 with a small dip, until the loss falls towards its end."""
    at = np.unique(np.geomspace(10, steps, 40).astype(int)) - 1
    fallen = expit(12 * np.log2((at + 1) / (1.2 * length)))
    loss = np.log(5) + 0.25 * np.exp(-at / 15) - 0.01 * at / steps
    return at, loss + fallen * (min(final, 1.6) - np.log(5)) + 0.01 * rng.normal(size=len(at))


def done(place: dict[str, Any], steps: int) -> dict[str, Any]:
    return {"state": "complete", "reason": None} | place | {"step": steps, "seconds": 12.0}


def curves(folder: Path, rng: np.random.Generator) -> None:
    """``validation.csv`` of two seeds of width 64 with few, some and many tasks."""
    cells = pd.read_csv(folder / "cells.csv")
    chosen = cells[(cells["width"] == 64) & cells["num_tasks"].isin([16, 64, 1024]) & (cells["seed"] < 2)]
    for _, cell in chosen.iterrows():
        rows = []
        for stream in ("seen_train", "unseen_held_out"):
            first, last = (cell[f"validation/{stream}/accuracy_{end}"] for end in ("first", "last"))
            methods = {"learner": (range(32), first, last)}
            methods |= {name: ((0, 1, 2, 5, 10, 20, 31), CHANCE, best) for name, best in ORACLES.items()}
            for method, (positions, start, end) in methods.items():
                for at in positions:
                    accuracy = start + (end - start) * (1 - np.exp(-at / 6)) / (1 - np.exp(-31 / 6))
                    rows.append((stream, method, at, 512, np.clip(accuracy + 0.01 * rng.normal(), 0, 1), 0.015))
        columns = ["stream", "method", "position", "sequences", "accuracy", "standard_error"]
        (folder / cell["run_dir"]).mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows, columns=columns).round(3).to_csv(folder / cell["run_dir"] / "validation.csv", index=False)


if __name__ == "__main__":
    main()
