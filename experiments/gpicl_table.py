"""The generalisation table of Kirsch et al. 2022, section 4: learners that are meta-trained on one data set, tested on others.

    python -m experiments.gpicl_table --sweep_dir runs/table [--workers 2] [--budget_minutes 30]

At the size of a CPU: runs what is left of ``configs/in_context/table.sweep.yaml``, and asks every method for the label of
the last example of the very same meta-test sequences, given those before it:

- transformer, LSTM and VSML of the sweep, meta-trained on digits 0-4;
- MAML: a start and a learning rate of an MLP, meta-trained on the same tasks through ten steps of gradient descent;
- SGD: gradient descent from a random start, of an MLP and of a linear model; of rates and lengths the best on the
  validation sequences of digits 0-4;
- classical learners, for reference.

Prints accuracies in per cent, mean and standard deviation over seeds, and writes ``table.csv`` and ``.tex`` into the
folder of the sweep. ``trials.jsonl`` there keeps them by method and seed; what is in it is not measured again.

    python -m experiments.gpicl_table runs/in_context/mnist_paper [more runs ...]

At the paper's size: reads the ``test.csv`` of each run (``metalearn test``) and sets it beside the published numbers.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.gpicl_mechanisms import read_tasks
from experiments.gpicl_phases import CONFIGS, show, swept
from metalearn import tree
from metalearn.analysis.compare import beside_published, format_table
from metalearn.analysis.runs import read_evaluations
from metalearn.analysis.trials import keep_trial, read_trials, summarise_trials
from metalearn.base import Batch, Batches, Examples, InnerState, MetaTest, MetaTrain, MetaValidation, Oracle, Params
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.saving import load_learner
from metalearn.models.tokens import Tokens
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.random import key
from metalearn.tasks.images import ProjectedImages
from metalearn.unroll import Descent, Tasks, unroll

# Per cent, by stream; unseen_held_out is MNIST. The reproduction is the best public one, github.com/Lerostre/gpicl.
_STREAMS = ("unseen_held_out", "fashion_mnist", "kmnist", "cifar10", "svhn", "random")
_ROWS = {
    "paper, SGD": (70.31, 50.78, 37.89, 14.84, 10.16, 100.0),
    "paper, MAML": (53.71, 48.44, 36.33, 17.38, 11.33, 99.80),
    "paper, VSML": (79.04, 68.49, 54.69, 24.09, 17.45, 100.0),
    "paper, LSTM": (25.39, 28.12, 18.10, 12.11, 11.07, 58.72),
    "paper, transformer": (73.70, 62.24, 53.39, 19.40, 14.58, 100.0),
    "best public reproduction": (52.3, 45.8, 35.0, 11.5, 8.9),  # which has no random labels
}
PUBLISHED: dict[str, dict[str, float]] = {name: dict(zip(_STREAMS, row, strict=False)) for name, row in _ROWS.items()}
HIDDEN = {"linear": (), "MLP": (64,)}
RATES, HORIZONS = (0.1, 0.3, 1.0, 3.0), (10, 100)
RATE = "log_lr"  # a meta-parameter beside those of the start
Answer = Callable[[Batch], Tensor]  # sequences (B, T) -> labels (B,) of their last examples


class Sizes(NamedTuple):
    """How much is measured and meta-trained."""

    sequences: int = 512  # of each stream and seed
    meta_steps: int = 1000  # of MAML
    meta_batch: int = 32
    queries: int = 16  # of a meta-training sequence
    adapt_steps: int = 10


class Adaptation(Descent):
    """Gradient descent on the cross-entropy of the first examples of a task, from a start phi and with a rate that are learned.

    theta_0 = phi; theta_{k+1} = theta_k - exp(log_lr) grad CE(theta_k; support); the meta-objective is CE(theta_K; query).

    Source: Finn et al. 2017, "Model-Agnostic Meta-Learning", algorithm 2. Differs from the paper: the rate is learned, too.
    """

    def __init__(self, module: nn.Module, horizon: int, lr: float):
        super().__init__(SGD(lr), horizon)
        self.module, self.lr = module, torch.tensor(lr)

    def init_meta(self, key: Tensor) -> Params:
        return tree.initialise(self.module, key)[0] | {RATE: self.lr.log()}

    def rule_meta(self, meta: Params) -> Params:
        return {"lr": meta[RATE].exp()}

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return self.start(meta, {name: value for name, value in meta.items() if name != RATE}, {})

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        return self.outer(meta, state, batch), {}

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return functional.cross_entropy(self.logits(state, batch.inputs), batch.targets)

    def logits(self, state: InnerState, inputs: Tensor) -> Tensor:
        return tree.call(self.module, state.params, {}, inputs)[0]


def split(batch: Batch, support: int, steps: int) -> Batches:
    """The first ``support`` examples of every sequence to adapt to, and the others to be right about."""
    first = Examples(batch.x[:, :support], batch.y[:, :support])
    return Batches(lambda k: first, Examples(batch.x[:, support:], batch.y[:, support:]), steps)


@torch.no_grad()
def adapted(problem: Adaptation, meta: Params, batch: Batch) -> Tensor:
    """The label of the last example by gradient descent on those before it."""
    assert problem.horizon is not None
    together, batches = Tasks(problem, len(batch.y)), split(batch, batch.y.shape[1] - 1, problem.horizon)
    end = unroll(together, meta, together.init(meta, key(0)), batches, key(0)).end
    return torch.vmap(problem.logits)(end, batches.outer.inputs).argmax(-1).squeeze(1)


def maml(tasks: ProjectedImages, length: int, seed: int, sizes: Sizes) -> Answer:
    """Meta-train an MLP's start and rate, from ``length - 1`` examples of a task, by Adam through all steps."""
    module = MLP(tasks.num_features, tasks.num_classes, HIDDEN["MLP"])
    problem, estimator = Adaptation(module, sizes.adapt_steps, lr=0.1), Unrolled(mode="graph")
    together, meta = Tasks(problem, sizes.meta_batch), problem.init_meta(key(seed, "maml"))
    optimizer = torch.optim.Adam(meta.values(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sizes.meta_steps)
    for step in range(sizes.meta_steps):
        batch = tasks.batch(step, 0, sizes.meta_batch, length - 1 + sizes.queries, MetaTrain())
        batches = split(batch, length - 1, sizes.adapt_steps)
        found = estimator.estimate(together, meta, {}, batches, key(seed, "steps", step))
        for name, value in meta.items():
            value.grad = found.grad[name]
        optimizer.step()
        decay.step()
    return partial(adapted, problem, meta)


def sgd(kind: str, tasks: ProjectedImages, length: int, seed: int, sizes: Sizes) -> Answer:
    """Gradient descent from a random start, with the rate and the number of steps that are best on validation sequences."""
    chosen = tasks.batch(0, 0, sizes.sequences, length, MetaValidation("unseen_held_out"))
    module = MLP(tasks.num_features, tasks.num_classes, HIDDEN[kind])
    ways = []
    for rate, horizon in itertools.product(RATES, HORIZONS):
        problem = Adaptation(module, horizon, rate)
        ways.append(partial(adapted, problem, problem.init_meta(key(seed, "sgd"))))
    return max(ways, key=lambda answer: float((answer(chosen) == chosen.y[:, -1]).float().mean()))


def in_context(checkpoint: Path) -> Answer:
    """A learner of the sweep."""
    learner, card, _ = load_learner(checkpoint)
    tokens = Tokens(card["tokens"], card["num_features"], card["num_classes"])

    @torch.inference_mode()
    def answer(batch: Batch) -> Tensor:
        return tokens.at_examples(learner(tokens.encode(*batch)))[:, -1].argmax(-1)

    return answer


def classical(oracle: Oracle) -> Answer:
    """A reference learner of the tasks."""
    return lambda batch: oracle(*batch, [batch.y.shape[1] - 1])[:, 0]


def methods(
    runs: dict[str, Path], tasks: ProjectedImages, length: int, seed: int, sizes: Sizes
) -> dict[str, Callable[[], Answer]]:
    """How each method is made ready, by name: learners of the sweep by theirs, then the others."""
    ready = {name: partial(in_context, run / "checkpoints" / "last.ckpt") for name, run in runs.items()}
    ready["MAML"] = partial(maml, tasks, length, seed, sizes)
    ready |= {f"SGD, {kind}": partial(sgd, kind, tasks, length, seed, sizes) for kind in HIDDEN}
    return ready | {name: partial(classical, oracle) for name, oracle in tasks.oracles().items()}


def measure(folder: Path, cells: Any, sizes: Sizes) -> list[dict[str, Any]]:
    """A trial per seed and method: accuracy in per cent on every stream, all methods on the same sequences of a seed."""
    file = folder / "trials.jsonl"
    kept = {(trial["method"], trial["seed"]) for trial in read_trials(file)}
    for seed, own in cells.groupby("seed"):
        runs = {name: folder / run for name, run in zip(own["learner"], own["run_dir"], strict=True)}
        tasks, length = read_tasks(next(iter(runs.values())))
        assert isinstance(tasks, ProjectedImages)
        tasks.open(test=True)
        batches = {name: tasks.batch(0, 0, sizes.sequences, length, MetaTest(name)) for name in tasks.streams()}
        for name, prepare in methods(runs, tasks, length, int(seed), sizes).items():
            if (name, seed) not in kept:
                answer = prepare()
                right = {name: (answer(batch) == batch.y[:, -1]).double().mean() for name, batch in batches.items()}
                accuracies = {stream: 100 * float(share) for stream, share in right.items()}
                keep_trial(file, {"method": name, "seed": int(seed)} | accuracies)
    return read_trials(file)


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders with a test.csv, at the paper's size")
    parser.add_argument("--sweep_dir", type=Path, help="folder of the sweep, and of what is written")
    parser.add_argument("--workers", type=int, help="as in metalearn sweep")
    parser.add_argument("--budget_minutes", type=float, help="as in metalearn sweep")
    options = parser.parse_args(argv)
    if bool(options.runs) == (options.sweep_dir is not None):
        parser.error("runs and --sweep_dir are both given or both missing; accepted: one of them")
    if options.runs:
        print(format_table(beside_published(read_evaluations(options.runs, "test"), PUBLISHED)))
        return
    given = {"workers": options.workers, "budget_minutes": options.budget_minutes}
    others = [f"--{name}={value}" for name, value in given.items() if value is not None]
    cells = swept(CONFIGS / "table.sweep.yaml", options.sweep_dir, others)
    trials = measure(options.sweep_dir, cells, sizes or Sizes())
    streams = [name for name in trials[0] if name not in ("method", "seed")]
    table = summarise_trials(trials, dict.fromkeys(streams, 1))
    show("Per cent after 31 examples, mean ± standard deviation over seeds", table, options.sweep_dir / "table")


if __name__ == "__main__":
    main()
