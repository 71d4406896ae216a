"""Values as plain data: every kind comes back through a file that loads safely, and nothing else is ever built."""

from __future__ import annotations

import io
import math
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lab.encoding import DEEPEST, Unsavable, decoded, encoded
from lab.verification import differences


def through_a_file(value: Any, existing: Any = None) -> Any:
    """What is there after saving and loading, put into what a fresh process has."""
    file = io.BytesIO()
    torch.save(encoded(value), file)
    file.seek(0)
    return decoded(torch.load(file, weights_only=True), existing)


VALUES = [
    None, True, 3, -0.5, math.inf, 1 + 2j, "words", b"bytes", b"", [], (), {},
    [1, [2, (3, [4.0])]], (1, "a", None), {"a": {"b": [1, 2]}, 3: (4,), ("x", 1): "tuple"},
    OrderedDict(b=1, a=2), Counter("aab"), {1, 2, 3}, frozenset("ab"), deque([1, 2], maxlen=2), deque([3]),
    torch.Size([2, 3]), Path("some/where"), {"is": "tensor", "value": 1},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_equal_and_of_its_type(value: Any) -> None:
    back = through_a_file(value)
    assert back == value
    assert type(back) is type(value)


def test_nan_comes_back_as_nan() -> None:
    assert math.isnan(through_a_file(math.nan))


def test_a_deque_keeps_its_longest_length() -> None:
    back = through_a_file(deque([1, 2, 3], maxlen=3))
    back.append(4)
    assert list(back) == [2, 3, 4]


def test_an_ordered_mapping_keeps_its_order() -> None:
    assert list(through_a_file({"b": 1, "a": 2})) == ["b", "a"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3), torch.tensor(1.5), torch.zeros(0, 3), torch.tensor([True, False]),
        torch.tensor([1.1, math.nan], dtype=torch.bfloat16), torch.tensor([1 / 3], dtype=torch.float64),
        torch.arange(6).reshape(2, 3).t(), torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(2)),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)  # fmt: skip
def test_a_tensor_comes_back_with_its_type_and_shape(tensor: torch.Tensor) -> None:
    back = through_a_file(tensor)
    assert (back.dtype, back.shape, back.requires_grad) == (tensor.dtype, tensor.shape, False)
    assert torch.allclose(back, tensor, rtol=0, atol=0, equal_nan=True)


def test_what_was_encoded_does_not_change_with_the_tensor() -> None:
    tensor = torch.zeros(2)
    plain = encoded([tensor])
    tensor += 1
    assert torch.equal(decoded(plain)[0], torch.zeros(2))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.array(2.5), np.zeros((0, 2)),
        np.array([True, False]), np.array([1 + 1j]), np.array([1, 2], dtype=">i4"), np.array([0.5], dtype=np.float16),
    ],
    ids=lambda array: f"{array.dtype.str} {array.shape}",
)  # fmt: skip
def test_an_array_comes_back_with_its_type_and_shape_and_can_be_written(array: np.ndarray[Any, Any]) -> None:
    back = through_a_file(array, np.ones(()) if not array.shape else None)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert np.array_equal(back, array)
    back[...] = 0


def test_a_numpy_number_comes_back_as_one() -> None:
    back = through_a_file(np.float32(0.1))
    assert type(back) is np.float32
    assert back == np.float32(0.1)


GENERATORS: dict[str, tuple[Any, Any]] = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(3, generator=g).tolist()),
    "python": (lambda: random.Random(3), lambda g: [g.random(), g.gauss(0, 1), g.gauss(0, 1)]),
    "legacy": (lambda: np.random.RandomState(3), lambda g: [g.rand(), g.randn(), g.randn()]),
    **{
        name: (lambda name=name: np.random.Generator(getattr(np.random, name)(3)), lambda g: g.random(3).tolist())
        for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
    },
}


@pytest.mark.parametrize("existing", [False, True], ids=["made", "existing"])
@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_goes_on_with_the_same_draws(name: str, existing: bool) -> None:
    make, draw = GENERATORS[name]
    generator = make()
    draw(generator)
    fresh = make() if existing else None
    back = through_a_file(generator, fresh)
    assert draw(back) == draw(generator)
    assert fresh is None or back is fresh


def test_an_object_that_says_its_state_takes_it_again() -> None:
    parameter, fresh = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    existing = torch.optim.SGD([fresh], lr=0.7, momentum=0.9)
    back = through_a_file(optimizer, existing)
    assert back is existing
    assert differences(back.state_dict(), optimizer.state_dict()) == []


@pytest.mark.parametrize(
    "container", [list, tuple, lambda parts: dict(enumerate(parts))], ids=["list", "tuple", "dict"]
)
def test_objects_in_containers_take_their_states_too(container: Any) -> None:
    layers, fresh = container([nn.Linear(2, 2), nn.Linear(2, 2)]), container([nn.Linear(2, 2), nn.Linear(2, 2)])
    back = through_a_file(layers, fresh)
    assert [back[i] is fresh[i] for i in range(2)] == [True, True]
    assert all(torch.equal(back[i].weight, layers[i].weight) for i in range(2))


@pytest.mark.parametrize(
    ("value", "existing"),
    [
        ([1, 2], [9]), ({"a": 1}, {"b": 2}), (OrderedDict(a=1), OrderedDict(b=2)), (Counter("a"), Counter("b")),
        (deque([1], maxlen=2), deque([2], maxlen=2)), ({1}, {2}), (defaultdict(list, a=[1]), defaultdict(list, b=[2])),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_container_is_filled_where_it_is(value: Any, existing: Any) -> None:
    assert through_a_file(value, existing) is existing
    assert existing == value


def test_a_tensor_and_an_array_are_filled_where_they_are() -> None:
    tensor, array = torch.zeros(2), np.zeros(2)
    assert through_a_file(torch.ones(2), tensor) is tensor
    assert through_a_file(np.ones(2), array) is array
    assert (tensor.tolist(), array.tolist()) == ([1, 1], [1, 1])


@pytest.mark.parametrize(
    "existing", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), "text"], ids=["shape", "type", "text"]
)
def test_a_tensor_of_another_shape_or_type_takes_the_place_of_what_is_there(existing: Any) -> None:
    back = through_a_file(torch.ones(2), existing)
    assert back is not existing
    assert torch.equal(back, torch.ones(2))


def test_a_defaultdict_keeps_what_it_makes_of_missing_keys() -> None:
    back = through_a_file(defaultdict(list, a=[1]), defaultdict(list))
    back["b"].append(2)
    assert back == {"a": [1], "b": [2]}


@pytest.mark.parametrize("made", [defaultdict(int), nn.Linear(1, 1)], ids=lambda made: type(made).__name__)
def test_what_only_an_existing_object_can_take_says_where_to_make_it(made: Any) -> None:
    with pytest.raises(Unsavable, match="make it before, in the constructor"):
        through_a_file(made)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda: None, "builtins.function"),
        (threading.Lock(), r"_thread\.lock"),
        ({"deep": [(threading.Lock(),)]}, r"_thread\.lock"),
        ({1: object()}, r"builtins\.object"),
        (np.array([object()]), r"numpy\.ndarray"),
        (nn.Linear, r"builtins\.type"),
        (type("Mine", (dict,), {})(), r"Mine"),
    ],
    ids=["lambda", "lock", "lock within", "object", "array of objects", "class", "subclass"],
)
def test_what_has_no_plain_form_is_refused_by_its_type(value: Any, named: str) -> None:
    with pytest.raises(Unsavable, match=f"it is or holds a .*{named}"):
        encoded(value)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_nesting_has_an_end_and_so_has_what_holds_itself() -> None:
    itself: list[Any] = []
    itself.append(itself)
    assert through_a_file(nested(20)) == nested(20)
    for value in (nested(40), itself):
        with pytest.raises(Unsavable, match=f"more than {DEEPEST} deep"):
            encoded(value)


@pytest.mark.parametrize(
    "plain",
    [
        {}, {"value": 1}, {"is": "os.system", "value": "true"}, {"is": "__class__", "value": []}, {"is": None},
        {"is": "tensor", "value": "none"}, {"is": "numpy.Generator", "value": {"is": "dict", "value": []}},
        *({"is": "numpy.Generator", "value": {"is": "dict", "value": [("bit_generator", name)]}}
          for name in ("__class__", "__builtins__", "RandomState", "load", "../PCG64")),
        {"is": "array", "value": (b"\0" * 8, "O", [1])}, {"is": "torch.Generator", "value": (1, "cpu")},
        {"is": "state", "value": {"is": "dict", "value": []}}, [{"is": "eval", "value": "1"}],
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_plain_form_that_nobody_made_so_raises(plain: Any) -> None:
    with pytest.raises((Unsavable, KeyError, TypeError, ValueError)):
        decoded(plain)


def test_a_foreign_generator_name_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(np.random, "Evil", lambda: built.append("evil"), raising=False)
    with pytest.raises(Unsavable, match="unknown generator 'Evil'"):
        decoded({"is": "numpy.Generator", "value": {"is": "dict", "value": [("bit_generator", "Evil")]}})
    assert built == []
