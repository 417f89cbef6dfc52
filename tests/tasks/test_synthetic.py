import hashlib

import pytest
import torch
from scipy import stats

from metalearn.random import key
from metalearn.tasks.synthetic import HeavyTailedRegression, student


@pytest.mark.parametrize("degrees_of_freedom", [1.0, 1.5, 4.0])
def test_matches_students_distribution(degrees_of_freedom):
    drawn = student(key(0), (20000,), degrees_of_freedom)
    assert stats.kstest(drawn.double().numpy(), stats.t(degrees_of_freedom).cdf).pvalue > 0.01
    assert stats.kstest(drawn.double().numpy(), stats.t(degrees_of_freedom * 1.5).cdf).pvalue < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_function_has_mean_zero_and_deviation_one(seed):
    source = HeavyTailedRegression(num_test=200_000, seed=seed)
    targets = source.read("test").targets
    assert abs(float(targets.mean())) < 0.02 and float(targets.std()) == pytest.approx(1, abs=0.02)


def test_training_targets_alone_are_contaminated():
    source = HeavyTailedRegression(num_train=5000, noise_scale=0.3)
    noise = {}
    for part in ("train", "validation", "test"):
        inputs, targets = source.read(part)
        assert inputs.shape == (len(targets), 4) and len(targets) == getattr(source, f"num_{part}")
        noise[part] = targets - source.function(inputs)
    assert noise["validation"].abs().max() == noise["test"].abs().max() == 0
    assert stats.kstest(noise["train"].double().numpy(), stats.t(1.5, scale=0.3).cdf).pvalue > 0.01
    assert noise["train"].abs().max() > 20


def test_parts_are_different_and_the_same_when_read_again():
    source = HeavyTailedRegression()
    inputs = torch.cat([source.read(part).inputs for part in ("train", "validation", "test")])
    assert len(inputs.unique(dim=0)) == len(inputs)
    assert all(map(torch.equal, source.read("train"), HeavyTailedRegression().read("train")))
    assert not torch.equal(source.read("train").targets, HeavyTailedRegression(seed=1).read("train").targets)


def test_fingerprints_tell_data_apart():
    changes = [dict(seed=1), dict(noise_scale=0.4), dict(num_train=7), dict(degrees_of_freedom=2.0)]
    found = {HeavyTailedRegression(**options).fingerprint() for options in [{}, {}, *changes]}
    assert len(found) == 5 and all(len(one) == len(hashlib.sha256().hexdigest()) for one in found)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: HeavyTailedRegression(num_features=0), "num_features is 0"),
        (lambda: HeavyTailedRegression(num_test=0), "num_test is 0"),
        (lambda: HeavyTailedRegression(degrees_of_freedom=0.0), "degrees_of_freedom is 0.0"),
        (lambda: HeavyTailedRegression(noise_scale=-1.0), "noise_scale is -1.0"),
        (lambda: HeavyTailedRegression().read("all"), "part is 'all'"),
    ],
)
def test_refuses(build, named):
    with pytest.raises(ValueError, match=named):
        build()
