"""How fast in-context learning is, as ratios to what people write today: ``python -m experiments.bench.in_context``.

Every measurement first checks that both sides do the same thing, then times them in turns
(``experiments.bench.timing``) on the tasks of ``experiments.bench.tasks``.

B sequences, T examples, P pixels, R kept directions, D projected features, K classes, Q queries, F a user's features.
"""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import copy
import functools
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.stats
import torch
import yaml
from jsonargparse import auto_cli
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from experiments.bench.report import Effort, Row, header, report
from experiments.bench.tasks import (
    CLASSES,
    LENGTH,
    PIXELS,
    RANK,
    SEQUENCES,
    InMemory,
    PlainTasks,
    batches_of,
    images,
    made_ahead,
    plain_batches,
    projected,
)
from experiments.bench.timing import Comparison, UnequalError, require_alike, require_equal, seconds_per_call
from metalearn import random
from metalearn.base import Batch, Examples, Learner, MetaTrain
from metalearn.classifier import InContextClassifier, class_probabilities
from metalearn.models.saving import describe, save_learner
from metalearn.models.tokens import Tokens
from metalearn.models.transformer import Transformer
from metalearn.tasks.images import BASE, ProjectedImages
from metalearn.tasks.sources import ImageSource
from metalearn.training.callbacks import Budget, RunCheckpoint
from metalearn.training.data import TaskBatches
from metalearn.training.in_context import InContextLearning

CONFIGS = Path(__file__).parents[2] / "configs" / "in_context"
NUM_ROWS = 12  # of a whole report, over which the time is shared out


# -- generation --------------------------------------------------------------------------------------------------------


def generation(effort: Effort) -> Iterator[Row]:
    """One batch of tasks against the plain way of drawing it, with the same output shape on both sides."""
    check_law(images().examples)
    for num_features, rank, bar in ((64, None, 1.7), (64, RANK, 8.0), (PIXELS, None, None), (PIXELS, RANK, 8.0)):
        ours, theirs = projected(images(), num_features, rank), PlainTasks(images().examples, num_features)
        require_equal("projected examples", ours.batch(0, 0, 4, LENGTH, MetaTrain()).x, dense_batch(ours, 4), 1e-4)
        batches = batches_of(ours), plain_batches(theirs)
        for part in zip(Batch._fields, *map(next, batches), strict=True):
            require_alike(*part)
        measured = effort.compare(*(functools.partial(next, side) for side in batches))
        kept = f"rank {rank} ({ours.kept_variance[BASE]:.1%} of variance)" if rank else "full rank"
        yield Row(f"generation {PIXELS}->{num_features}, {kept}", measured, bar)


def dense_batch(tasks: ProjectedImages, sequences: int) -> Tensor:
    """The x (B, T, D) of step 0 anew: whole images times the drawn A taken back to pixels, one sequence at a time."""
    images_NP, rotation_PR = tasks.source.read("train").inputs, tasks._rotations[BASE]
    pixels = images_NP.shape[1]
    back_PR = torch.eye(pixels) if rotation_PR is None else rotation_PR
    x = []
    for visit in random.fold(random.key(0, "train", 0), torch.arange(sequences)):
        drawn_RD = random.normal(random.fold(visit, "task", "projection"), (back_PR.shape[1], tasks.num_features))
        chosen_T = random.distinct(random.fold(visit, "examples"), LENGTH, len(images_NP))
        x.append(images_NP[chosen_T] @ (back_PR @ drawn_RD) / math.sqrt(pixels))
    return torch.stack(x)


def check_law(examples: Examples, num_features: int = 64, sequences: int = 256) -> None:
    """On images of norm sqrt(P): projected features have variance 1 given the image, inner products the same law."""
    images_NP = functional.normalize(examples.inputs[:2000]) * math.sqrt(examples.inputs.shape[1])
    source = InMemory("images of one norm", Examples(images_NP, examples.targets[:2000]))
    ours = projected(source, num_features, None).batch(0, 0, sequences, LENGTH, MetaTrain())
    theirs = next(plain_batches(PlainTasks(source.examples, num_features), sequences))
    for batch in (ours, theirs):
        require_equal("the variance given the image and 1", batch.x.square().mean(), torch.tensor(1.0), 0.02)
    first, second = ((batch.x[:, 0] * batch.x[:, 1]).sum(-1).numpy() for batch in (ours, theirs))
    if (p := scipy.stats.ks_2samp(first, second).pvalue) < 1e-3:
        raise UnequalError(f"inner products of projected images differ in law: Kolmogorov-Smirnov p = {p:.1e}")


# -- training ----------------------------------------------------------------------------------------------------------


def training(effort: Effort) -> Iterator[Row]:
    """Steps under the Trainer as ``metalearn fit`` sets it up against a bare loop over batches made beforehand.

    A callback runs the bare loop in turns with the Trainer, a block of steps each, in one process and thread. So both
    sides see the same machine, and all that the Trainer does from the end of one block to the end of the next counts:
    batches, hooks, a line of the log per block, budget and checkpoints, but neither set-up nor a progress bar. The
    blocks are short, hence three times the pairs.
    """
    for name, block in (("quick", 25), ("mnist_small", 10)):
        measured = against_bare_loop(_config(name), block, Effort(3 * effort.pairs, effort.seconds))
        yield Row(f"training {name}.yaml, Lightning against a bare loop", measured, 0.95, 1, "steps/s")


def against_bare_loop(config: dict[str, Any], block: int, effort: Effort) -> Comparison:
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    optimizer = functools.partial(torch.optim.Adam, **model["optimizer"]["init_args"])
    constant = {"learner": _learner(config), "optimizer": optimizer, "warmup_steps": 0, "decay": "none"}
    settings = data["tasks"]["init_args"]
    tasks = projected(_source(settings["source"]["init_args"]), settings["num_features"], settings.get("rank"))
    batches = TaskBatches(tasks, data["length"], data["meta_batch_size"])
    bare = InTurnsWithBareLoop(block, effort)
    with tempfile.TemporaryDirectory() as run_dir, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _trainer(Path(run_dir), bare).fit(InContextLearning(**model | constant), batches)
    return Comparison(bare.ours, bare.theirs)


class InTurnsWithBareLoop(Callback):
    """Takes turns with the Trainer; the first block is the warm-up, after which both losses must be equal."""

    def __init__(self, block: int, effort: Effort):
        self.block, self.effort = block, effort
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        data, learner = trainer.datamodule, copy.deepcopy(pl_module.learner)
        shape = data.meta_batch_size, data.length
        self.batches = [data.tasks.batch(step, 0, *shape, MetaTrain()) for step in range(self.block)]
        self.train = functools.partial(
            train, learner, pl_module.tokens, pl_module.build_optimizer(learner.parameters())
        )
        self.began = self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.block:
            return
        middle = time.perf_counter()
        loss = [self.train(batch) for batch in self.batches][-1]
        end = time.perf_counter()
        if trainer.global_step == self.block:
            require_equal("losses", outputs["loss"], loss, 1e-6)
        else:
            self.ours.append((middle - self.started) / self.block)
            self.theirs.append((end - middle) / self.block)
            trainer.should_stop = len(self.ours) == self.effort.pairs or end - self.began > self.effort.seconds
        self.started = time.perf_counter()


def train(learner: Learner, tokens: Tokens, optimizer: Optimizer, batch: Sequence[Tensor]) -> Tensor:
    """One step of the loop that people write: the loss (detached) before it."""
    x_BTD, y_BT = batch
    logits_BTK = tokens.at_examples(learner(tokens.encode(x_BTD, y_BT)))
    loss = functional.cross_entropy(logits_BTK.flatten(0, 1), y_BT.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def _learner(config: dict[str, Any]) -> Callable[[int, int], Transformer]:
    return functools.partial(Transformer, **config["model"]["init_args"]["learner"]["init_args"])


def _source(settings: dict[str, Any]) -> InMemory:
    if settings["path"] == "mnist":
        return images()
    source = ImageSource(**settings)
    return InMemory(settings["path"], source.read("train"), source.num_classes)


def _trainer(run_dir: Path, bare: InTurnsWithBareLoop) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=10**6,
        default_root_dir=run_dir,
        logger=CSVLogger(run_dir, name="logs", flush_logs_every_n_steps=1),
        log_every_n_steps=bare.block,
        callbacks=[RunCheckpoint(str(run_dir)), Budget(), bare],
        limit_val_batches=0,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


# -- end to end --------------------------------------------------------------------------------------------------------


def end_to_end(effort: Effort) -> Iterator[Row]:
    """Tokens per second of batches and training steps against a DataLoader of plain tasks and the same steps.

    The steps are of quick.yaml's model on tokens (x_j, y_{j-1}), as reproductions have them. The loader's worker
    process, where there is one, has a core of its own; our batches are then made in a thread.
    """
    cases = (("training", PIXELS, 0, 3.0), ("training", PIXELS, 1, 3.0), ("training", 64, 0, None))
    for what, num_features, workers, bar in (*cases, ("batches only", PIXELS, 0, None)):
        ours = batches_of(projected(images(), num_features, RANK))
        ours = made_ahead(ours) if workers else ours
        loader = DataLoader(PlainTasks(images().examples, num_features), SEQUENCES, num_workers=workers)
        for part in zip(Batch._fields, next(ours), next(iter(loader)), strict=True):
            require_alike(*part)
        consume = training_step(num_features) if what == "training" else lambda batch: None
        measured = effort.compare(
            lambda ours=ours, consume=consume: consume(next(ours)),
            lambda loader=loader, consume=consume: seconds_per_batch(loader, consume),
        )
        name = f"end to end {PIXELS}->{num_features}, {what}, {'a' if workers else 'no'} worker"
        yield Row(name, measured, bar, SEQUENCES * LENGTH, "tokens/s")


def training_step(num_features: int) -> Callable[[Sequence[Tensor]], object]:
    """A step of quick.yaml's model on a batch, with weights of its own."""
    tokens = Tokens("paper", num_features, CLASSES)
    learner = _learner(_config("quick"))(tokens.width, CLASSES)
    return functools.partial(train, learner, tokens, torch.optim.Adam(learner.parameters(), lr=1e-3))


def seconds_per_batch(loader: DataLoader, consume: Callable[[Sequence[Tensor]], object], count: int = 3) -> float:
    """Of a loader in its stride: started anew, so that a worker does not get ahead while the other side is timed."""
    batches = iter(loader)
    consume(next(batches))
    return seconds_per_call(lambda: consume(next(batches)), count)


# -- classifier --------------------------------------------------------------------------------------------------------


class Uncached(InContextClassifier):
    """Reads the context again with every query: whole sequences through the learner's forward pass."""

    def _answer(self, x_QF: Tensor) -> Tensor:
        x_1ND, y_1N = self._context
        queries_QD = (self._standardise(x_QF) @ self._basis_EFD[0]).to(x_1ND)
        x_QTD = torch.cat([x_1ND.expand(len(x_QF), -1, -1), queries_QD.unsqueeze(1)], dim=1)
        y_QT = functional.pad(y_1N, (0, 1)).expand(len(x_QF), -1)
        with torch.inference_mode():
            logits_QK = self._tokens.at_examples(self._learner(self._tokens.encode(x_QTD, y_QT)))[:, -1]
        return class_probabilities(logits_QK.double()[None, None], self._codes_EGC)[0]


def classifier(effort: Effort, rows: int = 10_000, subset: int = 512) -> Iterator[Row]:
    """``predict_proba`` of many rows after 100 context rows, against whole sequences for ``subset`` rows, scaled up."""
    rng = np.random.default_rng(0)
    context, labels = rng.standard_normal((LENGTH, 64)), np.arange(LENGTH) % 5
    queries = rng.standard_normal((rows, 64))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(Path(folder))
        ours, theirs = (
            kind(checkpoint, num_estimators=1).fit(context, labels) for kind in (InContextClassifier, Uncached)
        )
        answers = [torch.from_numpy(way.predict_proba(queries[:subset])) for way in (ours, theirs)]
        require_equal("probabilities", answers[0], answers[1], 1e-5)
        measured = effort.compare(
            lambda: ours.predict_proba(queries),
            lambda: rows / subset * seconds_per_call(lambda: theirs.predict_proba(queries[:subset])),
        )
    yield Row(f"classifier, {rows:,} rows, without cache timed on {subset}", measured, 5, rows, "rows/s")


def random_checkpoint(folder: Path) -> Path:
    """quick.yaml's model with random weights, for contexts of up to 100 examples."""
    tokens = Tokens("shift", num_features=16, num_classes=5)
    torch.manual_seed(0)
    learner = _learner(_config("quick"))(tokens.width, tokens.num_classes)
    sizes = {"num_features": tokens.num_features, "num_classes": tokens.num_classes, "length": LENGTH + 1}
    save_learner(folder / "random.safetensors", learner, {"learner": describe(learner), "tokens": "shift"} | sizes)
    return folder / "random.safetensors"


# -- gpu ---------------------------------------------------------------------------------------------------------------


def gpu(effort: Effort, sequences: int = 512, num_features: int = 64) -> Iterator[Row]:
    """A compiled bfloat16 training step of the paper's model size against an eager float32 one."""
    if not torch.cuda.is_available():
        print("gpu: not run: no GPU")
        return
    x_BTD = torch.randn(sequences, LENGTH, num_features, device="cuda")
    batch = Batch(x_BTD, torch.randint(CLASSES, (sequences, LENGTH), device="cuda"))
    tokens = Tokens("shift", num_features, CLASSES)
    eager = Transformer(tokens.width, CLASSES, width=256, depth=4, heads=8, head_width=32).cuda()
    fast = copy.deepcopy(eager)
    fast.compile()
    theirs = functools.partial(train, eager, tokens, torch.optim.Adam(eager.parameters()), batch)
    plain = functools.partial(train, fast, tokens, torch.optim.Adam(fast.parameters()), batch)
    ours = torch.autocast("cuda", torch.bfloat16)(plain)
    require_equal("losses", ours(), theirs(), 2e-2)
    measured = effort.compare(ours, theirs)
    yield Row("gpu, compiled bfloat16 against eager float32", measured, 3, sequences * LENGTH, "tokens/s")


# -- report ------------------------------------------------------------------------------------------------------------

Group = Literal["generation", "training", "end_to_end", "classifier", "gpu"]


def main(threads: int = 1, pairs: int = 7, only: Group | None = None, seconds: float = 200) -> None:
    """Print a row per measurement: medians of both sides, and the median ratio, above 1 where ours is faster.

    Args:
        threads: of torch, for both sides.
        pairs: interleaved pairs per measurement, at most.
        only: the one group of measurements to run.
        seconds: time for the whole report beside set-up; a measurement past its share begins no further pair.
    """
    torch.set_num_threads(threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(header(images().name), flush=True)
    groups = (generation, training, end_to_end, classifier, gpu)
    effort = Effort(pairs, seconds / NUM_ROWS)
    report({group.__name__: partial(group, effort) for group in groups if only in (None, group.__name__)})


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
