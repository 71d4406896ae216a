"""Sums of per-sample gradients against closed forms and against autograd, one sample at a time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lab import importance
from lab.batch import UNLABELLED, Labelled
from lab.datamodules.digits import Digits
from lab.importance import fisher, layered_parameters, per_sample
from lab.networks.convnet import ConvNet
from lab.networks.mlp import MLP
from lab.networks.resnet import ResNet
from lab.networks.transformer import Transformer


@pytest.fixture(scope="module")
def digits() -> Labelled:
    data = Digits()
    data.setup()
    return Labelled(data.train.inputs[:64].double(), data.train.targets[:64])


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64, its statistics and weights not those of the beginning."""
    torch.manual_seed(0)
    network = make().double()
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.uniform_(-0.2, 0.2), part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def looped(
    network: nn.Module, loss: Callable[[Tensor, int], Tensor], inputs: Tensor, power: int = 2
) -> dict[str, Tensor]:
    """One sample at a time, by autograd."""
    network = copy.deepcopy(network).eval()
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for place in range(len(inputs)):
        own = loss(network(inputs[place : place + 1]), place)
        found = torch.autograd.grad(own, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, found, strict=True):
            if gradient is not None:
                total[name] += gradient.abs() ** power
    return total


def assert_agree(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    assert any(float(value.abs().max()) > 0 for value in other.values())
    largest = max(float(value.abs().max()) for value in other.values())
    for name, value in other.items():
        scale = max(float(value.abs().max()), 1e-6 * largest)  # some are zero by nature
        assert float((one[name] - value).abs().max()) <= tolerance * scale, name


class Tokens(nn.Module):
    """A linear network over tokens ``[B, T, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.squeeze(1)).mean(1)


class Reused(nn.Module):
    """One layer, three times; one convolution, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x).tanh()).flatten(1)
        for _ in range(3):
            x = self.again(x).tanh()
        return self.head(x)


class Tied(nn.Module):
    """A weight of two layers, another that is also read as it is, and one that is nobody's layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.other.weight = self.one.weight
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.one(x.flatten(1)).tanh()).tanh() * self.scale
        return self.head(x) + F.linear(x, self.head.weight).sin()


class InPlace(nn.Module):
    """Changes what layers gave."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x.relu_()
        x = self.head(x.flatten(1))
        x.mul_(2)
        return x


class Rows(nn.Module):
    """Its layer's rows are no samples: positions come first, then all as one."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.body, self.head = nn.Linear(8, 8), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        rows = x.reshape(-1, 8) if self.flat else x.transpose(0, 1)
        y = self.body(rows)
        return self.head((y.reshape(x.shape) if self.flat else y.transpose(0, 1)).tanh().flatten(1))


class Recurrent(nn.Module):
    """What vmap cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.squeeze(1))[0][:, -1])


class Attention(nn.Module):
    """Its output layer's weight is read, and the layer not called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        return self.head(self.body(x, x, x, need_weights=False)[0].mean(1))


def convolutions(**arguments: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 6, **arguments), nn.Tanh(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


class Widths(nn.Module):
    """Convolutions over one and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(8, 4, 3, stride=2, dilation=2, padding=2)
        self.three = nn.Conv3d(1, 2, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0))
        self.head = nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x.squeeze(1)).tanh()
        three = self.three(x.reshape(-1, 1, 4, 4, 4)).tanh()
        return self.head(torch.cat([one.flatten(1), three.flatten(1)], 1))


def widths() -> nn.Module:
    network = Widths()
    network(torch.zeros(1, 1, 8, 8))
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(10, (1, 8, 8), (16, 12)),
    "convnet": lambda: ConvNet(10, 1, 4),
    "separable": lambda: ConvNet(10, 1, 4, separable=True),
    "resnet": lambda: ResNet(10, 1),
    "tokens": Tokens,
    "reused": Reused,
    "tied": Tied,
    "in place": InPlace,
    "rows first": lambda: Rows(flat=False),
    "rows flat": lambda: Rows(flat=True),
    "recurrent": Recurrent,
    "attention": Attention,
    "weight norm": lambda: nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 8)), nn.Tanh(), nn.Linear(8, 10)),
    "strided": lambda: convolutions(kernel_size=3, stride=2, padding=1),
    "dilated": lambda: convolutions(kernel_size=3, dilation=2),
    "grouped": lambda: convolutions(kernel_size=3, groups=2, bias=False),
    "same": lambda: convolutions(kernel_size=(3, 5), padding="same"),
    "circular": lambda: convolutions(kernel_size=3, padding=1, padding_mode="circular"),
    "reflected": lambda: convolutions(kernel_size=5, padding=2, padding_mode="reflect"),
    "one and three": widths,
    "instance norm": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.InstanceNorm2d(3, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10)
    ),
    "rms norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.RMSNorm(8), nn.Linear(8, 10)),
}


def entropy(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, places: F.cross_entropy(outputs, targets[places], reduction="none")


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_a_loop_over_samples_gives(name: str, power: Any, digits: Labelled) -> None:
    network, batch = made(NETWORKS[name]), digits[:16]
    found = per_sample(network, entropy(batch.targets), batch.inputs, power=power)
    assert_agree(found, looped(network, lambda o, n: F.cross_entropy(o, batch.targets[n : n + 1]), batch.inputs, power))


def test_it_is_what_a_loop_over_texts_gives() -> None:
    network = made(lambda: Transformer(4, 30, (12,), width=16, depth=2, heads=2))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 30, (9, 12), generator=generator)
    targets = torch.randint(4, (9,), generator=generator)
    found = per_sample(network, entropy(targets), tokens)
    assert_agree(found, looped(network, lambda o, n: F.cross_entropy(o, targets[n : n + 1]), tokens))


@pytest.mark.parametrize("name", ["mlp", "convnet", "tokens", "reused", "resnet"])
def test_these_are_found_by_products_alone(name: str, digits: Labelled) -> None:
    network = made(NETWORKS[name])
    assert layered_parameters(network, digits.inputs) == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("tied", {"one.weight", "head.weight", "scale"}),
        ("rows first", {"body.weight", "body.bias"}),
        ("rows flat", {"body.weight", "body.bias"}),
        ("weight norm", {"1.parametrizations.weight.original0", "1.parametrizations.weight.original1"}),
    ],
)
def test_these_are_not(name: str, others: set[str], digits: Labelled) -> None:
    network = made(NETWORKS[name])
    everything = {name for name, _ in network.named_parameters()}
    assert everything - layered_parameters(network, digits.inputs) == others


@pytest.mark.parametrize("name", ["convnet", "tokens", "reused", "tied", "grouped", "attention"])
def test_little_room_changes_nothing(name: str, digits: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = made(NETWORKS[name]), digits[:16]
    whole = per_sample(network, entropy(batch.targets), batch.inputs)
    monkeypatch.setattr(importance, "ROOM", 1000)
    assert_agree(per_sample(network, entropy(batch.targets), batch.inputs), whole)


def test_only_what_is_trained_is_asked_and_nothing_is_left_behind(digits: Labelled) -> None:
    network = made(NETWORKS["tied"])
    network.one.requires_grad_(False)  # type: ignore[union-attr]
    network.train()
    network.head.eval()  # type: ignore[union-attr]
    network.scale.grad = torch.ones(64, dtype=torch.float64)  # type: ignore[union-attr]
    before, randomness = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    found = per_sample(network, entropy(digits.targets), digits.inputs)
    assert found.keys() == {"scale", "head.weight", "head.bias", "other.bias"}
    assert all(not value.requires_grad for value in found.values())
    assert torch.equal(network.scale.grad, torch.ones(64, dtype=torch.float64))  # type: ignore[arg-type,union-attr]
    assert network.head.weight.grad is None  # type: ignore[union-attr]
    assert (network.training, network.head.training) == (True, False)  # type: ignore[union-attr]
    assert torch.equal(randomness, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(not part._forward_hooks for part in network.modules())


# Fisher information


def parts(batch: Labelled, size: int) -> Iterator[Labelled]:
    return (batch[begin : begin + size] for begin in range(0, len(batch), size))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_of_a_logistic_regression_it_is_the_closed_form(size: int, digits: Labelled) -> None:
    network = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    found, count = fisher(network, parts(digits, size), "exact")
    assert count == 64
    x = digits.inputs.flatten(1)
    p = network(digits.inputs).softmax(1).detach()
    spread = p * (1 - p)  # the expectation of (1[y = k] − p_k)²
    assert_agree(found, {"1.weight": spread.T @ x.square(), "1.bias": spread.sum(0)}, 1e-12)


@pytest.mark.parametrize("name", ["mlp", "convnet", "tokens", "tied"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_batches_of_any_size_give_the_same(name: str, kind: Any, digits: Labelled) -> None:
    network = made(NETWORKS[name])
    whole, count = fisher(network, [digits], kind)
    for size in (1, 7):
        found, number = fisher(network, parts(digits, size), kind)
        assert number == count == 64
        assert_agree(found, whole)


def expected(network: nn.Module, inputs: Tensor, asked: Tensor | None = None) -> dict[str, Tensor]:
    """Σ_n Σ_c p_c g_c², by a loop over both."""
    total: dict[str, Tensor] = {}
    for column in range(10) if asked is None else asked.nonzero().squeeze(1).tolist():

        def loss(outputs: Tensor, place: int, column: int = column) -> Tensor:
            kept = outputs if asked is None else outputs.masked_fill(~asked, -1e30)
            scores = kept.log_softmax(1)[0, column]
            return scores * scores.detach().exp().sqrt()

        for name, value in looped(network, loss, inputs).items():
            total[name] = total.get(name, 0) + value
    return total


@pytest.mark.parametrize("name", ["mlp", "convnet", "tied", "recurrent"])
def test_exact_is_the_expectation_over_all_classes(name: str, digits: Labelled) -> None:
    network = made(NETWORKS[name])
    assert_agree(fisher(network, [digits[:12]], "exact")[0], expected(network, digits.inputs[:12]))


def test_classes_that_are_not_asked_have_no_part(digits: Labelled) -> None:
    network, asked = made(NETWORKS["mlp"]), torch.arange(10) < 4
    found, _ = fisher(network, [digits], "exact", active=lambda task: asked)
    assert_agree(found, expected(network, digits.inputs, asked))
    assert float(found["head.weight"][4:].abs().max()) == 0
    for kind in ("exact", "sampled", "empirical"):
        few = digits[digits.targets < 4]
        sums, _ = fisher(network, [few], kind, active=lambda task: asked)  # type: ignore[arg-type]
        assert all(bool(value.isfinite().all()) for value in sums.values())
        assert float(sums["head.weight"][4:].abs().max()) == 0


def test_each_sample_may_have_classes_of_its_own(digits: Labelled) -> None:
    network = made(NETWORKS["tied"])
    tasks = torch.arange(64) % 2
    heads = torch.stack([torch.arange(10) < 5, torch.arange(10) >= 5])
    batch = Labelled(digits.inputs, digits.targets, task=tasks)
    found, _ = fisher(network, [batch], "exact", active=lambda task: heads[task])
    apart = [expected(network, digits.inputs[tasks == task], heads[task]) for task in (0, 1)]
    assert_agree(found, {name: apart[0][name] + apart[1][name] for name in found})


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_sampled_is_the_same_in_the_mean_and_by_its_generator(name: str, digits: Labelled) -> None:
    network, batch = made(NETWORKS[name]), digits[:8]
    whole, _ = fisher(network, [batch], "exact")

    def drawn(seed: int) -> dict[str, Tensor]:
        return fisher(network, [batch], "sampled", generator=torch.Generator().manual_seed(seed))[0]

    assert all(torch.equal(value, drawn(0)[key]) for key, value in drawn(0).items())
    mean = {key: torch.stack([drawn(seed)[key].sum() for seed in range(200)]).mean() for key in whole}
    for key, value in mean.items():
        assert float(value / whole[key].sum()) == pytest.approx(1, abs=0.1)


def test_empirical_passes_over_samples_without_a_label(digits: Labelled) -> None:
    network = made(NETWORKS["mlp"])
    hidden = Labelled(digits.inputs, digits.targets.clone())
    hidden.targets[::2] = UNLABELLED
    found, count = fisher(network, [hidden, Labelled(digits.inputs[:3], torch.full((3,), UNLABELLED))], "empirical")
    assert count == 32
    assert_agree(found, fisher(network, [digits[1::2]], "empirical")[0])  # type: ignore[misc]


def test_of_a_regression_it_is_the_outputs_squared_gradients(digits: Labelled) -> None:
    network = made(NETWORKS["mlp"])
    targets = torch.randn(64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Labelled(digits.inputs, targets)
    total: dict[str, Tensor] = {}
    for column in range(10):
        for name, value in looped(network, lambda o, n, c=column: o[0, c], digits.inputs).items():
            total[name] = total.get(name, 0) + value
    assert_agree(fisher(network, [batch], "exact", likelihood="regression")[0], total)
    residual = looped(network, lambda o, n: 0.5 * (o[0] - targets[n]).square().sum(), digits.inputs)
    assert_agree(fisher(network, [batch], "empirical", likelihood="regression")[0], residual)
    drawn = [
        fisher(network, [batch], "sampled", likelihood="regression", generator=torch.Generator().manual_seed(s))[0]
        for s in range(100)
    ]
    for name, value in total.items():
        assert float(torch.stack([one[name].sum() for one in drawn]).mean() / value.sum()) == pytest.approx(1, abs=0.1)


def test_it_is_another_number_than_the_square_of_a_batchs_mean_gradient(digits: Labelled) -> None:
    network = made(NETWORKS["mlp"])
    found, count = fisher(network, [digits], "empirical")
    F.cross_entropy(network(digits.inputs), digits.targets).backward()
    squared = sum(float(p.grad.square().sum()) for p in network.parameters())  # type: ignore[union-attr]
    assert squared < 0.2 * sum(float(value.sum()) for value in found.values()) / count
