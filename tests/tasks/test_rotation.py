"""What makes two data sets one, and what is then read once. Rotations themselves are tested with ProjectedImages."""

import pytest
import torch

from metalearn import random
from metalearn.base import Examples, MetaTest, MetaTrain, Source
from metalearn.tasks.images import ProjectedImages
from metalearn.tasks.rotation import RotatedData
from metalearn.tasks.sources import TableSource
from metalearn.tasks.synthetic import RandomSource


class Counting(Source):
    """No dataclass: only its fingerprint tells it from others."""

    num_classes = 3

    def __init__(self, content="a"):
        self.content, self.read_parts = content, []

    def read(self, part):
        self.read_parts.append(part)
        key = random.key(0, self.content, part)
        return Examples(random.normal(key, (9, 5)), torch.arange(9) % 3)

    def fingerprint(self):
        return self.content


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((TableSource("missing.csv"), 2), (TableSource("missing.csv"), 2), True),  # without being opened
        ((TableSource("missing.csv"), 2), (TableSource("missing.csv"), 3), False),
        ((TableSource("missing.csv"), 2), (TableSource("absent.csv"), 2), False),
        ((RandomSource(20), None), (RandomSource(20), None), True),
        ((RandomSource(20), None), (RandomSource(20, seed=1), None), False),
        ((Counting("a"), 2), (Counting("a"), 2), True),
        ((Counting("a"), 2), (Counting("b"), 2), False),
        ((Counting("a"), 2), (RandomSource(20), 2), False),
    ],
)
def test_data_are_the_same_where_settings_or_content_are(one, other, same):
    assert RotatedData(*one).is_same_as(RotatedData(*other)) is same
    assert RotatedData(*one).is_same_as(RotatedData(*one))


def test_what_is_shared_is_read_once_and_opened_by_each():
    sources = [Counting() for _ in range(3)]
    alone, first, second = (
        ProjectedImages(source, 4, seed=seed, others={"more": Counting(content)})
        for source, seed, content in zip(sources, (1, 0, 1), "bac", strict=True)
    )
    second.share(first)
    for tasks in (alone, first, second):
        tasks.open(test=tasks is not second)
    assert sources[1].read_parts.count("validation") == 1 and not sources[2].read_parts
    assert alone.record()["fingerprint"] == {"base": "a", "more": "b"}
    assert second.record()["fingerprint"] == {"base": "a", "more": "c"} and second.record()["seed"] == 1
    assert all(map(torch.equal, *(tasks.batch(3, 0, 4, 5, MetaTrain()) for tasks in (alone, second))))
    with pytest.raises(ValueError, match="sealed"):
        second.batch(0, 0, 1, 3, MetaTest("unseen_held_out"))
