"""Token formats against a plain loop, and the promise that makes caching possible."""

import pytest
import torch

from metalearn.models.tokens import FORMATS, Tokens

B, T, D, K = 3, 6, 4, 5


def examples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, D, generator=generator), torch.randint(K, (B, T), generator=generator)


def by_hand(format, x_TD, y_T):
    """One sequence, one token at a time, as the formats are defined."""
    one_hot, zeros = torch.eye(K), torch.zeros
    rows = []
    for j in range(len(x_TD)):
        before_x, before_y = (x_TD[j - 1], one_hot[y_T[j - 1]]) if j else (zeros(D), zeros(K))
        if format == "paper":
            rows.append(torch.cat([x_TD[j], before_y]))
        elif format == "shift":
            rows.append(torch.cat([x_TD[j], before_x, before_y]))
        else:
            rows += [torch.cat([x_TD[j], zeros(K)]), torch.cat([zeros(D), one_hot[y_T[j]]])]
    return torch.stack(rows[:-1] if format == "interleaved" else rows)


@pytest.mark.parametrize("format", FORMATS)
def test_matches_the_definition(format):
    x, y = examples()
    tokens = Tokens(format, D, K)
    encoded = tokens.encode(x, y)
    assert encoded.shape == (B, tokens.num_tokens(T), tokens.width)
    for b in range(B):
        assert torch.equal(encoded[b], by_hand(format, x[b], y[b]))


@pytest.mark.parametrize("format", FORMATS)
def test_labels_stay_one_hot_whatever_the_scale_of_the_inputs(format):
    x, y = examples()
    encoded = Tokens(format, D, K).encode(100 * x + 7, y)
    labels = encoded[..., -K:]
    assert set(labels.unique().tolist()) == {0.0, 1.0}
    assert labels.sum() == B * (T - 1)


@pytest.mark.parametrize("format", FORMATS)
def test_no_token_sees_the_label_it_is_asked_for(format):
    x, y = examples()
    tokens = Tokens(format, D, K)
    for j in range(T):
        other = y.clone()
        other[:, j:] = (other[:, j:] + 1) % K
        asked = torch.arange(tokens.num_tokens(T))[: 2 * j + 1 if format == "interleaved" else j + 1]
        assert torch.equal(tokens.encode(x, y)[:, asked], tokens.encode(x, other)[:, asked])


@pytest.mark.parametrize("format", FORMATS)
def test_context_and_query_make_up_the_whole(format):
    x, y = examples()
    tokens = Tokens(format, D, K)
    whole = tokens.encode(x, y)
    assert torch.equal(tokens.context(x[:, :-1], y[:, :-1]), whole[:, :-1])
    assert torch.equal(tokens.query(x[:, -1:], x[:, :-1], y[:, :-1]), whole[:, -1:])


def test_predictions_are_read_where_an_example_is_asked_for():
    logits = torch.arange(2 * T - 1).view(1, -1, 1).expand(B, -1, K)
    assert Tokens("interleaved", D, K).at_examples(logits)[0, :, 0].tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pfn", 2, 2), "'pfn'; accepted: 'paper'"),
        (("paper", 0, 2), "num_features is 0"),
        (("paper", 1, 0), "num_classes is 0"),
    ],
)
def test_refuses_what_it_cannot_encode(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tokens(*arguments)
