# %% [markdown]
# # What shortens the plateau?
#
# Reads the sweep of `metalearn sweep configs/in_context/interventions.sweep.yaml --sweep_dir runs/interventions`, whose axis
# `variant` names what was changed; its first value is the baseline. Nothing is trained here. For another sweep set
# `METALEARN_SWEEP`.

# %%
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt

from metalearn.analysis.compare import format_table, paired_comparison
from metalearn.analysis.plateaus import intervention_table, plateau_lengths, plot_interventions, plot_plateaus
from metalearn.analysis.sweeps import read_sweep, read_sweep_logs

SWEEP = Path(os.environ.get("METALEARN_SWEEP", "runs/interventions"))
BY = "variant"
CHANCE_LOSS = math.log(5)
UNSEEN = "validation/unseen_held_out/accuracy_last"

# %%
cells = read_sweep(SWEEP)
print(cells["state"].value_counts().to_string())
logs = read_sweep_logs(SWEEP, "train/loss")
lengths = plateau_lengths(logs, CHANCE_LOSS)

# %% [markdown]
# ## The plateau, and what happens on it
#
# On the plateau the loss is that of guessing. Close to it (right) one sees whether small biases are memorised before the drop.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
plot_plateaus(logs, BY, CHANCE_LOSS, left)
plot_plateaus(logs, BY, CHANCE_LOSS, right, zoom=0.1).get_legend().remove()

# %% [markdown]
# ## Its length by variant
#
# The step at which the smoothed loss first fell .05 nats below that of guessing. The interval of the median needs no assumption
# on the distribution and lets runs count that never left. `ratio` is to the baseline, over seeds that both have.

# %%
table = intervention_table(lengths, BY)
print(format_table(table))

# %%
figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.45 * len(table)), layout="constrained")
plot_interventions(table, axes)

# %% [markdown]
# ## Is the learner as good afterwards?
#
# A variant that leaves early by memorising would pay here: accuracy on unseen tasks at the end, paired by seed.

# %%
complete = cells[cells["state"] == "complete"]
print(format_table(paired_comparison(complete, group=BY, value=UNSEEN)))
