"""cli.py: the traps of LightningCLI, one run folder for many starts, and one clear line for what the user got wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import Callback

from metalearn.analysis.runs import read_evaluation, read_run
from metalearn.cli import main

HERE = Path(__file__).parent
TINY = HERE / "training" / "tiny.yaml"
LEARNER = "--model.init_args.learner"
TASKS = "--data.init_args.tasks.init_args"


def command(name, run_dir, *overrides):
    return main([name, "-c", str(TINY), "--run_dir", str(run_dir), *map(str, overrides)])


def fit(run_dir, *overrides):
    return command("fit", run_dir, *overrides)


def refused(capsys, *arguments):
    """The one line on stderr of a command that must end with code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("metalearn")]
    assert len(lines) == 1 and lines[0].startswith("metalearn: error: ")
    return lines[0]


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def last(run_dir):
    return torch.load(Path(run_dir) / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run of four steps. Tests may read it and must not change it."""
    folder = tmp_path_factory.mktemp("run")
    assert fit(folder, "--ckpt_path", "last") == 0  # a first start with `last` is a fresh start
    return folder


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def test_run_folder_holds_checkpoints_logs_and_the_result(run_dir):
    assert {path.name for path in run_dir.iterdir()} == {".lock", "checkpoints", "logs", "result.json"}
    logs = run_dir / "logs" / "version_0"
    assert {path.name for path in logs.iterdir()} >= {"config.yaml", "metrics.csv", "run.json"}
    assert yaml.safe_load((run_dir / "result.json").read_text())["global_step"] == 4
    assert last(run_dir)["global_step"] == 4
    record = yaml.safe_load((logs / "run.json").read_text())
    assert record["data"] == last(run_dir)["TaskBatches"] and record["data"]["seed"] == 0
    assert len(record["data"]["fingerprint"]["base"]) == 64 and record["versions"]["torch"] == torch.__version__


def test_every_start_logs_its_budget(run_dir):
    frame = read_run(run_dir).pivot(index="step", columns="metric", values="value")
    assert list(frame["budget/tokens"].dropna()) == [4 * 6 * step for step in (1, 2, 3, 4)]
    names = ("gradient_evaluations", "flops", "seconds", "peak_memory_bytes")
    assert all(frame[f"budget/{name}"].dropna().gt(0).all() for name in names)


def test_short_class_names_and_the_config_of_the_run_resolve_to_full_ones(run_dir):
    config = yaml.safe_load((run_dir / "logs" / "version_0" / "config.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["learner"]["class_path"] == "metalearn.models.transformer.Transformer"
    assert data["tasks"]["class_path"] == "metalearn.tasks.images.ProjectedImages"
    assert data["tasks"]["init_args"]["seed"] == 0  # that of seed_everything
    assert config["run_dir"] == str(run_dir)


def test_validate_and_test_write_their_tables(run_dir, tmp_path, capsys):
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    before = contents(run_dir)
    for name, stage in (("validate", "validation"), ("test", "test")):
        assert command(name, tmp_path, "--ckpt_path", checkpoint) == 0
        frame = read_evaluation(tmp_path, stage)
        assert set(frame["method"]) > {"learner", "1-nearest-neighbour"} and set(frame["sequences"]) == {8}
        assert (tmp_path / f"{stage}.png").stat().st_size > 1000
        assert f"({stage} tasks)" in capsys.readouterr().out
    assert not frame["accuracy"].equals(read_evaluation(tmp_path, "validation")["accuracy"])
    assert contents(run_dir) == before and not (tmp_path / "logs").exists()


# -- the traps ---------------------------------------------------------------------------------------------------------


def printed(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["fit", *map(str, arguments), "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_init_args_of_another_class_do_not_leak(tmp_path, capsys):  # trap 1
    text = (
        TINY.read_text()
        .replace("torch.optim.Adam", "torch.optim.SGD")
        .replace("Transformer, init_args: {", "LSTM, init_args: {")
    )
    other = tmp_path / "other.yaml"
    other.write_text(text.replace(", heads: 1, head_width: 8", ""))
    model = printed(capsys, "-c", other)["model"]["init_args"]
    assert set(model["learner"]["init_args"]) == {"width", "depth"}
    assert model["optimizer"]["init_args"]["weight_decay"] == 0 and "betas" not in model["optimizer"]["init_args"]


@pytest.mark.parametrize("by_overlay", [False, True])
def test_a_class_is_not_changed_over_the_settings_of_another(tmp_path, capsys, by_overlay):  # trap 1, as users meet it
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {learner: {class_path: LSTM}}}")
    change = ["-c", overlay] if by_overlay else [LEARNER, "LSTM"]
    line = refused(capsys, "fit", "-c", TINY, "--run_dir", tmp_path / "run", *change)
    assert (
        "model.init_args.learner is Transformer in a config file and metalearn.models.recurrent.LSTM after it" in line
    )


def test_resuming_with_another_optimizer_is_refused(run_dir, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(TINY.read_text().replace("torch.optim.Adam", "torch.optim.SGD"))
    before = contents(run_dir)
    line = refused(capsys, "fit", "-c", other, "--run_dir", run_dir, "--trainer.max_steps", 8, "--ckpt_path", "last")
    assert "of another optimizer" in line and contents(run_dir).items() >= before.items()


@pytest.mark.parametrize("name", ["validate", "test"])
def test_evaluation_on_data_that_may_have_been_trained_on_is_refused(run_dir, tmp_path, capsys, name):
    checkpoint = ["--ckpt_path", run_dir / "checkpoints" / "last.ckpt"]
    split = [f"{TASKS}.source.init_args.seed", 7]  # another division into training and held-out examples
    assert "trained on data of fingerprint" in refused(
        capsys, name, "-c", TINY, "--run_dir", tmp_path, *checkpoint, *split
    )
    arguments = [name, "-c", TINY, "--run_dir", tmp_path / "elsewhere", *checkpoint, "--seed_everything", 5]
    assert main([*map(str, arguments)]) == 0  # other unseen tasks, into a new folder
    assert (tmp_path / "elsewhere" / f"{'validation' if name == 'validate' else name}.csv").exists()


def test_command_line_beats_the_checkpoint_and_last_resumes(run_dir, tmp_path):  # traps 2 and 3
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    options = ["--trainer.max_steps", "6", "--model.init_args.optimizer.init_args.lr", "0.5"]
    assert fit(tmp_path, "--ckpt_path", checkpoint, *options) == 0
    assert last(tmp_path)["global_step"] == 6
    assert last(tmp_path)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5
    config = yaml.safe_load((tmp_path / "logs" / "version_0" / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    assert set(read_run(tmp_path)["step"]) >= {4, 5} and 3 not in set(read_run(tmp_path)["step"])


def test_second_start_keeps_metrics_and_config_of_the_first(tmp_path):  # traps 3, 4 and 5
    assert fit(tmp_path, "--ckpt_path", "last", "--trainer.max_steps", 3) == 0
    first = contents(tmp_path / "logs")
    assert fit(tmp_path, "--ckpt_path", "last") == 0
    assert first.items() <= contents(tmp_path / "logs").items()
    assert (tmp_path / "logs" / "version_1" / "config.yaml").exists()
    assert last(tmp_path)["global_step"] == 4  # not a multiple of every_n_train_steps from the first start on
    frame = read_run(tmp_path).query("metric == 'train/loss'")
    assert list(zip(frame["step"], frame["version"], strict=True)) == [(0, 0), (1, 0), (2, 0), (3, 1)]
    validations = read_run(tmp_path).query("metric == 'validation/unseen_held_out/loss'")
    assert list(validations["step"]) == [1, 3]


def test_resuming_a_finished_run_changes_nothing(run_dir):
    before = contents(run_dir)
    assert fit(run_dir, "--ckpt_path", "last") == 0
    after = contents(run_dir)
    assert before.items() <= after.items() and not [
        path for path in after.keys() - before.keys() if path.suffix != ".yaml"
    ]


def test_checkpoint_holds_tensors_and_builtins_alone(run_dir):  # trap 6
    assert {"state_dict", "optimizer_states", "callbacks", "TaskBatches", "metalearn"} <= last(run_dir).keys()


def test_entry_point_defines_no_classes():  # trap 7
    source = (HERE.parent / "metalearn" / "__main__.py").read_text()
    assert "class " not in source.split('"""')[2] and "main" in source


def test_callbacks_of_a_config_join_those_of_the_project(tmp_path):  # trap 10
    log = tmp_path / "seen"
    assert fit(tmp_path, "--trainer.callbacks+=test_cli.Witness", f"--trainer.callbacks.file={log}") == 0
    assert {"RunCheckpoint", "Budget", "StudyCheckpoints", "RunRecord", "Witness"} <= set(log.read_text().split())


class Witness(Callback):
    """Writes down which callbacks a run has."""

    def __init__(self, file: str):
        self.file = file

    def on_train_start(self, trainer, pl_module):
        Path(self.file).write_text(" ".join(type(callback).__name__ for callback in trainer.callbacks))


class Signal(Callback):
    """Sends this process ``number`` after step ``step``."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def signalled(step, number):
    """Overrides that send the process a signal after a step."""
    return (
        "--trainer.callbacks+=test_cli.Signal",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.number={int(number)}",
    )


def test_a_terminated_run_is_not_finished_and_resumes(tmp_path):  # trap 12
    result = tmp_path / "result.json"
    assert fit(tmp_path, "--trainer.max_steps", 1) == 0 and result.exists()
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, "--ckpt_path", "last", *signalled(3, signal.SIGTERM))
    assert not end.value.code  # the exit code of a process that is done
    assert last(tmp_path)["global_step"] == 2 and not result.exists()
    assert fit(tmp_path, "--ckpt_path", "last") == 0
    assert last(tmp_path)["global_step"] == 4 and yaml.safe_load(result.read_text())["global_step"] == 4


def test_fast_dev_run_leaves_no_checkpoint(tmp_path):
    assert fit(tmp_path, "--trainer.fast_dev_run", "true") == 0
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


# -- one line for what the user got wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--trianer.max_steps", "3"], "unrecognized arguments: --trianer.max_steps"),
        (["--trainer.max_stepz", "3"], "unrecognized arguments: --trainer.max_stepz"),
        (["--trainer.max_step", "3"], "unrecognized arguments: --trainer.max_step"),  # no silent abbreviations
        (["--model.init_args.tokenz", "shift"], "InContextLearning': Option 'tokenz' is not accepted"),
        ([f"{LEARNER}.init_args.widht", "3"], "Option 'widht' is not accepted"),
        (["--model.init_args.optimizer.init_args.lrr", "3"], "Option 'lrr' is not accepted"),
        ([f"{TASKS}.num_feature", "3"], "ProjectedImages': Option 'num_feature' is not accepted"),
        (["--trainer.max_steps", "many"], "trainer.max_steps"),
        (["--model.init_args.tokens", "long"], "tokens is 'long'; accepted: 'paper', 'shift', 'interleaved'"),
        ([f"{LEARNER}.init_args.depth", "0"], "depth is 0; accepted: 1 <="),
        (["--data.init_args.length", "0"], "length is 0; accepted: 1 <="),
        (["--trainer.max_steps", "-1"], "trainer.max_steps is -1; accepted: at least 1"),
        (["--trainer.accumulate_grad_batches", "3"], "meta_batch_size is 4; accepted: a multiple of"),
        (["-c", "no_such.yaml"], "no_such.yaml"),
        ([f"{TASKS}.source.init_args.path", "/no/such/data"], "/no/such/data"),
        ([LEARNER, "metalearn.models.no_such.Thing"], "metalearn.models.no_such.Thing"),
        ([LEARNER, "Thing"], "Thing"),
        (["--model", "Thing"], "Thing"),
        (["--ckpt_path", "no_such.ckpt"], "there is no checkpoint at no_such.ckpt"),
    ],
)
def test_one_line_for_a_mistake(tmp_path, capsys, overrides, message):
    line = refused(capsys, "fit", "-c", TINY, "--run_dir", tmp_path, *overrides)
    assert message in line and "Namespace(" not in line and len(line) < 500
    assert not [path for path in contents(tmp_path) if path.suffix in (".ckpt", ".csv", ".yaml", ".json")]


def test_one_line_for_a_missing_data_set_or_run_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METALEARN_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    path = f"{TASKS}.source.init_args.path"
    line = refused(capsys, "fit", "-c", TINY, "--run_dir", tmp_path, path, "someone/no_such_data")
    assert "'someone/no_such_data': no data set of that name" in line
    assert "run_dir is missing" in refused(capsys, "fit", "-c", TINY)
    assert "command is 'fti'; accepted: fit, validate" in refused(capsys, "fti")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "has checkpoints; add --ckpt_path last"),
        (["--ckpt_path", "last", f"{LEARNER}.init_args.depth", "2"], "of another model: its depth is 1; accepted: 2"),
        (["--ckpt_path", "last", "--model.init_args.tokens", "paper"], "of another model: its tokens is shift"),
        (["--ckpt_path", "last", f"{TASKS}.source.init_args.classes", "[0, 1, 3]"], "trained on data of fingerprint"),
        (["--ckpt_path", "last", "--seed_everything", "1"], "trained on data of seed 0, not 1"),
        (
            ["--ckpt_path", "last", "--model.init_args.optimizer", "torch.optim.SGD"],
            "would keep settings of torch.optim.Adam",
        ),
        (
            ["--ckpt_path", "last", "--trainer.precision", "bf16-true"],
            "trainer.precision is 'bf16-true'; accepted: '32'",
        ),
        (["--ckpt_path", "last", "--trainer.log_every_n_steps", "0"], "log_every_n_steps is 0; accepted: at least 1"),
        (["--ckpt_path", "last", "--trainer.max_steps", "0"], "max_steps is 0; accepted: at least 1"),
        (["--ckpt_path", "last", "--model.init_args.plateau_margin", "2"], "plateau_margin is 2.0; accepted"),
    ],
)
def test_refuses_another_run_in_the_folder_and_overwrites_nothing(run_dir, capsys, overrides, message):
    before = contents(run_dir)
    line = refused(capsys, "fit", "-c", TINY, "--run_dir", run_dir, "--trainer.max_steps", 8, *overrides)
    assert message in line
    assert contents(run_dir).items() >= before.items()


@pytest.mark.parametrize("name", ["validate", "test"])
def test_evaluation_without_a_checkpoint_is_an_error(tmp_path, run_dir, capsys, name):
    options = [name, "-c", TINY, "--run_dir", tmp_path]
    assert "ckpt_path is missing; accepted" in refused(capsys, *options)
    assert "there is no checkpoint at" in refused(capsys, *options, "--ckpt_path", "last")
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    line = refused(capsys, *options, "--ckpt_path", checkpoint, f"{LEARNER}.init_args.width", 4)
    assert "of another model: its width is 8; accepted: 4" in line
    assert not contents(tmp_path)


@pytest.mark.parametrize("content", ["text", {"state_dict": {}}, object()])
def test_refuses_files_that_are_no_checkpoint_of_a_run(tmp_path, capsys, content):
    path = tmp_path / "x.ckpt"
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    assert "no checkpoint of a run" in refused(capsys, "test", "-c", TINY, "--run_dir", tmp_path, "--ckpt_path", path)


def test_one_process_at_a_time_trains_in_a_run_folder(tmp_path, capsys):
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        line = refused(capsys, "fit", "-c", TINY, "--run_dir", tmp_path, "--ckpt_path", "last")
        assert f"another process is training in {tmp_path}" in line
        other.kill()
    assert fit(tmp_path, "--ckpt_path", "last", "--trainer.max_steps", 1) == 0


def test_errors_of_the_program_keep_their_traceback(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("metalearn.training.in_context.functional.cross_entropy", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        fit(tmp_path)


def test_debug_variable_shows_the_traceback_of_a_mistake(monkeypatch):
    monkeypatch.setenv("METALEARN_DEBUG", "1")
    with pytest.raises(ValueError, match="command is 'fti'"):
        main(["fti"])


def test_help_lists_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    printed_twice = capsys.readouterr().out
    assert all(printed_twice.count(f"\n  {name} ") == 2 for name in ("fit", "validate", "test", "compare"))
