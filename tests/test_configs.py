"""Every config that is committed: run shrunk to two steps, printed and parsed again, and under every hardware overlay."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from test_cli import printed

from metalearn.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
SWEEPS = sorted(CONFIGS.glob("*/*.sweep.yaml"))
EXPERIMENTS = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "hardware" and path not in SWEEPS)
HARDWARE = sorted(CONFIGS.glob("hardware/*.yaml"))
QUICK = CONFIGS / "in_context" / "quick.yaml"
SHORT = [
    *("--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=2"),
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"),
]
SHRUNK = [
    *SHORT,
    *("--data.init_args.meta_batch_size=2", "--data.init_args.evaluation_sequences=2"),
    "--model.init_args.compile=false",
]
SHRUNK_BY_TOPIC = {
    "loss_search": SHORT,
    "in_context": SHRUNK,
    "learned_optimizer": [*SHORT, "--model.init_args.runs=2"],
    "loss_tuning": SHORT,
    "meta_gradient": SHORT,
    "multilevel": SHORT,
}
# By topic and by experiment. Principal directions of 3072 pixels take seconds for each of four data sets; mnist_small has them too.
CHEAPER = {
    "loss_search": ("population_size: 32, initial_size: 64", "population_size: 4"),
    "loss_tuning": ("evaluation_steps: 200", "evaluation_steps: 5"),
    "learned_optimizer": ("horizon: ", "horizon: 20 # "),
    "digits_mlp_long": ("shortest: 100", "shortest: 10"),
    "family": ("groups: 3", "groups: 1"),
    "fashion_conv": ("pairs: 8", "pairs: 2"),
    "heavy_tailed": ("evaluation_steps: 300", "evaluation_steps: 5"),
    "quadratics": ("num_tasks: 128", "num_tasks: 4"),
    "mnist_paper": ("rank: 300", "rank: null"),
    "data_cleaning": ("evaluation_steps: 500", "evaluation_steps: 5"),
    "data_cleaning_few": ("evaluation_steps: 1500", "evaluation_steps: 5"),
}
IMAGE_SHAPES = {"mnist": (28, 28), "fashion_mnist": (28, 28), "cifar10": (32, 32, 3), "omniglot": (28, 28)}
CLASSES = {"omniglot": 30}  # else 10
LABEL = {"omniglot": "character"}  # else label


def name(path):
    return path.stem


@pytest.fixture(scope="module")
def image_sets(tmp_path_factory):
    """A folder as $METALEARN_DATA is: parquet files of noise images under the names of the real data sets."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for dataset, shape in IMAGE_SHAPES.items():
        (folder / dataset).mkdir()
        classes, label = CLASSES.get(dataset, 10), LABEL.get(dataset, "label")
        features = Features({"image": Image(), label: ClassLabel(names=[str(c) for c in range(classes)])})
        for split, count in (("train", 1200), ("test", 120)):
            pixels = random.integers(0, 256, (count, *shape), dtype=np.uint8)
            rows = Dataset.from_dict(
                {"image": list(pixels), label: [i % classes for i in range(count)]}, features=features
            )
            rows.to_parquet(folder / dataset / f"{split}-00000-of-00001.parquet")
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_text("Speak, speak.\nFirst, you know.\n" * 100)
    return folder


@pytest.fixture
def local_data(image_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_DATA", str(image_sets))
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("config", EXPERIMENTS, ids=name)
def test_experiment_runs_shrunk(config, tmp_path, local_data):
    copy = tmp_path / config.name
    text = config.read_text()
    for name in (config.parent.name, config.stem):
        text = text.replace(*CHEAPER.get(name, ("", "")))
    copy.write_text(text)
    shrunk = SHRUNK_BY_TOPIC[config.parent.name]
    assert main(["fit", "-c", str(copy), "--run_dir", str(tmp_path / "run"), *shrunk]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())


QUICK_SWEEPS = (
    "phases.sweep",
    "interventions.sweep",
)  # a list of numbers, and bundles of classes; the others take a minute
SWEEP_PARAMETERS = [
    pytest.param(path, marks=() if path.stem in QUICK_SWEEPS else pytest.mark.slow, id=path.stem) for path in SWEEPS
]


@pytest.mark.parametrize("config", SWEEP_PARAMETERS)
def test_sweep_is_listed_and_its_cost_estimated(config, tmp_path, local_data, capsys):
    small = ("trainer.max_steps=2", "data.init_args.meta_batch_size=2", "trainer.accelerator=cpu", "trainer.devices=1")
    settings = [part for setting in small for part in ("--set", setting)]
    assert main(["sweep", str(config), "--sweep_dir", str(tmp_path / "sweep"), "--dry_run", *settings]) == 0
    *cells, cost = capsys.readouterr().out.splitlines()
    search = yaml.safe_load(config.read_text()).get("trials")
    assert len(set(cells)) == len(cells) and cost.startswith(f"{search or len(cells)} cells")
    assert config.read_text().startswith("# ") and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("config", EXPERIMENTS, ids=name)
def test_experiment_states_its_seed_and_starts_with_a_comment(config):
    assert config.read_text().startswith("# ")
    content = yaml.safe_load(config.read_text())
    assert {"seed_everything", "trainer", "model", "data"} <= content.keys()
    assert content["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("config", EXPERIMENTS, ids=name)
def test_printed_config_parses_to_itself(config, tmp_path, capsys):  # trap 1
    first = printed(capsys, "-c", config)
    again = tmp_path / "printed.yaml"
    again.write_text(yaml.safe_dump(first))
    assert printed(capsys, "-c", again) == first


@pytest.mark.parametrize("config", HARDWARE, ids=name)
def test_hardware_overlay_changes_the_trainer_alone(config, capsys):
    overlay = yaml.safe_load(config.read_text())
    plain = (str, int, float, bool)
    assert overlay.keys() == {"trainer"} and all(isinstance(value, plain) for value in overlay["trainer"].values())
    alone, both = printed(capsys, "-c", QUICK), printed(capsys, "-c", QUICK, "-c", config)
    assert both == alone | {"trainer": alone["trainer"] | overlay["trainer"]}


def runs_here(config):
    """Whether this machine has what an overlay asks for."""
    return torch.cuda.is_available() or yaml.safe_load(config.read_text())["trainer"]["accelerator"] == "cpu"


@pytest.mark.parametrize("config", [path for path in HARDWARE if path.stem in ("cpu", "one_gpu")], ids=name)
def test_hardware_overlay_runs_or_is_refused_in_one_line(config, tmp_path, capsys):
    shrunk = [*SHRUNK, "-c", str(config)]  # the last of equals wins
    code = main(["fit", "-c", str(QUICK), "--run_dir", str(tmp_path), *shrunk])
    assert code == (0 if runs_here(config) else 2)
    if code:
        assert "metalearn: error: " in capsys.readouterr().err and not (tmp_path / "checkpoints").exists()
