"""The scikit-learn face for numbers, on a learner by hand whose answers are ridge regression, and on random transformers."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression as LeastSquares
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from metalearn import InContextClassifier, InContextRegressor
from metalearn.base import Learner
from metalearn.in_context import read_checkpoint
from metalearn.models.recurrent import LSTM
from metalearn.models.saving import describe, save_learner
from metalearn.models.tokens import FORMATS, Tokens
from metalearn.models.transformer import Transformer

D, LENGTH, SCALE = 6, 20, 2.5
SMALL = dict(width=16, depth=2, heads=2, head_width=8)


class RidgeLearner(Learner):
    """Ridge regression of penalty 1/4 without an intercept on shift tokens (x_j, x_{j-1}, y_{j-1}): the state is X'X and X'y."""

    def __init__(self, num_inputs: int, num_outputs: int):
        super().__init__()
        self.num_inputs, self.num_outputs = num_inputs, num_outputs
        self.penalty = torch.nn.Parameter(torch.tensor(0.25))

    def init_state(self, num_sequences, device, dtype):
        gram_BDD = torch.zeros(num_sequences, self.num_inputs // 2, self.num_inputs // 2, device=device, dtype=dtype)
        return {"gram": gram_BDD, "moment": gram_BDD[:, 0]}

    def prefill(self, tokens_BTD, state):
        now_BTD, before_BTD, y_BT1 = tokens_BTD.split([self.num_inputs // 2, self.num_inputs // 2, 1], dim=-1)
        gram_BTDD = state["gram"].unsqueeze(1) + (before_BTD.unsqueeze(-1) * before_BTD.unsqueeze(-2)).cumsum(1)
        moment_BTD = state["moment"].unsqueeze(1) + (before_BTD * y_BT1).cumsum(1)
        w_BTD = torch.linalg.solve(gram_BTDD + self.penalty * torch.eye(self.num_inputs // 2).to(now_BTD), moment_BTD)
        return (now_BTD * w_BTD).sum(-1, keepdim=True), {"gram": gram_BTDD[:, -1], "moment": moment_BTD[:, -1]}

    def forward(self, tokens_BTD):
        return self.prefill(tokens_BTD, self.init_state(len(tokens_BTD), tokens_BTD.device, tokens_BTD.dtype))[0]

    def branch(self, tokens_BQD, state):
        each = {name: leaf.repeat_interleave(tokens_BQD.shape[1], 0) for name, leaf in state.items()}
        return self.prefill(tokens_BQD.flatten(0, 1).unsqueeze(1), each)[0].view(*tokens_BQD.shape[:2], 1)

    def state_size(self, length):
        return (self.num_inputs // 2) * (self.num_inputs // 2 + 1)

    def flops_per_token(self, length):
        return 0


def write(path, kind=Transformer, tokens="shift", arguments=None, features=D, length=LENGTH, **more):
    """A checkpoint of random weights, large enough for answers to differ; of RidgeLearner there is nothing random."""
    torch.manual_seed(0)
    learner = kind(Tokens(tokens, features, 1).width, 1, **(arguments or {}))
    with torch.no_grad():
        for parameter in learner.parameters() if kind is not RidgeLearner else ():
            parameter.mul_(2)
    sizes = {"num_features": features, "num_classes": 1, "length": length}
    card = {"learner": describe(learner), "tokens": tokens} | sizes | {"target_scale": SCALE} | more
    save_learner(path, learner, {name: value for name, value in card.items() if value is not None})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("random") / "learner.safetensors", arguments=SMALL)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A ridge regressor of D features and contexts of up to 299 rows."""
    path = write(tmp_path_factory.mktemp("ridge") / "learner.safetensors", RidgeLearner, length=300)

    def build(**settings):
        return InContextRegressor(path, **dict(dtype="float64", trusted_classes=[RidgeLearner]) | settings)

    return build


def table(rows=15, features=8, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(3.0, 2.0, (rows, features))
    return X, 40 + 5 * X[:, 0] - 3 * X[:, -1] + rng.normal(size=rows)


# -- against references ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", FORMATS)
@pytest.mark.parametrize(("kind", "arguments"), [(Transformer, SMALL), (LSTM, dict(width=16, depth=2))])
def test_matches_the_uncached_prediction(tmp_path, kind, arguments, tokens):
    path = write(tmp_path / "learner.safetensors", kind, tokens, arguments)
    (X, y), queries = table(40), table(5, seed=1)[0]
    regressor = InContextRegressor(path, num_estimators=3).fit(X, y)
    learner, spread = read_checkpoint(path, ())[0], y.std()
    expected = np.zeros(5)
    for basis_FD, seen_ND, labels_N in zip(
        regressor._basis_EFD, regressor._context_END, regressor._labels_EN, strict=True
    ):
        for q, query_F in enumerate((queries - X.mean(0)) / X.std(0)):
            x = torch.cat([seen_ND, torch.from_numpy(query_F)[None] @ basis_FD]).float()
            told = torch.cat([labels_N * SCALE, torch.zeros(1)]).float()
            encoder = Tokens(tokens, D, 1)
            answer = encoder.at_examples(learner(encoder.encode(x[None], told[None])))[0, -1].item()
            expected[q] += (y.mean() + answer * spread / SCALE) / 3
    answers = regressor.predict(queries)
    np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-4)
    assert np.ptp(answers) > 0.1  # the queries matter


def test_matches_ridge_regression_on_as_many_features(exact):
    X, y = table(100, D)
    queries, (centre, spread) = table(30, D, seed=1)[0], (X.mean(0), X.std(0))
    ridge = Ridge(0.25, fit_intercept=False).fit((X - centre) / spread, y - y.mean())
    expected = ridge.predict((queries - centre) / spread) + y.mean()
    for members in (1, 5):  # a rotation changes nothing for a learner without favourite directions
        np.testing.assert_allclose(exact(num_estimators=members).fit(X, y).predict(queries), expected, atol=1e-9)
    for factor in (1e-3, 1e3):  # nor do the units of y, because ridge is linear in it
        answers = exact(target_scale=factor).fit(X, y).predict(queries)
        np.testing.assert_allclose(answers, expected, atol=1e-9)


@pytest.mark.parametrize("projection", ["orthogonal", "random", "pca"])
@pytest.mark.parametrize("features", [2, D, 15])
def test_matches_the_mean_of_ridge_regressions_on_projections(exact, features, projection):
    (X, y), queries = table(60, features), table(9, features, seed=1)[0]
    regressor = exact(num_estimators=4, projection=projection).fit(X, y)
    z, z_queries = (X - X.mean(0)) / X.std(0), (queries - X.mean(0)) / X.std(0)
    members = [
        Ridge(0.25, fit_intercept=False).fit(z @ basis, y - y.mean()).predict(z_queries @ basis)
        for basis in regressor._basis_EFD.numpy()
    ]
    np.testing.assert_allclose(regressor.predict(queries), np.mean(members, 0) + y.mean(), atol=1e-6)


@pytest.mark.parametrize("features", [2, D, 40])
@pytest.mark.parametrize("projection", ["orthogonal", "random", "pca"])
def test_projected_features_have_unit_variance(checkpoint, features, projection):
    X, y = table(200, features)
    regressor = InContextRegressor(checkpoint, projection=projection, num_estimators=100).fit(X, y)
    assert abs(regressor._context_END.var().item() - 1) < 0.1
    if projection == "orthogonal":
        basis_EFD = regressor._basis_EFD
        gram = basis_EFD.mT @ basis_EFD if features >= D else basis_EFD @ basis_EFD.mT * features / D
        torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).double().expand_as(gram), rtol=0, atol=1e-9)


def test_shrinks_towards_the_mean_by_the_share_of_features_that_members_see(exact):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(299, 24))
    y = X @ np.ones(24)
    answers = exact(num_estimators=60).fit(X, y).predict(X)
    slope = LeastSquares().fit(y[:, None], answers).coef_[0]
    assert slope == pytest.approx(D / 24, rel=0.15)


# -- behaviour -------------------------------------------------------------------------------------------------------


def test_predicts_the_diabetes_table_nearly_as_well_as_ridge_itself(exact):
    X, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[:299], order[299:]
    best = Ridge(0.001).fit(X[train], y[train]).score(X[test], y[test])
    settings = dict(projection="pca", num_estimators=8)
    assert exact(**settings).fit(X[train], y[train]).score(X[test], y[test]) > best - 0.05


def test_the_learner_is_told_targets_of_the_scale_it_knows(checkpoint):
    X, y = table(LENGTH - 1)
    for settings, scale in ((dict(), SCALE), (dict(target_scale=0.5), 0.5)):
        _, told_EN = InContextRegressor(checkpoint, **settings).fit(X, 1e9 * y)._context
        assert told_EN.mean().abs() < 1e-5 and told_EN.square().mean().item() == pytest.approx(scale**2, rel=1e-5)


def test_answers_follow_the_units_of_features_and_targets(checkpoint):
    (X, y), queries = table(), table(20, seed=1)[0]
    answers = InContextRegressor(checkpoint).fit(X, y).predict(queries)
    moved = InContextRegressor(checkpoint).fit(1000 * X - 5, 1e6 - 1e3 * y).predict(1000 * queries - 5)
    mirrored = InContextRegressor(checkpoint).fit(X, -y).predict(queries)
    np.testing.assert_allclose((1e6 - moved) / 1e3, -mirrored, rtol=0, atol=1e-3)
    assert not np.allclose(-mirrored, answers, atol=1e-2)  # a random transformer is not odd in its targets


@pytest.mark.parametrize("value", [7.25, 0.0, -1e300, 1 / 3])
def test_a_constant_target_is_answered_as_it_is(checkpoint, value):
    X, _ = table()
    answers = InContextRegressor(checkpoint).fit(X, np.full(15, value)).predict(X)
    np.testing.assert_allclose(answers, value, rtol=1e-12)


@pytest.mark.parametrize("query_batch_size", [1, 7, 100])
def test_a_row_has_one_answer_wherever_it_stands(checkpoint, query_batch_size):
    (X, y), queries = table(), table(60, seed=1)[0]
    answers = InContextRegressor(checkpoint, query_batch_size=query_batch_size).fit(X, y).predict(queries)
    order = np.random.default_rng(0).permutation(60)
    whole = InContextRegressor(checkpoint).fit(X, y)
    for others in (whole.predict(queries), whole.predict(queries[order])[order.argsort()]):
        np.testing.assert_allclose(others, answers, rtol=0, atol=1e-4)


def test_answers_in_the_users_floating_type_and_reads_lists_and_frames(checkpoint):
    X, y = table()
    for dtype, expected in (("float32", "float32"), ("float64", "float64"), ("int64", "float64")):
        seen = X.astype(dtype)
        assert InContextRegressor(checkpoint).fit(seen, y).predict(seen).dtype == expected
    numbers = InContextRegressor(checkpoint).fit(X, y).predict(X)
    for kind in (list, pd.Series, lambda y: y.astype(object)):
        assert np.array_equal(InContextRegressor(checkpoint).fit(X.tolist(), kind(y)).predict(X), numbers)


@parametrize_with_checks([InContextRegressor("learner.safetensors", trusted_classes=[RidgeLearner])])
def test_is_a_scikit_learn_regressor(estimator, check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "learner.safetensors", RidgeLearner, features=10, length=300)
    check(estimator)


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_a_fitted_regressor_comes_back_bit_by_bit(checkpoint, tmp_path):
    X, y = pd.DataFrame(table()[0], columns=list("hgfedcba")), table()[1]
    saved = InContextRegressor(checkpoint, num_estimators=3, projection="pca", target_scale=1.5, random_state=4)
    saved.fit(X, y).save(tmp_path / "fitted.safetensors")
    again = InContextRegressor.from_checkpoint(tmp_path / "fitted.safetensors")
    for other in (again, pickle.loads(pickle.dumps(saved)), clone(saved).fit(X, y)):
        assert np.array_equal(other.predict(X), saved.predict(X))
    assert again.get_params() == saved.get_params() | {"checkpoint": again.checkpoint}
    with pytest.raises(ValueError, match="feature names should match"):
        again.predict(X[list("abcdefgh")])


@pytest.mark.parametrize("name", ["units_3", "labels_EN", "basis_EFD"])
def test_refuses_a_forged_fit(checkpoint, tmp_path, name):
    InContextRegressor(checkpoint).fit(*table()).save(tmp_path / "fitted.safetensors")
    learner, card, tensors = read_checkpoint(tmp_path / "fitted.safetensors", ())
    save_learner(tmp_path / "forged.safetensors", learner, card, tensors | {f"fit.{name}": torch.zeros(2)})
    with pytest.raises(ValueError, match="does not hold a fitted regressor"):
        InContextRegressor.from_checkpoint(tmp_path / "forged.safetensors")


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_each_face_refuses_the_others_checkpoints(checkpoint, tmp_path):
    torch.manual_seed(0)
    classes = LSTM(Tokens("paper", D, 3).width, 3, width=4)
    card = {"learner": describe(classes), "tokens": "paper", "num_features": D, "num_classes": 3, "length": 9}
    save_learner(tmp_path / "classes.safetensors", classes, card)
    path = tmp_path / "classes.safetensors"
    for use in (lambda: InContextRegressor(path).fit(*table()), lambda: InContextRegressor.from_checkpoint(path)):
        with pytest.raises(
            ValueError, match="a learner of 3 classes, for InContextClassifier; accepted: one of numbers"
        ):
            use()
    X, y = table()
    for use in (
        lambda: InContextClassifier(checkpoint).fit(X, y > 40),
        lambda: InContextClassifier.from_checkpoint(checkpoint),
    ):
        with pytest.raises(ValueError, match="a learner of numbers, for InContextRegressor; accepted: one of classes"):
            use()


def test_asks_for_the_scale_of_targets_where_the_checkpoint_does_not_say(tmp_path):
    path = write(tmp_path / "old.safetensors", arguments=SMALL, target_scale=None)
    with pytest.raises(ValueError, match="does not say how large its targets were; accepted: target_scale"):
        InContextRegressor(path).fit(*table())
    assert np.isfinite(InContextRegressor(path, target_scale=math.sqrt(D)).fit(*table()).predict(table()[0])).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_estimators=0), "num_estimators is 0; accepted: 1 <="),
        (dict(projection="umap"), "'umap'; accepted: 'orthogonal', 'random', 'pca'"),
        (dict(target_scale=0.0), "target_scale is 0.0; accepted: 1e-06 <="),
        (dict(target_scale=float("nan")), "target_scale is nan; accepted"),
        (dict(checkpoint=None), "checkpoint is None; accepted: the path of"),
    ],
)
def test_refuses_bad_settings(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        InContextRegressor(**dict(checkpoint=checkpoint) | settings).fit(*table())


@pytest.mark.parametrize("y", [["a", "b", "c"], [1.0, np.nan, 2.0], [[1, 2], [3, 4], [5, 6]], [1.0, None, 2.0]])
def test_refuses_bad_targets(checkpoint, y):
    with pytest.raises(ValueError, match=r"accepted: numbers|accepted: finite|NaN|1d array"):
        InContextRegressor(checkpoint).fit(table(3)[0], np.array(y, dtype=object if None in y else None))


def test_says_so_when_the_learner_diverged(checkpoint, tmp_path):
    learner, card, _ = read_checkpoint(write(tmp_path / "learner.safetensors", arguments=SMALL), ())
    torch.nn.init.constant_(learner.head.bias, torch.nan)
    save_learner(tmp_path / "diverged.safetensors", learner, card)
    with pytest.raises(ValueError, match=r"not finite: .*diverged run"):
        InContextRegressor(tmp_path / "diverged.safetensors").fit(*table()).predict(table()[0])
