"""Task distributions as a LightningDataModule: loaders carry requests, batches are made on the device that asked for them."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from metalearn.base import BASE, Batch, MetaTest, MetaTrain, MetaValidation, Split, TaskDistribution, require_range


class Request(NamedTuple):
    """A batch by reference: sequences ``first … first + tasks - 1`` of global step ``step``."""

    step: int
    first: int
    tasks: int
    split: Split
    following: int | None = None  # number of the training request after this one


class Requests(IterableDataset):
    """An iterable of requests that starts anew, from the trainer's state of that moment, at every iteration."""

    def __init__(self, start: Callable[[], Iterator[Any]]):
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        return self.start()


class TaskBatches(LightningDataModule):
    """Meta-batches of a task distribution, the same global batch for every world size and accumulation.

    Step s uses sequences 0 … meta_batch_size - 1 of that step; micro-batch m on rank r of W takes the (m·W + r)-th
    share. Nothing but the step is needed to resume. ``fit`` and ``validate`` open meta-train and meta-validation data
    only; ``test`` opens meta-test.

    Args:
        tasks: the distribution.
        length: examples T per sequence, at least 1.
        meta_batch_size: sequences per optimizer step, over all ranks and accumulated micro-batches.
        evaluation_sequences: sequences per evaluation stream, over all ranks.
        evaluation_batch_size: sequences of an evaluation batch, per rank.

    Raises:
        ValueError: for sizes below 1, a meta-batch that does not divide, or a checkpoint that was trained on other
        data or with another seed of the tasks.
    """

    def __init__(
        self,
        tasks: TaskDistribution,
        length: int,
        meta_batch_size: int,
        evaluation_sequences: int = 1024,
        evaluation_batch_size: int = 256,
    ):
        super().__init__()
        for name, value in dict(
            length=length,
            meta_batch_size=meta_batch_size,
            evaluation_sequences=evaluation_sequences,
            evaluation_batch_size=evaluation_batch_size,
        ).items():
            require_range(name, value, 1)
        self.tasks, self.length, self.meta_batch_size = tasks, length, meta_batch_size
        self.evaluation_sequences, self.evaluation_batch_size = evaluation_sequences, evaluation_batch_size
        self._thread = ThreadPoolExecutor(1, "next_batch")
        self._ahead: dict[Request, Future[Batch]] = {}

    def prepare_data(self) -> None:
        self.tasks.open(test=False)  # one process decodes and caches; the others read the cache

    def setup(self, stage: str) -> None:
        self.tasks.open(test=stage == "test")

    def train_dataloader(self) -> DataLoader:
        return request_loader(self._training_requests)

    def val_dataloader(self) -> list[DataLoader]:
        return [request_loader(self._evaluation_requests(MetaValidation(stream))) for stream in self.tasks.streams()]

    def test_dataloader(self) -> list[DataLoader]:
        return [request_loader(self._evaluation_requests(MetaTest(stream))) for stream in self.tasks.streams()]

    def transfer_batch_to_device(self, batch: Request, device: torch.device, dataloader_idx: int) -> Batch:
        """Make the batch; on a CPU, the next training batch is made meanwhile in a thread, while this one is trained on.

        A GPU needs no thread: it is given the work and does not wait. Batches are pure functions, so order changes nothing.
        """
        if batch.following is None or device.type != "cpu":
            return self._make(batch, device)
        ready, following = self._ahead.pop(batch, None), self._training_request(batch.following)
        self._ahead = {following: self._thread.submit(self._make, following, device)}
        return self._make(batch, device) if ready is None else ready.result()

    def _make(self, request: Request, device: torch.device) -> Batch:
        return self.tasks.batch(request.step, request.first, request.tasks, self.length, request.split, device)

    def state_dict(self) -> dict[str, Any]:
        return self.tasks.record()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse other data than those of the checkpoint: all of them in ``fit``, those that it was trained on elsewhere."""
        saved, own = self._binding(state_dict), self._binding(self.state_dict())
        for name in own:
            if saved[name] != own[name]:
                raise ValueError(
                    f"the checkpoint was trained on data of {name} {_short(saved[name])}, not {_short(own[name])}; "
                    "accepted: the same data, or another --run_dir"
                )

    def _binding(self, record: dict[str, Any]) -> dict[str, Any]:
        """What must not differ: in ``fit`` all data and the seed; else the training data, and the seed of tasks seen in it."""
        fingerprint, seed = record.get("fingerprint", {}), {"seed": record.get("seed")}
        if self._trainer.state.fn == "fit":
            return {"fingerprint": fingerprint} | seed
        seen = any(stream.split("_")[0] == "seen" for stream in self.tasks.streams())
        return {"fingerprint": fingerprint.get(BASE)} | (seed if seen else {})

    @property
    def _trainer(self) -> Any:
        assert self.trainer is not None, "TaskBatches is used through a Trainer"
        return self.trainer

    def _training_requests(self) -> Iterator[Request]:
        accumulation, world = self._trainer.accumulate_grad_batches, self._trainer.world_size
        share, rest = divmod(self.meta_batch_size, accumulation * world)
        if rest or not share:
            raise ValueError(
                f"meta_batch_size is {self.meta_batch_size}; accepted: a multiple of "
                f"accumulate_grad_batches * ranks = {accumulation} * {world}"
            )
        yield from map(self._training_request, itertools.count(self._trainer.global_step * accumulation))

    def _training_request(self, index: int) -> Request:
        """Request number step * accumulation + micro-batch of this rank's stream."""
        accumulation, world = self._trainer.accumulate_grad_batches, self._trainer.world_size
        share = self.meta_batch_size // (accumulation * world)
        step, micro = divmod(index, accumulation)
        first = (micro * world + self._trainer.global_rank) * share
        return Request(step, first, share, MetaTrain(), following=index + 1)

    def _evaluation_requests(self, split: Split) -> Callable[[], Iterator[Request]]:
        def requests() -> Iterator[Request]:
            size, total = self.evaluation_batch_size, self.evaluation_sequences
            for number in range(self._trainer.global_rank, math.ceil(total / size), self._trainer.world_size):
                yield Request(0, number * size, min(size, total - number * size), split)

        return requests


def _short(value: Any) -> Any:
    """Hashes as they are told apart by eye."""
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    return value[:8] if isinstance(value, str) else value


def request_loader(start: Callable[[], Iterator[Any]]) -> DataLoader:
    """A loader that makes no batches itself: it hands out what the iterator gives."""
    return DataLoader(Requests(start), batch_size=None, num_workers=0)
