"""Everything that can be learned of a training run, on the same short tasks, for the same seconds of meta-training.

    python -m experiments.head_to_head [--seeds 3] [--seconds 120] [--out runs/head_to_head]

A task is a random projection of digits to 16 features and a random permutation of 5 labels: 32 labelled examples to learn from,
others to be right about. Each method has the 32 and answers for the others:

- in-context learner: a transformer that reads the 32 and answers; nothing of it is trained on the task;
- learned loss: a network of 32 tanh units trained by 20 steps of Adam on a loss that is a network, with a learned rate;
- learned optimizer: 20 steps of a ``SmallMLP`` on cross-entropy;
- learned loss and optimizer: 20 steps of a ``SmallMLP`` on the gradient of such a loss, both learned together from nothing;
- MAML: 20 steps of gradient descent on cross-entropy from a learned start, with a learned rate;
- Adam, on cross-entropy: 20 steps from torch's initial weights, at the best of 13 rates on 64 validation tasks, with a constant
  rate and with one that falls along a cosine; and each with 200 steps.

All but the last are meta-trained for the same CPU seconds on tasks of digits 0 to 4, by Adam: the learner on the labels of
whole sequences, the others on the cross-entropy of 16 further examples after the 20 steps, differentiated through all of
them, 16 tasks at a time. Outer learning rates are set by hand and not tuned, nor are sizes. Judged are the very same 256 new
tasks of a seed, made of test images of digits 0 to 4, and of digits 5 to 9: accuracy and cross-entropy on 32 examples that no
method has learned from.

Intervals of means are over seeds (bootstrap), and over all tasks of all seeds (normal, ``over_tasks`` is its half); differences
from tuned Adam of 20 steps are paired by seed and task. Seeds vary everything but the division of the images.

A seed takes about 11 CPU minutes, five times ``--seconds`` and one more. Each trial is kept when it is done, and the same command
goes on with what is missing.

Source: Kirsch et al. 2022 (in-context learner), Bechtle et al. 2021 (loss), Andrychowicz et al. 2016 and Metz et al. 2022
(optimizer), Finn et al. 2017 (MAML); see the classes. Differs from the papers: one kind of task for all.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from experiments.gpicl_table import split
from experiments.meta_trained import ADAMS, Budget, command, meta_train, parsed
from metalearn import tree
from metalearn.analysis.compare import format_table, paired_comparison, write_table
from metalearn.analysis.trials import keep_trial, read_trials, trial_frame
from metalearn.base import (
    Batch,
    Batches,
    Examples,
    InnerState,
    MetaTest,
    MetaTrain,
    MetaValidation,
    Params,
    Rule,
)
from metalearn.estimators.unrolled import Unrolled
from metalearn.losses.network import NetworkLoss
from metalearn.models.tokens import Tokens
from metalearn.models.transformer import Transformer
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD, Adam
from metalearn.optim.learned import LearnedRule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.problems.baselines import Baseline
from metalearn.random import fold, integers, key
from metalearn.tasks.images import ProjectedImages
from metalearn.tasks.sources import ImageSource
from metalearn.unroll import Descent, Tasks, unroll

START, LOSS, RULE, RATE = "start/", "loss/", "rule/", "log_lr"  # parts of the meta-parameters
SEEN, UNSEEN = "unseen_held_out", "unseen_classes"  # streams: new tasks of the same digits, and of others
CONTEXT, ADAM = "in-context learner", "Adam"
NUM_FEATURES, HIDDEN = 16, (32,)
OUTER_RATES = {
    CONTEXT: 2e-3,
    "learned loss": 3e-3,
    "learned optimizer": 3e-3,
    "learned loss and optimizer": 3e-3,
    "MAML": 3e-3,
}
RIVALS = {
    f"{name}{longer}": (baseline, factor)
    for longer, factor in (("", 1), (", 10 x the steps", 10))
    for name, baseline in ADAMS.items()
}
SHOWN = [
    "stream",
    "method",
    "n",
    "mean",
    "low",
    "high",
    "over_tasks",
    "difference",
    "difference_low",
    "difference_high",
]
Answer = Callable[[Batch], Tensor]  # sequences (B, N + Q) -> logits (B, Q, K) of the last Q examples, from the first N
Spent = dict[str, float]


class Scale(NamedTuple):
    """Sizes of a trial."""

    seconds: float = 120.0  # of CPU time, of each meta-training
    support: int = 32
    queries: int = 16  # of a task of meta-training
    test_queries: int = 32
    steps: int = 20
    meta_batch: int = 16
    sequences: int = 64  # a batch of the in-context learner
    validation_tasks: int = 64
    test_tasks: int = 256


SMOKE = Scale(0.02, 8, 4, 4, 1, 2, 2, 2, 3)


class ShortRun(Descent):
    """A module trained on the support examples of a task, some of whose start, loss and rule are learned.

    theta_0 = start; theta_{k+1} = rule(theta_k, grad loss(theta_k; support)); the meta-objective is the cross-entropy of
    theta_K on the task's query examples. What is not learned is a draw of initial weights, and cross-entropy; of rules that are
    not learned, the rate is, as log_lr.

    Args:
        tasks: whose training tasks are drawn; opened.
        rule: a learned one, or one with a learning rate.
        scale: sizes.
        loss: what the rule descends; null for cross-entropy.
        learns_start: whether the start is learned.
        lr: that a rate begins at.
    """

    def __init__(
        self,
        tasks: ProjectedImages,
        rule: Rule,
        scale: Scale,
        loss: NetworkLoss | None = None,
        learns_start: bool = False,
        lr: float = 0.01,
    ):
        super().__init__(rule, scale.steps)
        self.module: nn.Module = MLP(tasks.num_features, tasks.num_classes, HIDDEN)
        self.tasks, self.scale, self.loss, self.learns_start, self.lr = tasks, scale, loss, learns_start, lr

    def init_meta(self, key: Tensor) -> Params:
        meta: Params = {}
        if self.learns_start:
            meta |= {START + name: value for name, value in tree.initialise(self.module, fold(key, START))[0].items()}
        if self.loss is not None:
            self.loss.reset_parameters(fold(key, LOSS))
            meta |= {LOSS + name: value.detach().clone() for name, value in self.loss.named_parameters()}
        if isinstance(self.rule, LearnedRule):
            return meta | {RULE + name: value for name, value in self.rule.init_meta(fold(key, RULE)).items()}
        return meta | {RATE: torch.tensor(self.lr).log()}

    def rule_meta(self, meta: Params) -> Params:
        return {"lr": meta[RATE].exp()} if RATE in meta else _part(meta, RULE)

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return self.start(meta, _part(meta, START) if self.learns_start else tree.initialise(self.module, key)[0], {})

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        if self.loss is None:
            return self.outer(meta, state, batch), {}
        return functional_call(self.loss, _part(meta, LOSS), (self.logits(state, batch.inputs), batch.targets)), {}

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return functional.cross_entropy(self.logits(state, batch.inputs), batch.targets)

    def logits(self, state: InnerState, inputs: Tensor) -> Tensor:
        return tree.call(self.module, state.params, {}, inputs)[0]

    def batches(self, key: Tensor, steps: int) -> Batches:
        """A training task, drawn by the key."""
        number, length = int(integers(key, (), 2**31)), self.scale.support + self.scale.queries
        drawn = split(self.tasks.batch(number, 0, 1, length, MetaTrain()), self.scale.support, steps)
        support, query = (Examples(*(leaf[0] for leaf in part)) for part in (drawn.inner(0), drawn.outer))
        return Batches(lambda k: support, query, steps)


def _part(meta: Params, prefix: str) -> Params:
    return {name.removeprefix(prefix): value for name, value in meta.items() if name.startswith(prefix)}


@torch.no_grad()
def trained(problem: ShortRun, meta: Params, batch: Batch) -> Tensor:
    """Answers of a module that was trained on the support examples."""
    assert problem.horizon is not None
    together, batches = Tasks(problem, len(batch.y)), split(batch, problem.scale.support, problem.horizon)
    end = unroll(together, meta, together.init(meta, key(0, "init")), batches, key(0, "steps")).end
    return torch.vmap(problem.logits)(end, batches.outer.inputs)


# -- methods -----------------------------------------------------------------------------------------------------------


def problems(tasks: ProjectedImages, scale: Scale) -> dict[str, ShortRun]:
    """What is meta-trained through training runs."""
    return {
        "learned loss": ShortRun(tasks, Adam(), scale, NetworkLoss()),
        "learned optimizer": ShortRun(tasks, SmallMLP(), scale),
        "learned loss and optimizer": ShortRun(tasks, SmallMLP(), scale, NetworkLoss()),
        "MAML": ShortRun(tasks, SGD(), scale, learns_start=True, lr=0.1),
    }


def through_runs(problem: ShortRun, seed: int, scale: Scale, lr: float) -> tuple[Answer, Spent]:
    """Meta-train by backpropagation through whole runs."""
    spent: Spent = {}

    def watch(step: int, seconds: float, meta: Params) -> None:
        spent.update(meta_steps=step, seconds=seconds)

    together, budget = Tasks(problem, scale.meta_batch), Budget(2**31, scale.seconds)
    meta = meta_train(together, Unrolled("graph"), seed, budget, window=scale.steps, lr=lr, watch=watch)
    return lambda batch: trained(problem, meta, batch), spent


def in_context(tasks: ProjectedImages, seed: int, scale: Scale, lr: float) -> tuple[Answer, Spent]:
    """Meta-train a transformer to name the label of each example of a sequence, given those before it."""
    began, step = time.process_time(), 0
    tokens = Tokens("shift", tasks.num_features, tasks.num_classes)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        learner = Transformer(tokens.width, tasks.num_classes, width=64, depth=2, heads=4, head_width=16)
    optimizer = torch.optim.Adam(learner.parameters(), lr=lr)
    while not step or time.process_time() - began < scale.seconds:
        batch = tasks.batch(step, 0, scale.sequences, scale.support + 1, MetaTrain())
        logits_BTK = tokens.at_examples(learner(tokens.encode(*batch)))
        optimizer.zero_grad()
        functional.cross_entropy(logits_BTK.flatten(0, 1), batch.y.flatten()).backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        step += 1

    @torch.no_grad()
    def answer(batch: Batch) -> Tensor:
        known = batch.x[:, : scale.support], batch.y[:, : scale.support]
        state = learner.init_state(len(batch.y), "cpu", batch.x.dtype)
        state = learner.prefill(tokens.context(*known), state)[1]
        return learner.branch(tokens.query(batch.x[:, scale.support :], *known), state)

    return answer, {"meta_steps": step, "seconds": time.process_time() - began}


def tuned_rival(tasks: ProjectedImages, scale: Scale, baseline: Baseline) -> tuple[Answer, Spent]:
    """A hand-made optimizer on cross-entropy at the rate with the smallest cross-entropy on validation tasks."""
    began, problem = time.process_time(), ShortRun(tasks, baseline.rule(scale.steps), scale)
    length = scale.support + scale.test_queries
    chosen = tasks.batch(0, 0, scale.validation_tasks, length, MetaValidation(SEEN))
    metas = [{RATE: torch.tensor(lr).log()} for lr in baseline.rates]
    losses = [float(scores(trained(problem, meta, chosen), chosen)["loss"].mean()) for meta in metas]
    best = min(range(len(metas)), key=losses.__getitem__)
    seconds = time.process_time() - began
    return lambda batch: trained(problem, metas[best], batch), {"lr": baseline.rates[best], "seconds": seconds}


def methods(tasks: ProjectedImages, seed: int, scale: Scale) -> Iterator[tuple[str, Answer, Spent]]:
    """Each method, made ready: its name, its answers and what it has cost."""
    yield CONTEXT, *in_context(tasks, seed, scale, OUTER_RATES[CONTEXT])
    for name, problem in problems(tasks, scale).items():
        yield name, *through_runs(problem, seed, scale, OUTER_RATES[name])
    for name, (baseline, factor) in RIVALS.items():
        yield name, *tuned_rival(tasks, scale._replace(steps=factor * scale.steps), baseline)


def scores(logits_BQK: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Accuracy and cross-entropy (B,) of each task."""
    queries = logits_BQK.shape[1]
    targets_BQ = batch.y[:, -queries:]
    losses_BQ = functional.cross_entropy(logits_BQK.flatten(0, 1), targets_BQ.flatten(), reduction="none")
    right_BQ = (logits_BQK.argmax(-1) == targets_BQ).to(logits_BQK.dtype)
    return {"accuracy": right_BQ.mean(1), "loss": losses_BQ.unflatten(0, targets_BQ.shape).mean(1)}


# -- trials ------------------------------------------------------------------------------------------------------------


def open_tasks(seed: int) -> ProjectedImages:
    """Tasks of digits 0 to 4, and for tests of digits 5 to 9; a new one in every sequence."""

    def source(*classes: int) -> ImageSource:
        return ImageSource("digits", classes=list(classes), validation=0.2, test=0.3)

    tasks = ProjectedImages(source(*range(5)), NUM_FEATURES, others={UNSEEN: source(*range(5, 10))}, seed=seed)
    tasks.open(test=True)
    return tasks


def run(seeds: int, scale: Scale, out: Path, budget_minutes: float) -> list[dict[str, Any]]:
    """A trial per seed and method, those of an earlier call among them; none is begun after ``budget_minutes``."""
    file, settings = out / "trials.jsonl", scale._asdict()
    done = [trial for trial in read_trials(file) if trial["settings"] == settings]
    ends = time.monotonic() + 60 * budget_minutes
    for seed in sorted(set(range(seeds)) - {trial["seed"] for trial in done}):
        if time.monotonic() > ends:
            break
        tasks, length = open_tasks(seed), scale.support + scale.test_queries
        batches = {name: tasks.batch(0, 0, scale.test_tasks, length, MetaTest(name)) for name in (SEEN, UNSEEN)}
        rows = []
        for name, answer, spent in methods(tasks, seed, scale):
            for stream, batch in batches.items():
                found = {what: values.tolist() for what, values in scores(answer(batch), batch).items()}
                rows.append({"method": name, "stream": stream, **spent, **found})
            shown = ", ".join(f"{what} {value:.4g}" for what, value in spent.items())
            print(f"seed {seed}, {name}: {shown}", flush=True)
        trial = {"seed": seed, "settings": settings, "rows": rows}
        keep_trial(file, trial)
        done.append(trial)
    return [trial for trial in done if trial["seed"] < seeds]


def result_table(trials: Sequence[dict[str, Any]], value: str) -> Any:
    """Mean of ``value`` by stream and method with both intervals, and the difference from tuned Adam by task."""
    rows = [{"seed": trial["seed"], **row} for trial in trials for row in trial["rows"]]
    table = []
    for stream in (SEEN, UNSEEN):
        own = [row for row in rows if row["stream"] == stream]
        means = [{"method": row["method"], "seed": row["seed"], value: _mean(row[value])} for row in own]
        seeds = paired_comparison(trial_frame(means), group="method", value=value, baseline=ADAM)
        each = [
            {"method": row["method"], "task": f"{row['seed']}/{number}", value: one}
            for row in own
            for number, one in enumerate(row[value])
        ]
        paired = paired_comparison(trial_frame(each), group="method", value=value, baseline=ADAM, unit="task")
        for over_seeds, over_tasks in zip(seeds.to_dict("records"), paired.to_dict("records"), strict=True):
            name = over_seeds["group"]
            values = torch.tensor([one[value] for one in each if one["method"] == name], dtype=torch.float64)
            differences = {what: over_tasks[what] for what in SHOWN if what.startswith("difference")}
            half = 1.96 * float(values.std()) / math.sqrt(len(values))
            table.append({"stream": stream, "method": name, **over_seeds, "over_tasks": half, **differences})
    return trial_frame(table)[SHOWN]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "runs/head_to_head", seeds=3)
    parser.add_argument(
        "--seconds", type=float, default=Scale().seconds, help="of CPU time, of each meta-training (> 0)"
    )
    options = parsed(parser, argv)
    if not options.seconds > 0:
        raise ValueError(f"seconds is {options.seconds}; accepted: seconds > 0")
    scale = SMOKE if options.smoke else Scale(seconds=options.seconds)
    trials = run(options.seeds, scale, options.out, options.budget_minutes)
    for value in ("accuracy", "loss"):
        table = result_table(trials, value)
        write_table(table, options.out / value)
        print(f"\n{value} on {scale.test_queries} further examples of a task\n\n{format_table(table)}")


if __name__ == "__main__":
    main()
