"""What the bench of loss search measures: the task, candidates that differ, and what is timed in processes of its own."""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.bench.loss_reference import Plan, ReferenceStyle
from experiments.bench.loss_rivals import first_weights, meta_steps
from experiments.bench.timing import UnequalError
from metalearn import random
from metalearn.losses.program import Program
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold
from metalearn.search.candidates import Candidate, Scored, gradients_of
from metalearn.search.evaluation import Evaluation
from metalearn.search.evolution import GeneticProgramming
from metalearn.search.finalists import Rescoring
from metalearn.search.halving import Halving
from metalearn.search.local import LocalSearch
from metalearn.search.operators import drawing_from, ramped
from metalearn.search.population import PopulationTraining
from metalearn.search.screening import Screening, fingerprint
from metalearn.tasks.sources import ImageSource

KEY = random.key(0)
LIVE = 0.75  # share of a bench's candidates that must be live and unique
META_LR = 1e-3


def digits(dtype: torch.dtype = torch.float32, hidden: int = 64) -> LossTask:
    """The base task: scikit-learn's digits, one hidden layer, Nesterov's momentum as in the paper."""
    rule = SGD(0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    task = LossTask(ImageSource("digits", validation=0.3), partial(_network, hidden=hidden, dtype=dtype), rule)
    task.open(test=False)
    return task


def _network(num_inputs: int, num_outputs: int, hidden: int, dtype: torch.dtype) -> nn.Module:
    return MLP(num_inputs, num_outputs, [hidden]).to(dtype)


# -- candidates ------------------------------------------------------------------------------------------------------


def drawn(count: int, key: Tensor, nodes: range = range(8, 21)) -> list[Candidate]:
    """Losses of the grammar that a search would train: none dead, wrong of sign or the duplicate of another."""
    found: dict[str, Candidate] = {}
    known: dict[str, str] = {}
    batch = 0
    while len(found) < count:
        batch += 1
        with drawing_from(fold(key, batch)):
            programs = [program.canonical for program in ramped(2 * count) if len(program) in nodes]
        proposed = [Candidate(program) for program in programs]
        verdicts, names, known = Screening().screen(proposed, "softmax", weighted=False, known=known)
        pairs = zip(proposed, verdicts, names, strict=True)
        found |= {name: one for one, verdict, name in pairs if verdict is None and name not in found}
    return list(found.values())[:count]


def live_and_unique(candidates: Sequence[Candidate]) -> int:
    """How many different gradients they have that are not 0.

    Raises:
        UnequalError: for fewer than three quarters of them, which would make batching look better than it is.
    """
    prints = [fingerprint(candidate, "softmax") for candidate in candidates]
    count = len({found.key for found in prints if found.verdict != "dead"})
    if count < LIVE * len(candidates):
        raise UnequalError(f"{count} of {len(candidates)} candidates are live and unique; accepted: {LIVE:.0%} of them")
    return count


# -- processes of their own ------------------------------------------------------------------------------------------


def in_processes(function: Callable[..., Any], *calls: tuple) -> list[Any]:
    """The results of calls that run at once, each in a new process of one thread."""
    with ProcessPoolExecutor(len(calls), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return [future.result() for future in [pool.submit(function, *arguments) for arguments in calls]]


def shared_training(world: int, population: int, steps: int, calls: int = 3) -> tuple[float, list[float]]:
    """Seconds of a population's training by ``world`` processes, the slowest of them, and the errors that all know."""
    with tempfile.TemporaryDirectory() as folder:
        shares = [(rank, world, f"file://{folder}/ranks", population, steps, calls) for rank in range(world)]
        found = in_processes(_share, *shares)
    return max(seconds for seconds, _ in found), found[0][1]


def _share(rank: int, world: int, meeting: str, population: int, steps: int, calls: int) -> tuple[float, list[float]]:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    task, training = digits(), PopulationTraining(steps)
    mine = gradients_of(drawn(population, KEY)[rank::world], task.output)
    errors = torch.zeros(population, dtype=torch.float64)

    def train() -> None:
        errors.zero_()
        errors[rank::world] = training.errors(task, training.train(task, mine, KEY), "validation")
        dist.all_reduce(errors)

    train()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(calls):
        train()
    seconds = (time.perf_counter() - began) / calls
    dist.destroy_process_group()
    return seconds, errors.tolist()


# -- whole searches --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How large a search is: by default two fifths of the paper's meta-steps, rejection steps and training steps."""

    population: int = 32
    generations: int = 3
    meta_steps: int = 100
    rejection_steps: int = 40
    steps: int = 200

    def __str__(self) -> str:
        return (
            f"{self.population} x {self.generations} candidates, {self.meta_steps} meta-steps, {self.rejection_steps} "
            f"rejection steps, {self.steps} training steps"
        )


class Outcome(NamedTuple):
    """What came of a whole search."""

    seconds: float  # of the processor: searches are too long to be interleaved, and other work would count
    texts: list[list[str]]  # proposals by generation, in canonical form
    errors: list[list[float]]
    verdicts: list[list[str]]
    weights: list[list[tuple[float, ...]]]

    @property
    def best(self) -> tuple[str, tuple[float, ...]]:
        """Text and weights of the loss with the least validation error."""
        flat = [zip(*generation, strict=True) for generation in zip(self.errors, self.texts, self.weights, strict=True)]
        _, text, weights = min((one for generation in flat for one in generation), key=lambda one: one[0])
        return text, weights


def evaluation(task: LossTask, scale: Scale, key: Tensor, fast: bool) -> Evaluation:
    """Every candidate tuned and trained; with ``fast``, screened before and halved on the way."""
    screening = Screening(rejection_steps=scale.rejection_steps) if fast else None
    halving = Halving((scale.steps // 4, scale.steps // 2)) if fast else None
    local_search = LocalSearch(scale.meta_steps, lr=META_LR, inner_lr=None)
    return Evaluation([task], PopulationTraining(scale.steps, halving=halving), screening, local_search, key)


def our_search(
    scale: Scale, fast: bool, texts: list[list[str]] | None, key: Tensor = KEY, dtype: torch.dtype = torch.float32
) -> Outcome:
    """A search of ours, of these proposals or, without any, of those that evolution makes of its own results."""
    task = digits(dtype)
    if int(key) == int(KEY):  # other candidates, so that code is loaded and warm, and nothing of the search is known
        our_search(Scale(4, 2, 2, 2, 12), fast, None, random.key(1))
    began = time.process_time()
    scorer, strategy = evaluation(task, scale, key, fast), GeneticProgramming(scale.population)
    population: list[Scored] = []
    generations, proposals = [], []
    for number in range(scale.generations):
        asked = strategy.ask(number, population, key) if texts is None else parsed(texts[number])
        proposals.append([one.canonical.text for one in asked])
        generations.append(scorer.score([one.canonical for one in asked]))
        population = strategy.survive(population, generations[-1])
    seconds = time.process_time() - began
    columns = [[(one.error, one.verdict, one.best.weights) for one in scores] for scores in generations]
    errors, verdicts, weights = ([[row[place] for row in scores] for scores in columns] for place in range(3))
    return Outcome(seconds, proposals, errors, verdicts, weights)


def reference_search(
    scale: Scale, texts: list[list[str]], key: Tensor = KEY, dtype: torch.dtype = torch.float32
) -> Outcome:
    """The same proposals in the way of the public code."""
    task = digits(dtype)
    if int(key) == int(KEY):
        reference_search(Scale(4, 1, 2, 2, 12), [["mul(-1,mul(log(p),y))"] * 4], random.key(1))
    began = time.process_time()
    local_key = fold(key, "local")
    plan = Plan(
        start=partial(first_weights, key=local_key, like=next(task.module.parameters())),
        meta_steps=meta_steps(task, local_key, scale.meta_steps),
        lr=META_LR,
        rejection_params=task.initial(fold(key, "init"))[0],
        rejection_steps=scale.rejection_steps,
        rejection_lr=0.01,
    )
    rival = ReferenceStyle(task, scale.steps, fold(key, "train", 0))
    generations = rival.search([parsed(generation) for generation in texts], plan)
    seconds = time.process_time() - began
    errors = [[score.error for score in scores] for scores in generations]
    verdicts = [["rejected" if score.rejected else "scored" for score in scores] for scores in generations]
    weights = [[score.weights for score in scores] for scores in generations]
    return Outcome(seconds, texts, errors, verdicts, weights)


def parsed(texts: Sequence[str]) -> list[Candidate]:
    """Candidates of these texts."""
    return [Candidate(Program.parse(text)) for text in texts]


def rescored(outcomes: Sequence[Outcome], steps: int) -> list[float]:
    """The error of each search's best loss on examples that no search has seen, the mean over five runs."""
    task = digits()
    candidates = [Candidate(Program.parse(text), weights) for text, weights in (one.best for one in outcomes)]
    return Rescoring(seeds=5).errors(task, candidates, steps, fold(KEY, "rescore")).mean(1)[:-1].tolist()
