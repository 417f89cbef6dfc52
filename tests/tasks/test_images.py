"""ProjectedImages against its definition and against the faults of public reproductions (specs, in_context §2)."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from metalearn import random
from metalearn.base import Examples, MetaTest, MetaTrain, MetaValidation, Source
from metalearn.tasks.images import ProjectedImages, StackedImages
from metalearn.tasks.sources import ImageSource, TableSource
from metalearn.tasks.synthetic import RandomSource

P, K = 20, 4


class Told(Source):
    """Standard normal inputs whose first feature tells part and row, so that every example can be recognised."""

    num_classes = K

    def __init__(self, rows=200, features=P):
        self.asked, self.parts = [], {}
        for number, part in enumerate(("train", "validation", "test")):
            inputs = random.normal(random.key(7, part), (rows, features))
            inputs[:, 0] = torch.arange(rows) + 1000.0 * number
            self.parts[part] = Examples(inputs, random.integers(random.key(8, part), (rows,), K))

    def read(self, part):
        self.asked.append(part)
        return self.parts[part]

    def fingerprint(self):
        return "told"


def distribution(**settings):
    tasks = ProjectedImages(**{"source": Told(), "num_features": 6, "seed": 0} | settings)
    tasks.open(test=True)
    return tasks


def recognise(x_TD, source, part, task_matrix_PD):
    """The rows of ``part`` whose projection under the task is x, or -1."""
    projected_ND = source.parts[part].inputs @ task_matrix_PD
    distance, row = torch.cdist(x_TD.double(), projected_ND.double()).min(1)
    return torch.where(distance < 1e-3, row, -1)


def matrix(tasks, split, index, step=0):
    """A (P, D) of sequence ``index``, drawn again from its key as documented, not through ``batch``."""
    path = ("train", step) if isinstance(split, MetaTrain) else (type(split).__name__, split.stream)
    own = random.fold(random.fold(random.key(tasks.seed, *path), torch.tensor([index])), "task")
    if tasks.num_tasks and (isinstance(split, MetaTrain) or split.stream.startswith("seen")):
        own = random.fold(random.key(tasks.seed, "pool"), random.integers(own, (), tasks.num_tasks))
    return random.normal(random.fold(own, "projection"), (P, tasks.num_features))[0] / math.sqrt(P)


def test_matches_a_dense_projection_of_the_images_it_names():
    tasks = distribution()
    batch = tasks.batch(3, 0, 5, 12, MetaTrain())
    for b in range(5):
        rows = recognise(batch.x[b], tasks.source, "train", matrix(tasks, MetaTrain(), b, step=3))
        assert (rows >= 0).all() and len(set(rows.tolist())) == 12  # its own images, none of them twice
        permuted = {
            (int(t), int(y)) for t, y in zip(tasks.source.parts["train"].targets[rows], batch.y[b], strict=True)
        }
        assert len(permuted) == len({t for t, _ in permuted}) == len({y for _, y in permuted})  # one to one


def test_the_projection_has_variance_one_over_inputs():
    identity = Told(rows=P)
    identity.parts = {part: Examples(torch.eye(P), torch.arange(P) % K) for part in identity.parts}
    columns = distribution(source=identity, num_features=500).batch(0, 0, 40, P, MetaTrain()).x  # rows of A, reordered
    assert columns.var().item() == pytest.approx(1 / P, rel=0.01)
    assert stats.kstest(columns.flatten().numpy() * math.sqrt(P), "norm").pvalue > 1e-3


def test_images_are_drawn_anew_and_independently_of_the_task():
    tasks = distribution(num_tasks=1)
    task_matrix = matrix(tasks, MetaTrain(), 0)
    visits = [
        recognise(tasks.batch(s, 0, 1, 10, MetaTrain()).x[0], tasks.source, "train", task_matrix) for s in range(200)
    ]
    assert len({tuple(v.tolist()) for v in visits}) == 200
    counts = torch.bincount(torch.cat(visits), minlength=200)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3  # every image equally likely in the one task


@pytest.mark.parametrize(("num_tasks", "different"), [(8, 8), (None, 400)])
def test_tasks_are_a_pool_of_num_tasks_or_always_new(num_tasks, different):
    tasks = distribution(num_tasks=num_tasks)
    drawn = {tuple(matrix(tasks, MetaTrain(), b)[0].tolist()) for b in range(400)}
    batch = tasks.batch(0, 0, 400, 1, MetaTrain())
    rows = [int(recognise(batch.x[b], tasks.source, "train", matrix(tasks, MetaTrain(), b))) for b in range(400)]
    assert len(drawn) == different and min(rows) >= 0


@pytest.mark.parametrize("split", [MetaTrain(), MetaValidation("seen_train"), MetaTest("unseen_held_out")])
def test_a_sequence_is_a_function_of_seed_step_and_index_alone(split):
    tasks = distribution(num_tasks=64)
    whole = tasks.batch(5, 0, 12, 9, split)
    for first, count in ((0, 1), (3, 4), (7, 5)):  # other batch sizes, other ranks
        part = tasks.batch(5, first, count, 9, split)
        assert torch.equal(part.y, whole.y[first : first + count])
        torch.testing.assert_close(part.x, whole.x[first : first + count], rtol=1e-6, atol=1e-6)
    again = distribution(num_tasks=64).batch(5, 0, 12, 9, split)
    assert torch.equal(again.x, whole.x)
    assert not torch.equal(distribution(num_tasks=64, seed=1).batch(5, 0, 12, 9, split).x, whole.x)


def test_evaluation_does_not_depend_on_the_step_and_training_does():
    tasks = distribution()
    assert torch.equal(*(tasks.batch(s, 0, 4, 9, MetaValidation("unseen_held_out")).x for s in (0, 900)))
    assert not torch.equal(*(tasks.batch(s, 0, 4, 9, MetaTrain()).x for s in (0, 1)))


@pytest.mark.parametrize(
    ("split", "part"),
    [
        (MetaTrain(), "train"),
        (MetaValidation("seen_train"), "train"),
        (MetaValidation("seen_held_out"), "validation"),
        (MetaValidation("unseen_held_out"), "validation"),
        (MetaTest("seen_train"), "train"),
        (MetaTest("seen_held_out"), "test"),
        (MetaTest("unseen_held_out"), "test"),
    ],
)
def test_every_stream_holds_the_images_and_tasks_it_names(split, part):
    tasks = distribution(num_tasks=3)
    batch = tasks.batch(0, 0, 6, 15, split)
    for b in range(6):
        assert (recognise(batch.x[b], tasks.source, part, matrix(tasks, split, b)) >= 0).all()


def test_validation_and_test_tasks_and_sequences_differ():
    tasks = distribution()
    streams = [tasks.batch(0, 0, 8, 9, kind("unseen_held_out")).y for kind in (MetaValidation, MetaTest)]
    assert not torch.equal(*streams)
    assert not torch.equal(
        matrix(tasks, MetaValidation("unseen_held_out"), 0), matrix(tasks, MetaTest("unseen_held_out"), 0)
    )


def test_meta_test_is_sealed_until_it_is_opened():
    other = Told()
    tasks = ProjectedImages(Told(), 6, others={"other": other}, seed=0)
    tasks.open(test=False)
    assert "test" not in tasks.source.asked + other.asked
    for stream in tasks.streams():
        with pytest.raises(ValueError, match="sealed"):
            tasks.batch(0, 0, 1, 3, MetaTest(stream))
    tasks.open(test=True)
    assert tasks.batch(0, 0, 1, 3, MetaTest("other")).x.shape == (1, 3, 6)


def test_biased_tasks_share_one_permutation_and_unseen_tasks_do_not():
    source = Told()
    for part, examples in source.parts.items():
        source.parts[part] = Examples(
            examples.inputs[:K], torch.arange(K)
        )  # one image of each class: y is the permutation

    def shared(fraction, split):
        tasks = distribution(source=source, bias_fraction=fraction, num_tasks=1000)
        batch = tasks.batch(0, 0, 600, K, split)
        matrices = [matrix(tasks, split, b) for b in range(600)]
        rows = [recognise(batch.x[b], source, "train", matrices[b]) for b in range(600)]
        labels = torch.stack([batch.y[b][r.argsort()] for b, r in enumerate(rows)])
        return labels.unique(dim=0, return_counts=True)[1].max().item() / 600

    source.parts = dict.fromkeys(source.parts, source.parts["train"])
    assert shared(1.0, MetaTrain()) == 1.0
    assert shared(0.9, MetaTrain()) == pytest.approx(0.9 + 0.1 / 24, abs=0.04)
    assert shared(0.0, MetaTrain()) < 0.1
    assert shared(1.0, MetaValidation("unseen_held_out")) < 0.1


@pytest.mark.parametrize("num_tasks", [64, None])
def test_a_task_curriculum_matches_the_smaller_pool_and_then_the_whole_distribution(num_tasks):
    few, many = (distribution(num_tasks=count) for count in (8, num_tasks))
    tasks = distribution(num_tasks=num_tasks, task_curriculum={3: 8})
    for step, same in ((0, few), (2, few), (3, many), (9, many)):
        assert all(map(torch.equal, *(each.batch(step, 4, 6, 9, MetaTrain()) for each in (tasks, same))))
    for stream in many.streams():  # at any step
        assert all(map(torch.equal, *(each.batch(0, 0, 6, 9, MetaValidation(stream)) for each in (tasks, many))))


def test_tasks_of_a_curriculum_are_the_first_of_the_pool():
    tasks = distribution(num_tasks=64, task_curriculum={3: 4})
    keys_K = random.fold(random.key(0, "pool"), torch.arange(4))
    pool_KPD = random.normal(random.fold(keys_K, "projection"), (P, 6)) / math.sqrt(P)
    batch, seen = tasks.batch(2, 0, 30, 5, MetaTrain()), set()
    for b in range(30):
        known = [(recognise(batch.x[b], tasks.source, "train", a_PD) >= 0).all().item() for a_PD in pool_KPD]
        assert sum(known) == 1
        seen.add(known.index(True))
    assert seen == set(range(4))


def test_a_class_curriculum_holds_the_first_classes_of_each_task_until_it_ends():
    tasks, plain = distribution(class_curriculum={3: 2}), distribution()
    for step in (3, 9):
        assert all(map(torch.equal, *(each.batch(step, 0, 6, 9, MetaTrain()) for each in (tasks, plain))))
    split = MetaTest("unseen_held_out")
    assert all(map(torch.equal, *(each.batch(0, 0, 6, 9, split) for each in (tasks, plain))))
    batch, targets, pairs = tasks.batch(2, 0, 200, 40, MetaTrain()), tasks.source.parts["train"].targets, set()
    for b in range(200):
        rows = recognise(batch.x[b], tasks.source, "train", matrix(tasks, MetaTrain(), b, step=2))
        assert (rows >= 0).all() and len(set(rows.tolist())) == 40
        classes = {int(label): int(targets[row]) for row, label in zip(rows, batch.y[b], strict=True)}
        assert set(batch.y[b].tolist()) == {0, 1}
        assert all(classes[int(label)] == int(targets[row]) for row, label in zip(rows, batch.y[b], strict=True))
        pairs.add((classes[0], classes[1]))
    assert len(pairs) == K * (K - 1)  # every ordered pair of classes is some task's first two


def test_a_class_curriculum_draws_every_example_of_the_classes_alike():
    tasks = distribution(num_tasks=1, class_curriculum={1000: 2})
    task_matrix = matrix(tasks, MetaTrain(), 0)
    whole = tasks.batch(0, 0, 400, 10, MetaTrain())
    rows = recognise(whole.x.flatten(0, 1), tasks.source, "train", task_matrix)
    counts = torch.bincount(rows, minlength=200)
    allowed = torch.isin(tasks.source.parts["train"].targets, tasks.source.parts["train"].targets[rows].unique())
    assert (counts[~allowed] == 0).all() and stats.chisquare(counts[allowed].numpy()).pvalue > 1e-3
    part = tasks.batch(0, 150, 20, 10, MetaTrain())  # another rank
    assert torch.equal(part.y, whole.y[150:170])
    torch.testing.assert_close(part.x, whole.x[150:170], rtol=1e-6, atol=1e-6)


def test_a_class_curriculum_refuses_more_examples_than_its_classes_have():
    source = Told()
    source.parts["train"] = Examples(
        source.parts["train"].inputs, torch.tensor([0] * 100 + [1] * 60 + [2] * 37 + [3] * 3)
    )
    tasks = distribution(source=source, class_curriculum={5: 2})
    assert tasks.batch(0, 0, 3, 40, MetaTrain()).y.max() == 1
    with pytest.raises(ValueError, match=r"length is 41; accepted .* has 2 of 4 classes: at most 40"):
        tasks.batch(0, 0, 3, 41, MetaTrain())


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((None, 8, 2**31, 1), {}),
        ((None, None), {"bias_fraction": 0.5, "rank": 3}),
        ((16, 9), {"bias_fraction": 0.5, "task_curriculum": {2: 4}, "class_curriculum": {2: 2}}),
        ((None, 16), {"source": RandomSource(5, P, K), "num_features": 500}),
    ],
)
def test_stacked_distributions_match_each_ones_own_batches_bit_by_bit(sizes, settings):
    each = [distribution(num_tasks=size, seed=3 * seed - 1, **settings) for seed, size in enumerate(sizes)]
    stacked = StackedImages(each)
    for step, first in ((0, 0), (1, 7), (5, 0)):  # 12 at once, whichever they are of a step
        x_MBTD, y_MBT = stacked.batch(step, first, 12, 9)
        for m, own in enumerate(each):
            batch = own.batch(step, first, 12, 9, MetaTrain())
            assert torch.equal(x_MBTD[m], batch.x) and torch.equal(y_MBT[m], batch.y)
            assert m == 0 or not torch.equal(y_MBT[m], y_MBT[0])


@pytest.mark.parametrize(
    "other",
    [
        {"num_features": 7},
        {"bias_fraction": 0.1},
        {"rank": 4},
        {"class_curriculum": {1: 2}},
        {"source": RandomSource()},
    ],
)
def test_distributions_that_differ_in_more_than_seed_and_size_are_not_stacked(other):
    pair = [distribution(), distribution(**other)]
    assert StackedImages.accepts([pair[0], distribution(seed=1, num_tasks=9, others={"more": Told()})])
    assert not StackedImages.accepts(pair)
    with pytest.raises(ValueError, match="differ in seed and num_tasks alone"):
        StackedImages(pair)


def test_embeddings_in_an_npz_file_match_a_dense_projection_of_them(tmp_path):
    generator = np.random.default_rng(0)
    rows_NP, labels_N = generator.normal(3.0, 2.0, (60, P)).astype(np.float32), np.arange(60) % 3
    np.savez(tmp_path / "rows.npz", embeddings=rows_NP, labels=labels_N)
    tasks = distribution(source=TableSource(str(tmp_path / "rows.npz")), num_features=7)
    train_NP = tasks.source.read("train").inputs
    whitened = (rows_NP - rows_NP.mean(0)) / rows_NP.std(0)
    origin = torch.cdist(train_NP, torch.from_numpy(whitened)).argmin(1)  # the row of the file that each example is
    assert len(origin.unique()) == len(train_NP)
    batch, chosen = tasks.batch(0, 0, 4, 15, MetaTrain()), rows_NP[origin.numpy()]
    for b in range(4):
        dense_ND = (chosen - chosen.mean(0)) / chosen.std(0) @ matrix(tasks, MetaTrain(), b).numpy()
        distance, example = torch.cdist(batch.x[b].double(), torch.from_numpy(dense_ND).double()).min(1)
        assert distance.max() < 1e-3
        file_labels = labels_N[origin[example].numpy()].tolist()
        pairs = set(zip(file_labels, batch.y[b].tolist(), strict=True))
        assert len(pairs) == len({label for label, _ in pairs}) == len({label for _, label in pairs}) == 3


def test_the_rotated_draw_has_the_law_of_the_plain_one():
    digits = ImageSource("digits")
    plain = distribution(source=digits, num_features=16)
    full = distribution(source=digits, num_features=16, rank=64)
    cut = distribution(source=digits, num_features=16, rank=0.95)
    assert full.kept_variance["base"] == pytest.approx(1.0) and 0.95 <= cut.kept_variance["base"] < 0.97
    assert full._data["base"].read("train").inputs.shape[1] == 64 > cut._data["base"].read("train").inputs.shape[1]

    def inner_products(tasks, salt):
        """<A x, A x'> for fixed pairs x, x' under 4000 fresh A, by drawing A for the features as ``batch`` does."""
        pair = tasks._data["base"].read("train").inputs[[3, 11]]
        projected = pair @ random.normal(random.fold(random.key(salt), torch.arange(4000)), (pair.shape[1], 16))
        return torch.cat([(projected[:, 0] * projected[:, 1]).sum(-1), projected.square().sum(-1).flatten()]).numpy()

    assert stats.ks_2samp(inner_products(plain, 0), inner_products(full, 1)).pvalue > 1e-3
    shrunk = stats.ks_2samp(inner_products(plain, 0) * 0.8, inner_products(full, 1)).pvalue
    assert shrunk < 1e-6  # the test can tell a wrong variance


def test_a_rotation_does_not_depend_on_signs_and_keeps_inner_products():
    digits = ImageSource("digits")
    tasks = distribution(source=digits, num_features=16, rank=64)
    x, rotated = digits.read("test").inputs, tasks._data["base"].read("test").inputs * 8  # sqrt(64) pixels
    torch.testing.assert_close(rotated @ rotated.T, x @ x.T, rtol=1e-4, atol=1e-3)
    assert (tasks._rotations["base"].abs().max(0).values == tasks._rotations["base"].max(0).values).all()


def test_a_repeating_source_fills_longer_sequences_one_permutation_after_another():
    tasks = distribution(source=RandomSource(num_examples=5, num_features=P, num_classes=3))
    labels = tasks.batch(0, 0, 4, 12, MetaTrain())
    for b in range(4):
        rounds = [labels.x[b, r : r + 5].unique(dim=0) for r in (0, 5)]
        assert len(rounds[0]) == 5
        torch.testing.assert_close(*rounds)


def test_other_data_may_have_another_size_and_fewer_classes():
    wide = Told(features=33)
    wide.num_classes = 2
    tasks = distribution(others={"wide": wide})
    assert tasks.batch(0, 0, 2, 5, MetaTest("wide")).x.shape == (2, 5, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_features=0), "num_features is 0"),
        (dict(num_tasks=0), "num_tasks is 0"),
        (dict(num_tasks=2**31 + 1), "num_tasks is 2147483649"),
        (dict(bias_fraction=1.5), "bias_fraction is 1.5"),
        (dict(rank=1.5), "rank is 1.5"),
        (dict(others={"seen_train": Told()}), "names a stream 'seen_train'"),
        (dict(task_curriculum={0: 4}), "a step of task_curriculum is 0"),
        (dict(num_tasks=8, task_curriculum={5: 9}), "task_curriculum before step 5 is 9; accepted: 1 <= .* <= 8"),
        (dict(class_curriculum={5: 0}), "class_curriculum before step 5 is 0"),
        (dict(class_curriculum={5: 5}), "class_curriculum before step 5 is 5; accepted: 1 <= .* <= 4"),
        (dict(others={"big": RandomSource(num_classes=9)}), "big has 9 classes; accepted: at most the base's 4"),
    ],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        distribution(**settings)


def test_refuses_sequences_longer_than_the_data_and_unknown_streams():
    tasks = distribution()
    with pytest.raises(ValueError, match="length is 201; accepted: at most the 200 examples of base train"):
        tasks.batch(0, 0, 1, 201, MetaTrain())
    with pytest.raises(ValueError, match="stream is 'seen_train'; accepted: unseen_held_out"):
        tasks.batch(0, 0, 1, 2, MetaValidation("seen_train"))


@pytest.mark.gpu
def test_is_the_same_on_the_gpu():
    tasks = distribution(num_tasks=64)
    here, there = (tasks.batch(2, 0, 8, 9, MetaTrain(), device) for device in ("cpu", "cuda"))
    assert torch.equal(here.y, there.y.cpu())
    torch.testing.assert_close(here.x, there.x.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_stacked_distributions_are_the_same_on_the_gpu():
    stacked = StackedImages([distribution(num_tasks=size, seed=seed) for seed, size in enumerate((None, 8, 64))])
    here, there = (stacked.batch(2, 0, 8, 9, device) for device in ("cpu", "cuda"))
    assert torch.equal(here.y, there.y.cpu())
    torch.testing.assert_close(here.x, there.x.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_batch_on_the_gpu_does_not_wait_for_it():
    tasks = distribution(num_tasks=64, bias_fraction=0.5)
    tasks.batch(0, 0, 8, 9, MetaTrain(), "cuda")  # moves the examples there
    torch.cuda.set_sync_debug_mode("error")
    try:
        tasks.batch(1, 0, 8, 9, MetaTrain(), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inference", [False, True])
def test_threads_share_the_work_and_change_nothing(inference):
    tasks = distribution(num_features=500)  # 40 * 20 * 500 normals: enough to be shared
    alone = tasks.batch(0, 0, 40, 30, MetaTrain())
    torch.set_num_threads(2)
    try:
        with torch.inference_mode(inference):
            shared = tasks.batch(0, 0, 40, 30, MetaTrain())
    finally:
        torch.set_num_threads(1)
    assert torch.equal(shared.x, alone.x) and torch.equal(shared.y, alone.y)
