"""The scikit-learn face: cached answers equal uncached ones, whatever table comes in, and come back from disk unchanged."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from metalearn import InContextClassifier
from metalearn.classifier import _codes, class_probabilities
from metalearn.in_context import draw_blocks, read_checkpoint
from metalearn.models.fast_weights import DeltaNet, GatedDeltaNet, LinearAttention
from metalearn.models.feed_forward import FeedForward
from metalearn.models.outer_product import OuterProductLSTM
from metalearn.models.recurrent import GRU, LSTM
from metalearn.models.saving import describe, save_learner
from metalearn.models.self_modifying import VSML, VSMLWithoutSymmetries
from metalearn.models.tokens import FORMATS, Tokens
from metalearn.models.transformer import POSITIONS, Transformer

D, K, LENGTH = 6, 3, 20
SMALL = dict(width=16, depth=2, heads=2, head_width=8)
ZOO = [
    (GRU, dict(width=16)),
    (OuterProductLSTM, dict(width=8)),
    (LinearAttention, SMALL),
    (DeltaNet, SMALL | dict(chunk_size=5)),
    (GatedDeltaNet, SMALL | dict(convolution=3)),
    (VSML, dict(width=6)),
    (VSMLWithoutSymmetries, dict(grid_size=3, width=8)),
    (FeedForward, dict(width=16)),
]
LEARNERS = [(Transformer, SMALL | dict(positions=p)) for p in POSITIONS] + [(LSTM, dict(width=16, depth=2))]
EXPECTED_FAILURES: dict[str, str] = {}  # of scikit-learn's checks, with reasons: at most three, and so far none


class Stranger(LSTM):
    """A learner outside metalearn.models."""


def write(path, kind=Transformer, tokens="shift", arguments=SMALL):
    """A checkpoint of random weights, large enough for answers to differ."""
    torch.manual_seed(0)
    learner = kind(Tokens(tokens, D, K).width, K, **arguments)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.mul_(2)
    sizes = {"num_features": D, "num_classes": K, "length": LENGTH}
    save_learner(path, learner, {"learner": describe(learner), "tokens": tokens} | sizes)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("random") / "learner.safetensors")


def table(rows=15, features=8, classes=K, seed=0):
    """Features (rows, features) and labels of exactly ``classes`` classes."""
    rng = np.random.default_rng(seed)
    return rng.normal(3.0, 2.0, (rows, features)), rng.permutation(np.arange(rows) % classes)


def uncached(classifier, X_seen, X):
    """Every member, digit and query as a sequence of its own through ``forward``, probabilities by explicit loops."""
    learner, card, _ = read_checkpoint(classifier.checkpoint, ())
    tokens, codes_EGC = Tokens(card["tokens"], D, K), classifier._codes_EGC.numpy()
    z_QF = torch.from_numpy((X - X_seen.mean(0)) / X_seen.std(0))
    answers = np.zeros((len(X), len(classifier.classes_)))
    for code_GC, basis, seen_ND, labels_N in zip(
        codes_EGC, classifier._basis_EFD, classifier._context_END, classifier._labels_EN, strict=True
    ):
        for q, query_D in enumerate(z_QF @ basis):
            product_C = np.ones(code_GC.shape[1])
            for digit_C in code_GC:
                x = torch.cat([seen_ND, query_D[None]]).float()
                y = torch.tensor([*digit_C[labels_N], 0])
                logits_K = tokens.at_examples(learner(tokens.encode(x[None], y[None])))[0, -1].detach().double().numpy()
                weights = {k: np.exp(logits_K[k]) for k in set(digit_C)}
                product_C *= [weights[k] / sum(weights.values()) for k in digit_C]
            answers[q] += product_C / product_C.sum() / len(codes_EGC)
    return answers


# -- against references ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7], ids=["masked", "all", "digits"])
@pytest.mark.parametrize("tokens", FORMATS)
@pytest.mark.parametrize(("kind", "arguments"), [*LEARNERS, *ZOO])
def test_matches_the_uncached_prediction(tmp_path, kind, arguments, tokens, classes):
    path = write(tmp_path / "learner.safetensors", kind, tokens, arguments)
    (X, y), queries = table(classes=classes), table(5, seed=1)[0]
    classifier = InContextClassifier(path, num_estimators=2).fit(X, y)
    answers = classifier.predict_proba(queries)
    np.testing.assert_allclose(answers, uncached(classifier, X, queries), rtol=0, atol=1e-5)
    assert np.ptp(answers, axis=0).min() > 1e-4  # the queries matter


@pytest.mark.parametrize("rows", [1, LENGTH - 1, LENGTH, 50])
def test_matches_the_uncached_prediction_at_every_context_length(checkpoint, rows):
    (X, y), queries = table(rows, classes=min(rows, K)), table(5, seed=1)[0]
    X = np.concatenate([X, X + 1]) if rows == 1 else X  # one row has no standard deviation to compare with
    y = np.repeat(y, 2) if rows == 1 else y
    classifier = InContextClassifier(checkpoint, num_estimators=3).fit(X, y)
    assert classifier._labels_EN.shape == (3, min(len(X), LENGTH - 1))  # the last place of a sequence is the query's
    np.testing.assert_allclose(classifier.predict_proba(queries), uncached(classifier, X, queries), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize(("kind", "arguments"), LEARNERS)
def test_matches_single_precision(tmp_path, kind, arguments, dtype, tolerance):
    path, (X, y) = write(tmp_path / "learner.safetensors", kind, arguments=arguments), table()
    single = InContextClassifier(path).fit(X, y).predict_proba(X)
    other = InContextClassifier(path, dtype=dtype).fit(X, y).predict_proba(X)
    assert 0 < np.abs(single - other).max() < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_matches_the_cpu_on_a_gpu_and_comes_back_to_it(checkpoint, tmp_path, dtype):
    X, y = table(40, classes=7)
    settings = dict(num_estimators=4, dtype=dtype)
    there = InContextClassifier(checkpoint, device="cuda", **settings).fit(X, y)
    there.save(tmp_path / "fitted.safetensors")
    here = InContextClassifier.from_checkpoint(tmp_path / "fitted.safetensors")
    tolerance = 0.05 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(there.predict_proba(X), here.predict_proba(X), rtol=0, atol=tolerance)
    assert here.device == "cpu" and here._state["keys"].device.type == "cpu"


@pytest.mark.parametrize("classes", range(1, 11))
def test_matches_digit_decomposition_by_explicit_loops(classes):
    codes_EGC = _codes(classes, K, 4, np.random.RandomState(0))
    logits_EGQK = torch.randn(4, codes_EGC.shape[1], 5, K, dtype=torch.float64)
    for e, code_GC in enumerate(codes_EGC):
        words = [tuple(code_GC[:, c].tolist()) for c in range(classes)]
        assert len(set(words)) == classes and K ** (len(code_GC) - 1) < max(classes, 2) <= K ** len(code_GC)
        for q in range(5):
            product = torch.ones(classes, dtype=torch.float64)
            for g, digits_C in enumerate(code_GC):
                weights_K = logits_EGQK[e, g, q].exp()
                product *= weights_K[digits_C] / weights_K[digits_C.unique()].sum()
            torch.testing.assert_close(class_probabilities(logits_EGQK, codes_EGC)[e, q], product / product.sum())


@pytest.mark.parametrize(("rows", "longest"), [(5, 19), (19, 19), (20, 19), (100, 31), (93, 31)])
def test_blocks_cover_all_rows_and_repeat_none(rows, longest):
    needed = -(-rows // longest)
    blocks = draw_blocks(rows, longest, 2 * needed, np.random.RandomState(0)).numpy()
    assert all(len(set(block)) == len(block) == min(rows, longest) for block in blocks)
    assert set(blocks[:needed].ravel()) == set(blocks[needed:].ravel()) == set(range(rows))
    assert len({tuple(block) for block in blocks}) == len(blocks)


@pytest.mark.parametrize("features", [3, 9, 100])
@pytest.mark.parametrize("projection", ["random", "pca"])
@pytest.mark.parametrize("scaling", ["per_feature", "scalar"])
def test_projected_features_have_unit_variance(checkpoint, features, projection, scaling):
    X, y = table(200, features)
    X *= 7.0 if scaling == "scalar" else np.geomspace(1e-9, 1e9, features)
    classifier = InContextClassifier(checkpoint, projection=projection, scaling=scaling, num_estimators=100).fit(X, y)
    assert abs(classifier._context_END.var().item() - 1) < 0.1


# -- behaviour -------------------------------------------------------------------------------------------------------


def test_learns_unseen_digits_and_flowers_in_context(meta_trained_checkpoint):
    digits, iris = load_digits(return_X_y=True), load_iris(return_X_y=True)
    unseen = digits[1] >= 5
    for X, y, seen, scaling, chance in (
        (digits[0][unseen], digits[1][unseen], 100, "scalar", 0.2),
        (*iris, 60, "per_feature", 1 / 3),
    ):
        order = np.random.default_rng(0).permutation(len(y))
        train, test = order[:seen], order[seen:]
        settings = dict(num_estimators=16, scaling=scaling)
        accuracy = (
            InContextClassifier(meta_trained_checkpoint, **settings).fit(X[train], y[train]).score(X[test], y[test])
        )
        nearest = KNeighborsClassifier(1).fit(X[train], y[train]).score(X[test], y[test])
        assert accuracy > 2 * chance and accuracy > nearest - 0.15


@pytest.mark.parametrize("query_batch_size", [1, 7, 16, 100])
def test_a_row_has_one_answer_wherever_it_stands(checkpoint, query_batch_size):
    (X, y), queries = table(), table(120, seed=1)[0]
    classifier = InContextClassifier(checkpoint, query_batch_size=query_batch_size).fit(X, y)
    answers, order = classifier.predict_proba(queries), np.random.default_rng(0).permutation(120)
    np.testing.assert_allclose(classifier.predict_proba(queries[order]), answers[order], rtol=0, atol=1e-6)
    for size in (1, 13, query_batch_size):
        parts = np.concatenate([classifier.predict_proba(queries[i : i + size]) for i in range(0, 120, size)])
        np.testing.assert_allclose(parts, answers, rtol=0, atol=0 if size == query_batch_size else 1e-6)
    default = InContextClassifier(checkpoint).fit(X, y).predict_proba(queries)
    np.testing.assert_allclose(answers, default, rtol=0, atol=1e-6)


def test_statistics_are_of_the_training_set_alone(checkpoint):
    (X, y), queries = table(), table(20, seed=1)[0]
    classifier = InContextClassifier(checkpoint).fit(X, y)
    answers = classifier.predict_proba(queries)
    moved = InContextClassifier(checkpoint).fit(1000 * X - 5, y).predict_proba(1000 * queries - 5)
    np.testing.assert_allclose(moved, answers, rtol=0, atol=1e-5)
    queries[1:] *= 1e6
    assert np.array_equal(classifier.predict_proba(queries)[0], answers[0])


@pytest.mark.parametrize("labels", [list("aab"), [7, 7, -2], [True, True, False], [0.0, 0.0, 5.0]])
@pytest.mark.parametrize("kind", [list, np.array, pd.Series])
def test_answers_in_the_users_labels(checkpoint, labels, kind):
    X, _ = table(3)
    classifier = InContextClassifier(checkpoint, num_estimators=2).fit(X, kind(labels))
    assert classifier.classes_.tolist() == sorted(set(labels))
    assert set(classifier.predict(X)) <= set(labels)


def test_answers_in_the_users_floating_type(checkpoint):
    X, y = table()
    for dtype, expected in (
        ("float32", "float32"),
        ("float64", "float64"),
        ("int64", "float64"),
        ("float16", "float64"),
    ):
        seen = X.astype(dtype)
        assert InContextClassifier(checkpoint).fit(seen, y).predict_proba(seen).dtype == expected


def test_members_and_seeds_differ_and_repeat(checkpoint):
    X, y = table()

    def answers(**settings):
        return InContextClassifier(checkpoint, **settings).fit(X, y).predict_proba(X)

    assert np.array_equal(answers(random_state=3), answers(random_state=3))
    assert not np.allclose(answers(random_state=3), answers(random_state=4))
    assert not np.allclose(answers(num_estimators=1), answers(num_estimators=8))
    assert answers(random_state=None).shape == (15, K)


def test_classifiers_share_one_learner_and_leave_the_old_file_behind(tmp_path):
    path, (X, y) = write(tmp_path / "learner.safetensors"), table()
    first, second = (InContextClassifier(path).fit(X, y) for _ in range(2))
    assert first._learner is second._learner
    before = first.predict_proba(X)
    write(path, LSTM, "paper", dict(width=4))
    assert not np.allclose(clone(first).fit(X, y).predict_proba(X), before)
    first.save(tmp_path / "fitted.safetensors")  # of the learner that it was fitted with
    path.unlink()
    again = InContextClassifier.from_checkpoint(tmp_path / "fitted.safetensors")
    for other in (first, pickle.loads(pickle.dumps(first)), again):
        assert np.array_equal(other.predict_proba(X), before)


@parametrize_with_checks(
    [InContextClassifier("last.ckpt", num_estimators=2)], expected_failed_checks=lambda _: EXPECTED_FAILURES
)
def test_is_a_scikit_learn_classifier(estimator, check, meta_trained_checkpoint, monkeypatch):
    monkeypatch.chdir(meta_trained_checkpoint.parent)
    check(estimator)


# -- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [list("aäb"), [7, -2, 300], [True, False, True], [0.0, -2.0, 3e9], ["1", "2", "3"]])
@pytest.mark.parametrize("dtype", ["O", None], ids=["object", "plain"])
def test_a_fitted_classifier_comes_back_bit_by_bit(checkpoint, tmp_path, labels, dtype):
    y = np.array(labels * 5, dtype=dtype if isinstance(labels[0], str) else None)
    X = pd.DataFrame(table()[0], columns=list("hgfedcba"))
    saved = InContextClassifier(checkpoint, num_estimators=3, projection="pca", dtype="float64")
    saved.fit(X, y).save(tmp_path / "fitted.safetensors")
    again = InContextClassifier.from_checkpoint(tmp_path / "fitted.safetensors")
    assert np.array_equal(again.predict_proba(X), saved.predict_proba(X))
    assert np.array_equal(again.predict(X), saved.predict(X)) and again.classes_.dtype == saved.classes_.dtype
    assert again.feature_names_in_.tolist() == list("hgfedcba")
    with pytest.raises(ValueError, match="feature names should match"):
        again.predict(X[list("abcdefgh")])


def test_an_unfitted_classifier_comes_back_with_its_settings(checkpoint, tmp_path):
    settings = dict(num_estimators=np.int64(3), projection="pca", scaling="scalar", query_batch_size=9, random_state=5)
    saved, (X, y) = InContextClassifier(checkpoint, **settings), table()
    saved.save(tmp_path / "unfitted.safetensors")
    again = InContextClassifier.from_checkpoint(tmp_path / "unfitted.safetensors", query_batch_size=32)
    assert again.get_params() == saved.get_params() | {"checkpoint": again.checkpoint, "query_batch_size": 32}
    assert np.array_equal(again.fit(X, y).predict_proba(X), saved.fit(X, y).predict_proba(X))
    again.fit(X, y).save(tmp_path / "unfitted.safetensors")  # a second hand, onto the file it came from
    third = InContextClassifier.from_checkpoint(tmp_path / "unfitted.safetensors")
    assert np.array_equal(third.predict_proba(X), saved.predict_proba(X))


def test_the_file_is_a_json_header_and_bare_tensors(checkpoint, tmp_path):
    InContextClassifier(checkpoint).fit(*table()).save(tmp_path / "fitted.safetensors")
    content = (tmp_path / "fitted.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    sizes = {"F32": 4, "F64": 8, "I64": 8}
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    assert len(content) - end == sum(sizes[e["dtype"]] * int(np.prod(e["shape"], dtype=int)) for e in tensors)


def test_works_without_lightning_and_imports_without_torch(meta_trained_checkpoint):
    script = f"""
import sys
import metalearn
assert "torch" not in sys.modules
classifier = metalearn.InContextClassifier.from_checkpoint({str(meta_trained_checkpoint)!r}, num_estimators=1)
classifier.fit([[0.0, 1.0], [1.0, 0.0]], ["a", "b"]).predict([[0.0, 1.0]])
assert "pytorch_lightning" not in sys.modules and "lightning" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=dict(os.environ))


def test_takes_a_strangers_learner_only_when_trusted(tmp_path):
    path, (X, y) = write(tmp_path / "stranger.safetensors", Stranger, arguments=dict(width=6)), table()
    for build in (lambda: InContextClassifier(path).fit(X, y), lambda: InContextClassifier.from_checkpoint(path)):
        with pytest.raises(ValueError, match=r"Stranger'; accepted: a Learner under metalearn\.models"):
            build()
    trusting = InContextClassifier.from_checkpoint(path, trusted_classes=[Stranger]).fit(X, y)
    trusting.save(tmp_path / "again.safetensors")
    with pytest.raises(ValueError, match=r"Stranger'; accepted"):
        InContextClassifier.from_checkpoint(tmp_path / "again.safetensors")
    again = InContextClassifier.from_checkpoint(tmp_path / "again.safetensors", trusted_classes=[Stranger])
    assert np.array_equal(again.predict_proba(X), trusting.predict_proba(X))


# -- what goes wrong -------------------------------------------------------------------------------------------------


def forged(path, checkpoint, card=None, tensors=None):
    """A saved fitted classifier with entries of its "fit" card and fitted tensors changed; None removes one."""
    InContextClassifier(checkpoint, num_estimators=2).fit(*table()).save(path)
    learner, original, fitted = read_checkpoint(path, ())
    changed = {name: value for name, value in (fitted | (tensors or {})).items() if value is not None}
    save_learner(path, learner, original | {"fit": original["fit"] | (card or {})}, changed)
    return path


@pytest.mark.parametrize(
    "change",
    [
        dict(card={"classes": [1, 2]}),
        dict(card={"classes": None}),
        dict(card={"kind": "words"}),
        dict(card={"features": 7}),
        dict(card={"features": "many"}),
        dict(card={"features": 10**18}),
        dict(tensors={"fit.basis_EFD": None}),
        dict(tensors={"fit.basis_EFD": torch.zeros(2, 8, D + 1, dtype=torch.float64)}),
        dict(tensors={"fit.codes_EGC": torch.full((2, 1, K), 99)}),
        dict(tensors={"fit.codes_EGC": torch.full((2, 1, K), -1)}),
        dict(tensors={"fit.codes_EGC": torch.zeros(2, 1, K)}),
        dict(tensors={"fit.labels_EN": torch.full((2, 15), K)}),
        dict(tensors={"fit.context_END": torch.zeros(3)}),
    ],
    ids=str,
)
def test_refuses_a_forged_fit(checkpoint, tmp_path, change):
    path = forged(tmp_path / "forged.safetensors", checkpoint, **change)
    with pytest.raises(ValueError, match="does not hold a fitted classifier"):
        InContextClassifier.from_checkpoint(path)


@pytest.mark.parametrize("saved", [[], {"checkpoint": "/etc/passwd"}, {"device": "cuda"}, {"trusted_classes": ["os"]}])
def test_refuses_forged_settings(checkpoint, tmp_path, saved):
    learner, card, _ = read_checkpoint(checkpoint, ())
    save_learner(tmp_path / "forged.safetensors", learner, card | {"settings": saved})
    with pytest.raises(ValueError, match="accepted: num_estimators, projection"):
        InContextClassifier.from_checkpoint(tmp_path / "forged.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_estimators=0), "num_estimators is 0; accepted: 1 <="),
        (dict(query_batch_size=0), "query_batch_size is 0; accepted: 1 <="),
        (dict(projection="umap"), "'umap'; accepted: 'random', 'pca'"),
        (dict(scaling=None), "None; accepted: 'per_feature', 'scalar'"),
        (dict(dtype="float16"), "'float16'; accepted: 'float32'"),
        (dict(device="abacus"), "'abacus'; accepted: a torch device of this machine"),
        (dict(device="cuda:99"), "'cuda:99'; accepted: a torch device of this machine"),
        (dict(checkpoint=None), "checkpoint is None; accepted: the path of"),
        (dict(checkpoint="absent.ckpt"), "no checkpoint at 'absent.ckpt'; accepted"),
    ],
)
def test_refuses_bad_settings(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        InContextClassifier(**dict(checkpoint=checkpoint) | settings).fit(*table())


@pytest.mark.parametrize(
    "y", [["a", 1, "b"], [b"a", b"b", b"c"], [0.5, 1.5, 2.5], [[0, 1], [1, 0], [1, 1]], [None, 1, 2]]
)
def test_refuses_bad_labels(checkpoint, y):
    with pytest.raises(ValueError, match=r"y has labels|[Ll]abel|target|should be a 1d array"):
        InContextClassifier(checkpoint).fit(table(3)[0], np.array(y, dtype=object if None in y or "a" in y else None))


def test_refuses_to_save_what_would_not_come_back(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"accepted: a name that ends in \.safetensors"):
        InContextClassifier(checkpoint).save(tmp_path / "model.pkl")
    with pytest.raises(ValueError, match="accepted for save: an integer or None"):
        InContextClassifier(checkpoint, random_state=np.random.RandomState(0)).save(tmp_path / "model.safetensors")
    classifier = InContextClassifier(checkpoint).fit(*table())
    classifier.classes_ = classifier.classes_.astype("M8[D]")
    with pytest.raises(ValueError, match="accepted for save: strings"):
        classifier.save(tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


def test_says_so_when_the_learner_diverged(tmp_path):
    learner, card, _ = read_checkpoint(write(tmp_path / "learner.safetensors"), ())
    torch.nn.init.constant_(learner.head.bias, torch.nan)
    save_learner(tmp_path / "diverged.safetensors", learner, card)
    X, y = table()
    with pytest.raises(ValueError, match=r"not finite: .*diverged run"):
        InContextClassifier(tmp_path / "diverged.safetensors").fit(X, y).predict(X)


# -- whatever comes in -----------------------------------------------------------------------------------------------


def tables(**elements):
    shapes = st.tuples(st.integers(1, 25), st.integers(1, 9))
    return shapes.flatmap(lambda shape: arrays.arrays(st.sampled_from(["f4", "f8"]), shape, **elements))


WORDS = st.text(st.characters(exclude_characters="\0"), max_size=3)  # NumPy's strings end at a NUL
LABELS = WORDS | st.sampled_from(["a", "b"]), st.integers(-(2**40), 2**40), st.booleans()
SCALINGS, PROJECTIONS = st.sampled_from(["per_feature", "scalar"]), st.sampled_from(["random", "pca"])


@pytest.mark.filterwarnings("ignore:The number of unique classes is greater than 50%:UserWarning")
@settings(max_examples=60, deadline=None)
@given(st.data(), SCALINGS, PROJECTIONS)
def test_answers_any_finite_table(checkpoint, data, scaling, projection):
    values = st.one_of(st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from([0.0, 1.0, -3e38]))
    X = data.draw(tables(elements=values))
    y = data.draw(st.one_of(*(st.lists(label, min_size=len(X), max_size=len(X)) for label in LABELS)))
    classifier = InContextClassifier(checkpoint, num_estimators=2, scaling=scaling, projection=projection)
    answers = classifier.fit(X, y).predict_proba(X)
    assert answers.shape == (len(X), len(set(y))) and answers.dtype == X.dtype
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)
    assert set(classifier.predict(X).tolist()) <= set(y)


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")  # of scikit-learn's check
@settings(max_examples=20, deadline=None)
@given(tables(elements=st.floats(width=32)), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_refuses_any_table_that_is_not_finite(checkpoint, X, bad):
    good = np.arange(X.size, dtype=float).reshape(X.shape)
    X[-1, -1] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        InContextClassifier(checkpoint).fit(X, np.zeros(len(X)))
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        InContextClassifier(checkpoint, num_estimators=1).fit(good, np.zeros(len(X))).predict(X)


@pytest.mark.parametrize("scaling", ["per_feature", "scalar"])
@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-19, 1e200, 1e308])
def test_answers_at_any_scale(checkpoint, scaling, scale):
    X, y = table()
    X = X / np.abs(X).max()
    usual = InContextClassifier(checkpoint, scaling=scaling).fit(X, y).predict_proba(X)
    scaled = InContextClassifier(checkpoint, scaling=scaling).fit(X * scale, y).predict_proba(X * scale)
    np.testing.assert_allclose(scaled, usual, atol=0.1 if scale == 1e-320 else 1e-5)


@pytest.mark.parametrize("scaling", ["per_feature", "scalar"])
@pytest.mark.parametrize("projection", ["random", "pca"])
def test_a_constant_table_is_only_centred(checkpoint, projection, scaling):
    X = np.tile([0.1, 0.3, 0.7, 1e-5], (9, 1))
    classifier = InContextClassifier(checkpoint, projection=projection, scaling=scaling).fit(X, [0, 1, 2] * 3)
    np.testing.assert_allclose(classifier._centre_F, X[0], rtol=1e-12)
    assert (classifier._scale_F == 1).all() and classifier._basis_EFD.abs().max() < 10
    answers = classifier.predict_proba(X)
    np.testing.assert_allclose(answers, answers[:1].repeat(9, axis=0), rtol=0, atol=1e-6)
    assert np.isfinite(classifier.predict_proba(1e300 * X)).all()


def test_a_constant_column_does_not_touch_the_others(checkpoint):
    X, y = table()
    scale_F = InContextClassifier(checkpoint).fit(X, y)._scale_F.clone()
    X[:, 2], scale_F[2] = 0.1, 1.0
    assert torch.equal(InContextClassifier(checkpoint).fit(X, y)._scale_F, scale_F)


@pytest.mark.parametrize("projection", ["random", "pca"])
def test_answers_ten_thousand_features(checkpoint, projection):
    X, y = table(40, 10_000)
    X[y == 1] += 3
    answers = InContextClassifier(checkpoint, projection=projection, num_estimators=4).fit(X, y).predict_proba(X)
    assert np.isfinite(answers).all() and np.ptp(answers, axis=0).min() > 1e-3


def test_one_class_is_certain(checkpoint):
    answers = InContextClassifier(checkpoint).fit([[1.0, 2.0]], ["only"]).predict_proba([[5.0, 6.0]])
    assert answers.tolist() == [[1.0]]
