from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.callbacks.profile import profile
from lab.networks.transformer import Layer, Transformer

pools = pytest.mark.parametrize("pool", ["mean", "cls"])


def small(pool: str = "mean", **arguments: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(3, 50, (20,), **{"width": 16, "depth": 2, "heads": 4, "pool": pool, **arguments})


def texts(size: int = 6, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 50, (size, length), generator=generator)


@pytest.mark.parametrize(("width", "depth"), [(16, 2), (24, 1)])
@pools
def test_the_number_of_parameters_is_the_docstrings(width: int, depth: int, pool: str) -> None:
    network = small(pool, width=width, depth=depth)
    formula = 70 * width + depth * (12 * width**2 + 13 * width) + 2 * width + 3 * width + 3 + width * (pool == "cls")
    assert sum(p.numel() for p in network.parameters()) == formula


@pools
@pytest.mark.parametrize("added", [1, 11])
def test_padding_changes_nothing(pool: str, added: int) -> None:
    network, x = small(pool).eval(), texts()
    x[2, 4:] = 0
    assert torch.allclose(network(F.pad(x, (0, added))), network(x), atol=1e-6, rtol=0)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Equation (1) without the care for rows that see nothing that some kernels take."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ v


@pools
@pytest.mark.parametrize("attention", [F.scaled_dot_product_attention, plain_attention])
def test_a_text_without_tokens_gives_finite_outputs_and_gradients(
    pool: str, attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    network, x = small(pool), texts()
    x[1] = 0
    y = network(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pools
def test_a_text_does_not_depend_on_its_batch(pool: str) -> None:
    network, x = small(pool).eval(), texts()
    x[2, 4:] = 0
    assert torch.allclose(network(x)[2:3], network(x[2:3, :4]), atol=1e-6, rtol=0)


def test_the_order_of_the_tokens_matters() -> None:
    network, x = small().eval(), texts()
    assert not torch.allclose(network(x), network(x.flip(1)), atol=1e-4)


def test_attention_is_equation_1() -> None:
    torch.manual_seed(0)
    layer, x = Layer(8, 2, 0.0).double(), torch.rand(3, 5, 8, dtype=torch.float64)
    seen = torch.ones(3, 5, dtype=torch.bool)
    seen[1, 3:] = False
    q, k, v = layer.qkv(layer.attention_norm(x)).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 2.0  # √4
        heads.append(scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v[..., part])
    h = x + layer.out(torch.cat(heads, dim=-1))
    assert torch.allclose(layer(x, seen), h + layer.perceptron(h), rtol=1e-10)


def test_dropout_acts_in_training_only() -> None:
    network, x = small(dropout=0.5), texts()
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_it_is_profiled() -> None:
    cost = profile(small(), texts(1, 20))
    assert cost["macs"] >= 20 * 2 * 12 * 16**2
    assert set(cost["latency_ms"]) == {"batch_1", "batch_64"}


def test_it_learns_which_token_came_first() -> None:
    """Neither a bag of words nor a position alone tells whether 1 stands before 2."""
    x = texts(512, 8).clamp(min=3)
    places = torch.rand(512, 8, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :2]
    x.scatter_(1, places, torch.tensor([1, 2]).expand(512, 2))
    y = (places[:, 0] < places[:, 1]).long()
    network = small(dropout=0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(250):
        optimizer.zero_grad()
        F.cross_entropy(network(x[:384]), y[:384]).backward()
        optimizer.step()
    accuracy = (network.eval()(x[384:]).argmax(1) == y[384:]).float().mean()
    assert accuracy > 0.9


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": 3}, "width 16 is no multiple of heads 3"),
        ({"pool": "max"}, "'mean' or 'cls'"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_arguments_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**wrong)


def test_images_and_long_texts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"token ids \(L,\), the inputs have shape \(1, 8, 8\)"):
        Transformer(3, 50, (1, 8, 8))
    with pytest.raises(ValueError, match="texts of 21 tokens; this transformer has 20 positions"):
        small()(texts(1, 21))
