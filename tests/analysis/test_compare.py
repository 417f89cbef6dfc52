"""Statistics against references, and the tables that they are shown in."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from scipy.stats import ttest_rel

from metalearn.analysis.compare import (
    beside_published,
    bootstrap_interval,
    compare,
    format_table,
    holm,
    paired_comparison,
    summarise_evaluation,
    write_table,
)

METRIC = "validation/unseen_held_out/accuracy_last"


def write_run(run_dir: Path, values: list[float], seed: int | None, metric: str = METRIC) -> None:
    folder = run_dir / "logs" / "version_0"
    folder.mkdir(parents=True)
    pd.DataFrame({"step": range(len(values)), metric: values}).to_csv(folder / "metrics.csv", index=False, na_rep="nan")
    if seed is not None:
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")


def draw(seeds: int = 8) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    groups = {"a": 0.0, "b": 0.5, "c_1": 2.0}
    rows = [(name, seed, shift + rng.normal()) for name, shift in groups.items() for seed in range(seeds)]
    return pd.DataFrame(rows, columns=["group", "seed", "value"])


# Holm


def test_matches_holm_by_hand() -> None:
    # sorted: 4 * .005 = .02, 3 * .01 = .03, 2 * .03 = .06, 1 * .04 = .04 raised to .06
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, np.nan, 0.02]), [0.6, np.nan, 0.04])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_matches_holm_as_closed_testing(p_values: list[float]) -> None:
    """Holm is the closed test of Bonferroni: a hypothesis has the largest Bonferroni p of all subsets that hold it."""
    count = len(p_values)
    subsets = [[i for i in range(count) if mask >> i & 1] for mask in range(1, 2**count)]
    bonferroni = [min(1.0, len(subset) * min(p_values[i] for i in subset)) for subset in subsets]
    expected = [max(p for p, subset in zip(bonferroni, subsets, strict=True) if i in subset) for i in range(count)]
    np.testing.assert_allclose(holm(p_values), expected)


def test_holm_does_not_depend_on_order() -> None:
    p_values = np.array([0.01, 0.04, np.nan, 0.005])
    for order in map(list, permutations(range(4))):
        np.testing.assert_allclose(holm(p_values[order]), holm(p_values)[order])


# Intervals


@pytest.mark.parametrize(("size", "low", "high"), [(5, 0.87, 0.955), (10, 0.925, 0.975), (30, 0.925, 0.975)])
def test_interval_covers_the_mean_as_often_as_it_says(size: int, low: float, high: float) -> None:
    samples = np.random.default_rng(1).normal(3.0, 2.0, size=(800, size))
    intervals = [bootstrap_interval(sample, resamples=1000) for sample in samples]
    assert low < np.mean([start <= 3.0 <= end for start, end in intervals]) < high


def test_matches_the_normal_interval_of_a_large_sample() -> None:
    sample = np.random.default_rng(0).normal(size=2000)
    error = sample.std(ddof=1) / np.sqrt(len(sample))
    expected = sample.mean() + 1.645 * error * np.array([-1, 1])
    np.testing.assert_allclose(bootstrap_interval(sample, confidence=0.9), expected, atol=0.1 * error)


def test_interval_of_values_that_cannot_tell() -> None:
    for values in ([], [1.0], [1.0, np.nan], [1.0, np.inf]):
        assert np.isnan(bootstrap_interval(values)).all()
    assert bootstrap_interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))
    assert bootstrap_interval([1.0, 2.0]) == bootstrap_interval([1.0, 2.0])
    with pytest.raises(ValueError, match="confidence is 95; accepted: 0 < confidence < 1"):
        bootstrap_interval([1.0, 2.0], confidence=95)


# Paired comparison


def test_matches_scipy_on_pivoted_values() -> None:
    frame = draw()
    table = paired_comparison(frame.sample(frac=1, random_state=0), baseline="a").set_index("group")
    wide = frame.pivot(index="seed", columns="group", values="value")
    for name in ("b", "c_1"):
        assert table.loc[name, "p"] == pytest.approx(ttest_rel(wide[name], wide["a"]).pvalue)
        assert table.loc[name, "difference"] == pytest.approx((wide[name] - wide["a"]).mean())
        assert table.loc[name, "difference_low"] < table.loc[name, "difference"] < table.loc[name, "difference_high"]
    np.testing.assert_allclose(table.loc[["b", "c_1"], "p_holm"], holm(table.loc[["b", "c_1"], "p"]))
    np.testing.assert_allclose(table["mean"], wide.mean()[table.index])
    assert table.loc["a", ["pairs", "difference", "p", "p_holm"]].isna().all()


def test_pairs_only_the_seeds_that_both_groups_have() -> None:
    frame = draw().query("not (group == 'b' and seed in [0, 3])")
    frame = frame.assign(seed=frame["seed"].astype("Int64").mask((frame["group"] == "c_1") & (frame["seed"] == 1)))
    table = paired_comparison(frame).set_index("group")
    assert table["n"].tolist() == [8, 6, 8]
    assert table["pairs"].dropna().tolist() == [6, 7]
    wide = frame[frame["group"] != "c_1"].pivot(index="seed", columns="group", values="value").dropna()
    assert table.loc["b", "p"] == pytest.approx(ttest_rel(wide["b"], wide["a"]).pvalue)


@pytest.mark.parametrize(("ours", "difference"), [([1.5], 0.5), ([1.5, 2.5], 0.5), ([1.5, np.nan], np.nan)])
def test_p_is_missing_where_it_is_undefined(ours: list[float], difference: float) -> None:
    """One pair, equal differences, and a run that diverged."""
    seeds = list(range(len(ours)))
    frame = pd.DataFrame({"group": "a", "seed": seeds, "value": [1.0, 2.0][: len(ours)]})
    table = paired_comparison(pd.concat([frame, frame.assign(group="b", value=ours)])).set_index("group")
    assert np.isnan(table.loc["b", "p"]) and np.isnan(table.loc["b", "p_holm"])
    np.testing.assert_allclose(table.loc["b", "difference"], difference)


def test_groups_that_share_no_seed_have_no_difference() -> None:
    frame = pd.DataFrame({"group": ["a", "b"], "seed": [0, 1], "value": [1.0, 2.0]})
    table = paired_comparison(frame).set_index("group")
    assert table.loc["b", "pairs"] == 0 and table.loc["b", "mean"] == 2.0 and np.isnan(table.loc["b", "difference"])


def test_refuses_wrong_groups_by_name() -> None:
    with pytest.raises(ValueError, match="baseline is 'd'; accepted: 'a', 'b', 'c_1'"):
        paired_comparison(draw(), baseline="d")
    with pytest.raises(ValueError, match="group 'b' has several values for seed 2"):
        paired_comparison(pd.concat([draw(), draw().query("group == 'b' and seed == 2")]))


# Tables


def test_summary_has_a_row_per_method_and_a_column_per_position() -> None:
    columns = ["stream", "method", "position", "sequences", "accuracy", "standard_error"]
    rows = [
        ("unseen", "learner", 0, 8, 0.2, 0.04),
        ("unseen", "learner", 10, 8, 0.8234, 0.0119),
        ("unseen", "learner", 11, 8, 0.9, 0.01),
        ("unseen", "1-nearest-neighbour", 10, 8, 1.0, 0.0),
        ("seen", "learner", 2, 8, 0.5, np.nan),
    ]
    frame = pd.DataFrame(rows, columns=columns)
    assert list(summarise_evaluation(frame).columns) == ["stream", "method", "10"]  # where every method was evaluated
    table = summarise_evaluation(frame, positions=(0, 2, 10, 31))
    assert list(table.columns) == ["stream", "method", "0", "2", "10"]
    assert table.to_numpy().tolist() == [
        ["unseen", "learner", ".200 ± .040", "", ".823 ± .012"],
        ["unseen", "1-nearest-neighbour", "", "", "1.000 ± .000"],
        ["seen", "learner", "", ".500", ""],
    ]


def test_tables_are_written_for_people_and_for_programs(tmp_path: Path) -> None:
    table = paired_comparison(draw().replace({"group": {"c_1": "runs/c_1 & 50%"}}))
    write_table(table, tmp_path / "new" / "table.v1")
    read = pd.read_csv(tmp_path / "new" / "table.v1.csv", dtype={"pairs": "Int64"})
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    latex = (tmp_path / "new" / "table.v1.tex").read_text()
    for part in (r"\begin{tabular}", r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}", r"p\_holm"):
        assert latex.count(part) == 1
    assert r"runs/c\_1 \& 50\%" in latex and "NaN" not in latex and "<NA>" not in latex
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert [row.replace(r"\&", "").count("&") for row in body] == [len(table.columns) - 1] * 3


def test_terminal_table_is_aligned() -> None:
    lines = format_table(paired_comparison(draw())).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[1].split()[5:] == ["-"] * 6, "missing values of integer and float columns look the same"


# metalearn compare


def test_compares_folders_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    runs = {name: rng.normal(shift, 0.1, size=(4, 3)) for name, shift in (("a", 0.3), ("b", 0.8))}
    for name, values in runs.items():
        for seed, logged in enumerate(values):
            write_run(tmp_path / name / f"seed_{seed}", logged.tolist(), seed)
    folders = [f"{tmp_path}/a/", str(tmp_path / "b")]
    table = compare(folders, last=2, out=str(tmp_path / "table"))
    a, b = (runs[name][:, -2:].mean(1) for name in "ab")
    assert table["group"].tolist() == [str(tmp_path / "a"), str(tmp_path / "b")]
    np.testing.assert_allclose(table["mean"], [a.mean(), b.mean()])
    assert table["p"][1] == pytest.approx(ttest_rel(b, a).pvalue)
    assert format_table(table) in capsys.readouterr().out
    assert (tmp_path / "table.csv").is_file() and (tmp_path / "table.tex").is_file()


def test_says_what_could_not_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        write_run(tmp_path / "a" / str(seed), [0.1, 0.1 * seed], seed)
    for seed in range(1, 5):
        write_run(tmp_path / "b" / str(seed), [0.2 * seed], seed)
    write_run(tmp_path / "c", [0.5], None)
    table = compare([str(tmp_path / name) for name in "abc"])
    assert table["pairs"].dropna().tolist() == [2, 0]
    out = capsys.readouterr().out
    assert f"{tmp_path}/b: seeds not paired with {tmp_path}/a: [0, 3, 4]" in out
    assert f"{tmp_path}/c: not paired, its config.yaml has no seed" in out
    assert "the runs end at different steps: 0 to 1" in out


def test_a_diverged_run_is_not_hidden(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.5, float("nan")], 0)
    assert np.isnan(compare([str(tmp_path / "a")])["mean"][0])


def test_refuses_wrong_arguments_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "x", [0.5], 0)
    write_run(tmp_path / "a" / "y", [0.5], 0)
    run = str(tmp_path / "a" / "x")
    with pytest.raises(ValueError, match="nowhere', which holds no run"):
        compare([run, str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=f"metric is 'accuracy_lost'; .*x' has: {METRIC}"):
        compare([run], metric="accuracy_lost")
    with pytest.raises(ValueError, match="several values for seed 0"):
        compare([str(tmp_path / "a")])
    for last in (0, 2):
        with pytest.raises(ValueError, match=f"last is {last}; accepted: 1 to 1"):
            compare([run], last=last)
    for runs in ([], [run, run + "/"]):
        with pytest.raises(ValueError, match="have no run in common"):
            compare(runs)


def test_is_served_by_jsonargparse() -> None:
    """The way ``cli.py`` serves it: jsonargparse itself takes a list as one positional only."""
    parser = ArgumentParser()
    parser.add_argument("runs", nargs="+", type=str)
    parser.add_function_arguments(compare, skip={"runs"}, as_group=False)
    arguments = parser.parse_args(["runs/a", "runs/b", "--metric", "m", "--out", "t"]).as_dict()
    assert arguments == {"runs": ["runs/a", "runs/b"], "metric": "m", "last": 1, "confidence": 0.95, "out": "t"}
    assert "number of last logged values" in parser.format_help()


def test_published_rows_stand_above_runs_at_their_last_position():
    frame = pd.DataFrame(
        {
            "run": "runs/a",
            "stream": ["mnist", "mnist", "random"],
            "method": "learner",
            "position": [0, 99, 99],
            "accuracy": [0.1, 0.7371, 1.0],
            "standard_error": [0.01, 0.014, 0.0],
        }
    )
    table = beside_published(frame, {"paper": {"mnist": 73.7}}).set_index("method")
    assert table.loc["paper"].tolist() == ["73.7", "-"]
    assert table.loc["runs/a: learner"].tolist() == ["73.7 ± 1.4", "100.0 ± 0.0"]


def test_compares_what_was_evaluated_after_training(tmp_path: Path) -> None:
    for group, seed, accuracy in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.6), ("b", 1, 0.9)):
        write_run(tmp_path / group / str(seed), [0.1], seed)
        row = {"stream": ["new"], "method": "learner", "position": 31, "sequences": 8, "accuracy": accuracy}
        pd.DataFrame(row | {"standard_error": 0.1}).to_csv(tmp_path / group / str(seed) / "test.csv", index=False)
    table = compare([str(tmp_path / "a"), str(tmp_path / "b")], metric="test/new/learner/31")
    assert table["mean"].tolist() == pytest.approx([0.6, 0.75])
    assert table["difference"].iloc[1] == pytest.approx(0.15) and table["pairs"].iloc[1] == 2
