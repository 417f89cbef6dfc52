"""How a learner comes to learn in context: what forms inside it, and whom it answers like, at every checkpoint of a run.

A measurement is a function of a learner and its tokens that returns a table; ``through_training`` repeats it over the
checkpoints that a run with ``checkpoint_steps: log`` leaves. Heads are measured in ``analysis.attention``, figures
drawn in ``analysis.mechanism_curves``.

B sequences, T examples, S tokens, D features of an example or of the residual stream, K classes (1 in regression), P
last positions, L layers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from metalearn.analysis.attention import standard_error
from metalearn.base import Batch, Learner, require_range
from metalearn.models.saving import load_learner
from metalearn.models.tokens import Tokens
from metalearn.training.in_context import answers, scores

_LIGHT = re.compile(r"(left_plateau_)?step=(\d+)")


class Snapshot(NamedTuple):
    """A checkpoint of a run: the optimizer step after which it was written, and its file."""

    step: int
    path: Path


def snapshots(run_dir: str | Path) -> list[Snapshot]:
    """The checkpoints of a run in order, one for each step: the light ones, and ``last.ckpt`` where it is later.

    Raises:
        ValueError: where the run has no light checkpoints.
    """
    folder = Path(run_dir) / "checkpoints"
    found = {step: path for path, step, _ in _light(folder)}
    if not found:
        raise ValueError(
            f"{str(folder / 'steps')!r} holds no checkpoints; accepted: a run of in-context training with checkpoint_steps: log"
        )
    if (last := folder / "last.ckpt").is_file():
        found.setdefault(torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"], last)
    return [Snapshot(step, found[step]) for step in sorted(found)]


def transition_step(run_dir: str | Path) -> int | None:
    """The step at which the run was seen to have left the plateau; None where it never did.

    That is where the smoothed training loss first was ``plateau_margin`` below chance, of the steps at which the run logs.
    """
    return min((step for _, step, left in _light(Path(run_dir) / "checkpoints") if left), default=None)


def through_training(
    run_dir: str | Path,
    measure: Callable[[Learner, Tokens], pd.DataFrame],
    trusted_classes: Sequence[type[Learner]] = (),
) -> pd.DataFrame:
    """The tables of ``measure`` at every checkpoint of a run, below one another, with their ``step`` in the first column."""
    frames = []
    for step, path in snapshots(run_dir):
        learner, card, _ = load_learner(path, trusted_classes)
        frame = measure(learner, Tokens(card["tokens"], card["num_features"], card["num_classes"]))
        frame.insert(0, "step", step)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def half_way(frame: pd.DataFrame, value: str, by: Sequence[str], least: float = 0.05) -> pd.DataFrame:
    """What forms first: the first step at which a value is half way from where it starts to the most that it reaches.

    Args:
        frame: a table of ``through_training``.
        value: the column that grows.
        by: columns that tell apart what is followed, such as layer and head.
        least: rise from the start below which nothing has formed, and the step is missing.

    Returns:
        Columns of ``by``, step, start, most; in order of the step, what did not form last.
    """
    rows = []
    for _, of in frame.sort_values("step").groupby(list(by), sort=False):
        start, most = of[value].iloc[0], of[value].max()
        reached = of.loc[of[value] >= (start + most) / 2, "step"].iloc[0]
        rows.append(
            of[list(by)].iloc[0].to_dict()
            | {"step": reached if most - start >= least else None, "start": start, "most": most}
        )
    return pd.DataFrame(rows).astype({"step": "Int64"}).sort_values("step", ignore_index=True, kind="stable")


def summarise(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row per checkpoint: the most that any head does of each kind, what the last layer tells, whom the answers equal.

    Args:
        frames: tables of ``through_training``: ``attention``, ``ablation``, ``distances``, and any others of
            ``decodability``, whose names say what is read.
    """
    attention, ablation, near = frames["attention"], frames["ablation"], frames["distances"]
    table = attention.pivot_table(index="step", columns="kind", values="excess", aggfunc="max", sort=False)
    change, value = _changes(frames)
    table[f"largest {change.replace('_', ' ')}"] = ablation.groupby("step")[change].max()
    for name in _probes(frames):
        last = frames[name][frames[name]["layer"] == frames[name]["layer"].max()]
        table[f"reads {name}"] = last.set_index("step")["accuracy"]
    beside = near.pivot_table(index="step", columns="other", values=value, sort=False)
    return table.join(beside.add_prefix(f"{value} with ")).reset_index()


def order_of_formation(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """``half_way`` of the strongest head of each kind, of the two most causal heads, of each layer's decodability, of agreement.

    Args:
        frames: as in ``summarise``.
    """
    heads = half_way(frames["attention"], "excess", ["kind", "layer", "head"]).rename(columns={"kind": "what"})
    change, value = _changes(frames)
    causal = half_way(frames["ablation"].assign(what=change), change, ["what", "layer", "head"])
    parts = [heads.nlargest(len(heads), "most").drop_duplicates("what"), causal.nlargest(2, "most")]
    parts += [
        half_way(frames[name].assign(what=f"reads {name}"), "accuracy", ["what", "layer"]) for name in _probes(frames)
    ]
    if value == "agreement":  # a squared difference falls
        near = frames["distances"]
        parts.append(half_way(near.assign(what="agrees with " + near["other"]), value, ["what"]))
    found = pd.concat(parts).astype({"layer": "Int64", "head": "Int64"})
    return found.sort_values("step", kind="stable", ignore_index=True)


def _changes(frames: Mapping[str, pd.DataFrame]) -> tuple[str, str]:
    """The columns that say what ablation costs and how near answers are: of classification, or of regression."""
    return ("accuracy_drop", "agreement") if "agreement" in frames["distances"] else ("loss_rise", "squared_difference")


def _probes(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    return [name for name in frames if name not in ("attention", "ablation", "distances")]


# -- what can be read from the residual stream -----------------------------------------------------------------------


@torch.no_grad()
def decodability(
    learner: Learner, tokens: Tokens, batch: Batch, target_B: Tensor, position: int = -1, held_out: float = 0.25
) -> pd.DataFrame:
    """How well a linear probe reads ``target_B`` from each layer's output where one example is classified.

    The probe is multinomial logistic regression (L2, C = 1) on standardised features of the first sequences; its
    accuracy is that on the rest. Layer 0, the token itself, knows of the context only what the token says.

    Args:
        learner: any learner whose layers stand in ``blocks``, one after the other.
        tokens: the format that it was trained with.
        batch: sequences.
        target_B: int64 (B,), what is to be read of each sequence: the task (``tasks_of``), or an answer.
        position: example 0 … T - 1, or from the end if negative.
        held_out: share of the sequences, the last ones, that the probe is not fitted on; in (0, 1).

    Returns:
        Columns layer, position, accuracy, standard_error, chance (accuracy of always saying the commonest target of the
        sequences fitted on), classes and sequences (held out).

    Raises:
        ValueError: for a learner without ``blocks``, a position out of range, a share that leaves no sequence on one
        side, or targets that are all the same where the probe is fitted.
    """
    count, length = batch.y.shape
    require_range("position", position, -length, length - 1)
    fitted = count - round(held_out * count)
    require_range("sequences that the probe is fitted on", fitted, 1, count - 1)
    target, position = target_B.cpu().numpy(), position % length
    classes, frequency = np.unique(target[:fitted], return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"target is {classes[0]} in all sequences that the probe is fitted on; accepted: two or more")
    chance, rows = np.mean(target[fitted:] == classes[frequency.argmax()]), []
    for layer, stream_BSD in enumerate(residual_stream(learner, tokens.encode(*batch))):
        features_BD = tokens.at_examples(stream_BSD)[:, position].double().cpu().numpy()
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
            features_BD[:fitted], target[:fitted]
        )
        right = torch.from_numpy(probe.predict(features_BD[fitted:]) == target[fitted:]).double()
        row = {
            "layer": layer,
            "position": position,
            "accuracy": float(right.mean()),
            "standard_error": standard_error(right),
        }
        rows.append(row | {"chance": chance, "classes": len(classes), "sequences": len(right)})
    return pd.DataFrame(rows)


@torch.no_grad()
def residual_stream(learner: Learner, tokens_BSW: Tensor) -> list[Tensor]:
    """What goes into the first layer and comes out of every one: L + 1 tensors (B, S, D).

    Raises:
        ValueError: for a learner without ``blocks``.
    """
    blocks = getattr(learner, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"learner is a {type(learner).__name__}, whose layers are not known; accepted: one with blocks"
        )
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        hooks.callback(blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])).remove)
        for block in blocks:
            hooks.callback(block.register_forward_hook(lambda _, inputs, out: seen.append(_first(out))).remove)
        learner(tokens_BSW)
    return seen


def tasks_of(x_BTD: Tensor) -> Tensor:
    """Which sequences are of one task, told from their inputs alone: int64 (B,), numbered from 0.

    Where every task transforms the same finite set of examples in a way of its own, as in ``ProjectedImages``, two
    sequences with an equal input are of one task, and so are all that are joined by a chain of such pairs. Draw many
    more sequences than tasks, or one task may come out as several; inputs of a few features may be equal by chance.

    Raises:
        ValueError: if no two sequences share an input, as where inputs are drawn afresh.
    """
    sequences, length, _ = x_BTD.shape
    # Rounded, because a product's last bits depend on the row of the matrix in which an example stands.
    rounded = (x_BTD / x_BTD.std() * 1e4).round().flatten(0, 1)
    example = torch.unique(rounded, dim=0, return_inverse=True)[1].cpu().numpy()
    sequence = np.arange(sequences).repeat(length)
    nodes = sequences + example.max() + 1
    graph = coo_array((np.ones(len(example)), (sequence, sequences + example)), shape=(nodes, nodes))
    found = np.unique(connected_components(graph, directed=False)[1][:sequences], return_inverse=True)[1]
    if found.max() + 1 == sequences:
        raise ValueError(f"none of {sequences} sequences shares an input with another; accepted: several of each task")
    return torch.from_numpy(found.astype(np.int64))


# -- whom the learner answers like -----------------------------------------------------------------------------------


@torch.no_grad()
def distances(learner: Learner, tokens: Tokens, batch: Batch, others: Mapping[str, Tensor]) -> pd.DataFrame:
    """How far the learner's answers at the last positions are from those of others, and from the right ones.

    Two that are mostly right mostly agree; whether one follows the other shows where the other is wrong.

    Args:
        learner: any.
        tokens: the format that it was trained with.
        batch: sequences.
        others: by name, answers (B, P) at the last P positions, such as oracles' on the same sequences. ``truth`` is added.

    Returns:
        Columns other, positions (P), sequences, and in classification agreement (share of equal answers) and
        agreement_on_errors (the same where the other is wrong; missing where it never is), in regression
        squared_difference (mean); with standard_error over sequences, that of the errors' left out.

    Raises:
        ValueError: if ``others`` is empty or its shapes differ.
    """
    shapes = {tuple(said.shape) for said in others.values()}
    if len(shapes) != 1 or (count := next(iter(shapes)))[0] != len(batch.y):
        raise ValueError(f"answers have shapes {sorted(shapes)}; accepted: one, ({len(batch.y)}, last positions)")
    positions = count[1]
    y_BP = batch.y[:, -positions:]
    own_BP = answers(tokens.at_examples(learner(tokens.encode(*batch)))[:, -positions:])
    rows = []
    for name, said_BP in {"truth": y_BP, **others}.items():
        apart_BP = scores(own_BP, said_BP).double()
        row: dict[str, Any] = {"other": name, "positions": positions, "sequences": len(y_BP)}
        if tokens.num_classes == 1:
            row |= {"squared_difference": float(apart_BP.mean())}
        else:
            wrong = apart_BP[said_BP != y_BP]
            row |= {
                "agreement": float(apart_BP.mean()),
                "agreement_on_errors": float(wrong.mean()) if len(wrong) else np.nan,
            }
        rows.append(row | {"standard_error": standard_error(apart_BP.mean(1))})
    return pd.DataFrame(rows)


def one_gradient_step(
    x_BTD: Tensor, y_BT: Tensor, positions: Sequence[int], num_classes: int, rate: float = 1.0
) -> Tensor:
    """Answers (B, len(positions)) after one step of gradient descent from zero on all n examples seen; an ``Oracle``.

    Classification: softmax regression with intercept and mean cross-entropy. From zero every class has probability 1/K,
    so that after one step the logit of class k is rate / n · Σ_i (1[y_i = k] - 1/K) (x_i · x + 1), and its maximum does not
    depend on the rate. Regression: w · x with mean of (w · x - y)² / 2, hence rate / n · Σ_i y_i x_i · x. Before the
    first example the answer is 0.

    Args:
        x_BTD: inputs.
        y_BT: classes, or numbers.
        positions: where answers are wanted, each from the examples before it.
        num_classes: K; 1 in regression.
        rate: step size, > 0; of no effect in classification. ``best_rate`` chooses it.

    Source: von Oswald et al. 2023, "Transformers Learn In-Context by Gradient Descent", proposition 1, for regression.
    """
    place_P = torch.tensor(list(positions), device=x_BTD.device)
    before_PT = torch.arange(x_BTD.shape[1], device=x_BTD.device) < place_P.unsqueeze(1)
    kernel_BPT = x_BTD[:, place_P] @ x_BTD.mT
    if num_classes == 1:
        return rate * (kernel_BPT * before_PT @ y_BT.unsqueeze(-1)).squeeze(-1) / place_P.clamp(min=1)
    one_hot_BTK = functional.one_hot(y_BT, num_classes).to(x_BTD.dtype)  # 1/K and the rate are the same for every class
    return ((kernel_BPT + 1) * before_PT @ one_hot_BTK).argmax(-1)


def best_rate(batch: Batch, num_last: int) -> float:
    """The rate of ``one_gradient_step`` in regression with the least squared error at the last positions of these sequences."""
    length = batch.y.shape[1]
    require_range("num_last", num_last, 1, length - 1)
    positions = range(length - num_last, length)
    said_BP, y_BP = one_gradient_step(*batch, positions, 1).double(), batch.y[:, -num_last:].double()
    return float((said_BP * y_BP).sum() / said_BP.square().sum())


def _light(folder: Path) -> list[tuple[Path, int, bool]]:
    """Light checkpoints: file, step, and whether it is the one that was written on leaving the plateau."""
    named = [(path, _LIGHT.fullmatch(path.stem)) for path in sorted((folder / "steps").glob("*.safetensors"))]
    return [(path, int(match[2]), match[1] is not None) for path, match in named if match]


def _first(out: Any) -> Tensor:
    """The residual stream among what a layer returns, which may be followed by its cache."""
    return out[0] if isinstance(out, tuple) else out
