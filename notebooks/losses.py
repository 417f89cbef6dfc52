# %% [markdown]
# # What do the found losses do?
#
# Reads the hall of fame of one run of `metalearn fit -c configs/loss_search/digits.yaml --run_dir runs/loss`. Nothing is
# trained here. For another run set `METALEARN_RUN`; without a hall of fame there, three losses written by hand take its
# place.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from metalearn.analysis.compare import format_table
from metalearn.analysis.landscape import equivalent_smoothing, plot_rates, plot_smoothing, total_losses
from metalearn.analysis.losses import (
    gradient_scales,
    hall_losses,
    loss_curves,
    plot_losses,
    read_hall_of_fame,
)
from metalearn.losses.learned import LearnedLoss, load_loss
from metalearn.losses.standard import standard_name

RUN = Path(os.environ.get("METALEARN_RUN", "runs/loss"))
NUM_CLASSES = 10

# %%
by_hand = {
    "squared error": LearnedLoss("square(sub(y,p))"),
    "squared error of 1.2 p": LearnedLoss("square(sub(y,p))", [1.0, 1.0, 1.2]),
    "log and root": LearnedLoss("sub(log(add(1,p)),mul(y,sqrt(p)))"),
}
if (RUN / "hall_of_fame.csv").exists():
    found = hall_losses(read_hall_of_fame(RUN).head(4), load_loss(RUN / "best.json").output)
else:
    print(f"{RUN} has no hall of fame: losses written by hand")
    found = by_hand
output = next(iter(found.values())).output
standard = standard_name(output)
losses = {standard: load_loss(standard, output=output)} | found

# %% [markdown]
# ## The formulas
#
# As LaTeX, with the weights that local search or tuning left, four digits of each.

# %%
for name, loss in found.items():
    if isinstance(loss, LearnedLoss):
        print(f"{name}\n    {loss.latex()}")

# %% [markdown]
# ## What do they punish, and where do they push?
#
# Each loss has the multiple at which its mean gradient is the standard loss's, because a learning rate would do the same.
# Left and middle: the loss of one output. Right: the direction in which it pushes the raw output, z. Cross-entropy pushes an
# output in proportion to its error. Where a solid line falls below zero, the loss pushes a probability that is too sure of
# itself back; where it stays near zero at p = 0, examples that are far off (outliers, or wrong labels) hardly count.

# %%
curves = loss_curves(losses, NUM_CLASSES)
plot_losses(curves, reference=standard)[0].get_figure(root=True)

# %% [markdown]
# What the learning rate has to make up for, the mean of |dL/dz| as a multiple of the standard loss's:

# %%
scales = gradient_scales(curves)
print(format_table((scales / scales[standard]).rename("scale").reset_index()))

# %% [markdown]
# ## Are they label smoothing in disguise?
#
# The whole loss of an example against the probability of its class, the others sharing the rest. Cross-entropy wants
# certainty: its minimum is at p = 1. A loss with a minimum before that regularises as label smoothing by ε does, whose minimum
# is at the same p (Raymond et al. 2023 find this in most of their losses).

# %%
if output == "softmax":
    totals = total_losses(losses, NUM_CLASSES)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    plot_smoothing(totals, axes, NUM_CLASSES, reference=standard)
    print(format_table(equivalent_smoothing(totals, NUM_CLASSES)))

# %% [markdown]
# ## Are they a learning rate in disguise?
#
# The best learning rate of each loss against the scale of its gradient, once `metalearn loss landscape runs/loss` has found
# the rates. A loss on the dashed line is the standard loss at another rate, as far as rates go.

# %%
for file in sorted(RUN.glob("landscape_*_rates.csv")):
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    plot_rates(pd.read_csv(file), axes).set_title(file.stem)
