from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_fit import LIGHTNINGS_OWN, Classifier, fit, loader, trainer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lab.batch import Labelled
from lab.callbacks import Reports
from lab.callbacks import profile as module_under_test
from lab.callbacks.profile import Profile, profile

pytestmark = LIGHTNINGS_OWN


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(x)).flatten(1))


def test_parameters_and_macs_are_what_the_layers_add_up_to() -> None:
    found = profile(Convolutional(), torch.rand(1, 1, 8, 8))
    assert found["parameters"] == found["nonzero_parameters"] + 4 == 4 * 9 + 2 * 4 + 256 * 10 + 10  # norm's zero bias
    assert found["macs"] == 8 * 8 * 9 * 4 + 256 * 10


def test_a_batch_of_64_takes_longer_than_one_input_and_both_are_milliseconds() -> None:
    network = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512))
    latency = profile(network, torch.rand(1, 256))["latency_ms"]
    assert 1e-3 < latency["batch_1"] < latency["batch_64"] < 1e3


def test_one_stall_does_not_decide_the_latency() -> None:
    class Stalls(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            time.sleep(0.4 if self.calls in (4, 40) else 0.002)
            return x

    assert profile(Stalls(), torch.rand(1, 4))["latency_ms"]["batch_1"] < 100


def test_a_network_that_takes_seconds_is_timed_once_or_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            time.sleep(0.1)
            return x

    monkeypatch.setattr(module_under_test, "TIMED", 0.005)
    network = Slow()
    profile(network, torch.rand(1, 4))
    assert network.calls == 1 + 2 * (1 + 1)  # counted; warmed up and timed, for each batch size


class Layer(nn.Module):
    """A layer that gives more than one tensor, for sequences of 5 vectors of 16."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Any = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return out[0]


PROJECTIONS, SCORES_AND_SUMS = 4 * 5 * 16 * 16, 2 * 5 * 5 * 16


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.MultiheadAttention(16, 2, batch_first=True), PROJECTIONS + SCORES_AND_SUMS),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), PROJECTIONS + SCORES_AND_SUMS + 2 * 5 * 16 * 32),
        (nn.LSTM(16, 32, batch_first=True), 5 * 4 * 32 * (16 + 32)),
        (nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True), 5 * 2 * 4 * 8 * (16 + 8 + 16 + 8)),
        (nn.GRU(16, 32, batch_first=True), 5 * 3 * 32 * (16 + 32)),
        (nn.Conv1d(5, 8, 3, groups=1), 14 * 8 * 5 * 3),
    ],
)
def test_layers_whose_kernels_are_fused_count_too(layer: nn.Module, macs: int) -> None:
    assert profile(Layer(layer), torch.rand(1, 5, 16))["macs"] == macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_zeros_are_those_of_the_masked_weights() -> None:
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(10, 64))
            self.mask[:, :32] = 0

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    network = nn.Linear(64, 10)
    nn.init.ones_(network.weight)
    network.weight.data[0, 0] = 0  # behind the mask, to be counted once
    parametrize.register_parametrization(network, "weight", Mask())
    found = profile(network, torch.rand(1, 64))
    assert (found["parameters"], found["nonzero_parameters"]) == (650, 330)


def test_the_network_is_left_as_it_was() -> None:
    network = Convolutional()
    network.norm.eval()
    network(torch.rand(2, 1, 8, 8)).sum().backward()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    gradient = network.head.weight.grad
    random = torch.get_rng_state()
    profile(nn.Sequential(network, nn.Dropout()), torch.rand(1, 1, 8, 8))
    torch.rand(1, 1, 8, 8)
    assert [module.training for module in network.modules()] == [True, True, False, True]
    assert network.head.weight.grad is gradient
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    torch.set_rng_state(random)


def test_a_network_in_double_precision_gets_an_input_of_its_own_kind() -> None:
    assert profile(nn.Linear(4, 2).double(), torch.rand(1, 4))["macs"] == 8


def test_after_a_fit_the_callback_reports_the_modules_network(tmp_path: Path) -> None:
    callback, module = Profile(), Classifier()
    assert isinstance(callback, Reports)
    made = fit(module, tmp_path, callback, epochs=1, enable_checkpointing=False)
    found = callback.results(made, module)
    assert (found["parameters"], found["macs"], set(found["latency_ms"])) == (650, 640, {"batch_1", "batch_64"})


def test_a_module_without_a_network_is_profiled_itself(tmp_path: Path) -> None:
    class Bare(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.network = self.network, None

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def on_validation_epoch_end(self) -> None:
            pass

    callback, module = Profile(), Bare()
    made = fit(module, tmp_path, callback, epochs=1, enable_checkpointing=False)
    assert callback.results(made, module)["macs"] == 640


def test_a_test_alone_gives_an_example_too(tmp_path: Path) -> None:
    callback, module = Profile(), Classifier()
    made = trainer(tmp_path, callback, enable_checkpointing=False)
    made.test(module, loader(0, 50), verbose=False)
    assert callback.results(made, module)["macs"] == 640


@pytest.mark.parametrize("batch", [torch.rand(3, 64), {"inputs": torch.rand(3, 64)}, [torch.rand(3, 64)] * 3])
def test_of_a_batch_that_is_no_pair_only_the_size_is_told(batch: Any) -> None:
    callback, module = Profile(), Classifier()
    callback.on_train_batch_start(None, module, batch, 0)  # type: ignore[arg-type]
    assert callback.results(None, module) == {"parameters": 650, "nonzero_parameters": 650}  # type: ignore[arg-type]


def test_of_a_network_that_cannot_run_on_one_input_only_the_size_is_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x: Tensor, task: int) -> Tensor:
            raise NotImplementedError

    callback, module = Profile(), Classifier()
    module.network = Odd()
    callback.on_train_batch_start(None, module, Labelled(torch.rand(3, 64), torch.zeros(3)), 0)  # type: ignore[arg-type]
    assert callback.results(None, module) == {"parameters": 650, "nonzero_parameters": 650}  # type: ignore[arg-type]
    assert module.network.training
