"""Planes around models, and what losses are equivalent to: plain loops and closed forms."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from problems.conftest import Clusters, double, opened

from metalearn import random
from metalearn.analysis.landscape import (
    equivalent_rates,
    equivalent_smoothing,
    filter_normalised,
    landscape,
    loss_plane,
    plot_plane,
    plot_planes,
    plot_rates,
    plot_smoothing,
    total_losses,
)
from metalearn.analysis.rates import tuned_errors
from metalearn.analysis.transfer import compared_losses, open_source, open_task
from metalearn.base import InnerState
from metalearn.losses.learned import load_loss
from metalearn.models.vision import LeNet
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.search.candidates import gradients_of
from metalearn.search.population import PopulationTraining
from metalearn.tree import initialise

KEY = random.key(3)
CROSS_ENTROPY = "mul(-1,mul(y,log(p)))"


@pytest.fixture
def task() -> LossTask:
    return opened(LossTask(Clusters(), double, SGD(0.1), batch_size=8, outer_batch_size=None, untouched=0.0))


# -- planes ------------------------------------------------------------------------------------------------------------


def test_every_filter_of_a_direction_is_as_long_as_the_models() -> None:
    params, _ = initialise(LeNet(64, 10), KEY)
    found, other = filter_normalised(params, KEY), filter_normalised(params, random.fold(KEY, 1))
    for name, value in params.items():
        if value.ndim == 1:
            assert not found[name].any()
            continue
        lengths = [one[name].flatten(1).norm(dim=1) for one in (found, params)]
        torch.testing.assert_close(*lengths)
        cosine = torch.cosine_similarity(found[name].flatten(), other[name].flatten(), 0)
        assert abs(cosine) < 5 / value.numel() ** 0.5  # five deviations of independent directions
    assert all(torch.equal(value, filter_normalised(params, KEY)[name]) for name, value in found.items())


def test_matches_one_model_at_a_time(task: LossTask) -> None:
    params, buffers = task.initial(KEY)
    mse = load_loss("mse")
    frame = loss_plane(task, params, buffers, KEY, {"mse": mse}, extent=0.7, points=5, chunk=4)
    a, b = (filter_normalised(params, random.fold(KEY, axis)) for axis in "ab")
    examples = task.examples("validation", "cpu")
    assert len(frame) == 25
    for row in frame.to_dict("records"):
        moved = {name: value + row["a"] * a[name] + row["b"] * b[name] for name, value in params.items()}
        state = InnerState(moved, buffers, {}, torch.tensor(0), {})
        score = task.score(state, "validation")
        assert row["objective"] == pytest.approx(score["loss"], rel=1e-10)
        assert row["error"] == score["error"]
        assert row["mse"] == pytest.approx(
            float(mse(task.predict(state, examples.inputs), examples.targets)), rel=1e-10
        )
    whole = loss_plane(task, params, buffers, KEY, {"mse": mse}, extent=0.7, points=5, chunk=25)
    pd.testing.assert_frame_equal(frame, whole, rtol=1e-12)


def test_draws_the_plane_on_a_logarithmic_scale_where_that_helps() -> None:
    axis = np.linspace(-1, 1, 7)
    frame = pd.DataFrame(
        [(a, b, 0.01 + a * a + b * b, a) for a in axis for b in axis], columns=[*"ab", "objective", "tilt"]
    )
    labels = [plot_plane(frame, value=name).figure.axes[1].get_ylabel() for name in ("objective", "tilt")]
    assert labels == ["log10 of objective", "tilt"]
    with pytest.raises(ValueError, match="value is 'error'; accepted: 'objective', 'tilt'"):
        plot_plane(frame, value="error")


def test_planes_share_one_scale() -> None:
    axis = np.linspace(-1, 1, 5)
    rows = [(name, a, b, k * (0.01 + a * a + b * b)) for k, name in ((1, "x"), (9, "y")) for a in axis for b in axis]
    figure = plot_planes(pd.DataFrame(rows, columns=["loss", *"ab", "objective"]))
    panels, bars = [ax for ax in figure.axes if ax.get_title()], [ax for ax in figure.axes if not ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["x", "y"]
    for bar in bars:
        np.testing.assert_allclose(bar.get_ylim(), np.log10([0.01, 9 * 2.01]))


def test_every_plane_has_the_model_that_its_loss_leads_to_in_the_middle(tmp_path: Path) -> None:
    settings = {"seed": 3, "steps": 60, "rates": [0.01, 0.03, 0.1], "points": 3, "extent": 0.5, "out": str(tmp_path)}
    planes = landscape(["square(sub(y,p))", "div(log(sub(y,p)),p)"], model="linear", **settings)
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "landscape_digits_linear.csv"), planes, rtol=1e-6, check_dtype=False
    )
    middle = planes[(planes["a"] == 0) & (planes["b"] == 0)].set_index("loss")
    source = open_source("digits", "images", "train", None, 0.2)
    task = open_task(source, "linear", SGD(10**-1.5, momentum=0.9), 128, test=False)
    losses = compared_losses(list(middle.index[1:]), task, standard=("cross_entropy",))
    found = tuned_errors(task, losses, settings["rates"], 60, random.key(3, "landscape"), "validation")
    assert list(middle.index) == [row["loss"] for row in found] == ["cross_entropy", *list(middle.index[1:])]
    np.testing.assert_allclose(middle["error"], [row["error"] for row in found], atol=1e-6)
    rates = pd.read_csv(tmp_path / "landscape_digits_linear_rates.csv")
    np.testing.assert_allclose(rates["rate"], [row["rate"] for row in found])
    for name in ("landscape_digits_linear.png", "landscape_digits_linear_rates.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    with pytest.raises(ValueError, match="out is None with no run among the losses"):
        landscape(["square(sub(y,p))"], model="linear")


# -- equivalences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_matches_the_smoothing_of_smoothed_labels(epsilon: float, num_classes: int) -> None:
    losses = {"smooth": load_loss("label_smoothing", epsilon=epsilon), "hard": load_loss(CROSS_ENTROPY)}
    totals = total_losses(losses, num_classes)
    found = equivalent_smoothing(totals, num_classes).set_index("loss")
    assert found.loc["smooth", "epsilon"] == pytest.approx(epsilon, rel=5e-3)  # the grid's step in logit p
    assert found.loc["smooth", "minimum"] == pytest.approx(1 - epsilon + epsilon / num_classes, rel=1e-3)
    assert found.loc["hard", "epsilon"] == 0
    ax = plot_smoothing(totals, num_classes=num_classes)
    at_minimum = [line.get_xdata()[0] for line in ax.get_lines() if len(line.get_xdata()) == 1]
    np.testing.assert_allclose(at_minimum, found["minimum"])


def test_a_scaled_loss_at_the_inverse_rate_gives_the_same_run(task: LossTask) -> None:
    scaled = load_loss(CROSS_ENTROPY)
    scaled.load_state_dict({"weights": torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0])})
    losses = {"one": load_loss(CROSS_ENTROPY), "four": scaled}
    rates = {"one": 0.2, "four": 0.05}
    gradients = gradients_of(list(losses.values()), task.output)
    trained = PopulationTraining(steps=60).train(
        task, gradients, KEY, torch.tensor([*rates.values()], dtype=torch.float64)
    )
    begun = task.initial(random.fold(KEY, "init"))[0]
    for name, value in trained.params.items():
        torch.testing.assert_close(value[0], value[1], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(value[0], begun[name], atol=1e-2)
    found = equivalent_rates(losses, rates, reference="one").set_index("loss")
    assert found.loc["four", "scale"] == pytest.approx(4)
    np.testing.assert_allclose(found["gain"], 1.0)
    assert len(plot_rates(found.reset_index()).get_lines()) == 3


def test_other_outputs_and_references_are_refused() -> None:
    with pytest.raises(ValueError, match="output of a is 'identity'; accepted: 'softmax'"):
        total_losses({"a": load_loss("mse", output="identity")})
    with pytest.raises(ValueError, match="reference is 'b'; accepted: 'a'"):
        equivalent_rates({"a": load_loss("mse")}, {"a": 0.1}, reference="b")
