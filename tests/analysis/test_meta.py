import pytest
from matplotlib.figure import Figure

from metalearn.analysis.meta import Point, plot_meta_training, save_meta_training, summarise_meta_training


def points(problem="toy"):
    for method, end in (("PES", 1.0), ("backprop", 9.0)):
        for seed in range(3):
            for iteration in range(3):
                yield Point(problem, "loss", method, seed, iteration, 5.0 + (end + seed - 5.0) * iteration / 2)


def test_summary_matches_ends_by_hand():
    table = summarise_meta_training([*points("toy"), *points("other")])
    assert list(zip(table["problem"], table["method"], strict=True)) == [
        ("toy", "PES"), ("toy", "backprop"), ("other", "PES"), ("other", "backprop"),
    ]  # fmt: skip
    first = table.iloc[0]
    assert first[["seeds", "iterations", "start", "end", "least", "greatest"]].tolist() == [3, 2, 5.0, 2.0, 1.0, 3.0]


def test_figure_draws_medians_between_least_and_greatest():
    ax = plot_meta_training(points(), Figure().subplots(), target=2.0)
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(lines) == ["PES", "backprop", "target"]
    assert list(lines["PES"]) == pytest.approx([5.0, 3.5, 2.0])
    assert len(ax.collections) == 2


def test_figure_of_several_problems_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"toy.*other"):
        save_meta_training([*points("toy"), *points("other")], tmp_path / "figure.png")
