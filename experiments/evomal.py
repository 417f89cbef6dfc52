"""What the experiments on found losses share: data, models, scales, and searches that all count alike.

A search is an endless iterator of ``Generation``. ``cut`` follows it until it has used so many evaluations and so many
seconds, and says what was the best at both points. An evaluation is a candidate that was proposed, whether it was rejected
at once or trained; seconds are of CPU time of one thread, which hardly depend on what else the machine does, on a GPU of
wall time.
"""

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metalearn.analysis.trials import read_trials
from metalearn.base import Source
from metalearn.losses.elementwise import ElementwiseLoss
from metalearn.losses.network import NetworkLoss
from metalearn.models.vision import MLP, LeNet
from metalearn.optim.first_order import SGD, Adam
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold
from metalearn.search.candidates import gradients_of
from metalearn.search.evaluation import Evaluation
from metalearn.search.evolution import GeneticProgramming, RandomSearch, Strategy, TaylorEvolution
from metalearn.search.local import Episode, LocalSearch, one_step_gradients
from metalearn.search.operators import standing
from metalearn.search.population import PopulationTraining
from metalearn.search.screening import Screening
from metalearn.tasks.sources import ImageSource, TableSource
from metalearn.tasks.synthetic import HeavyTailedRegression

IMAGES, SHARE = 4000, 0.4  # of a large set that is trained and validated on, and the share of it that validates
INNER_RATE = 0.01  # of the one step that local search looks through, and of ML3's
ML3_RATE = 1e-3  # of Adam on the weights of a loss that is a network
SEARCHES = ("evomal", "evomal_seeded", "gp_lfl", "random", "taylor", "ml3")
SEEDS = {"cross_entropy": "mul(-1,mul(y,log(p)))", "mse": "square(sub(y,p))"}  # as programs


class Scale(NamedTuple):
    """How much of everything."""

    population: int
    generations: int
    local_steps: int  # meta-steps of local search on each candidate
    local_rate: float  # of Adam in local search
    train_steps: int  # of the run that a candidate is scored by
    rejection_steps: int
    restarts: int  # of ML3
    test_steps: int  # of the runs that losses are compared by
    tune_steps: int  # outer steps of the gradient phase on what was found
    tune_horizon: int  # inner steps of each


SCALES = {  # by model: what an hour on one core has room for
    "mlp": Scale(32, 8, 25, 0.01, 150, 50, 4, 300, 12, 50),
    "linear": Scale(32, 8, 25, 0.01, 150, 50, 4, 300, 12, 50),
    "lenet": Scale(24, 7, 20, 0.01, 120, 50, 4, 200, 10, 40),
}
SMOKE = Scale(16, 1, 2, 0.01, 6, 5, 2, 8, 1, 3)
PAPER = Scale(25, 50, 250, 1e-3, 500, 100, 4, 2000, 50, 500)


# -- data and models -----------------------------------------------------------------------------------------------------


def _images(path: str, size: int, channels: int = 1) -> ImageSource:
    return ImageSource(
        path, split=f"train[:{IMAGES}]", test="test", validation=SHARE, image_size=size, channels=channels
    )


def _table(name: str) -> TableSource:
    path = Path(os.environ.get("METALEARN_DATA", ".")) / "uci_regression" / f"{name}.npz"
    return TableSource(path, test=0.2, validation=SHARE, task="regression")


DATA: dict[str, Callable[[], Source]] = {
    "digits": lambda: ImageSource("digits", test=0.2, validation=SHARE),
    "mnist": lambda: _images("mnist", 14),
    "fashion_mnist": lambda: _images("fashion_mnist", 14),
    "cifar10": lambda: _images("cifar10", 16, 3),
    "cifar10_jpeg": lambda: _images("cifar10_jpeg", 16, 3),
    "heavy_tailed": lambda: HeavyTailedRegression(num_train=500, num_validation=500),
    "diabetes": lambda: TableSource("diabetes", test=0.2, validation=SHARE, task="regression"),
    **{name: functools.partial(_table, name) for name in ("energy", "concrete", "yacht")},
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": functools.partial(MLP, hidden=(64,), activation="relu"),
    "lenet": functools.partial(LeNet, channels=(4, 8), widths=(32, 32), activation="tanh"),
    "linear": functools.partial(MLP, hidden=()),
}
RATES = {"mlp": 0.05, "lenet": 0.1, "linear": 0.05}


@functools.lru_cache(maxsize=32)
def open_task(data: str, model: str) -> LossTask:
    """A model to be trained on data, with all parts read. The search sees the whole of the validation part.

    Images have 14 x 14 pixels (digits 8 x 8, colour 16 x 16). Batches of 64; SGD with momentum .9, whose rate in searches is
    .05 (LeNet .1, regression .01).
    """
    source = DATA[data]()
    built = MODELS[model]
    if isinstance(source, ImageSource) and model == "lenet":
        built = functools.partial(built, image_channels=source.image_shape[0])
    rate = RATES[model] if isinstance(source, ImageSource) else 0.01
    # Outliers would make the deviation of the targets anything.
    scale = not isinstance(source, HeavyTailedRegression)
    rule = SGD(lr=rate, momentum=0.9, nesterov=True)
    task = LossTask(source, built, rule, None, batch_size=64, outer_batch_size=64, untouched=0.0, scale_targets=scale)
    task.open(test=True)
    return task


def rates(task: LossTask) -> list[float]:
    """Nine learning rates, four a decade, around that of the search.

    So close, because the losses that a search finds suit its rate, and between two rates a standard loss would lose.
    """
    assert isinstance(task.rule, SGD)
    return [task.rule.settings["lr"] * 10 ** (k / 4) for k in range(-4, 5)]


# -- searches --------------------------------------------------------------------------------------------------------


class Generation(NamedTuple):
    """What a search has done since it was last heard of."""

    evaluations: int
    error: float  # of the best of them on the validation part; infinite where none could be trained
    loss: ElementwiseLoss | None  # that one


class Best(NamedTuple):
    """The best so far, and what it has cost."""

    error: float
    loss: ElementwiseLoss | None
    evaluations: int
    seconds: float


def clock(device: torch.device) -> float:
    """Seconds that searches are measured by: of CPU time, on a GPU of wall time."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def cut(
    generations: Iterator[Generation], evaluations: int, seconds: float | None = None, device: str = "cpu"
) -> tuple[Best, Best]:
    """The best after so many evaluations, and after so many seconds.

    The generation in which evaluations or seconds run out counts as a whole.

    Args:
        generations: an endless search.
        evaluations: at least 1.
        seconds: None for as many as the evaluations take.
        device: that the search computes on.
    """
    where = torch.device(device)
    started, best, by_evaluations = clock(where), Best(math.inf, None, 0, 0.0), None
    by_seconds: Best | None = None
    for done in generations:
        spent = clock(where) - started
        error, loss = (done.error, done.loss) if done.error < best.error else (best.error, best.loss)
        best = Best(error, loss, best.evaluations + done.evaluations, spent)
        if by_evaluations is None and best.evaluations >= evaluations:
            by_evaluations = best
            seconds = spent if seconds is None else seconds
        if by_seconds is None and seconds is not None and spent >= seconds:
            by_seconds = best
        if by_evaluations and by_seconds:
            return by_evaluations, by_seconds
    raise AssertionError("a search never ends by itself")


def evaluation(task: LossTask, scale: Scale, key: Tensor, local: bool, **training: Any) -> Evaluation:
    """How candidates of a trial are scored: from the same start, on the same batches, whatever proposes them."""
    search = LocalSearch(scale.local_steps, lr=scale.local_rate, inner_lr=INNER_RATE) if local else None
    runs = PopulationTraining(scale.train_steps, **training)
    return Evaluation([task], runs, Screening(rejection_steps=scale.rejection_steps), search, fold(key, "evaluation"))


def evolve(strategy: Strategy, scored_by: Evaluation, key: Tensor) -> Iterator[Generation]:
    """The generations of a strategy."""
    population = []
    for generation in itertools.count():
        children = scored_by.score(strategy.ask(generation, population, fold(key, "ask", generation)))
        population = strategy.survive(population, children)
        best = min(children, key=standing)
        found = best.best.loss(scored_by.task.output) if math.isfinite(best.error) else None
        yield Generation(len(children), best.error, found)


def train_networks(task: LossTask, scale: Scale, key: Tensor) -> Iterator[Generation]:
    """ML3: losses that are networks, trained as local search trains weights, each looked at every ``local_steps`` meta-steps.

    So an evaluation is what one of EvoMAL's is: meta-steps, and a training run.
    """
    window, own, rule = Episode(task, SGD(INNER_RATE), 1), fold(key, "ml3"), Adam(ML3_RATE)
    losses = [NetworkLoss() for _ in range(scale.restarts)]
    for restart, loss in enumerate(losses):
        loss.reset_parameters(fold(own, "start", restart))
    meta = {"weights": torch.stack([loss.weights.detach() for loss in losses]).to(key.device)}
    state, slopes = rule.init({}, meta), [network_slope] * scale.restarts
    for look in itertools.count():
        for step in range(look * scale.local_steps, (look + 1) * scale.local_steps):
            found = one_step_gradients(window, slopes, meta["weights"].unbind(), fold(own, "step", step))
            meta, state = rule.update({}, {"weights": torch.stack(found)}, state, meta)
        yield _looked_at(task, meta["weights"], scale, key)


def network_slope(y: Tensor, p: Tensor, weights: Tensor) -> Tensor:
    """``dl/dp`` of a network with these weights, in the way that programs give it to ``one_step_gradients``."""
    p = p.detach().requires_grad_()
    # As a function of a raw output that is the output itself, the loss is one of p; it averages over examples.
    total = functional_call(NetworkLoss(output="identity"), {"weights": weights}, (p, y)) * len(y)
    return torch.autograd.grad(total, p, create_graph=True)[0]


def _looked_at(task: LossTask, weights: Tensor, scale: Scale, key: Tensor) -> Generation:
    losses = [NetworkLoss(own, output=task.output) for own in weights.unbind()]
    errors = score(task, losses, scale, key)
    place = errors.index(min(errors))
    return Generation(len(losses), errors[place], losses[place] if math.isfinite(errors[place]) else None)


def score(task: LossTask, losses: Sequence[ElementwiseLoss], scale: Scale, key: Tensor) -> list[float]:
    """Validation errors of losses, from the start and on the batches that ``evaluation`` scores candidates with."""
    training, own = PopulationTraining(scale.train_steps), fold(fold(key, "evaluation"), "train", 0)
    trained = training.train(task, gradients_of(losses, task.output), own)
    return training.errors(task, trained, "validation").tolist()


def searching(method: str, task: LossTask, scale: Scale, key: Tensor) -> Iterator[Generation]:
    """The generations of one of ``SEARCHES``."""
    size = scale.population
    match method:
        case "evomal":
            return evolve(GeneticProgramming(size), evaluation(task, scale, key, local=True), key)
        case "evomal_seeded":
            strategy = GeneticProgramming(size, seeds=[SEEDS[task.own_loss]])
            return evolve(strategy, evaluation(task, scale, key, local=True), key)
        case "gp_lfl":
            return evolve(GeneticProgramming(size), evaluation(task, scale, key, local=False), key)
        case "random":
            return evolve(RandomSearch(size), evaluation(task, scale, key, local=True), key)
        case "taylor":
            return evolve(TaylorEvolution(size), evaluation(task, scale, key, local=False), key)
        case "ml3":
            return train_networks(task, scale, key)
    raise ValueError(f"method is {method!r}; accepted: {', '.join(SEARCHES)}")


def warm_up(task: LossTask, key: Tensor) -> None:
    """Everything once, so that imports and first calls count in no search's seconds."""
    for method in SEARCHES:
        next(searching(method, task, SMOKE, key))


# -- trials ----------------------------------------------------------------------------------------------------------


def kept_trials(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials of a file; ``ValueError`` where they were made with other settings."""
    trials = read_trials(file)
    for trial in trials:
        if differing := sorted(name for name, value in settings.items() if trial["settings"].get(name) != value):
            raise ValueError(f"{file} has trials of other {', '.join(differing)}; accepted: the same, or another --out")
    return trials
