"""Batch normalisation of two domains in one pass, against a layer for each of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lab.domain_norm import STATISTICS, SourceStatistics, by_domain, in_turns


class Own(nn.BatchNorm2d):
    """A layer with a way of its own, as SyncBatchNorm is."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


LAYERS = {
    "2d": lambda: nn.BatchNorm2d(3),
    "1d": lambda: nn.BatchNorm1d(3),
    "3d": lambda: nn.BatchNorm3d(3, momentum=0.3, eps=0.1),
    "plain": lambda: nn.BatchNorm2d(3, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "own": lambda: Own(3),
}


def domains(layer: nn.Module, seed: int) -> list[Tensor]:
    """A dark domain and a bright one."""
    rest = {nn.BatchNorm1d: (), nn.BatchNorm3d: (2, 5, 5)}.get(type(layer), (5, 5))
    generator = torch.Generator().manual_seed(seed)
    both = [torch.randn(8, 3, *rest, generator=generator, dtype=torch.float64) * (1 + 4 * i) + i for i in range(2)]
    return [part.requires_grad_() for part in both]


@pytest.mark.parametrize("kind", LAYERS)
def test_one_pass_is_a_layer_for_each_domain(kind: str) -> None:
    network = nn.Sequential(LAYERS[kind]()).double()
    statistics = SourceStatistics(network, separate=True)
    alone = [copy.deepcopy(network) for _ in range(2)]
    for seed in range(3):
        inputs, others = domains(network[0], seed), domains(network[0], seed)
        with statistics.in_turns(network):
            found = by_domain(network(in_turns(*inputs)))
        sum((i + 1) * part.square().sum() * part.flatten()[0] for i, part in enumerate(found)).backward()
        expected = [layer(part) for layer, part in zip(alone, others, strict=True)]
        sum((i + 1) * part.square().sum() * part.flatten()[0] for i, part in enumerate(expected)).backward()
        for one, other in zip([*found, *(part.grad for part in inputs)], [*expected, *(part.grad for part in others)],
                              strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    for parameter, *both in zip(network.parameters(), *(layer.parameters() for layer in alone), strict=True):
        torch.testing.assert_close(parameter.grad, both[0].grad + both[1].grad)
    for name, value in alone[1].state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value)
    for which in STATISTICS:
        torch.testing.assert_close(statistics.get_buffer(f"{which}_0"), getattr(alone[0][0], which))


def test_batches_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples of the source and 4 of the target"):
        in_turns(torch.zeros(3, 2), torch.zeros(4, 2))


def test_what_is_put_in_turns_comes_apart_again() -> None:
    source, target = torch.arange(12.0).view(2, 3, 2).unbind(0)
    assert torch.equal(in_turns(source, target)[:2], torch.stack([source[0], target[0]]))
    assert all(map(torch.equal, by_domain(in_turns(source, target)), (source, target)))
