import builtins
import copy
import json
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given, settings
from losses.conftest import points, programs, random_programs
from torch import nn
from torch.func import functional_call

from metalearn.losses import symbolic
from metalearn.losses.elementwise import MAX_BYTES
from metalearn.losses.learned import LearnedLoss, load_loss, loss_from_json
from metalearn.losses.program import Program

TEXT = "mul(-1,mul(y,log(p)))"
Z = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 2, 1, 0])


def _evaluated(loss: LearnedLoss, y: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The loss by the code that it writes, in an otherwise empty namespace."""
    namespace: dict = {}
    exec(loss.source(), namespace)
    return namespace["loss"](y, p)


def test_formula_latex_and_source_follow_the_weights_through_an_optimizer_step():
    loss = LearnedLoss(TEXT, trainable=True)
    optimizer = torch.optim.SGD(loss.parameters(), 0.5)
    before = loss.latex()
    loss(Z, TARGET).backward()
    optimizer.step()
    assert loss.latex() != before and before == r"-y \cdot \log\left|p\right|"
    y, p = torch.rand(2, 5, dtype=torch.float64)
    wanted = loss.terms(p.log().unsqueeze(1), y.unsqueeze(1))  # the softmax of one output is 1
    torch.testing.assert_close(_evaluated(loss, y, torch.ones(5).double()), wanted.squeeze(1).detach())
    exact = loss.sympy().subs({symbolic.TARGET: y[0].item(), symbolic.OUTPUT: p[0].item()}).evalf()
    assert float(exact) == pytest.approx(_evaluated(loss, y, p)[0].item(), rel=1e-6)
    written = [float(number) for number in symbolic.expression(loss.program, loss.weights.tolist()).atoms(sympy.Float)]
    assert all(any(math.isclose(weight, one) for one in written) for weight in map(abs, loss.weights.tolist()))


def test_source_matches_the_criterion_on_random_programs():
    for number, program in enumerate(random_programs(100, seed=4)):
        y, p, w = points(program, number)
        loss = LearnedLoss(program, w, output="identity", reduction="none")
        torch.testing.assert_close(_evaluated(loss, y, p), loss(p, y).detach(), rtol=1e-6, atol=1e-6)


@given(programs())
@settings(max_examples=60, deadline=None)
def test_json_round_trips(program: Program):
    _, _, w = points(program)
    loss = LearnedLoss(program, w, output="sigmoid", reduction="sum", provenance={"seed": 3, "of": [1, "x"]})
    saved = json.loads(json.dumps(loss.to_json()))
    again = loss_from_json(saved)
    assert again.to_json() == loss.to_json() == saved
    assert isinstance(again, LearnedLoss) and again.program == program and torch.equal(again.weights, loss.weights)


def test_a_saved_file_is_whole_and_options_take_the_place_of_what_it_says(tmp_path: Path):
    loss = LearnedLoss(TEXT, [1.0, 2.0, 0.5, 1.5, 1.0], ignore_index=2)
    loss.save(tmp_path / "best.json")
    assert os.listdir(tmp_path) == ["best.json"]
    again = load_loss(str(tmp_path / "best.json"), reduction="none", trainable=True)
    assert again(Z, TARGET).shape == (6,) and next(again.parameters()).requires_grad
    torch.testing.assert_close(again(Z, TARGET)[TARGET != 2].mean(), loss(Z, TARGET))
    with pytest.raises(ValueError, match="accepted: 5 finite numbers"):
        load_loss(tmp_path / "best.json", weights=[1.0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_longer_finite_are_not_written(value: float, tmp_path: Path):
    for name in ("weights", "weight"):
        loss = LearnedLoss(TEXT, weight=[1.0, 2.0, 3.0])
        with torch.no_grad():
            getattr(loss, name)[2] = value
        writers = [loss.to_json, lambda of=loss: of.save(tmp_path / "loss.json")]
        for write in [*writers, loss.source] if name == "weights" else writers:
            with pytest.raises(ValueError, match=rf"^{name}\[2\] is {value}; accepted: finite numbers"):
                write()
    assert not os.listdir(tmp_path)


def test_what_is_saved_can_be_loaded_and_what_is_too_large_is_not_saved(tmp_path: Path):
    path = tmp_path / "loss.json"
    weight = torch.rand(30_000, dtype=torch.float64)
    LearnedLoss(TEXT, weight=weight).save(path)
    torch.testing.assert_close(load_loss(path).weight, weight.float())
    path.unlink()
    with pytest.raises(ValueError, match=rf"bytes; accepted: at most {MAX_BYTES}"):
        LearnedLoss(TEXT, weight=weight.repeat(10)).save(path)
    assert not os.listdir(tmp_path)


def test_copies_pickles_and_state_dicts_are_the_same_loss():
    loss = LearnedLoss(TEXT, [1.0, 2.0, 0.5, 1.5, 1.0])
    assert not loss.weights.requires_grad
    other = LearnedLoss(TEXT)
    other.load_state_dict(loss.state_dict())
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), other):
        assert copied(Z, TARGET) == loss(Z, TARGET) and copied.program == loss.program
        assert copied.weights is not loss.weights


def test_is_a_function_of_weights_that_it_is_given():
    loss = LearnedLoss(TEXT)
    weights = torch.full((5,), 2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: functional_call(loss, {"weights": w}, (Z, TARGET)), weights)


@pytest.mark.parametrize("text", [TEXT, "square(tanh(sub(y,p)))", "div(mul(y,p),sqrt(add(y,p)))", "max(y,square(p))"])
def test_second_derivatives_match_finite_differences(text):
    loss = LearnedLoss(text, trainable=True).double()
    z = Z[:2].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda at, w: functional_call(loss, {"weights": w}, (at, TARGET[:2])), (z, loss.weights)
    )


def test_autocast_computes_in_float32():
    loss, linear = LearnedLoss(TEXT), nn.Linear(4, 3)
    inputs = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        z = linear(inputs)
        value = loss(z, TARGET)
    assert z.dtype == torch.bfloat16 and value.dtype == torch.float32
    torch.testing.assert_close(value, nn.CrossEntropyLoss()(z.float(), TARGET))
    value.backward()
    assert linear.weight.grad is not None and linear.weight.grad.isfinite().all()


# inductor's own imports
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend):
    loss = LearnedLoss(TEXT, [1.0, 2.0, 0.5, 1.5, 1.0], weight=[1.0, 2.0, 3.0], trainable=True)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for target in (TARGET, torch.tensor([0, 1, -100, 2, 2, 1]), Z.softmax(1).float()):
        z = Z.float().requires_grad_()
        wanted = torch.autograd.grad(loss(z, target), [z, loss.weights])
        found = torch.autograd.grad(compiled(z, target), [z, loss.weights])
        torch.testing.assert_close(found, wanted)


# -- strangers -------------------------------------------------------------------------------------------------------

GOOD = {"version": 1, "loss": "program", "program": ["mul", "y", "p"], "weights": [1.0, 1.0], "provenance": {}}
DEEP = "[" * 10**5 + "]" * 10**5
HOSTILE_FILES = [
    "",
    "null",
    "[]",
    "NaN",
    DEEP,
    '{"version":' * 10**4,
    "{'version': 1}",
    "__import__('os').system('true')",
    "9" * 10**5,
    "\x00",
    '{"version": 1}',
    "x" * (MAX_BYTES + 1),
    *(
        json.dumps(GOOD | change)
        for change in (
            {"version": 2},
            {"version": "1"},
            {"version": []},
            {"version": True},
            {"version": 1.0},
            {"loss": "exec"},
            {"loss": ["program"]},
            {"loss": None},
            {"program": "mul(y,p)"},
            {"program": ["mul", "y"]},
            {"program": ["__import__", "y", "p"]},
            {"program": ["mul", "y", ["p"]]},
            {"program": ["mul", "y", None]},
            {"program": ["mul", "y", 1]},
            {"program": ["m\u0443l", "y", "p"]},
            {"program": ["abs"] * 10**4 + ["p"]},
            {"program": {"mul": 1}},
            {"weights": [math.nan, 1.0]},
            {"weights": [math.inf, 1.0]},
            {"weights": [10**400, 1]},
            {"weights": [1e308, 1.0]},
            {"weights": [True, 1.0]},
            {"weights": ["1", "1"]},
            {"weights": [[1.0], [1.0]]},
            {"weights": [1.0]},
            {"weights": None},
            {"weights": {}},
            {"output": "__class__"},
            {"output": ["softmax"]},
            {"output": None},
            {"reduction": 3},
            {"ignore_index": 10**400},
            {"ignore_index": math.nan},
            {"weight": [math.nan]},
            {"weight": "abc"},
            {"weight": [1] * 300_000 + [None]},
            {"weight": [1] * 400_000},
            {"provenance": []},
            {"loss": "focal", "gamma": math.nan},
            {"loss": "focal", "gamma": [2]},
            {"loss": "huber", "delta": 10**400},
            {"loss": "network"},
            {"loss": "taylor"},
        )
    ),
]


def test_hostile_files_are_refused_within_a_second_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args, **kwargs):
        raise AssertionError("text was executed")

    outcomes = []
    for number, content in enumerate(HOSTILE_FILES):
        path = tmp_path / f"{number}.json"
        path.write_text(content, encoding="utf-8")
        with monkeypatch.context() as patched:
            for place, name in ((builtins, "eval"), (builtins, "exec"), (os, "system"), (pickle, "loads")):
                patched.setattr(place, name, fail)
            start = time.perf_counter()
            try:
                load_loss(path)
                message = "accepted"
            except ValueError as error:
                message = str(error)
        outcomes.append((content[:120], message, time.perf_counter() - start))
    for content, message, seconds in outcomes:
        assert "accepted: " in message and len(message) < 500 and message.isascii(), (content, message[:200])
        assert seconds < 1, content


@pytest.mark.parametrize(
    "name", ["nothing.json", "a\x00b.json", "x" * 5000 + ".json", "\ud800.json", Path(), Path("/dev/zero")], ids=ascii
)
def test_paths_that_are_no_files_are_refused(name):
    with pytest.raises(ValueError, match=r"cannot be read: .*; accepted"):
        load_loss(name)


def test_what_is_no_loss_is_refused_with_what_is_accepted():
    for loss in (None, 5, ["p"], "focl", b"p"):
        with pytest.raises(ValueError, match="or one of cross_entropy, mse"):
            load_loss(loss)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"accepted: 5 finite numbers$"):
        load_loss(TEXT, weights=[1.0])


# -- elsewhere -------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
importers = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"sympy", "deap"}:
            if BLOCKED:
                raise ImportError(f"{name} is not installed")
            frame = sys._getframe(1)
            while frame is not None and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            importers.append(frame.f_globals["__name__"])

sys.meta_path.insert(0, Watch())
import metalearn, torch
z = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, 0.3]], requires_grad=True)
t = torch.tensor([2, 0])
for text in ("mul(-1,mul(y,log(p)))", "cross_entropy", sys.argv[1]):
    z.grad = None
    metalearn.load_loss(text)(z, t).backward()
    found = z.grad.clone()
    z.grad = None
    torch.nn.CrossEntropyLoss()(z, t).backward()
    assert torch.allclose(found, z.grad, rtol=1e-6, atol=1e-7)  # torch.testing needs sympy
assert "metalearn.losses.symbolic" not in sys.modules
assert not [name for name in importers if name.startswith("metalearn")], importers
assert BLOCKED or metalearn.load_loss(text).latex()
print("well")
"""


@pytest.mark.parametrize("blocked", [True, False])
def test_works_where_neither_sympy_nor_deap_is_and_imports_neither_where_they_are(blocked: bool, tmp_path: Path):
    LearnedLoss(TEXT).save(tmp_path / "loss.json")
    code = ELSEWHERE.replace("BLOCKED", str(blocked))
    command = [sys.executable, "-c", code, str(tmp_path / "loss.json")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout == "well\n", run.stderr
