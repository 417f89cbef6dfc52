"""in_context.py: its loss, schedule, optimizer settings and evaluation against hand-written ones, and what it may not do."""

import csv
import math

import pytest
import torch
from pytorch_lightning import Callback

from metalearn.base import MetaValidation
from metalearn.models.saving import load_learner
from metalearn.tasks.synthetic import RandomSource
from metalearn.training.callbacks import Budget, RunCheckpoint, StudyCheckpoints

LAST = "checkpoints/last.ckpt"


class Steps(Callback):
    """Keeps every batch and the learning rate it was trained with."""

    def __init__(self):
        self.batches, self.rates = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_matches_cross_entropy_summed_by_hand_over_every_position(train):
    module = train().lightning_module
    batch = module.data.tasks.batch(9, 0, 3, module.data.length, MetaValidation("unseen_held_out"))
    terms = []
    for b in range(3):
        for j in range(module.data.length):
            logits = module(batch.x[b : b + 1, : j + 1], batch.y[b : b + 1, : j + 1])[0, j].detach()  # the past alone
            terms.append(math.log(sum(math.exp(z) for z in logits.tolist())) - float(logits[batch.y[b, j]]))
    assert module.training_step(batch, 0).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_accumulation_sees_the_same_sequences_and_gives_the_same_weights(train):
    whole, parts = Steps(), Steps()
    one = train(whole).lightning_module
    two = train(parts, accumulate_grad_batches=2).lightning_module
    assert (len(whole.batches), len(parts.batches)) == (4, 8)
    for step, batch in enumerate(whole.batches):
        pair = parts.batches[2 * step : 2 * step + 2]
        assert torch.equal(batch.x, torch.cat([p.x for p in pair]))
        assert torch.equal(batch.y, torch.cat([p.y for p in pair]))
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("warmup_steps", "decay", "expected"),
    [
        (0, "none", [0.1] * 6),
        (4, "none", [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]),
        (0, "cosine", [0.1 * (1 + math.cos(math.pi * s / 6)) / 2 for s in range(6)]),
        (2, "cosine", [0.05] + [0.1 * (1 + math.cos(math.pi * s / 6)) / 2 for s in range(1, 6)]),
    ],
)
def test_matches_the_written_learning_rates(train, warmup_steps, decay, expected):
    steps = Steps()
    train(steps, model={"warmup_steps": warmup_steps, "decay": decay}, max_steps=6)
    assert steps.rates == pytest.approx(expected)


def test_configured_learning_rate_beats_the_checkpoints(train, tmp_path):
    train(RunCheckpoint(str(tmp_path)), model={"warmup_steps": 10}, enable_checkpointing=True)
    steps, options = Steps(), {"warmup_steps": 10, "lr": 0.5}
    again = RunCheckpoint(str(tmp_path))
    train(steps, again, model=options, max_steps=6, ckpt_path=tmp_path / LAST, enable_checkpointing=True)
    assert steps.rates == pytest.approx([0.25, 0.30])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"optimizer": torch.optim.Adam}}, "another optimizer.*betas"),
        ({"data": {"seed": 1}}, "of seed 0, not 1"),
    ],
)
def test_refuses_a_checkpoint_of_another_optimizer_or_seed(train, tmp_path, options, message):
    train(RunCheckpoint(str(tmp_path)), enable_checkpointing=True)
    with pytest.raises(ValueError, match=message):
        train(**options, ckpt_path=tmp_path / LAST)


def test_checkpoint_loads_with_weights_only_and_without_lightning(train, tmp_path):
    trainer = train(RunCheckpoint(str(tmp_path)), StudyCheckpoints(0.05), Budget(), enable_checkpointing=True)
    path = tmp_path / LAST
    assert torch.load(path, weights_only=True)["global_step"] == 4
    learner, card, _ = load_learner(path)
    assert (card["tokens"], card["length"]) == ("shift", 5)
    for ours, theirs in zip(learner.parameters(), trainer.lightning_module.learner.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def evaluation_table(make_trainer, make_model, data, stage="validate"):
    trainer = make_trainer(limit_val_batches=None)
    getattr(trainer, stage)(make_model(), data, verbose=False)
    name = {"validate": "validation", "test": "test"}[stage]
    with open(f"{trainer.default_root_dir}/{name}.csv") as file:
        return trainer, list(csv.DictReader(file))


@pytest.mark.parametrize("num_tasks", [None, 4])
def test_evaluation_matches_a_direct_recomputation(make_trainer, make_model, make_data, num_tasks):
    data = make_data(evaluation_sequences=7, evaluation_batch_size=3, num_tasks=num_tasks)
    trainer, rows = evaluation_table(make_trainer, make_model, data)
    expected = []
    for stream in data.tasks.streams():
        batch = data.tasks.batch(0, 0, 7, data.length, MetaValidation(stream))
        correct = {"learner": trainer.lightning_module(*batch).argmax(-1) == batch.y}
        correct |= {
            name: oracle(*batch, [0, 1, 2, 4]) == batch.y[:, [0, 1, 2, 4]]
            for name, oracle in data.tasks.oracles().items()
        }
        for name, hits in correct.items():
            for position, column in zip(range(5) if name == "learner" else (0, 1, 2, 4), hits.double().T, strict=True):
                expected.append((stream, name, position, 7, float(column.mean()), float(column.std()) / math.sqrt(7)))
    assert [(r["stream"], r["method"], int(r["position"]), int(r["sequences"])) for r in rows] == [
        e[:4] for e in expected
    ]
    measured = [[float(r["accuracy"]), float(r["standard_error"])] for r in rows]
    torch.testing.assert_close(torch.tensor(measured), torch.tensor([e[4:] for e in expected]), rtol=0, atol=1e-6)


def test_evaluation_does_not_depend_on_its_batch_size(make_trainer, make_model, make_data):
    tables = []
    for size in (3, 7, 256):
        data = make_data(evaluation_sequences=7, evaluation_batch_size=size)
        trainer, rows = evaluation_table(make_trainer, make_model, data)
        tables.append((rows, float(trainer.callback_metrics["validation/unseen_held_out/loss"])))
    assert tables[0][0] == tables[1][0] == tables[2][0]
    assert tables[0][1] == pytest.approx(tables[1][1], rel=1e-6) == pytest.approx(tables[2][1], rel=1e-6)


def test_logs_loss_accuracies_and_improvement_for_every_stream(train):
    trainer = train(log_every_n_steps=2, limit_val_batches=None, val_check_interval=2, check_val_every_n_epoch=None,
                    data={"num_tasks": 4, "evaluation_sequences": 3})  # fmt: skip
    names = ["loss", "accuracy_first", "accuracy_last", "improvement"]
    streams = [f"validation/{stream}" for stream in ("seen_train", "seen_held_out", "unseen_held_out")]
    assert set(trainer.callback_metrics) == {f"{where}/{name}" for where in ["train", *streams] for name in names}
    for where in ["train", *streams]:
        first, last, gain = (float(trainer.callback_metrics[f"{where}/{name}"]) for name in names[1:])
        assert gain == pytest.approx(last - first)


class SealedTest(RandomSource):
    """A source whose test part must not be read."""

    def read(self, part):
        assert part != "test", "the meta-test data were read"
        return super().read(part)


def test_only_the_test_command_can_read_meta_test_data(train, make_trainer, make_model, make_data):
    source = SealedTest(num_features=6, num_classes=3)
    train(data={"source": source}, limit_val_batches=None)
    evaluation_table(make_trainer, make_model, make_data(source=source, evaluation_sequences=3))
    with pytest.raises(AssertionError, match="were read"):
        evaluation_table(make_trainer, make_model, make_data(source=source), stage="test")


def test_does_not_wait_for_the_device_between_logged_steps(train, monkeypatch):
    steps, reads = Steps(), []

    def counted(name, original):
        def read(tensor, *arguments, **options):
            reads.append((len(steps.batches), name))
            return original(tensor, *arguments, **options)

        return read

    for name in ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    # At every step Lightning reads again what was last logged for the progress bar, which is a host copy.
    lightning = "pytorch_lightning.trainer.connectors.logger_connector.result.convert_tensors_to_scalars"
    monkeypatch.setattr(lightning, lambda metrics: metrics)
    train(steps, StudyCheckpoints(0.05), Budget(), max_steps=23, log_every_n_steps=20)
    assert [name for step, name in reads if step == 20][:2] == ["cpu", "cpu"]
    # Light checkpoints read the weights at the log-spaced steps, and at no other.
    quiet = {5, 7, 9, 10, 12, 13, 14, 15, 17, 18, 19, 21, 22}
    assert not [read for read in reads if read[0] in quiet]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps is -1; accepted: 0 <="),
        ({"decay": "linear"}, "decay is 'linear'; accepted: 'none', 'cosine'"),
        ({"checkpoint_steps": "all"}, "checkpoint_steps is 'all'; accepted: 'log', None"),
        ({"plateau_margin": -0.1}, "plateau_margin is -0.1"),
    ],
)
def test_refuses_bad_values(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_bfloat16_trains(train):
    module = train(precision="bf16-mixed", max_steps=2).lightning_module
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_learner_gives_the_same_weights(train):
    plain, compiled = (train(model={"compile": flag}, max_steps=2).lightning_module for flag in (False, True))
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for ours, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
