"""DANN's siblings against their equations; what batch normalisation does in one pass; two processes against one."""

from __future__ import annotations

import copy
import math
import os
import signal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Adam

from lab import fit, stages
from lab.batch import Labelled, SourceTarget
from lab.datamodules.mnist_digits import MNISTDigits
from lab.modules.adabn import AdaBN
from lab.modules.adaptation import Adaptation, View, ramp
from lab.modules.cdan import CDAN, multilinear, sureness
from lab.modules.coral import CORAL, coral_loss, covariance
from lab.modules.dann import DANN
from lab.modules.mmd import MMD, squared_mmd
from lab.networks.convnet import ConvNet
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification
from lab.registry import callbacks

SMALL = {"name": "mnist_digits", "direction": "digits_to_mnist", "size": 8, "val_fraction": 0.05, "test_fraction": 0.75}
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def digits(**arguments: Any) -> MNISTDigits:
    data = MNISTDigits(**{**{key: value for key, value in SMALL.items() if key != "name"}, **arguments})
    data.prepare_data()
    data.setup("fit")
    return data


def built(kind: Any, network: nn.Module | None = None, **arguments: Any) -> Any:
    seed_everything(0, verbose=False)
    network = network or MLP(10, (1, 8, 8), (24,))
    given = {"optimizer": partial(Adam, lr=0.003), "input_shape": (1, 8, 8), **arguments}
    return kind(network=network, objective=Classification(10), **given)


def trained(module: Any, data: Any, **arguments: Any) -> Any:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(**{**settings, "enable_progress_bar": False, "accelerator": "cpu", **arguments})
    trainer.fit(module, datamodule=data)
    return module


def features(count: int, width: int = 5, seed: int = 0, shift: float = 0.0) -> Tensor:
    return shift + torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(module: Any, step: int, total: int) -> Any:
    """The module at a step of a training."""
    module._trainer = type("At", (), {"global_step": step, "log_every_n_steps": 10**9})()
    module.total_steps = total
    return module


def views(batch: int = 6, width: int = 24) -> tuple[View, View]:
    source, target = (View(features(batch, width, seed, seed), features(batch, 10, seed + 5)) for seed in (0, 1))
    return source, target


# MMD


@pytest.mark.parametrize(("sizes", "shift"), [((6, 4), 0.0), ((5, 5), 2.0)])
def test_the_mmd_is_that_of_a_double_loop(sizes: tuple[int, int], shift: float) -> None:
    source, target = features(sizes[0]), features(sizes[1], seed=1, shift=shift)
    everything = [*source.tolist(), *target.tolist()]

    def distance(x: list[float], y: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))

    n, m, total = *sizes, len(everything)
    scale = sum(distance(x, y) for x in everything for y in everything) / (total * (total - 1))

    def kernel(x: list[float], y: list[float]) -> float:
        return sum(math.exp(-distance(x, y) / (b * scale)) for b in BANDWIDTHS) / len(BANDWIDTHS)

    s, t = source.tolist(), target.tolist()
    expected = sum(kernel(x, y) for x in s for y in s) / n**2 + sum(kernel(x, y) for x in t for y in t) / m**2
    expected -= 2 * sum(kernel(x, y) for x in s for y in t) / (n * m)
    assert float(squared_mmd(source, target, BANDWIDTHS)) == pytest.approx(expected, rel=1e-10)


def test_the_mmd_of_a_domain_with_itself_is_nothing_and_all_alike_is_finite() -> None:
    source = features(7)
    assert float(squared_mmd(source, source.clone(), BANDWIDTHS)) == pytest.approx(0, abs=1e-14)
    assert float(squared_mmd(torch.ones(3, 2), torch.ones(4, 2), BANDWIDTHS)) == 0


def test_the_mmds_gradient_is_that_of_finite_differences_at_a_fixed_bandwidth() -> None:
    source, target = features(4).requires_grad_(), features(3, seed=1)
    (gradient,) = torch.autograd.grad(squared_mmd(source, target, BANDWIDTHS), source)
    everything = torch.cat([source, target]).detach()
    scale = torch.cdist(everything, everything).square().sum() / (7 * 6)

    def value(moved: Tensor) -> Tensor:
        both = torch.cat([moved, target])
        distances = torch.cdist(both, both).square()
        kernel = torch.stack([(-distances / (b * scale)).exp() for b in BANDWIDTHS]).mean(0)
        return kernel[:4, :4].mean() + kernel[4:, 4:].mean() - 2 * kernel[:4, 4:].mean()

    for place in ((0, 0), (2, 3)):
        step = torch.zeros_like(source)
        step[place] = 1e-6
        slope = (value(source.detach() + step) - value(source.detach() - step)) / 2e-6
        assert float(gradient[place]) == pytest.approx(float(slope), rel=1e-5, abs=1e-9)


# CORAL


def test_coral_is_that_of_numpys_covariances() -> None:
    source, target = features(9), features(6, seed=1)
    ours = [np.cov(rows.numpy(), rowvar=False) for rows in (source, target)]
    np.testing.assert_allclose(covariance(source).numpy(), ours[0], rtol=1e-12)
    assert float(coral_loss(source, target)) == pytest.approx(((ours[0] - ours[1]) ** 2).sum() / (4 * 25), rel=1e-12)


def test_coral_does_not_see_means_and_one_sample_is_no_error() -> None:
    source = features(9)
    assert float(coral_loss(source, source + 3)) == pytest.approx(0, abs=1e-20)
    assert float(coral_loss(source[:1], source[:1])) == 0


@pytest.mark.parametrize("kind", [MMD, CORAL])
def test_an_alignment_is_weighed_by_the_ramped_lambda(kind: type[Adaptation]) -> None:
    module = at(built(kind, strength=3.0).double(), 20, 100)
    terms = module.alignment(*views())
    (unweighed,) = terms.parts.values()
    assert float(terms.loss) == pytest.approx(3 * ramp(0.2, 10) * float(unweighed), rel=1e-12)
    assert float(unweighed) > 0


# CDAN


def test_the_multilinear_map_is_the_outer_product_of_each_sample() -> None:
    f, g = features(4, 3), features(4, 2, seed=1).softmax(1)
    expected = torch.stack([torch.outer(f[i], g[i]).reshape(-1) for i in range(4)])
    assert torch.equal(multilinear(f, g), expected)


def test_the_randomized_maps_products_are_those_of_the_whole_in_the_mean() -> None:
    """⟨T⊙(x), T⊙(y)⟩ estimates ⟨f, f'⟩⟨g, g'⟩ without bias (theorem 1)."""
    module = built(CDAN, MLP(10, (1, 8, 8), (6,)), projection=20_000).double()
    view = View(features(3, 6), features(3, 10, seed=1))
    whole = multilinear(view.features, view.logits.softmax(1))
    randomized = module.judged(view)
    assert randomized.shape == (3, 20_000)
    torch.testing.assert_close(randomized @ randomized.T, whole @ whole.T, rtol=0.2, atol=0.2)


def test_cdan_sees_features_and_answers_and_no_gradient_goes_through_the_answers() -> None:
    module = built(CDAN).double()
    view = View(features(4, 24).requires_grad_(), features(4, 10, seed=1).requires_grad_())
    seen = module.judged(view)
    assert torch.equal(seen.detach(), multilinear(view.features, view.logits.softmax(1)).detach())
    seen.sum().backward()
    assert view.features.grad is not None
    assert view.logits.grad is None


def test_sure_samples_count_more_and_their_mean_is_one() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    raw = [2.0, 1 + 0.5, 1 + math.exp(0.9 * math.log(0.9) + 0.1 * math.log(0.1))]
    assert sureness(p).tolist() == pytest.approx([3 * w / sum(raw) for w in raw], rel=1e-12)


def test_entropy_conditioning_weighs_the_domain_loss() -> None:
    source, target = views()
    module = at(built(CDAN, entropy_conditioning=True).double(), 50, 100)
    seen = torch.cat([module.judged(source), module.judged(target)])
    domains = torch.tensor([1.0] * 6 + [0.0] * 6, dtype=torch.float64)
    losses = F.binary_cross_entropy_with_logits(module.discriminator(seen), domains, reduction="none")
    weights = torch.cat([sureness(view.logits.softmax(1)) for view in (source, target)])
    torch.testing.assert_close(module.alignment(source, target).loss, (losses * weights).mean())


# Batch normalisation


def halves(seed: int = 0) -> SourceTarget:
    """A dark domain and a bright one."""
    inputs = torch.rand(2, 8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = torch.zeros(8, dtype=torch.int64)
    return SourceTarget(Labelled(inputs[0], labels), Labelled(5 * inputs[1], labels))


def test_each_half_is_normalised_by_its_own_statistics_and_each_domain_has_running_ones() -> None:
    module = built(DANN, ConvNet(10, 1, 4))
    plain = {which: copy.deepcopy(module.network) for which in ("source", "target")}
    for seed in range(3):
        batch = halves(seed)
        found = dict(zip(plain, module.views(batch), strict=True))
        for which, network in plain.items():
            torch.testing.assert_close(found[which].features, network.features(getattr(batch, which).inputs))
    for name, value in module.network.state_dict().items():
        torch.testing.assert_close(value, plain["target"].state_dict()[name])
    module.eval(), plain["source"].eval()
    inputs = halves(9).source.inputs
    with module.source_statistics.serving(module.network):
        torch.testing.assert_close(module.features(inputs), plain["source"].features(inputs))
    assert not torch.allclose(module.features(inputs), plain["source"].features(inputs))
    assert not [part for part in module.network.modules() if "forward" in vars(part)]


def test_layers_that_do_not_train_are_left_alone() -> None:
    module = built(DANN, ConvNet(10, 1, 4))
    module.views(halves(1))  # from here on the domains' running statistics differ
    module.eval()
    batch = halves()
    before = copy.deepcopy(module.state_dict())
    source, _ = module.views(batch)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    torch.testing.assert_close(source.features, module.features(batch.source.inputs))


@pytest.mark.parametrize("policy", ["separate", "mixed"])
def test_a_step_normalises_as_it_was_told(policy: str) -> None:
    module = built(DANN, ConvNet(10, 1, 4), batch_norm=policy)
    batch = halves()
    source, _ = module.views(batch)
    alone = module.network.features(batch.source.inputs)
    assert torch.allclose(source.features, alone, atol=1e-6) == (policy == "separate")


def test_adabns_statistics_are_those_of_all_target_inputs_layer_by_layer() -> None:
    data = digits(eval_batch_size=37)
    module = trained(built(AdaBN, ConvNet(10, 1, 4)), data)
    module.adapt()
    x = data.target.train.inputs
    for part in module.network.body:
        if not isinstance(part, nn.Sequential):
            x = part(x)
            continue
        convolution, normalisation, relu = part
        with torch.no_grad():
            reached = convolution(x)
            rows = reached.double().transpose(0, 1).flatten(1)
            torch.testing.assert_close(normalisation.running_mean.double(), rows.mean(1), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(normalisation.running_var.double(), rows.var(1), rtol=1e-5, atol=1e-6)
            x = relu(normalisation.eval()(reached))


def test_adabn_trains_as_the_source_alone_does_and_what_is_kept_is_adapted() -> None:
    from lab.modules.supervised import Supervised

    results = {}
    for name, train_on in (("supervised", "source"), ("adabn", "both")):
        data = digits(train_on=train_on, batch_size=128)
        seed_everything(0, verbose=False)
        network = ConvNet(10, 1, 4)
        common = {"network": network, "objective": Classification(10), "optimizer": partial(Adam, lr=0.003)}
        module = Supervised(**common) if name == "supervised" else AdaBN(**common, input_shape=(1, 8, 8))
        results[name] = trained(module, data, max_epochs=2)
    one, other = (results[name].network.state_dict() for name in ("supervised", "adabn"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    before = {key: value.clone() for key, value in other.items()}
    results["adabn"].finish()
    after = results["adabn"].network.state_dict()
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed == {key for key in after if key.endswith(("running_mean", "running_var"))}


def test_a_network_without_batch_normalisation_has_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match="MLP has no batch normalisation, whose statistics adabn adapts"):
        built(AdaBN)


# Promises


class Interrupting(Callback):
    """Asks the process to stop in the middle of the second epoch."""

    watches_only = True
    after = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == Interrupting.after:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", ["cdan", "mmd", "coral", "adabn"])
def test_what_was_left_goes_on_as_if_it_had_not_been(name: str) -> None:
    callbacks.register("interrupting")(Interrupting)
    recipe = {
        "data": {**SMALL, "batch_size": 64, "transforms": ["invert"]}, "trainer": {"max_epochs": 2}, "logger": "csv",
        "module": {"name": name, "network": {"name": "convnet", "width": 4}, "optimizer": "adam"},
        "callbacks": {"profile": None, "progress": None, "interrupting": {}},
    }  # fmt: skip
    Interrupting.after = 0
    whole = fit(recipe)
    Interrupting.after = 30
    with pytest.raises(stages.Terminated) as stopped:
        fit(recipe, fresh=True)
    Interrupting.after = 0
    left = stopped.value.run
    assert left is not None
    stages.resume(left)
    one, other = (load_file(run.stage("main") / "network.safetensors") for run in (whole, left))
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (run.results["stages"]["main"] for run in (whole, left))
    for key in ("a_distance", "validators", "metrics"):
        assert one[key] == other[key]
