"""What a learner that was really meta-trained does on tasks it has never seen."""

import pytest
import torch

from metalearn.base import MetaTest
from metalearn.models.saving import load_learner
from metalearn.models.tokens import Tokens
from metalearn.tasks.images import ProjectedImages
from metalearn.tasks.oracles import nearest_neighbour
from metalearn.tasks.sources import ImageSource

SEQUENCES, LENGTH, CLASSES = 2048, 32, 5


@pytest.fixture(scope="module", params=[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], ids=["held-out", "unseen-classes"])
def evaluated(request, meta_trained_checkpoint):
    """(correct (B, T), the same after labels were changed from the middle on, batch) on unseen tasks."""
    learner, card, _ = load_learner(meta_trained_checkpoint)
    tasks = ProjectedImages(ImageSource("digits", classes=request.param), num_features=card["num_features"], seed=1)
    tasks.open(test=True)
    batch = tasks.batch(0, 0, SEQUENCES, LENGTH, MetaTest("unseen_held_out"))
    tokens = Tokens(card["tokens"], card["num_features"], card["num_classes"])
    with torch.inference_mode():
        predicted = learner(tokens.encode(*batch)).argmax(-1)
        later = torch.cat([batch.y[:, :16], (batch.y[:, 16:] + 1) % CLASSES], dim=1)
        perturbed = learner(tokens.encode(batch.x, later)).argmax(-1)
    return predicted, perturbed, batch


def test_knows_nothing_before_the_first_example(evaluated):
    predicted, _, batch = evaluated
    accuracy = (predicted == batch.y)[:, 0].float().mean().item()
    assert accuracy == pytest.approx(1 / CLASSES, abs=4 * (0.2 * 0.8 / SEQUENCES) ** 0.5)


def test_learns_in_context_on_the_way_to_nearest_neighbours(evaluated):
    predicted, _, batch = evaluated
    learner = (predicted == batch.y).float().mean(0)
    answers_B1 = nearest_neighbour(batch.x, batch.y, [LENGTH - 1])
    neighbour = (answers_B1 == batch.y[:, -1:]).float().mean().item()
    assert learner[-1] > 0.55 and learner[-1] > learner[5] > learner[1] > 1 / CLASSES
    assert learner[-1] > neighbour - 0.25  # a third of quick.yaml's training


def test_labels_are_used_after_and_never_before_they_are_shown(evaluated):
    predicted, perturbed, _ = evaluated
    assert torch.equal(predicted[:, :17], perturbed[:, :17])  # the label of example 16 is first visible at 17
    assert (predicted[:, 17:] != perturbed[:, 17:]).float().mean() > 0.05
