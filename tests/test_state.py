"""What a training is besides its weights: found where it changed, named where it can't be kept, put back as it was."""

from __future__ import annotations

import dataclasses
import functools
import random
import threading
from collections import defaultdict, deque
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lab import state
from lab.encoding import Unsavable
from lab.state import Attributes
from lab.verification import differences


class Owner(LightningModule):
    """Has what plugins have."""

    unsaved: ClassVar[tuple[str, ...]] = ("scratch",)

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 2)
        self.number = 1
        self.fixed = "as it was"
        self.missing = float("nan")
        self.losses: list[float] = []
        self.nested: dict[str, Any] = {"a": [1, {"b": [2]}]}
        self.average = torch.zeros(2)
        self.array = np.zeros(2)
        self.recent: deque[int] = deque(maxlen=2)
        self.seen = {1}
        self.python = random.Random(0)
        self.numpy = np.random.default_rng(0)
        self.torch = torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.AdamW
        self.function = self.configure
        self.lock = threading.Lock()
        self.scratch: Any = None

    def configure(self) -> None:
        """A method to keep."""

    @functools.cached_property
    def derived(self) -> list[int]:
        return [self.number]


def watched() -> tuple[Owner, Attributes]:
    owner = Owner()
    return owner, Attributes({"Owner": owner})


CHANGES: dict[str, Any] = {
    "number": lambda owner: setattr(owner, "number", 2),
    "losses": lambda owner: owner.losses.append(0.5),
    "nested": lambda owner: owner.nested["a"][1]["b"].append(3),
    "average": lambda owner: owner.average.add_(1),
    "array": lambda owner: owner.array.__setitem__(0, 1.0),
    "recent": lambda owner: owner.recent.append(1),
    "seen": lambda owner: owner.seen.add(2),
    "python": lambda owner: owner.python.random(),
    "numpy": lambda owner: owner.numpy.random(),
    "torch": lambda owner: torch.rand(1, generator=owner.torch),
    "new": lambda owner: setattr(owner, "new", (1, "two")),
    "missing": lambda owner: setattr(owner, "missing", None),
}


def test_where_nothing_has_changed_nothing_is_saved() -> None:
    _, attributes = watched()
    assert attributes.changed() == {}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_and_saved_alone_and_restored_in_a_fresh_object(name: str) -> None:
    owner, attributes = watched()
    CHANGES[name](owner)
    saved = attributes.changed()
    assert list(saved["Owner"]) == [name]
    fresh, its = watched()
    existing = getattr(fresh, name, None)
    its.restore(saved)
    assert differences(*(state.encoded([getattr(one, name)]) for one in (fresh, owner))) == []
    if name not in ("number", "new", "missing"):
        assert getattr(fresh, name) is existing


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_a_generator_that_drew_long_ago_draws_on(name: str) -> None:
    def draw(owner: Owner) -> float:
        made = getattr(owner, name)
        return float(torch.rand((), generator=made)) if name == "torch" else float(made.random())

    owner, attributes = watched()
    for _ in range(700):  # past the first block of numbers
        draw(owner)
    fresh, its = watched()
    its.restore(attributes.changed())
    assert draw(fresh) == draw(owner)


def test_what_changed_back_is_as_it_was() -> None:
    owner, attributes = watched()
    owner.losses.append(1.0)
    owner.losses.pop()
    assert attributes.changed() == {}


def test_what_a_class_names_unsaved_is_not_looked_at_nor_what_its_bases_name() -> None:
    class Further(Owner):
        unsaved: ClassVar[tuple[str, ...]] = ("further",)

        def __init__(self) -> None:
            super().__init__()
            self.further: Any = None

    owner = Further()
    attributes = Attributes({"Further": owner})
    owner.scratch = owner.further = threading.Lock()
    assert attributes.changed() == {}


def test_of_an_object_that_only_watches_nothing_is_saved() -> None:
    class Watches(Callback):
        watches_only = True

        def __init__(self) -> None:
            self.count = 0

    watching = Watches()
    attributes = Attributes({"Watches": watching})
    watching.count = 1
    assert attributes.changed() == {}


def test_a_cached_property_is_left_to_be_derived_again() -> None:
    owner, attributes = watched()
    assert owner.derived == [1]
    assert "derived" in vars(owner)
    assert attributes.changed() == {}


def test_a_bound_method_and_a_class_as_attributes_are_no_state() -> None:
    owner, attributes = watched()
    owner.later = owner.configure  # as DDP leaves one
    assert attributes.changed() == {}
    assert owner.optimizer is torch.optim.AdamW


def test_what_lightning_keeps_in_a_module_is_not_the_modules() -> None:
    owner, attributes = watched()
    owner.prepare_data_per_node = False
    owner._fabric = object()  # type: ignore[assignment]
    owner.kept = torch.optim.SGD(owner.parameters(), lr=0.1)
    assert attributes.changed() == {}


@pytest.mark.parametrize(
    ("value", "cause"),
    [(lambda: 0, r"builtins\.function"), ([threading.Lock()], r"_thread\.lock")],
    ids=["lambda", "lock in a list"],
)
def test_an_attribute_that_cannot_be_saved_is_named_with_what_can_be_done(value: Any, cause: str) -> None:
    owner, attributes = watched()
    owner.late = value
    with pytest.raises(
        Unsavable, match=rf"^Owner\.late cannot be saved, so a resumed .* it is or holds a {cause}"
    ) as e:
        attributes.changed()
    assert "Keep numbers, strings, tensors" in str(e.value)
    assert 'name it in Owner.unsaved = ("late",)' in str(e.value)


def test_what_cannot_be_saved_is_no_matter_while_it_stays_as_it_was() -> None:
    owner, attributes = watched()
    owner.number = 5
    assert list(attributes.changed()["Owner"]) == ["number"]


def test_the_attributes_of_who_is_not_there_any_more_are_passed_over() -> None:
    owner, attributes = watched()
    owner.number = 5
    Attributes({}).restore({"Owner": {"number": 7}})
    assert owner.number == 5
    assert list(attributes.changed()) == ["Owner"]


def test_an_object_with_a_state_is_always_saved() -> None:
    class Counter:
        count = 0

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, saved: dict[str, int]) -> None:
            self.count = saved["count"]

    class Holder:
        def __init__(self) -> None:
            self.counter, self.several = Counter(), [Counter(), Counter()]

    holder, fresh = Holder(), Holder()
    attributes, its = Attributes({"Holder": holder}), Attributes({"Holder": fresh})
    holder.counter.count, holder.several[1].count = 3, 4
    its.restore(attributes.changed())
    assert (fresh.counter.count, [one.count for one in fresh.several]) == (3, [0, 4])


class Sharing:
    """Its attributes begin as one list and one tensor that somebody else has, too."""

    def __init__(self, values: list[int], tensor: Tensor) -> None:
        self.one = self.other = values
        self.best = self.last = tensor


def shared() -> tuple[Sharing, list[int], Tensor, Attributes]:
    values, tensor = [0], torch.zeros(1)
    owner = Sharing(values, tensor)
    return owner, values, tensor, Attributes({"Sharing": owner})


def test_what_was_filled_is_filled_for_all_who_share_it() -> None:
    owner, *_, attributes = shared()
    owner.one.append(1)
    owner.best += 1
    fresh, values, tensor, its = shared()
    its.restore(attributes.changed())
    assert values == [0, 1]
    assert float(tensor) == 1
    assert fresh.one is fresh.other is values
    assert fresh.best is fresh.last is tensor


def test_what_another_object_took_the_place_of_stays_as_it_is() -> None:
    owner, *_, attributes = shared()
    owner.one, owner.other, owner.best, owner.last = [1], [2], torch.ones(1), torch.full((1,), 2.0)
    fresh, values, tensor, its = shared()
    its.restore(attributes.changed())
    assert (fresh.one, fresh.other, values) == ([1], [2], [0])
    assert [float(fresh.best), float(fresh.last), float(tensor)] == [1, 2, 0]


@pytest.mark.parametrize("beforehand", [False, True])
def test_what_a_validation_computed_is_saved_though_it_counts_no_changes(beforehand: bool) -> None:
    class Keeps:
        def __init__(self) -> None:
            self.outputs: Any = None
            if beforehand:
                with torch.inference_mode():
                    self.outputs = torch.zeros(2)

    owner, fresh = Keeps(), Keeps()
    attributes, its = Attributes({"Keeps": owner}), Attributes({"Keeps": fresh})
    with torch.inference_mode():
        if beforehand:
            owner.outputs += 1
        else:
            owner.outputs = torch.ones(2)
    its.restore(attributes.changed())
    assert fresh.outputs.tolist() == [1, 1]


def test_a_record_that_changed_within_is_seen() -> None:
    @dataclasses.dataclass
    class Record:
        count: int = 0

    owner, attributes = watched()
    owner.record = Record()
    attributes = Attributes({"Owner": owner})
    assert attributes.changed() == {}
    owner.record.count += 1
    with pytest.raises(Unsavable, match=r"^Owner\.record cannot be saved, .*Record"):
        attributes.changed()


@pytest.mark.parametrize("made", [defaultdict(list), MulticlassAccuracy(3)], ids=lambda made: type(made).__name__)
def test_what_nobody_could_take_is_refused_when_it_is_saved_not_when_it_is_needed(made: Any) -> None:
    class Holder:
        """Has nothing at first."""

    owner = Holder()
    attributes = Attributes({"Holder": owner})
    owner.late = made  # type: ignore[attr-defined]
    with pytest.raises(Unsavable, match=r"^Holder\.late cannot be saved, .*make it before, in the constructor"):
        attributes.changed()


def test_what_is_counted_as_changed_is_saved() -> None:
    _, attributes = watched()
    attributes.count([("Owner", "losses")])
    assert list(attributes.changed()["Owner"]) == ["losses"]


class Remembers(Metric):
    """A plugin's own metric, with an attribute beside its states."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("all", [], dist_reduce_fx="cat")
        self.calls = 0

    def update(self, value: float) -> None:
        self.total += value
        self.all.append(torch.tensor([value]))
        self.calls += 1

    def compute(self) -> Tensor:
        return self.total + self.calls + sum(self.all)


def test_a_plugins_metric_is_saved_once_its_states_as_such_and_its_attributes() -> None:
    left, fresh = nn.ModuleDict({"own": Remembers()}), nn.ModuleDict({"own": Remembers()})
    attributes, its = Attributes({"own": left["own"]}), Attributes({"own": fresh["own"]})
    left["own"].update(2.0)
    left["own"].compute()
    saved = attributes.changed()
    assert list(saved["own"]) == ["calls"]
    its.restore(saved)
    state.set_metrics(fresh, state.metrics(left))  # type: ignore[arg-type]  # any module has metrics
    for metric in (left["own"], fresh["own"]):
        metric.update(3.0)
    assert torch.equal(left["own"].compute(), fresh["own"].compute())


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(2).tolist()]


def test_the_global_generators_are_put_back_where_they_were() -> None:
    draws()
    saved = state.randomness()
    expected = draws()
    draws()
    state.set_randomness(saved)
    assert draws() == expected


def collection() -> MetricCollection:
    members = [MulticlassAccuracy(3, average="micro"), MulticlassPrecision(3), MulticlassRecall(3)]
    return MetricCollection(members, compute_groups=True)


class Measured(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.metrics = collection()
        self.alone = MulticlassAccuracy(3)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(3, (8,), generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(count)
    ]


def test_metrics_go_on_in_the_middle_of_an_epoch_those_that_share_their_states_too() -> None:
    whole, left, resumed = Measured(), Measured(), Measured()
    for batch in batches(5):
        whole.metrics.update(*batch)
    for batch in batches(5)[:3]:
        left.metrics.update(*batch)
    state.set_metrics(resumed, state.metrics(left))
    for batch in batches(5)[3:]:
        resumed.metrics.update(*batch)
    assert differences(whole.metrics.compute(), resumed.metrics.compute()) == []
    assert whole.metrics.compute().keys() == left.metrics.compute().keys()


def test_metrics_that_held_nothing_hold_nothing() -> None:
    fresh = Measured()
    fresh.alone.update(*batches(1)[0])
    state.set_metrics(fresh, state.metrics(Measured()))
    assert fresh.alone.update_count == 0
    assert fresh.alone.tp.sum() == 0


def test_a_metrics_state_is_its_own_afterwards() -> None:
    left, resumed = Measured(), Measured()
    left.alone.update(*batches(1)[0])
    saved = state.metrics(left)
    state.set_metrics(resumed, saved)
    expected = resumed.alone.compute()
    left.alone.update(*batches(2)[1])
    resumed.alone.update(*batches(3)[2])
    again = Measured()
    state.set_metrics(again, saved)
    assert torch.equal(again.alone.compute(), expected)


def test_frozen_parameters_and_modes_are_put_back() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))

    one, other = network(), network()
    one[0].bias.requires_grad_(False)
    one[1][1].eval()
    other[0].weight.requires_grad_(False)
    other.eval()
    state.set_frozen(other, state.frozen(one))
    assert [p.requires_grad for p in other.parameters()] == [True, False, True, True]
    assert [part.training for part in other.modules()] == [True, True, True, True, False]
