import pytest
import torch
from torch.nn import functional

from metalearn import random
from metalearn.models.self_modifying import VSML, VSMLWithoutSymmetries
from metalearn.models.tokens import Tokens

B, T, D, K = 2, 6, 4, 3


def sequences(classes=K):
    x = random.normal(random.key(0), (B, T, D)).double()
    y = random.integers(random.key(1), (B, T), classes)
    return x, y if classes > 1 else random.normal(random.key(1), (B, T)).double()


def built(outputs=K, **settings):
    torch.manual_seed(0)
    return VSML(D + outputs, outputs, width=5, message_size=3, **settings).double()


def cell_step(weight, bias, enters, hidden, cell):
    i, g, f, o = (weight @ torch.cat([*enters, hidden]) + bias).chunk(4)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def grid_written_out(grid, rows, columns, hidden, cell):
    """Cell by cell; ``hidden`` and ``cell`` are dictionaries by (i, j). What came out last token enters this one."""
    p = dict(grid.named_parameters())
    num_rows, num_columns = len(rows), len(columns)
    back = [
        p["backward_messenger.weight"] @ (sum(hidden[i, j] for j in range(num_columns)) / num_columns)
        for i in range(num_rows)
    ]
    ahead = [
        p["forward_messenger.weight"] @ (sum(hidden[i, j] for i in range(num_rows)) / num_rows)
        for j in range(num_columns)
    ]
    for i, j in hidden:
        for _ in range(grid.micro_ticks):
            enters = (rows[i], back[i], columns[j], ahead[j])
            hidden[i, j], cell[i, j] = cell_step(p["cell.weight"], p["cell.bias"], enters, hidden[i, j], cell[i, j])
    return [
        p["forward_messenger.weight"] @ (sum(hidden[i, j] for i in range(num_rows)) / num_rows)
        for j in range(num_columns)
    ]


@pytest.mark.parametrize(("outputs", "error_feedback"), [(K, False), (K, True), (1, True)])
def test_matches_vsml_cell_by_cell(outputs, error_feedback):
    learner = built(outputs=outputs, error_feedback=error_feedback, micro_ticks=3, bound=0.05)
    tokens = Tokens("paper", D, outputs).encode(*sequences(outputs))
    for sequence, answers in zip(tokens, learner(tokens), strict=True):
        hidden = {(i, j): torch.zeros(5).double() for i in range(D) for j in range(outputs)}
        cell, z = dict(hidden), torch.zeros(outputs).double()
        for t, token in enumerate(sequence):
            x, y = token[:D], token[D:]
            wrong = (z if outputs == 1 else z.softmax(0) * (t > 0)) - y
            columns = torch.stack([y, wrong], 1) if error_feedback else y[:, None]
            said = grid_written_out(learner.grid, x[:, None], columns, hidden, cell)
            z = 0.05 * torch.stack([message[0] for message in said]).div(0.05).tanh()
            torch.testing.assert_close(answers[t], z, rtol=1e-12, atol=1e-14)


def test_matches_vsml_without_symmetries_cell_by_cell():
    sizes = dict(grid_size=2, width=5, message_size=3, row_size=4, column_size=2)
    learner = VSMLWithoutSymmetries(D + K, K, **sizes).double()
    tokens = Tokens("paper", D, K).encode(*sequences())
    p = dict(learner.named_parameters())
    for sequence, answers in zip(tokens, learner(tokens), strict=True):
        hidden = {(i, j): torch.zeros(5).double() for i in range(2) for j in range(2)}
        cell = dict(hidden)
        for t, token in enumerate(sequence):
            rows = (p["embed.features.weight"] @ token[:D] + p["embed.features.bias"]).view(2, 4)
            columns = (p["embed.label.weight"] @ token[D:] + p["embed.label.bias"]).view(2, 2)
            said = grid_written_out(learner.grid, rows, columns, hidden, cell)
            wanted = p["head.weight"] @ torch.cat(said) + p["head.bias"]
            torch.testing.assert_close(answers[t], wanted, rtol=1e-12, atol=1e-14)


def permuted(learner, order_D, order_K):
    """Answers to permuted inputs and classes, against permuted answers."""
    tokens = Tokens("shift", D, K)
    x, y = sequences()
    inverse = order_K.argsort()
    return learner(tokens.encode(x[..., order_D], inverse[y])), learner(tokens.encode(x, y))[..., order_K]


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_vsml_is_equivariant_under_permutations_of_inputs_and_of_classes(seed, error_feedback):
    torch.manual_seed(seed)
    learner = VSML(2 * D + K, K, width=5, message_size=3, error_feedback=error_feedback).double()
    with torch.no_grad():
        learner.grid.forward_messenger.weight.mul_(10)  # answers that matter
    ours, wanted = permuted(learner, torch.randperm(D), torch.randperm(K))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    assert wanted.std(-1)[:, 1:].min() > 1e-3


def test_projections_take_the_symmetries_away():
    learner = VSMLWithoutSymmetries(2 * D + K, K, grid_size=3).double()
    for order_D, order_K in ((torch.arange(D).flip(0), torch.arange(K)), (torch.arange(D), torch.arange(K).flip(0))):
        ours, wanted = permuted(learner, order_D, order_K)
        assert (ours - wanted).abs().max() > 1e-3


def test_error_feedback_is_the_gradient_of_the_last_loss():
    learner = built(error_feedback=True)
    tokens = Tokens("paper", D, K).encode(*sequences())
    logits, state = learner.prefill(tokens[:, :3], learner.init_state(B, "cpu", torch.float64))
    z = logits[:, -1].detach().requires_grad_()
    loss = functional.cross_entropy(z, sequences()[1][:, 2], reduction="sum")
    columns = learner.read(tokens[:, 3], learner.grid.messages(state["hidden"]))[1]
    torch.testing.assert_close(columns[..., 1], torch.autograd.grad(loss, z)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [VSML, VSMLWithoutSymmetries])
def test_refuses_tokens_without_features(kind):
    with pytest.raises(ValueError, match="num_inputs is 3; accepted: 4 <= num_inputs"):
        kind(3, 3)
