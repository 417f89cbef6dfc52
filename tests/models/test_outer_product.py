import torch

from metalearn import random
from metalearn.models.outer_product import OuterProductLSTM

WIDTH, HEADS = 3, 2


def built():
    torch.manual_seed(0)
    learner = OuterProductLSTM(5, 4, width=WIDTH, heads=HEADS).double()
    with torch.no_grad():
        learner.scale.fill_(1.7)  # gates far from one half
    return learner, random.normal(random.key(0), (2, 6, 5)).double()


def written_out(learner, x):
    """Entry by entry of every cell state."""
    p = dict(learner.named_parameters())
    scale = (1 + p["scale"].exp()).log()
    answers = []
    for sequence in x:
        hidden, cell = torch.zeros(HEADS * WIDTH).double(), torch.zeros(HEADS, WIDTH, WIDTH).double()
        for token in sequence:
            z = p["embed.weight"] @ token + p["embed.bias"] + p["recur.weight"] @ hidden
            heads = []
            for head in range(HEADS):
                a_i, a_g, a_f, b_i, b_g, b_f, q, o = z.view(HEADS, 8, WIDTH)[head]
                rows = []
                for j in range(WIDTH):
                    i, g, f = (scale * a[j].tanh() * b.tanh() for a, b in ((a_i, b_i), (a_g, b_g), (a_f, b_f)))
                    rows.append((f + 1).sigmoid() * cell[head, j] + i.sigmoid() * g)
                heads.append(
                    (torch.stack(rows), o.sigmoid() * torch.stack([q[j] * rows[j] for j in range(WIDTH)]).sum(0).tanh())
                )
            cell, hidden = torch.stack([c for c, _ in heads]), torch.cat([h for _, h in heads])
            answers.append(p["head.weight"] @ hidden + p["head.bias"])
    return torch.stack(answers).view(len(x), x.shape[1], -1)


def test_matches_recurrence_written_out():
    learner, x = built()
    weights = random.normal(random.key(1), (2, 6, 4)).double()
    results = []
    for logits in (learner(x), written_out(learner, x)):
        results.append((logits, *torch.autograd.grad((logits * weights).sum(), list(learner.parameters()))))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-12)


def test_never_sees_the_future():
    learner, x = built()
    jacobian = torch.autograd.functional.jacobian(lambda one: learner(one[None])[0], x[0])
    influence = jacobian.abs().amax(dim=(1, 3))  # of token s on the logits at t
    assert (influence.triu(1) == 0).all() and (influence.tril()[influence.tril() > 0]).numel() == 21


def test_state_grows_with_the_square_of_the_width_and_parameters_with_heads_do_not():
    one, four = OuterProductLSTM(5, 4, width=64), OuterProductLSTM(5, 4, width=16, heads=4)
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in four.parameters())
    assert (one.state_size(9), four.state_size(9)) == (64 * 65, 64 * 17)
