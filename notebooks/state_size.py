# %% [markdown]
# # What makes a learner learn: its state, or its parameters?
#
# Reads the sweep of `python -m experiments.gpicl_state_size`, over learners of many kinds and sizes; nothing is trained
# here. For another sweep set `METALEARN_SWEEP`; its axis `learner` names kind and size, as in "GRU 32".

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt

from metalearn.analysis.compare import format_table
from metalearn.analysis.state_size import PARAMETERS, STATE, plot_state_size, rank_correlations
from metalearn.analysis.sweeps import read_sweep

SWEEP = Path(os.environ.get("METALEARN_SWEEP", "runs/state_size"))
UNSEEN = "validation/unseen_held_out/accuracy_last"

# %%
cells = read_sweep(SWEEP)
print(cells["state"].value_counts().to_string())
cells["architecture"] = cells["learner"].str.split().str[0]

# %% [markdown]
# ## Accuracy on unseen tasks against both sizes
#
# The state is the number of floats that the last prediction of a sequence can depend on. Kirsch et al. 2022 find that accuracy
# follows it, and not the number of parameters: then the left panel is one curve, and the right one is not.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
plot_state_size(cells, UNSEEN, STATE, left)
plot_state_size(cells, UNSEEN, PARAMETERS, right).set_ylabel("")
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)

# %% [markdown]
# ## In numbers
#
# Spearman's rank correlations over learners (the mean over seeds counts once), and the difference of the two with its bootstrap
# interval: an interval that holds zero says that these learners do not tell which size matters. The sizes are themselves
# correlated, so that neither correlation alone would tell.

# %%
print(rank_correlations(cells, UNSEEN))
print(f"between the sizes: {cells[[STATE, PARAMETERS]].corr('spearman').iloc[0, 1]:.2f}")

# %%
table = cells.groupby(["learner", PARAMETERS, STATE], sort=False)[UNSEEN].agg(["count", "mean", "std"])
print(format_table(table.reset_index()))
