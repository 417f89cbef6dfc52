"""Search for a loss: one generation is one training step, then its best losses are tuned and scored anew, in the same run."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import functools
import json
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from metalearn import random, tree
from metalearn.base import Tree, require_range
from metalearn.files import write_whole
from metalearn.problems.learned_loss import UNTOUCHED, LossTask
from metalearn.search.cache import settings_hash
from metalearn.search.candidates import Candidate, Scored
from metalearn.search.evaluation import Evaluation, evaluation_settings
from metalearn.search.evolution import Stopping, Strategy
from metalearn.search.finalists import Rescoring, Tuning
from metalearn.search.hall_of_fame import HallOfFame
from metalearn.search.local import LocalSearch
from metalearn.search.population import PopulationTraining
from metalearn.search.processes import by_processes, require_alone
from metalearn.search.screening import Screening
from metalearn.training.callbacks import Cost
from metalearn.training.meta_gradient import Evaluated

BEST, HALL_OF_FAME, CACHE = "best.json", "hall_of_fame.csv", "cache.jsonl"
PHASES = ("search", "tune", "rescore", "done")


class LossSearch(Evaluated):
    """Evolution of symbolic losses: proposed, screened, tuned by gradients, scored by the validation error they train to.

    A training step is one generation; after the last, one outer step of one finalist's tuning; at the end, one scoring of
    the finalists on fresh seeds and untouched examples. The run then stops by itself. After every step the run folder
    has ``hall_of_fame.csv`` and ``best.json``, which ``metalearn.load_loss`` reads. Every draw is keyed, and a
    candidate's score is a function of the candidate and the run's seed alone: a resumed run, and one of several ranks, which
    divide the candidates among them, ends with the hall of fame of one that was not stopped.

    Args:
        task: what losses are trained on; its rule and its batches are those of every candidate.
        strategy: what proposes losses.
        fitness: how candidates are trained to be scored.
        screening: what keeps hopeless candidates and duplicates from training; null for none.
        local_search: how each candidate's weights are tuned before it is scored; null for weights of 1.
        stopping: when the search ends.
        tuning: of the finalists' weights at a long horizon; null for none.
        rescoring: of the finalists at the end.
        tasks: further tasks, whose errors count as much as the first's; weights are tuned on the first alone.
        hall_of_fame: losses that are kept, at least 1.
        workers: processes that a generation's candidates are divided among, at least 1, which is this one; scores are
            the same bit by bit, but for convolutions and numbers of threads, whose rounding may differ.

    Raises:
        ValueError: for values out of range, tasks with different outputs, a checkpoint of another search, or several workers
            together with several ranks, a GPU or halving.

    Source: Raymond et al. 2023, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", algorithms 1-3.
    Differs from the paper: screening comes before local search; duplicates are found by their gradients; there is an
    elite; the best of the hall of fame is chosen on examples that the search has not seen, and measured on yet others.
    """

    def __init__(
        self,
        task: LossTask,
        strategy: Strategy,
        fitness: PopulationTraining,
        screening: Screening | None = None,
        local_search: LocalSearch | None = None,
        stopping: Stopping | None = None,
        tuning: Tuning | None = None,
        rescoring: Rescoring | None = None,
        tasks: list[LossTask] | None = None,
        hall_of_fame: int = 20,
        workers: int = 1,
    ):
        super().__init__()
        require_range("hall_of_fame", hall_of_fame, 1)
        require_range("workers", workers, 1)
        self.workers = workers
        self.tasks = [task, *(tasks or [])]
        self.strategy, self.fitness, self.screening = strategy, fitness, screening
        self.local_search, self.tuning = local_search, tuning
        if local_search is not None and strategy.example().program is None:
            raise ValueError(
                f"local_search is given with {type(strategy).__name__}, whose losses have no program; accepted: null"
            )
        self.settings = settings_hash(strategy, tuning, rescoring)
        self.stopping, self.rescoring = stopping or Stopping(), rescoring or Rescoring()
        self.anchor = nn.Parameter(torch.zeros(()))  # what data-parallel strategies ask a module to have
        self.hall = HallOfFame(hall_of_fame)
        self.phase, self.population, self.history = "search", [], []
        self.generation, self.evaluations, self.seconds = 0, 0, 0.0
        self.finalists: list[dict[str, Any]] = []  # builtins, as checkpoints hold them
        self.place = 0  # finalists tuned so far times steps, plus steps of the present one
        self.tuned: Tree = None
        self._saved_tuned: dict[str, Tensor] | None = None
        self._saved_scores: dict[str, Any] | None = None
        self.evaluation: Evaluation | None = None

    # -- set-up ------------------------------------------------------------------------------------------------------

    @property
    def task(self) -> LossTask:
        """The first task."""
        return self.tasks[0]

    def key(self, *labels: int | str) -> Tensor:
        """The run's key of a purpose, on the module's device."""
        return random.fold(self.trainer.datamodule.key("search", 0, self.device), *labels)

    def prepare_data(self) -> None:
        for task in self.tasks:
            task.open(test=False)

    def setup(self, stage: str) -> None:
        for task in self.tasks:
            task.open(test=stage == "test")
        if UNTOUCHED not in self.task.parts:
            raise ValueError(
                f"untouched is {self.task.untouched}, which leaves no examples to score the best losses on; accepted: a "
                "larger share of the validation part"
            )
        if self.tuning is not None:
            self.tuning.problem(self.task, self.strategy.example())
        if len(outputs := {task.output for task in self.tasks}) > 1:
            raise ValueError(f"the tasks have {', '.join(sorted(outputs))} outputs; accepted: tasks of one kind")
        if stage == "fit" and not isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"trainer.strategy is {type(self.trainer.strategy).__name__}, which shards parameters; accepted: one "
                "device, or ddp"
            )
        if stage == "fit":
            require_alone(self.workers, self.trainer.world_size, self.trainer.strategy.root_device)
        if stage == "fit" and self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}; accepted: 1, a generation "
                "being one step"
            )

    def configure_optimizers(self) -> None:
        # Lightning warns right after this call. Only under automatic optimisation are steps counted without an optimizer.
        warnings.filterwarnings("ignore", message="`LightningModule.configure_optimizers` returned `None`")

    def on_fit_start(self) -> None:
        threads = max(1, torch.get_num_threads() // self.workers)
        self.evaluation = Evaluation(
            *(self.tasks, self.fitness, self.screening, self.local_search),
            self.key("evaluation"),
            self.run_dir / CACHE,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            precision=self.trainer.precision,
            map=map if self.workers == 1 else functools.partial(by_processes, self.workers, threads),
            shards=self.workers,
        )
        if self._saved_scores is not None:
            self.evaluation.load_state(self._saved_scores)
            self._saved_scores = None
        if self._saved_tuned is not None:
            self.tuned = tree.unpack(self._begun(), self._saved_tuned)
            self._saved_tuned = None

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.trainer.default_root_dir)

    @property
    def expected_steps(self) -> int | None:
        """Steps of the whole run, for its progress bar; None where only the clock or a plateau knows."""
        generations = self.stopping.generations
        if generations is None:
            return None
        tuning = self.tuning.steps * self.tuning.finalists if self.tuning else 0
        return min(generations + tuning + 1, self.trainer.max_steps)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do, whatever ``max_steps`` is."""
        return self.phase == "done"

    # -- one step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        started = time.monotonic()
        with torch.no_grad():
            {"search": self._search, "tune": self._tune, "rescore": self._rescore, "done": lambda: None}[self.phase]()
        self.seconds += time.monotonic() - started
        if self.phase == "search":
            self._stop_searching()
        if self.finished:
            self.trainer.should_stop = True
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            self._write()
        return 0.0 * self.anchor

    def _search(self) -> None:
        """One generation."""
        assert self.evaluation is not None
        started = time.monotonic()
        proposed = self.strategy.ask(self.generation, self.population, self.key("ask", self.generation))
        children = self.evaluation.score(proposed)
        self.population = self.strategy.survive(self.population, children)
        for scored in children:
            self.hall.add(scored, {"generation": self.generation})
        self.generation += 1
        self.evaluations += len(children)
        self.history.append(min([scored.error for scored in children] + self.history[-1:], default=math.inf))
        counts = {name: float(count) for name, count in self.evaluation.counts.items()}
        errors = [scored.error for scored in self.population if math.isfinite(scored.error)]
        shown = {
            "best": self.history[-1],
            "median": statistics.median(errors) if errors else math.inf,
            "unique": counts.pop("unique"),
            "rejected": counts.pop("rejected"),
            "seconds": time.monotonic() - started,
        }
        self.log_dict({f"search/{name}": value for name, value in shown.items()}, prog_bar=True, batch_size=1)
        self.log_dict({f"search/{name}": value for name, value in counts.items()}, batch_size=1)

    def _stop_searching(self) -> None:
        seconds = self._agreed(self.seconds)
        reason = self.stopping.reason(self.generation, self.evaluations, seconds, self.history)
        if reason is None:
            return
        rank_zero_info(f"\nthe search ends: {reason}")
        best = self.hall.entries[: max(self.rescoring.finalists, self.tuning.finalists if self.tuning else 0)]
        if not best:
            raise ValueError(
                f"none of {self.evaluations} candidates could be trained; accepted: more generations, or less screening"
            )
        self.finalists = [{"scored": scored.to_builtins(), "tuned": None} for scored, _ in best]
        self.phase, self.place = ("rescore" if self.tuning is None else "tune"), 0

    def _agreed(self, seconds: float) -> float:
        """The first rank's clock, so that all stop together."""
        return float(self.trainer.strategy.broadcast(seconds))

    def _tune(self) -> None:
        """One outer step on the weights of one finalist; every rank takes the same."""
        assert self.tuning is not None
        number, step = divmod(self.place, self.tuning.steps)
        if step == 0:
            self.tuned = self._begun()
        self.tuned, loss = self.tuning.step(self._problem(number), self.tuned, self.key("tune", number, step))
        self.log("tune/loss", loss.float(), prog_bar=True, batch_size=1)
        self.log("tune/finalist", float(number), prog_bar=True, batch_size=1)
        self.place += 1
        if step + 1 == self.tuning.steps:
            self.finalists[number]["tuned"] = [float(weight) for weight in self.tuned["meta"]["weights"]]
            self.tuned = None
        if self.place == self.tuning.steps * min(self.tuning.finalists, len(self.finalists)):
            self.phase = "rescore"

    def _problem(self, number: int) -> LossTask:
        assert self.tuning is not None
        return self.tuning.problem(self.task, Scored.from_builtins(self.finalists[number]["scored"]).best)

    def _begun(self) -> Tree:
        """The state in which the tuning of the present finalist begins."""
        assert self.tuning is not None
        number = self.place // self.tuning.steps
        return self.tuning.begin(self._problem(number), self.key("tune", number))

    def _rescore(self) -> None:
        """Finalists as found and as tuned, and the task's own loss, in one population per seed."""
        found = [Scored.from_builtins(finalist["scored"]).best for finalist in self.finalists]
        tuned = [
            Candidate(one.program, tuple(finalist["tuned"] or ()))
            for one, finalist in zip(found, self.finalists, strict=True)
        ]
        both = [*found, *(one for one, finalist in zip(tuned, self.finalists, strict=True) if finalist["tuned"])]
        errors = self.rescoring.errors(self.task, both, self.fitness.steps, self.key("rescore"))
        means = [float(error) for error in errors.mean(1)]
        for number, finalist in enumerate(self.finalists):
            finalist["rescored"] = means[number]
        after = iter(means[len(found) : -1])
        for finalist in self.finalists:
            finalist["rescored_tuned"] = next(after) if finalist["tuned"] else None
        self.log("rescore/own_loss", means[-1], batch_size=1)
        self.log("rescore/best", min(means[:-1]), prog_bar=True, batch_size=1)
        self.phase = "done"

    # -- what the run folder has -------------------------------------------------------------------------------------

    def _write(self) -> None:
        extra = {}
        for finalist in self.finalists:
            scored = Scored.from_builtins(finalist["scored"])
            numbers = {name: finalist.get(name) for name in ("rescored", "rescored_tuned")}
            tuned = finalist["tuned"] and json.dumps(finalist["tuned"])
            extra[scored.candidate.canonical.name] = numbers | {"weights_tuned": tuned}
        self.hall.write(self.run_dir / HALL_OF_FAME, extra)
        if self.hall.entries:
            loss, about = self._best()
            write_whole(self.run_dir / BEST, json.dumps(loss.to_json() | {"provenance": about}, indent=1))

    def _best(self) -> tuple[Any, dict[str, Any]]:
        """The loss with the least error known of it: on untouched examples at the end, on validation examples before."""
        scored, about = self.hall.entries[0]
        best, errors = scored.best, {"validation_error": scored.error}
        choices = [
            (one[name], name, one)
            for one in self.finalists
            for name in ("rescored", "rescored_tuned")
            if one.get(name) is not None
        ]
        if choices:
            error, name, one = min(choices, key=lambda choice: choice[0])
            scored = Scored.from_builtins(one["scored"])
            best = scored.best if name == "rescored" else scored.best._replace(weights=tuple(one["tuned"]))
            errors = {"validation_error": scored.error, "untouched_error": error, "tuned": name == "rescored_tuned"}
        about = {"seed": self.trainer.datamodule.seed, "generations": self.generation, **errors}
        about |= {"complexity": best.complexity, "task": self.task.record()["fingerprint"]}
        return best.loss(self.task.output), about

    @property
    def step_cost(self) -> Cost:
        """Inner steps of a generation's training, were no candidate screened or halved."""
        return Cost(self.fitness.steps, self.fitness.steps, None)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self._evaluate("validation", "untouched")

    def test_step(self, batch: int, batch_idx: int) -> None:
        self._evaluate("test", "test")

    def _evaluate(self, stage: str, part: str) -> None:
        """Errors of the best loss and of the task's own at the same learning rate; ``loss transfer`` tunes the rates."""
        if not self.hall.entries:
            return
        with torch.inference_mode(False), torch.no_grad():
            best, _ = self._best()
            errors = self.rescoring.errors(self.task, [best], self.fitness.steps, self.key(stage), part)
        spread = errors.std(1) if errors.shape[1] > 1 else torch.zeros(2)
        found = {"error": errors[0].mean(), "own_loss_error": errors[1].mean(), "error_std": spread[0]}
        self.report(stage, {name: float(value) for name, value in found.items()})

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = ("phase", "generation", "evaluations", "seconds", "history", "finalists", "place")
        checkpoint["search"] = {name: getattr(self, name) for name in names} | {
            "population": [scored.to_builtins() for scored in self.population],
            "hall": self.hall.to_builtins(),
            "strategy": self.strategy.state(),
            "tuned": None if self.tuned is None else tree.pack(self.tuned),
            "scores": self.evaluation.state() if self.evaluation is not None else self._saved_scores,
            "card": self._card(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, own = checkpoint.get("search", {}), self._card()
        before = saved.get("card", {})
        for name in own:
            if before.get(name) != own[name] and (self.trainer.state.fn == "fit" or name == "division"):
                raise ValueError(
                    f"the checkpoint was searched with {name} {before.get(name)}, not {own[name]}; accepted: the same "
                    f"{name}, or another --run_dir"
                )
        for name in ("phase", "generation", "evaluations", "seconds", "history", "finalists", "place"):
            setattr(self, name, saved[name])
        self.population = [Scored.from_builtins(scored) for scored in saved["population"]]
        self.hall.load_builtins(saved["hall"])
        self.strategy.load_state(saved["strategy"])
        self._saved_tuned, self._saved_scores = saved["tuned"], saved["scores"]

    def _card(self) -> dict[str, Any]:
        """What a resumed run must not change without saying so."""
        records = [task.record() for task in self.tasks]
        return {
            "strategy": type(self.strategy).__name__,
            "local_search": None if self.local_search is None else type(self.local_search).__name__,
            "data": [record["fingerprint"] for record in records],
            "division": [record["division"] for record in records],
            "settings of strategy, tuning or rescoring": self.settings,
            "settings of the evaluation": evaluation_settings(
                self.tasks, self.fitness, self.screening, self.local_search, random.key(0), self.trainer.precision
            ),
        }
