"""The package as a stranger meets it: light to import, few names, complete pins."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import metalearn

ROOT = Path(__file__).parents[1]


def test_import_is_light():
    code = (
        "import time; t = time.perf_counter(); import metalearn; s = time.perf_counter() - t; import sys; "
        "print(s, 'torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds, *heavy = min(run.stdout.split() for run in runs)
    assert float(seconds) < 0.2 and heavy == ["False", "False"]


def test_exports_are_there_and_nothing_else():
    for name in metalearn.__all__:
        assert getattr(metalearn, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = metalearn.Nothing


def test_a_loss_is_one_line_away():
    assert metalearn.load_loss("mul(-1,mul(y,log(p)))").latex() == r"-y \cdot \log\left|p\right|"
    assert set(metalearn.__all__) == set(dir(metalearn))


def test_every_dependency_is_pinned_and_torch_without_a_local_suffix():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    pins = dict(line.split(" ")[0].split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    names = {name.split("[")[0].split(">")[0].split("<")[0].strip() for name in wanted}
    assert names <= set(pins)
    assert pins["torch"] == "2.13.0" and pins["pytorch-lightning"] == "2.6.6"
