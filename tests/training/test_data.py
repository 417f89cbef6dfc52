"""data.py: every world size and accumulation sees the same global batch, every evaluation sequence is seen once."""

from types import SimpleNamespace

import pytest
import torch

from metalearn.base import MetaTest, MetaTrain, MetaValidation


def attach(data, rank=0, world=1, accumulation=1, step=0, command="fit"):
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, accumulate_grad_batches=accumulation,
                                   global_step=step, state=SimpleNamespace(fn=command))  # fmt: skip
    return data


def take(data, count):
    return [request for request, _ in zip(data.train_dataloader(), range(count), strict=False)]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_ranks_and_micro_batches_make_up_the_same_global_batch(make_data, world, accumulation):
    data = make_data(meta_batch_size=8)
    data.setup("fit")
    whole = data.tasks.batch(3, 0, 8, data.length, MetaTrain())
    ranks = [take(attach(data, rank, world, accumulation, step=3), accumulation) for rank in range(world)]
    requests = [ranks[rank][micro] for micro in range(accumulation) for rank in range(world)]
    assert all(request.step == 3 and request.split == MetaTrain() for request in requests)
    parts = [data.transfer_batch_to_device(request, torch.device("cpu"), 0) for request in requests]
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
    assert torch.equal(torch.cat([part.y for part in parts]), whole.y)


def test_stream_goes_on_from_the_step_of_the_trainer(make_data):
    data = attach(make_data(), accumulation=2, step=7)
    assert [request.step for request in take(data, 5)] == [7, 7, 8, 8, 9]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_shares_out_every_sequence_once(make_data, world):
    data = make_data(evaluation_sequences=10, evaluation_batch_size=4)
    seen = []
    for rank in range(world):
        (loader,) = attach(data, rank, world).val_dataloader()
        for request in loader:
            assert request.step == 0 and request.split == MetaValidation("unseen_held_out")
            seen += range(request.first, request.first + request.tasks)
    assert sorted(seen) == list(range(10))


def test_streams_of_the_test_command_are_meta_test(make_data):
    loaders = attach(make_data(num_tasks=2, evaluation_sequences=1)).test_dataloader()
    assert [next(iter(loader)).split for loader in loaders] == [
        MetaTest(stream) for stream in ("seen_train", "seen_held_out", "unseen_held_out")
    ]


def test_refuses_a_meta_batch_that_does_not_divide(make_data):
    with pytest.raises(ValueError, match=r"meta_batch_size is 8; accepted: a multiple of .* = 3 \* 2"):
        take(attach(make_data(), world=2, accumulation=3), 1)
    with pytest.raises(ValueError, match="meta_batch_size is 1"):
        take(attach(make_data(meta_batch_size=1), world=2), 1)


def test_refuses_to_resume_on_other_data(make_data):
    for command, num_tasks, refused in [("fit", None, "both"), ("test", 3, "both"), ("test", None, "fingerprint")]:
        data = attach(make_data(num_tasks=num_tasks), command=command)
        data.setup(command)
        data.load_state_dict(data.state_dict())
        for name, other in {"fingerprint": {"base": "0"}, "seed": 1}.items():
            if refused in (name, "both"):
                with pytest.raises(ValueError, match=f"data of {name}.*accepted: the same data"):
                    data.load_state_dict(data.state_dict() | {name: other})
            else:  # other unseen tasks, of examples that are held out all the same
                data.load_state_dict(data.state_dict() | {name: other})


@pytest.mark.parametrize("name", ["meta_batch_size", "evaluation_sequences", "evaluation_batch_size"])
def test_refuses_sizes_below_one(make_data, name):
    with pytest.raises(ValueError, match=f"{name} is 0; accepted: 1 <= {name}"):
        make_data(**{name: 0})


def test_the_batch_made_ahead_is_the_one_asked_for(make_data, monkeypatch):
    data = attach(make_data(), accumulation=2, step=3)
    data.setup("fit")
    made, batch = [], data.tasks.batch
    monkeypatch.setattr(
        data.tasks, "batch", lambda step, first, *rest: made.append((step, first)) or batch(step, first, *rest)
    )
    requests = take(data, 5)
    batches = [data.transfer_batch_to_device(request, torch.device("cpu"), 0) for request in requests]
    for request, ours in zip(requests, batches, strict=True):
        assert torch.equal(ours.x, batch(request.step, request.first, request.tasks, data.length, MetaTrain()).x)
    data._thread.shutdown()
    assert sorted(made) == sorted({(r.step, r.first) for r in requests} | {(5, 4)})  # each once, and one more ahead
