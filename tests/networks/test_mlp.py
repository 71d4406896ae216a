from __future__ import annotations

import pytest
import torch

from lab.networks.mlp import MLP


def test_the_layers_have_the_sizes_that_were_asked_for() -> None:
    network = MLP(10, (1, 8, 8), hidden=(32, 16))
    assert sum(p.numel() for p in network.parameters()) == 65 * 32 + 33 * 16 + 17 * 10
    x = torch.rand(5, 1, 8, 8)
    assert network.features(x).shape == (5, 16)
    assert network(x).shape == (5, 10)


def test_the_outputs_are_the_head_of_the_features() -> None:
    network = MLP(3, (6,)).eval()
    x = torch.rand(5, 6)
    assert torch.equal(network(x), network.head(network.features(x)))


def test_it_computes_what_the_matrices_say() -> None:
    torch.manual_seed(0)
    network = MLP(3, (2, 3), hidden=(4,)).double()
    x = torch.rand(5, 2, 3, dtype=torch.float64)
    first, last = network.body[1], network.head
    hidden = (x.reshape(5, 6) @ first.weight.T + first.bias).clamp(min=0)
    assert torch.allclose(network(x), hidden @ last.weight.T + last.bias, rtol=1e-12)


def test_without_hidden_layers_it_is_linear() -> None:
    network = MLP(3, (6,), hidden=())
    x, y = torch.rand(2, 5, 6).unbind()
    assert torch.allclose(network(x) + network(y), network(x + y) + network(torch.zeros(5, 6)), atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network = MLP(3, (6,), dropout=0.5)
    x = torch.rand(5, 6)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("wrong", [{"dropout": 1.0}, {"hidden": (0,)}, {"input_shape": (0, 3)}, {"num_classes": 0}])
def test_arguments_out_of_range_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MLP(**{"num_classes": 3, "input_shape": (6,), **wrong})
