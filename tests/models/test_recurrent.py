import pytest
import torch

from metalearn import random, tree
from metalearn.models.recurrent import GRU, LSTM

WIDTH, DEPTH = 5, 2


def lstm_cell(wx, wh, b, hidden, cell):
    i, f, g, o = (wx + wh + b).chunk(4)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gru_cell(wx, wh, b, hidden, cell):
    """The bias ``b`` is on the side of the token; that of the recurrent products is in ``wh``."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (wx + b).chunk(3), wh.chunk(3)
    update = (x_z + h_z).sigmoid()
    return (1 - update) * (x_n + (x_r + h_r).sigmoid() * h_n).tanh() + update * hidden, cell


def written_out(learner, name, step, x):
    p = dict(learner.named_parameters())
    answers = []
    for sequence in x:
        hidden, cell = torch.zeros(DEPTH, WIDTH).double(), torch.zeros(DEPTH, WIDTH).double()
        for token in sequence:
            for layer in range(DEPTH):
                w_x, w_h, b_x, b_h = (
                    p[f"{name}.{kind}_l{layer}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                new = step(w_x @ token, w_h @ hidden[layer] + b_h, b_x, hidden[layer], cell[layer])
                hidden, cell = (
                    torch.cat([s[:layer], n[None], s[layer + 1 :]]) for s, n in zip((hidden, cell), new, strict=True)
                )
                token = hidden[layer]
            answers.append(p["head.weight"] @ token + p["head.bias"])
    return torch.stack(answers).view(len(x), x.shape[1], -1)


@pytest.mark.parametrize(("kind", "name", "step"), [(LSTM, "lstm", lstm_cell), (GRU, "gru", gru_cell)])
def test_matches_recurrence_written_out(kind, name, step):
    learner = kind(4, 3, width=WIDTH, depth=DEPTH).double()
    x = random.normal(random.key(0), (2, 6, 4)).double()
    torch.testing.assert_close(learner(x), written_out(learner, name, step, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_cannot_be_stacked_and_says_so(kind):
    """The day that vmap takes torch's fused recurrences this fails, and the attribute may go."""
    learner = kind(4, 3, width=WIDTH)
    stacked = {name: torch.stack([p, p]) for name, p in learner.named_parameters()}
    x = random.normal(random.key(0), (2, 6, 4))
    assert not kind.can_be_stacked
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda params: tree.call(learner, params, {}, x)[0])(stacked)
