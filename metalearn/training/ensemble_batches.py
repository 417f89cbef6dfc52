"""The training batches of an ensemble, drawn for all of its members at once where that can be.

M members, B sequences, T examples, D features.
"""

from collections.abc import Sequence

import torch

from metalearn.base import Batch
from metalearn.tasks.images import StackedImages
from metalearn.training.data import Request, TaskBatches


class MemberBatches(TaskBatches):
    """The training batches of all members as one: x (M, B, T, D), y (M, B, T), each the member's own.

    Drawn in one go where members have the same data and their tasks differ in seed and number alone; else one by one.
    """

    def __init__(self, members: Sequence[TaskBatches]):
        first = members[0]
        super().__init__(first.tasks, first.length, first.meta_batch_size)
        self.distributions = [member.tasks for member in members]
        together = StackedImages.accepts(self.distributions)
        self.stacked = StackedImages(self.distributions) if together else None

    def _make(self, request: Request, device: torch.device) -> Batch:
        if self.stacked is not None:
            return self.stacked.batch(request.step, request.first, request.tasks, self.length, device)
        arguments = request.step, request.first, request.tasks, self.length, request.split, device
        own = [distribution.batch(*arguments) for distribution in self.distributions]
        return Batch(*(torch.stack(parts) for parts in zip(*own, strict=True)))
