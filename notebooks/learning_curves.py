# %% [markdown]
# # How many examples does the learner need?
#
# Reads the sweep of `metalearn sweep configs/in_context/phases.sweep.yaml --sweep_dir runs/phases`, and what `metalearn validate`
# measured on some of its runs: accuracy by number of examples seen, for the learner and for the oracles on the very same
# sequences. Nothing is trained here. For another sweep set `METALEARN_SWEEP`.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from metalearn.analysis.compare import format_table, summarise_evaluation
from metalearn.analysis.curves import plot_learning_curves
from metalearn.analysis.runs import read_evaluations
from metalearn.analysis.sweeps import axes_of, read_sweep

SWEEP = Path(os.environ.get("METALEARN_SWEEP", "runs/phases"))
BY = "num_tasks"
SEEN, UNSEEN = "seen_train", "unseen_held_out"
CHANCE = 1 / 5

# %%
sweep = read_sweep(SWEEP)
axes = axes_of(sweep)
sweep["run"] = [(SWEEP / run_dir).as_posix() for run_dir in sweep["run_dir"]]
evaluated = sweep[[(Path(run) / "validation.csv").exists() for run in sweep["run"]]]
if evaluated.empty:
    raise SystemExit(
        f"no run of {SWEEP} is evaluated: metalearn validate -c RUN/cell.yaml --run_dir RUN --ckpt_path last"
    )
print(format_table(evaluated[["cell", *axes]]))

# %% [markdown]
# The mean over the runs at each number of tasks; the error is that of the mean over seeds where there are several, and
# otherwise that over sequences.

# %%
curves = read_evaluations(evaluated["run"].tolist(), "validation").merge(evaluated[["run", BY]], on="run")
learner = curves[curves["method"] == "learner"]
learner = learner.assign(method=[f"{number:g} tasks" for number in learner[BY]]).sort_values(BY, kind="stable")
methods = pd.concat([learner, curves[curves["method"] != "learner"]])
groups = methods.groupby(["stream", "method", "position"], sort=False)
mean = groups.agg(
    run=("run", "first"),
    runs=("run", "nunique"),
    accuracy=("accuracy", "mean"),
    error=("accuracy", "sem"),
    standard_error=("standard_error", "mean"),
).reset_index()
mean["standard_error"] = mean["error"].fillna(mean["standard_error"])

# %% [markdown]
# ## The curves
#
# A learner that memorised its tasks is flat: at the top on tasks it knows, at chance on new ones. One that learns rises on both,
# and starts at chance.

# %%
figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True, layout="constrained")
for stream, panel in zip((SEEN, UNSEEN), panels, strict=True):
    plot_learning_curves(mean[mean["stream"] == stream], panel, CHANCE).get_legend().remove()
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)

# %%
print(format_table(summarise_evaluation(mean[mean["stream"] == UNSEEN])))

# %% [markdown]
# ## Examples to half of the way
#
# The number of examples after which accuracy on unseen tasks is first halfway from chance to the best of the oracles; missing
# where it never is.

# %%
unseen = mean[mean["stream"] == UNSEEN]
best = unseen[~unseen["method"].isin(learner["method"])]["accuracy"].max()
reached = unseen[unseen["accuracy"] >= (CHANCE + best) / 2].groupby("method")["position"].min()
runs = unseen.groupby("method", sort=False)["runs"].max()
print(format_table(pd.DataFrame({"runs": runs, "examples": reached.reindex(runs.index)}).reset_index()))
