"""ensemble.py: what it leaves of every member against what the member's own Trainer leaves, and whom it turns away."""

import functools
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger

from metalearn.analysis.runs import read_run
from metalearn.models.recurrent import LSTM
from metalearn.models.transformer import Transformer
from metalearn.tasks.images import ProjectedImages
from metalearn.tasks.synthetic import RandomSource
from metalearn.training.callbacks import Budget, RunCheckpoint
from metalearn.training.data import TaskBatches
from metalearn.training.ensemble import Member, fit_together, refusal
from metalearn.training.in_context import InContextLearning
from metalearn.training.record import RunRecord

LAST, LENGTH, CLASSES, HEADS = "checkpoints/last.ckpt", 6, 3, 2
SETTINGS = {
    "accelerator": "cpu",
    "log_every_n_steps": 25,
    "val_check_interval": 50,
    "check_val_every_n_epoch": None,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Batches(Callback):
    """Keeps every training batch of one member."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)


class KilledError(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KilledError


def two_groups(named, lr):
    """AdamW that decays matrices only."""
    named = list(named)
    matrices, rest = ([(n, p) for n, p in named if (p.ndim > 1) == large] for large in (True, False))
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=lr)


def make_member(run_dir, seed=0, num_tasks=None, lr=3e-3, length=LENGTH, size=4, every=50, data=0, **model):
    learner = functools.partial(Transformer, width=16, depth=1, heads=HEADS, head_width=8)
    optimizer = functools.partial(model.pop("optimizer", torch.optim.Adam), lr=lr)
    options = {"learner": learner, "tokens": "shift", "checkpoint_steps": "log"} | model
    source = RandomSource(num_features=6, num_classes=CLASSES, seed=data)
    tasks = ProjectedImages(source, 4, num_tasks=num_tasks, seed=seed)
    return Member(
        InContextLearning(optimizer=optimizer, **options),
        TaskBatches(tasks, length, size, evaluation_sequences=5, evaluation_batch_size=4),
        run_dir,
        seed,
        [Batches(), RunCheckpoint(str(run_dir), every), Budget()],
    )


def make_members(folder, **options):
    """Other seeds, numbers of tasks, learning rates and warm-ups; the first two share an optimizer's group."""
    settings = ({"seed": 0}, {"seed": 1, "num_tasks": 4}, {"seed": 2, "num_tasks": 64, "lr": 1e-2, "warmup_steps": 10})
    return [make_member(folder / str(number), **own, **options) for number, own in enumerate(settings)]


def fit_alone(member, ckpt_path=None, **settings):
    torch.manual_seed(member.seed)
    logger = CSVLogger(member.run_dir, name="logs", flush_logs_every_n_steps=1)
    trainer = Trainer(**settings, logger=logger, default_root_dir=member.run_dir, callbacks=list(member.callbacks))
    trainer.fit(member.model, member.data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def batches(member):
    (kept,) = (callback for callback in member.callbacks if isinstance(callback, Batches))
    return kept.batches


def last(run_dir):
    return torch.load(run_dir / LAST, weights_only=True)


def weights(run_dir):
    """Without the bias of keys: no output depends on it, so that its gradient is rounding, which Adam takes for full steps."""
    state = last(run_dir)["state_dict"]
    for name in [name for name in state if name.endswith("project_in.bias")]:
        queries, _, values = state[name].chunk(3)
        state[name] = torch.cat([queries, values])
    return state


def logged(run_dir):
    """What is logged, by metric and step, but for seconds and bytes."""
    frame = read_run(run_dir)
    frame = frame[~frame["metric"].isin(["budget/seconds", "budget/peak_memory_bytes"])]
    return {
        (metric, step): value
        for metric, step, value in zip(*(frame[c] for c in ("metric", "step", "value")), strict=True)
    }


def files(run_dir):
    return sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file())


def assert_alike(ours, theirs, tolerance):
    """Nested dictionaries and lists of tensors and builtins."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_alike(ours[name], theirs[name], tolerance)
    elif isinstance(ours, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other, tolerance)
    elif isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    else:
        assert ours == theirs


def assert_same_run(ours, theirs, tolerance=1e-4):
    """Batches, log, files and every part of the checkpoint but folders, seconds and counts of evaluation batches."""
    for one, other in zip(batches(ours), batches(theirs), strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
    assert logged(ours.run_dir) == pytest.approx(logged(theirs.run_dir), abs=tolerance)
    assert files(ours.run_dir) == files(theirs.run_dir)
    assert_alike(weights(ours.run_dir), weights(theirs.run_dir), tolerance)
    checkpoints = [last(member.run_dir) for member in (ours, theirs)]
    for checkpoint in checkpoints:
        checkpoint["state_dict"] = checkpoint["state_dict"].keys()
        checkpoint["callbacks"]["Budget"].pop("seconds")
        checkpoint["callbacks"] = {name: checkpoint["callbacks"][name] for name in ("Budget", "StudyCheckpoints")}
        loops = checkpoint["loops"]["fit_loop"]
        loops["epoch_loop.val_loop.batch_progress"] = loops["epoch_loop.val_loop.batch_progress"].keys()
    assert_alike(checkpoints[0], checkpoints[1], tolerance)


class Parser:
    """As much of LightningCLI's as a run record needs."""

    def save(self, config, path, **options):
        Path(path).write_text(config)


def recorded(member):
    return member._replace(callbacks=[*member.callbacks, RunRecord(Parser(), f"seed: {member.seed}", overwrite=True)])  # type: ignore[arg-type]


def test_matches_every_members_own_run_and_what_it_would_go_on_to(tmp_path):
    together, alone = ([recorded(member) for member in make_members(tmp_path / name)] for name in ("together", "alone"))
    results = fit_together(together, SETTINGS | {"max_steps": 100}, tmp_path / "ensemble", 50)
    for ours, theirs, result in list(zip(together, alone, results, strict=True))[1:]:
        trainer = fit_alone(theirs, **SETTINGS, max_steps=100)
        assert_same_run(ours, theirs)
        expected = {name: float(value) for name, value in trainer.callback_metrics.items()} | theirs.model.sizes
        assert result == {"global_step": 100, "metrics": pytest.approx(expected, abs=1e-4)}
    assert (tmp_path / "together/2/logs/version_0/config.yaml").read_text() == "seed: 2"
    for name in ("together", "alone"):
        member = make_members(tmp_path / name)[2]
        fit_alone(member, ckpt_path=member.run_dir / LAST, **SETTINGS, max_steps=105)
    assert_alike(*(weights(tmp_path / name / "2") for name in ("together", "alone")), tolerance=1e-4)


@pytest.mark.parametrize(("algorithm", "data"), [("norm", (0, 0)), ("value", (0, 1))])
def test_matches_own_runs_with_parameter_groups_clipping_accumulation_and_other_data(tmp_path, algorithm, data):
    clipping = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}  # the norms are about 1 here
    settings = SETTINGS | clipping | {"max_steps": 6, "accumulate_grad_batches": 2, "log_every_n_steps": 2}
    together, alone = (
        [
            make_member(tmp_path / name / str(seed), seed, tasks, lr, data=own, optimizer=two_groups)
            for seed, tasks, lr, own in zip(range(2), (None, 64), (3e-3, 1e-2), data, strict=True)
        ]
        for name in ("together", "alone")
    )
    fit_together(together, settings, tmp_path / "ensemble")
    for ours, theirs in zip(together, alone, strict=True):
        fit_alone(theirs, **settings)
        assert_same_run(ours, theirs)


def test_killed_ensemble_resumes_bit_equal(tmp_path):
    settings = SETTINGS | {"max_steps": 6, "log_every_n_steps": 1, "val_check_interval": 4}
    whole, killed, again = (make_members(tmp_path / name, every=2) for name in ("whole", "killed", "killed"))
    fit_together(whole, settings, tmp_path / "a", 2)
    with pytest.raises(KilledError):
        fit_together(killed, settings, tmp_path / "b", 2, [KillAt(5)])
    fit_together(again, settings, tmp_path / "b", 2)
    for ours, theirs in zip(again, whole, strict=True):
        assert len(batches(ours)) == 2
        assert_alike(last(ours.run_dir)["state_dict"], last(theirs.run_dir)["state_dict"], 0)
        assert_alike(last(ours.run_dir)["optimizer_states"], last(theirs.run_dir)["optimizer_states"], 0)
        numbers = [logged(member.run_dir) for member in (ours, theirs)]
        del numbers[0]["model/parameters", 4], numbers[0]["model/state_size", 4]  # of the second start
        assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("options", "message"), [({"lr": 0.5}, "optimizer of 0"), ({"seed": 7}, "seed_everything of 0")]
)
def test_refuses_a_checkpoint_of_other_members(tmp_path, options, message):
    settings = SETTINGS | {"max_steps": 1, "limit_val_batches": 0}
    fit_together([make_member(tmp_path / "0")], settings, tmp_path / "ensemble")
    with pytest.raises(ValueError, match=message):
        fit_together([make_member(tmp_path / "0", **options)], settings, tmp_path / "ensemble")
    with pytest.raises(ValueError, match="of 1 members; accepted: 2"):
        fit_together([make_member(tmp_path / name) for name in "01"], settings, tmp_path / "ensemble")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learner": functools.partial(Transformer, width=8, depth=1, heads=2, head_width=8)}, "learner.width is 8 in"),
        ({"tokens": "paper"}, "tokens is paper in .* and shift in"),
        ({"length": 5}, "length is 5"),
        ({"size": 8}, "meta_batch_size is 8"),
        ({"optimizer": torch.optim.SGD}, "optimizer is .*SGD"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"compile": True}, "compile is True"),
        ({"learner": functools.partial(LSTM, width=8)}, "LSTM"),
    ],
)
def test_refuses_by_name_what_cannot_be_stacked(tmp_path, options, message):
    pair = [make_member(tmp_path / "a"), make_member(tmp_path / "b", **options)]
    with pytest.raises(ValueError, match=message):
        fit_together(pair, SETTINGS, tmp_path)


def test_members_share_what_they_read(tmp_path, monkeypatch):
    reads, read = [], RandomSource.read
    monkeypatch.setattr(
        RandomSource, "read", lambda source, part: (reads.append((source.seed, part)), read(source, part))[1]
    )
    members = [make_member(tmp_path / str(number), number, data=data) for number, data in enumerate((0, 0, 1, 0))]
    fit_together(members, SETTINGS | {"max_steps": 1, "limit_val_batches": 0}, tmp_path / "ensemble")
    assert reads.count((0, "validation")) == reads.count((1, "validation")) == 1


def test_accepts_what_differs_in_data_rates_and_schedules(tmp_path):
    assert (
        refusal([*make_members(tmp_path), make_member(tmp_path / "3", decay="cosine", checkpoint_steps=None)]) is None
    )


def test_cannot_stack_torchs_own_lstm(tmp_path):
    alone = [make_member(tmp_path / "a", learner=functools.partial(LSTM, width=8))]
    assert "cannot be stacked" in str(refusal(alone))
