# %% [markdown]
# # When does the learner generalise?
#
# Reads the sweep of `metalearn sweep configs/in_context/phases.sweep.yaml --sweep_dir runs/phases`, finished or not. Nothing is
# trained here. For another sweep set `METALEARN_SWEEP`.

# %%
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt

from metalearn.analysis.bimodality import bimodality_table, plot_bimodality
from metalearn.analysis.compare import format_table
from metalearn.analysis.phases import plot_phase_diagram, plot_transitions
from metalearn.analysis.plateaus import plateau_lengths, plot_plateaus
from metalearn.analysis.regimes import regime_table, regimes
from metalearn.analysis.sweeps import read_sweep, read_sweep_logs
from metalearn.analysis.transitions import critical_number, critical_table

SWEEP = Path(os.environ.get("METALEARN_SWEEP", "runs/phases"))
X, Y = "num_tasks", "width"
CHANCE = 1 / 5
SEEN, UNSEEN = (f"validation/{stream}/accuracy_last" for stream in ("seen_train", "unseen_held_out"))

# %%
sweep = read_sweep(SWEEP)
print(sweep["state"].value_counts().to_string())
cells = regimes(sweep, CHANCE)
one = cells[cells[Y] == cells[Y].max()]

# %% [markdown]
# ## The phase diagram
#
# Accuracy at the end of a sequence, on tasks of the training pool and on new ones. The line is halfway between chance and one.
# A marker is the regime that most seeds are in (Kirsch et al. 2022): with few tasks the learner memorises them, with more
# it identifies which one it sees, and with many it learns from the examples, whatever the task.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
plot_phase_diagram(cells, X, Y, SEEN, left, threshold=(1 + CHANCE) / 2)
plot_phase_diagram(cells, X, Y, UNSEEN, right, threshold=(1 + CHANCE) / 2)
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)

# %%
print(format_table(regime_table(one, [X])))

# %% [markdown]
# ## The critical number of tasks
#
# A logistic function of log2 tasks, fitted to accuracy on unseen tasks; the interval is a bootstrap over seeds. "none" where the
# accuracy is not seen to depend on the number of tasks, hardly changes, or has not settled within the sweep.

# %%
print(critical_number(one, X, UNSEEN))
table = critical_table(cells, X, [UNSEEN], by=Y)
print(format_table(table[[Y, "found", "estimate", "low", "high", "octaves", "after", "p", "seeds", "cells", "reason"]]))

# %% [markdown]
# How much is gained within a sequence: thin lines are seeds.

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
plot_transitions(one, X, ax=axes)

# %% [markdown]
# ## Does a seed near the edge end in between, or on one of two sides?
#
# Hartigan's dip test at each number of tasks, where there are at least ten seeds: a small p says that there are two clusters.

# %%
figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
plot_bimodality(one, X, UNSEEN, axes)

# %%
print(format_table(bimodality_table(one, X, UNSEEN)))

# %% [markdown]
# ## How long is the plateau?
#
# The training loss of the widest learners, and the step at which it first fell .05 nats below that of guessing (a dot).

# %%
logs = read_sweep_logs(SWEEP, "train/loss")
logs = logs[logs[Y] == logs[Y].max()]
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
plot_plateaus(logs, X, -math.log(CHANCE), axes)

# %%
lengths = plateau_lengths(logs, -math.log(CHANCE))
table = lengths.groupby(X)["plateau"].agg(["count", "min", "median", "max"])
print(format_table(table.reset_index()))
