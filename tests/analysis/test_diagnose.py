"""The table of estimators, against what is known of the ridge problem."""

import pytest
import torch
from estimators.conftest import ridge
from test_cli import HERE

from metalearn.analysis.diagnose import Draw, advice, diagnose, growth
from metalearn.base import InnerProblem
from metalearn.cli import main
from metalearn.estimators.forward import ForwardMode, ZerothOrder
from metalearn.estimators.unrolled import Unrolled
from metalearn.problems.toys import LearningRateToy
from metalearn.random import key


@pytest.fixture(scope="module")
def diagnosis():
    return diagnose(ridge()[0], steps=12, draws=2)


def row(diagnosis, name):
    return diagnosis.table.set_index("estimator").loc[name]


def test_matches_theory_estimator_by_estimator(diagnosis):
    for name in ("Unrolled(store)", "Unrolled(checkpoint)", "Unrolled(mixed)", "ForwardMode"):
        assert row(diagnosis, name)["bias"] < 1e-10 and row(diagnosis, name)["cosine"] > 1 - 1e-10
    assert row(diagnosis, "Identity")["bias"] > row(diagnosis, "Neumann(10)")["bias"] > 1e-4
    assert row(diagnosis, "ForwardGradient(8)")["deviation"] > 0.2 and row(diagnosis, "Neumann(10)")["deviation"] < 1e-6


def test_no_cell_is_blank(diagnosis):
    table = diagnosis.table
    measured = table[["cosine", "bias", "deviation", "seconds", "peak_mib"]].notna().all(axis=1)
    assert (measured | table["remark"].str.startswith("refused: ")).all()
    assert diagnosis.facts["meta_parameters"] == 6 and len(table) >= 12


def test_growth_matches_the_spectral_radius():
    problem, meta = ridge(lr=0.1)
    matrix = problem._normal_matrix(meta)
    wanted = float(torch.linalg.eigvalsh(torch.eye(6, dtype=torch.float64) - 0.1 * matrix).abs().max())
    assert growth(problem, meta, Draw(key(0), problem.batches(key(0), 30), None)) == pytest.approx(wanted, rel=1e-3)


class Opaque(LearningRateToy):
    differentiable = False


def test_an_opaque_run_is_measured_against_differences():
    found = diagnose(Opaque(100), 10, 2, estimators={"zeroth": ZerothOrder(64), "forward": ForwardMode()})
    assert row(found, "zeroth")["cosine"] > 0.8 and "refused" in row(found, "forward")["remark"]
    assert "cannot be differentiated" in found.advice[0] and "growth" not in found.facts


def test_exploding_runs_are_told_to_smooth(diagnosis):
    problem: InnerProblem = ridge()[0]
    said = advice(diagnosis.table, diagnosis.facts | {"growth": 1.2}, problem, horizon=100)
    assert "explode" in said[0] and "PersistentES" in said[0]


def test_command_prints_table_and_advice(capsys):
    config = HERE.parent / "configs" / "meta_gradient" / "distillation.yaml"
    assert main(["diagnose", "-c", str(config), "--steps", "2", "--draws", "2"]) == 0
    out = capsys.readouterr().out
    assert "Unrolled(store)" in out and "\n- " in out
    quick = HERE.parent / "configs" / "in_context" / "quick.yaml"
    assert main(["diagnose", "-c", str(quick)]) == 2
    assert "the model is InContextLearning; accepted for diagnose" in capsys.readouterr().err


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="draws is 1"):
        diagnose(ridge()[0], 3, draws=1, estimators={"store": Unrolled()})
