# %% [markdown]
# # What does a learned optimizer do?
#
# Reads `rule.safetensors` of one run of `metalearn fit -c configs/learned_optimizer/digits_mlp.yaml --run_dir runs/lopt`. Nothing
# is trained here. For another run set `METALEARN_RUN`; without a rule there, the one that comes with the package is
# taken, and beside either stand optimizers made by hand, of which we know what should be found.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from metalearn.analysis.compare import format_table
from metalearn.analysis.coordinates import Coordinate
from metalearn.analysis.optimizer_curves import (
    of_rules,
    plot_adaptation,
    plot_modes,
    plot_schedule,
    plot_stability,
    plot_update_curves,
)
from metalearn.analysis.optimizers import (
    adaptation,
    autonomous,
    drive,
    findings,
    fixed_point,
    linearise,
    modes,
    update_curve,
)
from metalearn.analysis.stability import stability
from metalearn.optim.first_order import SGD, Adam, Clipped
from metalearn.optim.saving import PACKAGED, load_rule

RUN = Path(os.environ.get("METALEARN_RUN", "runs/lopt"))
SCALE, STEPS = 0.01, 100  # size of the gradients, updates of a run

# %% [markdown]
# An optimizer is looked at as what it does to one parameter: a state, a gradient that comes in, an update that goes out.
# A rule that looks at whole tensors is given 255 more parameters to look at, with gradients of the usual size.

# %%
found = next((path for path in (RUN / "rule.safetensors", PACKAGED / "digits_mlp.safetensors") if path.exists()), None)
by_hand = {"momentum .9": SGD(1.0, momentum=0.9), "clipped": Clipped(SGD(1.0), SCALE), "Adam": Adam(0.001)}
rules = {name: Coordinate(rule) for name, rule in by_hand.items()}
if found is None:
    print(f"{RUN} has no rule, and the package has none: optimizers made by hand")
else:
    print(found)
    rules = {"learned": Coordinate(load_rule(found), others=255, spread=SCALE)} | rules

# %%
print(format_table(pd.DataFrame([{"rule": name} | findings(rule, SCALE, STEPS) for name, rule in rules.items()])))

# %% [markdown]
# ## What does it remember?
#
# The eigenvalues of its memory around the state where it rests. One on the real axis is a running mean with that decay;
# the larger a disc, the more of that mean is in the updates. Momentum .9 is a disc at .9.

# %%
points = {name: fixed_point(rule, 0.0, STEPS // 2) for name, rule in rules.items()}
linear = {name: linearise(rule, points[name]) for name, rule in rules.items()}
spectra = pd.concat([modes(each).assign(rule=name) for name, each in linear.items()], ignore_index=True)
figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
plot_modes(spectra, axes)
print(format_table(spectra.groupby("rule", sort=False).head(3)[["rule", "modulus", "timescale", "strength"]]))

# %% [markdown]
# ## Does it clip, and does it follow the size of gradients?
#
# Left: the step that one more gradient causes, the state being that after gradients of the usual size; it is flat where
# large gradients are cut. Right: the same step for small gradients after gradients of other sizes. A slope of -1 divides
# by their root mean square.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
grads, sizes = np.linspace(-4 * SCALE, 4 * SCALE, 161), SCALE * np.geomspace(0.01, 100, 9)
plot_update_curves(of_rules(rules, lambda rule: update_curve(rule, drive(rule, SCALE, STEPS // 2), grads)), left)
plot_adaptation(of_rules(rules, lambda rule: adaptation(rule, sizes, STEPS)), right)

# %% [markdown]
# ## Has it a schedule?
#
# Without gradients only its own clock and memory move. Where its step shrinks by itself, it has learned a schedule; past
# the horizon of meta-training (dotted) nothing was learned.

# %%
figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
axes.axvline(STEPS, color="0.4", linestyle=":", linewidth=1.4)
plot_schedule(of_rules(rules, lambda rule: autonomous(rule, 2 * STEPS, SCALE)), axes)

# %% [markdown]
# ## Where would it diverge?
#
# Its spectral radius around rest, if the loss were a quadratic: above 1 a run diverges there, and far from rest the
# clipping above may catch it.

# %%
figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
radii = {name: stability(each, np.geomspace(1e-3, 10, 60).tolist()) for name, each in linear.items() if name != "Adam"}
plot_stability(pd.concat([frame.assign(rule=name) for name, frame in radii.items()]), axes)
