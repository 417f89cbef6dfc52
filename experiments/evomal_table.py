"""EvoMAL beside its rivals: test errors of found losses and of standard ones, every loss at the learning rate that suits it.

    python -m experiments.evomal_table [--data digits mnist fashion_mnist] [--models mlp lenet] [--seeds 5] [--out runs/evomal]

For each seed, data set and model a loss is looked for by

- evomal: genetic programming, screening, weights tuned by local search;
- evomal_seeded: the same, with cross-entropy (in regression squared error) in the first generation, as a user would;
- gp_lfl: the same with all weights 1;
- random: programs drawn at random, with the same screening and local search;
- taylor: TaylorGLO, CMA-ES on the numbers of a cubic polynomial, with the same screening;
- ml3: networks as losses, trained by the meta-gradient that local search follows; see ``evomal.train_networks``.

EvoMAL's generations give the evaluations, and the CPU seconds that it takes for them give the seconds. Every other search
goes on until it has used both, and its best loss by validation error is recorded at both points; the generation in which the
seconds run out still counts. The searches of a seed train models from one start on the same batches.

Then all found losses and the standard ones are trained at every learning rate of one grid, in one population: a start and
batches that no search has seen, more steps. The rate is chosen on the validation part, the error measured on the test part.
Differences are from cross-entropy (in regression from mean squared error), paired by seed, with a bootstrap interval; Welch's
p is corrected for all comparisons of the table (Holm). Seeds vary everything but the division of the data into parts.

The second table says what gradients add to the symbolic search: EvoMAL's expressions with all weights 1, as local search left
them, and after ``tune_steps`` meta-gradients through ``tune_horizon`` steps each; and those of gp_lfl, found with weights
of 1, before and after such tuning. The former were chosen for their tuned weights, the latter for weights of 1.

Each trial is kept when it is done, in files of its data set and model, and the same command goes on with what is missing;
several processes can share a folder where they do not share data set and model. All figures are of runs of this program.

Source: Raymond et al. 2023, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", sections 4 and 5. Differs
from the paper: fewer images, smaller models and budgets (``--paper`` has its budget), learning rates are tuned for all losses.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import evomal
from experiments.evomal import Best, Scale
from metalearn.analysis.compare import format_table, paired_comparison, write_table
from metalearn.analysis.transfer import compared_losses, transfer_table, tuned_errors
from metalearn.analysis.trials import keep_trial, read_trials, trial_frame
from metalearn.base import require_range
from metalearn.estimators.unrolled import Unrolled
from metalearn.losses.elementwise import ElementwiseLoss
from metalearn.losses.learned import LearnedLoss, loss_from_json
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold, key
from metalearn.search.candidates import Candidate
from metalearn.search.finalists import Tuning

CUTS = ("evaluations", "seconds")
TUNE_RATE = 0.01
ONES, LONG = ", weights 1", ", long horizon"
SHOWN = ["data", "model", "loss", "n", "error", "sd", "difference", "low", "high", "p_welch", "p_holm"]


# -- one cell: a seed, a data set, a model ---------------------------------------------------------------------------------


class Cell:
    """What is done for one seed on one data set with one model, and the files that it is kept in."""

    def __init__(self, data: str, model: str, seed: int, scale: Scale, out: Path, device: str = "cpu"):
        self.data, self.model, self.seed, self.scale = data, model, seed, scale
        self.key = key(seed, "evomal", device=device)
        self.searches, self.trials = (out / f"{kind}_{data}_{model}.jsonl" for kind in ("searches", "trials"))
        self.settings = {"data": data, "model": model, **scale._asdict()}
        self.name = f"seed {seed}, {data}, {model}"

    def found(self) -> dict[str, dict[str, Any]]:
        """Searches of this cell that are done, by method."""
        kept = evomal.kept_trials(self.searches, self.settings)
        return {trial["method"]: trial for trial in kept if trial["seed"] == self.seed}

    def tested(self) -> set[str]:
        """Losses of this cell whose test error is known."""
        kept = evomal.kept_trials(self.trials, self.settings)
        return {trial["loss"] for trial in kept if trial["seed"] == self.seed}

    def search(self, method: str) -> None:
        """Look for a loss, with EvoMAL's evaluations and seconds."""
        clock = self.found().get("evomal")
        seconds = None if clock is None else clock["evaluations"]["seconds"]
        generations = evomal.searching(method, evomal.open_task(self.data, self.model), self.scale, self.key)
        evaluations = self.scale.population * self.scale.generations
        cuts = evomal.cut(generations, evaluations, seconds, self.key.device.type)
        found = {name: _record(best) for name, best in zip(CUTS, cuts, strict=True)}
        keep_trial(self.searches, {"method": method, "seed": self.seed, "settings": self.settings} | found)
        shown = ", ".join(f"{best.error:.4f} in {best.seconds:.1f} s, {best.evaluations}" for best in cuts)
        print(f"{self.name}, {method}: {shown}", flush=True)

    def test(self, methods: Sequence[str]) -> None:
        """Test errors of the losses of these searches and of the standard ones, all at once."""
        task, started = evomal.open_task(self.data, self.model), evomal.clock(self.key.device)
        rows = {name: {"loss": loss.to_json()} for name, loss in compared_losses((), task).items()}
        searches = self.found()
        rows |= self._phases(task, searches)
        rows |= _by_cut({method: searches[method] for method in methods})  # kept last: with them all are there
        texts = {name: json.dumps(row["loss"]) for name, row in rows.items() if row["loss"] is not None}
        names = {text: name for name, text in reversed(texts.items())}  # equal losses are trained once
        losses: dict[str, ElementwiseLoss] = {
            name: loss_from_json(json.loads(text)).to(self.key.device) for text, name in names.items()
        }
        tested = tuned_errors(task, losses, evomal.rates(task), self.scale.test_steps, fold(self.key, "test"))
        found = {row["loss"]: row for row in tested}
        about = {"data": self.data, "model": self.model, "baseline": task.own_loss, "seed": self.seed}
        kept = self.tested()
        for name, row in ((name, row) for name, row in rows.items() if name not in kept):
            nothing = {"rate": math.nan, "validation": math.inf, "error": math.inf, "edge": ""}
            result = found[names[texts[name]]] if name in texts else nothing
            text = _text(row["loss"])
            trial = {**about, **row, **result, "loss": name, "text": text, "settings": self.settings}
            keep_trial(self.trials, trial)
        print(
            f"{self.name}, {len(losses)} losses tested in {evomal.clock(self.key.device) - started:.0f} s", flush=True
        )

    def _phases(self, task: LossTask, searches: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """EvoMAL's loss with weights of 1, and the losses of both genetic searches after tuning at a long horizon."""
        rows = {}
        for method in ("evomal", "gp_lfl"):
            saved = searches[method]["evaluations"]["loss"] if method in searches else None
            if saved is None:
                continue
            loss, started = loss_from_json(saved), evomal.clock(self.key.device)
            assert isinstance(loss, LearnedLoss)
            if method == "evomal":
                rows[method + ONES] = {"loss": LearnedLoss(loss.program, output=task.output).to_json()}
            tuned = tune(task, loss, self.scale, fold(self.key, "tune", method))
            rows[method + LONG] = {"loss": tuned.to_json(), "seconds": evomal.clock(self.key.device) - started}
        return rows


def tune(task: LossTask, loss: LearnedLoss, scale: Scale, own_key: torch.Tensor) -> LearnedLoss:
    """The loss after gradient descent on its weights through ``tune_horizon`` inner steps."""
    tuning = Tuning(Unrolled(), finalists=1, steps=scale.tune_steps, horizon=scale.tune_horizon, lr=TUNE_RATE)
    problem = tuning.problem(task, Candidate(loss.program, tuple(loss.weights.tolist())))
    state = tuning.begin(problem, own_key)
    for step in range(scale.tune_steps):
        state, _ = tuning.step(problem, state, fold(own_key, step))
    return LearnedLoss(loss.program, state["meta"]["weights"].cpu(), output=task.output)


def _record(best: Best) -> dict[str, Any]:
    return best._asdict() | {"loss": None if best.loss is None else best.loss.to_json()}


def _by_cut(searches: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A row for each method and cut; EvoMAL, which sets the clock, has one."""
    rows = {}
    for method, search in searches.items():
        for name in CUTS[:1] if method == "evomal" else CUTS:
            best = search[name]
            label = method if method == "evomal" else f"{method}, equal {name}"
            rows[label] = {name: best[name] for name in ("loss", "evaluations", "seconds")} | {"search": best["error"]}
    return rows


def _text(saved: dict[str, Any] | None) -> str:
    return "" if saved is None else saved.get("text", saved["loss"])


# -- tables ------------------------------------------------------------------------------------------------------------


def result_table(trials: Sequence[dict[str, Any]]) -> Any:
    """A row per data set, model and loss; what gradients add is left to ``phase_table``."""
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for trial in trials:
        if not trial["loss"].endswith((ONES, LONG)):
            rows.setdefault((trial["data"], trial["model"], trial["loss"]), []).append(trial)
    table = transfer_table(trial_frame([trial for own in rows.values() for trial in own]))
    own = [rows[place] for place in zip(table["data"], table["model"], table["loss"], strict=True)]
    means = {name: [_mean([one.get(name, math.nan) for one in row]) for row in own] for name in CUTS}
    return table.assign(n=[len(row) for row in own], **means)[[*SHOWN, *CUTS, "rates"]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def phase_table(trials: Sequence[dict[str, Any]]) -> Any:
    """What gradients add: paired by seed for each data set and model, and over all cells of one kind of task."""
    cells = [trial | {"unit": f"{trial['data']} {trial['model']} {trial['seed']}"} for trial in trials]
    pooled = [trial | {"data": f"all with {trial['baseline']}", "model": ""} for trial in cells]
    rows = []
    for baseline, others in (("evomal" + ONES, ("evomal", "evomal" + LONG)), ("gp_lfl", ("gp_lfl" + LONG,))):
        renamed = [trial | {"loss": trial["loss"].replace(", equal evaluations", "")} for trial in [*cells, *pooled]]
        order = (baseline, *others)
        own = sorted((one for one in renamed if one["loss"] in order), key=lambda one: order.index(one["loss"]))
        for data, model in dict.fromkeys((trial["data"], trial["model"]) for trial in own):
            frame = trial_frame([trial for trial in own if (trial["data"], trial["model"]) == (data, model)])
            if baseline in set(frame["loss"]):
                paired = paired_comparison(frame, unit="unit", group="loss", value="error", baseline=baseline)
                rows += [{"data": data, "model": model} | row for row in paired.to_dict("records")]
    names = ["data", "model", "group", "n", "mean", "difference", "difference_low", "difference_high", "p"]
    return trial_frame(rows)[names] if rows else trial_frame([])


def show(out: Path) -> None:
    """Print both tables from the trials of a folder, and write them there. Cells of a single seed are left out."""
    kept = [trial for file in sorted(out.glob("trials_*.jsonl")) for trial in read_trials(file)]
    places = {(trial["data"], trial["model"], trial["seed"]) for trial in kept}
    cells = [place[:2] for place in places]
    trials = [trial for trial in kept if cells.count((trial["data"], trial["model"])) > 1]
    if not trials:
        raise ValueError(f"{out} has no two seeds of anything; accepted: a folder in which this program has done more")
    table, phases = result_table(trials), phase_table(trials)
    write_table(table, out / "table")
    print(f"test error, each loss at its own learning rate\n\n{format_table(table.drop(columns='rates'))}")
    if len(phases):
        write_table(phases, out / "phases")
        print(f"\nwhat gradients add to the symbolic search\n\n{format_table(phases)}")


# -- the command -------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=evomal.DATA, default=["digits", "mnist", "fashion_mnist"])
    parser.add_argument("--models", nargs="+", choices=evomal.MODELS, default=["mlp", "lenet"])
    parser.add_argument("--methods", nargs="+", choices=evomal.SEARCHES, default=list(evomal.SEARCHES))
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (>= 1)")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--population", type=int, help="of all searches; by default evomal.SCALES has it")
    parser.add_argument("--generations", type=int, help="of EvoMAL, which all others are measured by")
    parser.add_argument("--budget_minutes", type=float, default=math.inf, help="nothing is begun after this time (> 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/evomal"), help="folder of trials and tables")
    parser.add_argument("--device", default="cpu", help="where to compute, as cuda")
    parser.add_argument("--table", action="store_true", help="only show what the trials in the folder say")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="seconds instead of an hour; the numbers mean nothing")
    size.add_argument("--paper", action="store_true", help="the paper's budget, for a GPU or a few days")
    args = parser.parse_args(argv)
    require_range("seeds", args.seeds, 1)
    if not args.budget_minutes > 0:
        raise ValueError(f"budget_minutes is {args.budget_minutes}; accepted: budget_minutes > 0")
    if "evomal" not in args.methods:
        raise ValueError(
            f"methods is {args.methods}; accepted: with evomal, whose seconds are the measure of all others"
        )
    return args


def scale_of(args: argparse.Namespace, model: str) -> Scale:
    """The scale of a model, as the options change it."""
    scale = evomal.SMOKE if args.smoke else evomal.PAPER if args.paper else evomal.SCALES[model]
    chosen = {name: getattr(args, name) for name in ("population", "generations") if getattr(args, name) is not None}
    return scale._replace(**chosen)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    if not args.table:
        run(args)
    show(args.out)


def run(args: argparse.Namespace) -> None:
    """Everything that is missing, all of a seed before the next, until time is up."""
    deadline = time.monotonic() + 60 * args.budget_minutes
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    cells = [
        Cell(data, model, seed, scale_of(args, model), args.out, args.device)
        for seed in seeds
        for data in args.data
        for model in args.models
    ]
    methods = sorted(args.methods, key=evomal.SEARCHES.index)  # EvoMAL first: it sets the clock
    evomal.warm_up(evomal.open_task(args.data[0], args.models[0]), key(0, "warm-up", device=args.device))
    for cell in cells:
        for method in (method for method in methods if method not in cell.found()):
            if time.monotonic() > deadline:
                print(f"stopped by --budget_minutes before {cell.name}, {method}")
                return
            cell.search(method)
        if not set(_by_cut({method: cell.found()[method] for method in methods})) <= cell.tested():
            cell.test(methods)


if __name__ == "__main__":
    main()
