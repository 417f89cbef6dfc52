# %% [markdown]
# # What did the learner learn, and when?
#
# Reads one run of `metalearn fit -c configs/in_context/quick.yaml --run_dir runs/in_context/quick` and what
# `metalearn validate` (or else `metalearn test`) measured on it. Nothing is trained here. For another run set
# `METALEARN_RUN`.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt

from metalearn.analysis.compare import format_table, summarise_evaluation
from metalearn.analysis.curves import plot_learning_curves, plot_training
from metalearn.analysis.runs import read_evaluation, read_run

RUN = Path(os.environ.get("METALEARN_RUN", "runs/in_context/quick"))

# %%
run = read_run(RUN)
stage = "validation" if (RUN / "validation.csv").exists() else "test"
evaluation = read_evaluation(RUN, stage)

# %% [markdown]
# ## When: the training curves
#
# A learner that learns to learn first sits on a plateau, at the loss of guessing; then the loss drops, and the accuracy
# after the last example of a sequence leaves chance. If the accuracy on seen tasks rises long before that on unseen
# tasks, the learner recognises tasks before it learns them.

# %%
accuracies = [metric for metric in run["metric"].unique() if metric.endswith("/accuracy_last")]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
plot_training(run, ["train/loss"], left)
plot_training(run, accuracies, right)

# %% [markdown]
# The step at which each accuracy was first halfway between its first and its last value:

# %%
progress = run[run["metric"].isin(accuracies)]
ends = progress.groupby("metric")["value"].agg(["first", "last"])
halfway = progress["metric"].map(ends.mean(axis="columns"))
ends["halfway at step"] = progress[progress["value"] >= halfway].groupby("metric")["step"].min()
print(format_table(ends.reset_index()))

# %% [markdown]
# ## What: the learning curves
#
# How accuracy on a stream rises with the number of examples seen tells the algorithms apart (Kirsch et al. 2022):
#
# | seen tasks | unseen tasks | the learner |
# |---|---|---|
# | flat and high | flat at chance | memorised its tasks |
# | rises | flat at chance | identifies which of its tasks it sees |
# | flat and high | flat and high | generalises without examples |
# | rises | rises | learns from the examples: it learned to learn |
#
# The other methods are fitted to the same sequences; a learner that reaches them extracts as much from few examples.

# %%
plot_learning_curves(evaluation).get_figure(root=True)

# %% [markdown]
# Accuracy ± standard error, by number of examples seen:

# %%
print(format_table(summarise_evaluation(evaluation)))

# %% [markdown]
# The improvement within a sequence, accuracy after the last example minus accuracy before the first:

# %%
learner = evaluation[evaluation["method"] == "learner"].sort_values("position")
accuracy = learner.groupby("stream", sort=False)["accuracy"].agg(["first", "last"])
accuracy["improvement"] = accuracy["last"] - accuracy["first"]
print(format_table(accuracy.reset_index()))
