"""Every notebook runs from top to bottom on a small run, or on a made-up sweep, and is one that Jupyter opens."""

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

jupytext = pytest.importorskip("jupytext")
matplotlib = pytest.importorskip("matplotlib")
nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))
SWEEPS = {  # made up: see tests/data/sweeps/README.md
    notebook: Path(__file__).parent / "data" / "sweeps" / sweep
    for notebook, sweep in {
        "phases": "phases",
        "learning_curves": "phases",
        "state_size": "state_size",
        "interventions": "interventions",
    }.items()
}
STREAMS = ("seen_train", "unseen_held_out")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 40 steps that was killed once, with what ``metalearn validate`` and ``metalearn test`` leave."""
    for version, steps in enumerate((range(0, 25), range(20, 40))):
        folder = tmp_path / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        frame = pd.DataFrame({"epoch": 0, "step": steps, "train/loss": np.exp(-np.array(steps) / 20)})
        for stream in STREAMS:
            frame[f"validation/{stream}/accuracy_last"] = np.where(frame["step"] % 10 == 9, frame["step"] / 50, np.nan)
        frame.to_csv(folder / "metrics.csv", index=False)
        (folder / "config.yaml").write_text("seed_everything: 3\n")
    rows = [
        (stream, method, position, 8, 0.2 + 0.02 * position, 0.01)
        for stream in STREAMS
        for method, positions in (("learner", range(32)), ("ridge", (1, 2, 5, 31)))
        for position in positions
    ]
    columns = ["stream", "method", "position", "sequences", "accuracy", "standard_error"]
    for stage in ("validation", "test"):
        pd.DataFrame(rows, columns=columns).to_csv(tmp_path / f"{stage}.csv", index=False)
    return tmp_path


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_a_small_run(notebook: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("METALEARN_RUN", str(run_dir))
    monkeypatch.setenv("METALEARN_SWEEP", str(SWEEPS.get(notebook.stem, "")))
    namespace = runpy.run_path(str(notebook))
    name, folder = ("SWEEP", SWEEPS[notebook.stem]) if notebook.stem in SWEEPS else ("RUN", run_dir)
    assert folder == namespace[name], f"the notebook must read what METALEARN_{name} names"
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_opens_in_jupyter(notebook: Path) -> None:
    opened = jupytext.read(notebook)
    nbformat.validate(opened)
    kinds = [cell["cell_type"] for cell in opened["cells"]]
    assert kinds[0] == "markdown" and kinds.count("code") >= 3
    assert opened["cells"][0]["source"].startswith("# ") and opened["cells"][0]["source"].splitlines()[0].endswith("?")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_short_and_shows_nothing_by_hand(notebook: Path) -> None:
    text = notebook.read_text()
    assert len(text.splitlines()) <= 120
    assert text.startswith("# %%"), "notebooks are jupytext py:percent files"
    assert "plt.show" not in text, "a notebook shows the last expression of a cell"
