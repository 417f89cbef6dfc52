"""What loss search costs against trying one loss after the other: ``python -m experiments.bench.loss_search``.

Digits, 64 hidden units, batches of 128, losses drawn from the grammar that differ. Rivals are those of
``experiments.bench.loss_rivals`` ("loop") and ``loss_reference`` ("reference": in the way of the public code). Both sides of
a row give equal results before there is a ratio. Ratios are theirs / ours in seconds, and shrink towards 1 where
products of matrices take the time, as with 512 hidden units on a CPU.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from experiments.bench.loss_reference import Checkout, ReferenceStyle
from experiments.bench.loss_rivals import Loop, Rival, first_weights, meta_steps
from experiments.bench.loss_runs import (
    KEY,
    META_LR,
    Outcome,
    Scale,
    digits,
    drawn,
    in_processes,
    live_and_unique,
    our_search,
    reference_search,
    rescored,
    shared_training,
)
from experiments.bench.report import Bounded, Effort, Row, header, report
from experiments.bench.timing import Comparison, UnequalError, require_equal
from metalearn.base import require_choice
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold
from metalearn.search.candidates import Candidate, gradients_of
from metalearn.search.evolution import GeneticProgramming
from metalearn.search.local import LocalSearch
from metalearn.search.population import PopulationTraining
from metalearn.search.screening import Screening

NUM_ROWS = 8  # of a whole report, over which the time is shared out
ONE_WRONG = 1 / 215 + 1e-6  # errors are equal up to one validation example: in float32 the order of a sum may tip it
TABULATED = 0.03
FEW_STEPS = 5
REJECTION_LR = 0.01


@dataclass(frozen=True)
class Bench:
    """How much of everything."""

    effort: Effort
    candidates: Sequence[Candidate]
    steps: int = 50
    meta_steps: int = 10
    rejection_steps: int = 100
    proposals: int = 250
    shared: int = 64
    scale: Scale = field(default_factory=Scale)
    checkout: Path | None = None

    def against(
        self,
        name: str,
        ours: Callable[[], Any],
        theirs: Callable[[], Any],
        bar: float | None,
        tolerance: float | None = ONE_WRONG,
    ) -> Row:
        """A row in losses per second, once results are found equal; ``tolerance`` None where they cannot be compared."""
        if tolerance is not None:
            require_equal(name, _numbers(ours()), _numbers(theirs()), tolerance)
        return Row(name, self.effort.compare(ours, theirs), bar, len(self.candidates), "loss/s")


def _numbers(found: Sequence[float] | Sequence[Tensor] | Tensor) -> Tensor:
    """One vector, in which what diverged is 2."""
    parts = [torch.as_tensor(part, dtype=torch.float64).flatten() for part in found]
    return torch.cat(parts).nan_to_num(posinf=2.0)


# -- phases ----------------------------------------------------------------------------------------------------------


def fitness(bench: Bench) -> Iterator[Row]:
    """Training runs and validation errors of a population."""
    task, candidates = digits(), bench.candidates
    loop, reference = (kind(task, bench.steps, KEY) for kind in (Loop, ReferenceStyle))
    exact, tables = (partial(_errors, task, candidates, bench.steps, mode) for mode in ("exact", "tabulated"))
    differences = (_numbers(exact()) - _numbers(tables())).abs()
    print(
        f"tabulated: {int((differences == 0).sum())} of {len(candidates)} errors are those of exact gradients, the "
        f"largest difference is {float(differences.max()):.4f}"
    )
    name = f"fitness of {len(candidates)}, {bench.steps} steps"
    yield bench.against(f"{name}: batched / loop", exact, lambda: loop.train(candidates)[1], 2)
    yield bench.against(f"{name}: tabulated / loop", tables, lambda: loop.train(candidates)[1], 3, TABULATED)
    yield bench.against(f"{name}: batched / reference", exact, lambda: reference.train(candidates)[1], 8)


def _errors(task: LossTask, candidates: Sequence[Candidate], steps: int, mode: str, key: Tensor = KEY) -> Tensor:
    training = PopulationTraining(steps, mode)
    return training.errors(task, training.train(task, gradients_of(candidates, task.output), key), "validation")


def local(bench: Bench) -> Iterator[Row]:
    """Weights tuned through one step of training.

    Compared in float64: along weights that change nothing, Adam makes whole steps of the rounding errors of float32.
    """
    for rival, bar in ((Loop, 2), (ReferenceStyle, None)):
        ways = {dtype: _ways_to_tune(bench, rival, digits(dtype)) for dtype in (torch.float64, torch.float32)}
        ours, theirs = ways[torch.float64]
        require_equal("tuned weights", _numbers(ours()), _numbers(theirs()), 1e-6)
        name = f"local search of {len(bench.candidates)}, {bench.meta_steps} meta-steps: jvp / {_name(rival)}"
        yield bench.against(name, *ways[torch.float32], bar, None)


def _ways_to_tune(
    bench: Bench, rival: type[Rival], task: LossTask
) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    tuning, candidates = LocalSearch(bench.meta_steps, lr=META_LR, inner_lr=None), bench.candidates
    starts = [first_weights(one, KEY, next(task.module.parameters())) for one in candidates]

    def ours() -> list[Tensor]:
        return [torch.tensor(weights, dtype=torch.float64) for weights in tuning.tune(task, candidates, KEY)]

    def theirs() -> list[Tensor]:
        steps = meta_steps(task, KEY, bench.meta_steps)
        return rival(task, bench.steps, KEY).tune(candidates, starts, steps, META_LR)

    return ours, theirs


def rejection(bench: Bench) -> Iterator[Row]:
    """Predictions that are optimised directly."""
    task, candidates = digits(), bench.candidates
    screener, (params, _) = Screening(rejection_steps=bench.rejection_steps), task.initial(KEY)

    def ours() -> list[bool]:
        return screener.rejected(task, gradients_of(candidates, task.output), KEY)

    for kind in (Loop, ReferenceStyle):
        rival = kind(task, bench.steps, KEY)
        theirs = partial(rival.rejected, candidates, params, bench.rejection_steps, REJECTION_LR)
        name = f"rejection of {len(candidates)}, {bench.rejection_steps} steps: batched / {_name(kind)}"
        yield bench.against(name, ours, theirs, 3, 0.0)


def _name(rival: type[Rival]) -> str:
    return "reference" if rival is ReferenceStyle else "loop"


def screening(bench: Bench) -> Iterator[Bounded]:
    """Milliseconds of the processor per candidate: of what sympy makes of a new one, once, and of everything else."""
    screener, new, known = Screening(), [], []
    for batch in range(1 + bench.effort.pairs):
        proposed = GeneticProgramming(bench.proposals).ask(0, [], fold(KEY, "screening", batch))
        screen = partial(screener.screen, list(dict.fromkeys(proposed)), "softmax", True)
        first, again = (_processor_ms(screen) / len(proposed) for _ in range(2))
        if batch:  # the first loads code
            new.append(first - again)
            known.append(again)
    yield Bounded("screening without sympy, per candidate", known, [1.0] * len(known), "ms", 0.5)
    yield Bounded("screening, what sympy adds per new candidate", new, [1.0] * len(new), "ms", 5.0)


def _processor_ms(call: Callable[[], object]) -> float:
    began = time.process_time()  # no ratio makes up for what else the machine does
    call()
    return 1e3 * (time.process_time() - began)


# -- processes and whole searches ------------------------------------------------------------------------------------


def ranks(bench: Bench) -> Iterator[Row]:
    """A population's training by two processes of one thread each and by one."""
    two, one = [], []
    for _ in range(min(3, bench.effort.pairs)):
        for world, samples in ((2, two), (1, one)):
            samples.append(shared_training(world, bench.shared, bench.steps))
    require_equal("errors", _numbers(two[0][1]), _numbers(one[0][1]), ONE_WRONG)
    measured = Comparison([found[0] for found in two], [found[0] for found in one])
    yield Row(f"fitness of {bench.shared}: two ranks / one", measured, 1.7, bench.shared, "loss/s")


def search(bench: Bench) -> Iterator[Row]:
    """Whole searches of the same proposals, each in a process that has seen none of them; seconds are of the processor."""
    scale = bench.scale
    (exact,) = in_processes(our_search, (scale, False, None))
    (reference,) = in_processes(reference_search, (scale, exact.texts))
    (fast,) = in_processes(our_search, (scale, True, exact.texts))
    count = scale.population * scale.generations
    print(f"search: {scale}; {_require_same_search(scale, exact, reference)}", flush=True)
    searches = {"exact": exact, "screened and halved": fast, "reference": reference}
    best = rescored(list(searches.values()), scale.steps)
    print("search: error of the best loss on untouched examples, mean of 5 runs:")
    for (name, outcome), error in zip(searches.items(), best, strict=True):
        print(f"  {name:<20} {error:.4f}  {outcome.best[0]}")
    if best[1] > best[2]:
        print("search: WORSE: the best loss of the screened and halved search, than that of the reference")
    for name, bar in (("exact", 6), ("screened and halved", 12)):
        measured = Comparison([searches[name].seconds], [reference.seconds])
        yield Row(f"search: {name} / reference", measured, bar, count, "loss/s")


def _require_same_search(scale: Scale, ours: Outcome, theirs: Outcome) -> str:
    """What is equal: the errors of all that the reference accepted; of a tenth at most, in float64 and after few steps only.

    Losses whose derivatives have poles make another run of a rounding error: 1e-16 grows beyond 1 within 20 steps.
    """
    accepted, tipped = _differing(ours, theirs)
    if len(tipped) > accepted / 10 or not accepted:
        raise UnequalError(f"{len(tipped)} of {accepted} errors of accepted candidates differ; accepted: a tenth")
    if tipped:
        again = replace(scale, population=max(2, len(tipped)), generations=1, steps=FEW_STEPS)
        precise = our_search(again, False, [tipped], KEY, torch.float64)
        if left := _differing(precise, reference_search(again, [tipped], KEY, torch.float64))[1]:
            raise UnequalError(f"errors differ after {FEW_STEPS} steps in float64, too: {', '.join(left)}")
    few = f", {len(tipped)} of them after {FEW_STEPS} steps in float64 only: {', '.join(tipped)}" if tipped else ""
    return f"errors equal of {accepted} proposals that the reference accepted{few}"


def _differing(ours: Outcome, theirs: Outcome) -> tuple[int, list[str]]:
    """How many proposals the reference accepted, and those of them whose errors differ by more than one example."""
    columns = (itertools.chain(*column) for column in (ours.texts, ours.errors, theirs.errors))
    accepted = [row for row in zip(*columns, strict=True) if math.isfinite(row[2])]
    tipped = [text for text, found, wanted in accepted if not abs(found - wanted) <= ONE_WRONG]
    return len(accepted), list(dict.fromkeys(tipped))


def gpu(bench: Bench) -> Iterator[Row]:
    """Populations of three sizes on a GPU, per loss, against the loop over the bench's candidates."""
    if not torch.cuda.is_available():
        print("gpu: not measured: no GPU")
        return
    task, key = digits(), KEY.to("cuda")
    loop = Loop(task, bench.steps, key)
    for count in (32, 128, 512):
        candidates = drawn(count, KEY)
        some = candidates[: len(bench.candidates)]
        batched = partial(_errors, task, candidates, bench.steps, "exact", key)
        require_equal("errors", _numbers(batched()[: len(some)].cpu()), _numbers(loop.train(some)[1]), 5 * ONE_WRONG)
        found = bench.effort.compare(batched, partial(loop.train, some))
        per_loss = Comparison([s / count for s in found.ours], [s / len(some) for s in found.theirs])
        yield Row(f"gpu, fitness of {count}: batched / loop", per_loss, None, 1, "loss/s")


def public(bench: Bench) -> Iterator[Row]:
    """The same phases by a checkout of the public code. Its losses are found equal to ours; its draws are its own."""
    if bench.checkout is None:
        return
    task, candidates = digits(), bench.candidates
    theirs = Checkout(bench.checkout, task, bench.steps, KEY)
    losses, (tune, _) = [theirs.loss(one) for one in candidates], _ways_to_tune(bench, Loop, task)
    screener = Screening(rejection_steps=bench.rejection_steps)
    phases: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "fitness": (partial(_errors, task, candidates, bench.steps, "exact"), partial(theirs.train, losses)),
        "local search": (tune, partial(theirs.tune, losses, bench.meta_steps, META_LR)),
        "rejection": (
            lambda: screener.rejected(task, gradients_of(candidates, task.output), KEY),
            partial(theirs.reject, losses, bench.rejection_steps, REJECTION_LR),
        ),
    }
    for name, (ours, one_by_one) in phases.items():
        try:
            yield bench.against(f"{name}: ours / public code", ours, one_by_one, None, None)
        except Exception as error:  # whatever a foreign program raises
            print(f"{name}: ours / public code: NOT MEASURED: {type(error).__name__}: {error}")


# -- the report ------------------------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[Bench], Iterator[Row | Bounded]]] = {
    group.__name__: group for group in (fitness, local, rejection, screening, ranks, search, gpu, public)
}


def main(
    pairs: int = 7,
    only: str | None = None,
    seconds: float = 200,
    quick: bool = False,
    reference_path: Path | None = None,
    json: Path | None = None,
) -> None:
    """Print a row per measurement: losses per second of both sides and the median ratio, or milliseconds per loss.

    Args:
        pairs: interleaved pairs per measurement, at most.
        only: groups of measurements, as "fitness,local"; null for all of fitness, local, rejection, screening, ranks,
            search, gpu and public.
        seconds: time for the timed rows beside set-up; a measurement past its share begins no further pair.
        quick: one pair per measurement, and everything small.
        reference_path: a checkout of the public reference, Decadz/Evolved-Model-Agnostic-Loss, for the rows of "public".
        json: file that the rows are written to.
    """
    chosen = list(GROUPS) if only is None else only.split(",")
    for group in chosen:
        require_choice("only", group, GROUPS)
    if reference_path is not None and not (reference_path / "source").is_dir():
        raise ValueError(f"reference_path is {str(reference_path)!r}; accepted: a folder that has 'source' in it")
    torch.set_num_threads(1)
    print(header("digits"), flush=True)
    effort = Effort(1 if quick else pairs, seconds / NUM_ROWS)
    bench = Bench(effort, drawn(32, KEY), checkout=reference_path)
    measure(replace(bench, **SMALL) if quick else bench, chosen, json)


SMALL: dict[str, Any] = {"steps": 10, "meta_steps": 2, "proposals": 20, "shared": 8, "scale": Scale(4, 2, 2, 5, 12)}


def measure(bench: Bench, chosen: Sequence[str], path: Path | None) -> None:
    """Print these groups' rows as they come, and write them to a file where there is one."""
    lengths = sum(len(one.program or ()) for one in bench.candidates) / len(bench.candidates)
    shared = f"{live_and_unique(bench.candidates)} of {len(bench.candidates)} candidates are live and unique"
    print(f"{shared}, of {lengths:.1f} nodes on average", flush=True)
    report({group: partial(GROUPS[group], bench) for group in chosen}, path)


if __name__ == "__main__":
    # jsonargparse knows options by their parameters' names only.
    words = [word.replace("--reference-path", "--reference_path") for word in sys.argv[1:]]
    auto_cli(main, as_positional=False, args=words)
