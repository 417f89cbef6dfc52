import math

import pytest
import torch
from losses.conftest import assert_same_with_gradient
from torch import nn
from torch.nn import functional

from metalearn.losses.elementwise import finite_vector, require_number, shown
from metalearn.losses.learned import LearnedLoss, load_loss
from metalearn.losses.standard import CrossEntropy

CROSS_ENTROPY = "mul(-1,mul(y,log(p)))"
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
SHAPES = [(4,), (6, 4), (3, 4, 5), (2, 4, 3, 2)]


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, "cross_entropy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_cross_entropy_matches_torch_on_every_kind_of_target(loss, shape, reduction, weight):
    generator = torch.Generator().manual_seed(len(shape))
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    axis = 1 if len(shape) > 1 else 0
    index = torch.randint(0, 4, [size for place, size in enumerate(shape) if place != axis], generator=generator)
    ours = load_loss(loss, reduction=reduction, weight=weight, ignore_index=1)
    theirs = nn.CrossEntropyLoss(weight, reduction=reduction, ignore_index=1)
    assert_same_with_gradient(
        ours, nn.CrossEntropyLoss(weight, reduction=reduction), z, torch.softmax(2 * z.flip(0), axis)
    )
    assert_same_with_gradient(ours, theirs, z, torch.where(index == 2, 0, index) if len(shape) > 1 else torch.tensor(3))
    byte = load_loss(loss, reduction=reduction, weight=weight)
    torch.testing.assert_close(byte(z, index.to(torch.uint8)), byte(z, index))


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, "mse", "sqrt(sub(y,p))"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_ignored_example_counts_for_nothing_even_if_it_is_not_a_number(loss, reduction):
    z = torch.randn(5, 3, dtype=torch.float64)
    z[2], z[4] = math.nan, math.inf
    target = torch.tensor([0, 1, -100, 2, -100])
    trained = {"trainable": True} if "(" in loss else {}
    criterion = load_loss(loss, reduction=reduction, weight=[1.0, 2.0, 3.0], **trained)
    kept = target != -100
    z = z.requires_grad_()
    value, wanted = criterion(z, target), criterion(z[kept], target[kept])
    torch.testing.assert_close(value[kept] if reduction == "none" else value, wanted)
    slope, *by_weights = torch.autograd.grad(value.sum(), [z, *criterion.parameters()])
    torch.testing.assert_close(slope[kept], torch.autograd.grad(wanted.sum(), z)[0][kept])
    assert (slope[~kept] == 0).all() and all(part.isfinite().all() for part in by_weights)


def test_mean_of_nothing_is_not_a_number_as_in_torch():
    z, target = torch.randn(2, 3), torch.full((2,), -100)
    assert load_loss("cross_entropy")(z, target).isnan() and nn.CrossEntropyLoss()(z, target).isnan()
    assert load_loss("cross_entropy", reduction="sum")(z, target) == 0


def test_programs_of_known_losses_match_torch_with_gradients():
    z, y = (torch.randn(6, 3, dtype=torch.float64) for _ in "zy")
    regression = {
        "square(sub(y,p))": nn.MSELoss(),
        "abs(sub(y,p))": nn.L1Loss(),
    }
    for text, theirs in regression.items():
        assert_same_with_gradient(load_loss(text, output="identity"), lambda a, b, of=theirs: 3 * of(a, b), z, y)
    column = z[:, :1]
    binary = "mul(-1,add(mul(y,log(p)),mul(sub(1,y),log(sub(1,p)))))"
    target = (y[:, 0] > 0).double()
    ours = load_loss(binary, output="sigmoid")
    assert_same_with_gradient(ours, lambda a, b: nn.BCEWithLogitsLoss()(a, b.unsqueeze(1)), column, target)
    assert_same_with_gradient(ours, nn.BCEWithLogitsLoss(), column, target.unsqueeze(1))
    assert_same_with_gradient(ours, lambda a, b: nn.BCEWithLogitsLoss()(a, b.double()), column[:, 0], target.long())
    index = y.argmax(1)
    assert_same_with_gradient(
        load_loss("square(sub(y,p))"),
        lambda a, b: (a.softmax(1) - functional.one_hot(b, 3)).square().sum(1).mean(),
        z,
        index,
    )


def test_weights_of_outputs_multiply_their_terms_in_regression():
    z, y = (torch.randn(5, 2, dtype=torch.float64) for _ in "zy")
    found = load_loss("mse", output="identity", weight=[1.0, 3.0])(z, y)
    torch.testing.assert_close(found, ((z - y).square() * torch.tensor([1.0, 3.0])).sum(1).mean())


@pytest.mark.parametrize(
    ("prediction", "target", "options"),
    [
        ((3, 4), torch.zeros(4, dtype=torch.long), {}),
        ((3, 4), torch.zeros(3, 4, dtype=torch.long), {}),
        ((3, 4), torch.zeros(4, 3), {}),
        ((3, 4), torch.zeros(3), {"output": "sigmoid"}),
        ((3, 4), torch.zeros(3, 4), {"weight": [1.0, 1.0]}),
        ((3, 4), torch.zeros(3, 4), {"output": "sigmoid", "weight": [1.0]}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(prediction, target, options):
    with pytest.raises(ValueError, match=r"has shape .*; accepted"):
        load_loss("mae", **options)(torch.zeros(prediction), target)


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, "mse"])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0, 4.0]], ids=["plain", "weighted"])
@pytest.mark.parametrize("index", [4, 255, -1])
def test_classes_out_of_range_are_refused(loss, weight, index):
    criterion = load_loss(loss, weight=weight, ignore_index=-7)
    target = torch.tensor([0, -7, index, 3])
    wanted = rf"target has class index {index}; accepted: class indices 0 to 3, or ignore_index, -7"
    with pytest.raises(ValueError, match=wanted):
        criterion(torch.zeros(4, 4), target)
    with pytest.raises(ValueError, match=wanted):
        criterion(torch.zeros(1, 4, 4), target.unsqueeze(0))
    assert load_loss(loss, ignore_index=index)(torch.zeros(2, 4), torch.tensor([index, 3])).isfinite()


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_class_indices_that_are_no_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"target has type {dtype}; accepted: integer class indices"):
        load_loss("cross_entropy")(torch.zeros(2, 3), torch.zeros(2, dtype=dtype))


def test_matches_a_loop_under_vmap_of_the_gradient():
    criterion = load_loss(CROSS_ENTROPY, weight=[1.0, 2.0, 0.5], ignore_index=1)
    z, target = torch.randn(4, 5, 3, dtype=torch.float64), torch.arange(20).view(4, 5) % 3
    slope = torch.func.grad(criterion)
    found = torch.vmap(slope)(z, target)
    torch.testing.assert_close(found, torch.stack([slope(*one) for one in zip(z, target, strict=True)]))
    shared = torch.vmap(slope, in_dims=(0, None))(z, target[0])
    torch.testing.assert_close(shared, torch.stack([slope(one, target[0]) for one in z]))


@pytest.mark.parametrize(
    "options",
    [
        {"output": "relu"},
        {"output": ["softmax"]},
        {"reduction": "max"},
        {"ignore_index": 1.5},
        {"ignore_index": True},
        {"ignore_index": 10**400},
        {"weight": "11"},
        {"weight": [1.0, math.nan]},
        {"weight": [[1.0]]},
        {"weight": [10**400]},
        {"weight": torch.ones(2, 2)},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="accepted: "):
        LearnedLoss("mul(y,p)", **options)


def test_half_precision_is_computed_in_float32():
    z = torch.randn(8, 3, dtype=torch.bfloat16)
    target = torch.randint(0, 3, (8,))
    loss = CrossEntropy()
    assert loss(z, target).dtype == torch.float32
    torch.testing.assert_close(loss(z, target), nn.CrossEntropyLoss()(z.float(), target))
    assert load_loss("mse", weight=torch.ones(3, dtype=torch.float64))(z, target).dtype == torch.float32


def test_numbers_of_strangers():
    assert require_number("x", 2, 0, 3) == 2.0
    for value in ("1", True, None, math.nan, math.inf, 10**400, [1]):
        with pytest.raises(ValueError, match="accepted: a number"):
            require_number("x", value, 0)
    with pytest.raises(ValueError, match="2 finite numbers"):
        finite_vector("x", [1.0], 2)
    assert finite_vector("x", [1, 2.5]).tolist() == [1.0, 2.5]
    assert len(shown("x" * 10**6)) == 40 and shown([[1]]) == "a list"
