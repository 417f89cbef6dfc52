"""The rules against their torch.optim twins, finite differences and loops; all in float64 but for one test of types."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.nn.utils import clip_grad_norm_

from metalearn.base import Params, Rule
from metalearn.optim.first_order import SGD, Adam, AdamW, Clipped, RMSProp, Scheduled
from metalearn.optim.schedules import Cosine, Linear

TWINS = {
    "sgd": (SGD(0.1), torch.optim.SGD, dict(lr=0.1)),
    "momentum": (SGD(0.1, 0.9), torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "nesterov": (
        SGD(0.1, 0.8, nesterov=True, weight_decay=0.02),
        torch.optim.SGD,
        dict(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.02),
    ),
    "dampening": (
        SGD(0.1, 0.9, dampening=0.3, weight_decay=0.1),
        torch.optim.SGD,
        dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    ),
    "rmsprop": (RMSProp(), torch.optim.RMSprop, dict()),
    "rmsprop options": (
        RMSProp(0.02, 0.99, 1e-6, 0.1, 0.5, centered=True),
        torch.optim.RMSprop,
        dict(lr=0.02, alpha=0.99, eps=1e-6, weight_decay=0.1, momentum=0.5, centered=True),
    ),
    "adam": (Adam(), torch.optim.Adam, dict()),
    "adam options": (
        Adam(0.05, 0.8, 0.95, 1e-4, 0.1),
        torch.optim.Adam,
        dict(lr=0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    ),
    "adamw": (AdamW(), torch.optim.AdamW, dict()),
    "adamw options": (
        AdamW(0.05, 0.0, 0.9, 1e-5, 0.3),
        torch.optim.AdamW,
        dict(lr=0.05, betas=(0.0, 0.9), eps=1e-5, weight_decay=0.3),
    ),
}
INPUTS, TARGETS = (torch.randn(8, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (3, 2))
EVERY_SETTING = {
    "sgd": SGD(0.05, 0.9, nesterov=True, weight_decay=0.02),
    "dampened": SGD(0.05, 0.9, weight_decay=0.02, dampening=0.2),
    "rmsprop": RMSProp(0.01, 0.9, 1e-3, 0.02, 0.5),
    "centered": RMSProp(0.01, 0.9, 1e-3, 0.02, 0.5, centered=True),
    "adam": Adam(0.05, 0.9, 0.99, 1e-3, 0.02),
    "adamw": AdamW(0.05, 0.9, 0.99, 1e-3, 0.02),
    "clipped": Clipped(SGD(0.05, 0.9), 0.1),
    "scheduled": Scheduled(Clipped(AdamW(0.05, eps=1e-3), 0.1), Cosine(8, 2)),
}
every_rule = pytest.mark.parametrize("rule", EVERY_SETTING.values(), ids=EVERY_SETTING.keys())


def start(seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4), "scale": ()}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def loss_of(params: Params) -> Tensor:
    hidden = torch.tanh(INPUTS @ params["a.weight"].T + params["a.bias"])
    return (params["scale"] * hidden @ params["b.weight"].T - TARGETS).square().mean()


def unroll(rule: Rule, meta: Params, params: Params, steps: int) -> Params:
    state = rule.init(meta, params)
    for _ in range(steps):
        params, state = rule.update(meta, grad(loss_of)(params), state, params)
    return params


def all_settings(rule: Rule) -> Params:
    names = set(rule.settings) - ({"dampening"} if getattr(rule, "nesterov", False) else set())
    return {name: torch.tensor(rule.settings[name], dtype=torch.float64) for name in sorted(names)}


def assert_follows(ours, optimizer, twin: Params, meta: Params, scheduler=None, max_norm=None) -> None:
    params = {name: p.detach().clone() for name, p in twin.items()}
    state = ours.init(meta, params)
    for _ in range(50):
        params, state = ours.update(meta, grad(loss_of)(params), state, params)
        optimizer.zero_grad()
        loss_of(twin).backward()
        if max_norm is not None:
            clip_grad_norm_(twin.values(), max_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for name, p in params.items():
            torch.testing.assert_close(p, twin[name].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("as_meta", [False, True])
@pytest.mark.parametrize("name", TWINS)
def test_matches_torch(name, as_meta):
    rule, cls, options = TWINS[name]
    twin = {n: p.requires_grad_() for n, p in start().items()}
    meta = all_settings(rule) if as_meta else {}
    assert_follows(rule, cls(list(twin.values()), **options), twin, meta)


@pytest.mark.parametrize("schedule", [Cosine(40, 5, 0.1), Linear(30)])
def test_clipping_and_schedules_match_torch(schedule):
    twin = {n: p.requires_grad_() for n, p in start().items()}
    optimizer = torch.optim.AdamW(list(twin.values()), lr=0.05, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(schedule(torch.tensor(t))))
    norms = [grad(loss_of)(start())[n].norm() for n in start()]
    max_norm = 0.3 * float(torch.stack(norms).norm())  # some updates are clipped, the later ones are not
    ours = Scheduled(Clipped(AdamW(0.05, weight_decay=0.1), max_norm), schedule)
    assert_follows(ours, optimizer, twin, {}, scheduler, max_norm)


@every_rule
def test_derivative_matches_finite_differences(rule):
    meta = all_settings(rule)

    def outer(meta: Params) -> Tensor:
        return loss_of(unroll(rule, meta, start(), 5))

    def central(name: str, h: float) -> Tensor:
        return (outer({**meta, name: meta[name] + h}) - outer({**meta, name: meta[name] - h})) / (2 * h)

    for name, value in grad(outer)(meta).items():
        h = 1e-3 * max(float(meta[name]), 1e-3)
        expected = (4 * central(name, h / 2) - central(name, h)) / 3
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_rate_of_one_parameter_beats_the_common_one():
    params, rows = start(), torch.linspace(0.0, 0.3, 4, dtype=torch.float64).unsqueeze(1)
    meta = {"lr/a.weight": rows, "lr/scale": torch.tensor(0.0, dtype=torch.float64)}
    grads = grad(loss_of)(params)
    half = Scheduled(SGD(0.1), Linear(9, warmup_steps=2))
    for rule, factor in ((SGD(0.1), 1.0), (half, 0.5)):
        new, _ = rule.update(meta, grads, rule.init(meta, params), params)
        torch.testing.assert_close(new["a.weight"], params["a.weight"] - factor * rows * grads["a.weight"])
        torch.testing.assert_close(new["a.bias"], params["a.bias"] - factor * 0.1 * grads["a.bias"])
        assert torch.equal(new["scale"], params["scale"])


def test_learned_bound_reaches_the_gradients():
    params, meta = start(), {"max_norm": torch.tensor(0.01, dtype=torch.float64)}
    new = unroll(Clipped(SGD(1.0), 1e9), meta, params, 1)
    moved = torch.cat([(new[n] - p).flatten() for n, p in params.items()]).norm()
    torch.testing.assert_close(moved, meta["max_norm"], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("rule", [RMSProp(eps=1e-3), RMSProp(eps=1e-3, centered=True), Adam(eps=1e-3)])
def test_first_step_from_zero_gradients_has_the_derivative_of_its_limit(rule):
    params = {"p": torch.zeros(3, dtype=torch.float64)}

    def moved(g: Tensor) -> Tensor:
        return rule.update({}, {"p": g}, rule.init({}, params), params)[0]["p"]

    slopes = jacrev(moved)(torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(slopes, -rule.settings["lr"] / 1e-3 * torch.eye(3, dtype=torch.float64))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_derivatives_to_second_order_at_zero_gradients(rule, dtype):
    params = {"w": torch.ones(2, dtype=dtype), "s": torch.ones((), dtype=dtype)}
    directions = {"w": torch.tensor([1.0, -2.0], dtype=dtype), "s": torch.tensor(1.0, dtype=dtype)}

    def moved(grads: Params, lr: Tensor) -> Tensor:
        p, state = params, rule.init({"lr": lr}, params)
        for _ in range(3):
            p, state = rule.update({"lr": lr}, grads, state, p)
        return sum(v.sum() for v in p.values())

    zeros = {n: torch.zeros_like(p) for n, p in params.items()}
    lr = torch.tensor(0.1, dtype=dtype)
    first, second = jvp(lambda g: grad(moved, argnums=(0, 1))(g, lr), (zeros,), (directions,))
    for tree in (first, second):
        assert all(v.isfinite().all() for v in (*tree[0].values(), tree[1]))
    assert all(v.abs().min() > 0 for v in first[0].values())


def test_nan_stays_visible_and_in_its_run():
    rule = Clipped(Adam(), 1.0)
    params = {"w": torch.ones(2, 3)}
    grads = {"w": torch.stack([torch.full((3,), torch.nan), torch.ones(3)])}
    new, _ = vmap(lambda g, p: rule.update({}, g, rule.init({}, p), p))(grads, params)
    assert new["w"][0].isnan().all()
    assert new["w"][1].isfinite().all()


@every_rule
def test_vmap_matches_loop(rule):
    runs = [start(seed) for seed in range(3)]
    metas = [{"lr": torch.tensor(lr, dtype=torch.float64)} for lr in (0.0, 0.01, 0.1)]

    def two_updates(meta, params, state):
        for _ in range(2):
            params, state = rule.update(meta, grad(loss_of)(params), state, params)
        return params, state

    alone = [two_updates(m, p, rule.init(m, p)) for m, p in zip(metas, runs, strict=True)]
    meta, params = ({n: torch.stack([t[n] for t in trees]) for n in trees[0]} for trees in (metas, runs))
    together = vmap(two_updates)(meta, params, vmap(rule.init)(meta, params))
    for i, (expected, state) in enumerate(alone):
        for name, p in expected.items():
            torch.testing.assert_close(together[0][name][i], p, rtol=1e-12, atol=1e-13)
        if "step" in state:
            assert together[1]["step"][i] == state["step"] == 2


@every_rule
def test_forward_and_reverse_derivatives_agree(rule):
    meta, tangents = all_settings(rule), {n: 0.1 * p for n, p in start(5).items()}
    nudges = {name: torch.tensor(0.1 + 0.2 * i, dtype=torch.float64) for i, name in enumerate(meta)}

    def end(meta: Params, params: Params) -> Params:
        return unroll(rule, meta, params, 4)

    _, forward = jvp(end, (meta, start()), (nudges, tangents))
    _, pull = vjp(end, meta, start())
    cotangents = start(7)
    to_meta, to_params = pull(cotangents)
    left = sum((cotangents[n] * forward[n]).sum() for n in forward)
    right = sum((to_meta[n] * nudges[n]).sum() for n in meta) + sum(
        (to_params[n] * tangents[n]).sum() for n in tangents
    )
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_types_and_arguments(rule, dtype):
    params = {n: p.to(dtype) for n, p in start().items()}
    meta = {"lr": torch.tensor(0.1, dtype=torch.float64)}
    grads, state = {n: p * 0.1 for n, p in params.items()}, rule.init(meta, params)
    trees = [meta, grads, state, params]
    leaves = [t for tree in trees for t in torch.utils._pytree.tree_leaves(tree)]
    before, names = [t.clone() for t in leaves], [set(tree) for tree in trees]
    new, later = rule.update(meta, grads, state, params)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))
    assert [set(tree) for tree in trees] == names
    for tree, like in ((new, params), (later, state)):
        pairs = zip(torch.utils._pytree.tree_leaves(tree), torch.utils._pytree.tree_leaves(like), strict=True)
        assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)


def test_plain_descent_has_no_state():
    assert SGD(0.1, weight_decay=0.1).init({}, start()) == {}


def test_traces_without_breaks():
    rule = EVERY_SETTING["scheduled"]
    compiled = torch.compile(rule.update, backend="eager", fullgraph=True)
    params = start()
    state = rule.init({}, params)
    expected, _ = rule.update({}, params, state, params)
    assert all(torch.equal(p, expected[n]) for n, p in compiled({}, params, state, params)[0].items())


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: SGD(-0.1), "lr is -0.1"),
        (lambda: SGD(momentum=1.1), "momentum is 1.1"),
        (lambda: SGD(nesterov=True), "momentum of nesterov is 0.0"),
        (lambda: SGD(momentum=0.9, dampening=0.1, nesterov=True), "dampening of nesterov is 0.1"),
        (lambda: SGD(momentum=0.9, nesterov=True).init({"dampening": torch.tensor(0.1)}, start()), "dampening"),
        (lambda: SGD(dampening=0.5).init({}, start()), "dampening"),
        (lambda: RMSProp(alpha=-0.1), "alpha is -0.1"),
        (lambda: Adam(beta1=1.0), "beta1 is 1.0"),
        (lambda: Adam(beta2=float("nan")), "beta2 is nan"),
        (lambda: AdamW(eps=-1.0), "eps is -1.0"),
        (lambda: AdamW(weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda: Clipped(SGD(), -1.0), "max_norm is -1.0"),
        (lambda: Clipped(SGD(), 1.0).init({"lr/a": torch.tensor(1.0)}, start()), "'lr/a'; accepted: lr, .*lr/a.bias"),
        (lambda: SGD().init({"beta1": torch.tensor(1.0)}, start()), "'beta1'; accepted: lr, momentum"),
        (lambda: SGD().init({"lr": torch.ones(3)}, start()), r"'lr' has shape \(3,\)"),
    ],
)
def test_refuses(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_refuses_to_schedule_what_has_no_rate():
    class Unrated(Rule):
        def init(self, meta, params):
            return {}

        def update(self, meta, grads, state, params, *, loss=None):
            return params, state

    clipped = Clipped(Unrated(), 1.0)  # a rule of another family can be clipped
    assert clipped.update({}, start(), {}, start())[1] == {}
    with pytest.raises(ValueError, match="without 'lr'"):
        Scheduled(clipped, Linear(5))
