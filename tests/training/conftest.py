"""Training runs in code, as small as they get: three classes, five examples of random inputs."""

import functools

import pytest
import torch
from pytorch_lightning import Callback, Trainer

from metalearn.models.recurrent import LSTM
from metalearn.tasks.images import ProjectedImages
from metalearn.tasks.synthetic import RandomSource
from metalearn.training.data import TaskBatches
from metalearn.training.in_context import InContextLearning

LENGTH, CLASSES = 5, 3


class Stop(Callback):
    """Ends training after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def make_data():
    def make_data(meta_batch_size=8, source=None, num_tasks=None, seed=0, **options):
        source = source or RandomSource(num_features=6, num_classes=CLASSES)
        tasks = ProjectedImages(source, num_features=4, num_tasks=num_tasks, seed=seed)
        return TaskBatches(tasks, LENGTH, meta_batch_size, **options)

    return make_data


@pytest.fixture
def make_trainer(tmp_path):
    def make_trainer(*callbacks, max_steps=4, **options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options = {"limit_val_batches": 0, "accelerator": "cpu", "enable_model_summary": False, **quiet} | options
        return Trainer(callbacks=list(callbacks), max_steps=max_steps, default_root_dir=tmp_path, **options)

    return make_trainer


@pytest.fixture
def make_model():
    def make_model(optimizer=torch.optim.SGD, lr=0.1, **options):
        torch.manual_seed(0)
        learner = functools.partial(LSTM, width=8, depth=1)
        return InContextLearning(learner, "shift", functools.partial(optimizer, lr=lr), **options)

    return make_model


@pytest.fixture
def train(make_trainer, make_model, make_data):
    """Train ``make_model(**model)`` on ``make_data(**data)`` and return the Trainer."""

    def train(*callbacks, model=None, data=None, ckpt_path=None, **options):
        trainer = make_trainer(*callbacks, **options)
        trainer.fit(make_model(**(model or {})), make_data(**(data or {})), ckpt_path=ckpt_path)
        return trainer

    return train


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.lightning_module.parameters()])
