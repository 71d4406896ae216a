"""Signatures read from source text: they agree with ``inspect``, run nothing, and never claim what isn't certain."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.signature import Reference, Signature, canonical, forget, inspected, read
from lab.source import MISSING

Write = Callable[[dict[str, str]], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write modules, by dotted name (``package.`` is its ``__init__``), into a folder on the import path."""
    folder = tmp_path / "site"
    folder.mkdir()

    def write_files(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = folder.joinpath(*name.split("."))
            path = path / "__init__.py" if name.endswith(".") else path.with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
        monkeypatch.syspath_prepend(folder)
        forget()

    return write_files


def required(signature: Signature) -> list[str]:
    return [name for name, parameter in signature.parameters.items() if parameter.required]


def public_classes(module: str) -> dict[str, type]:
    found = vars(importlib.import_module(module))
    names = found.get("__all__", [name for name in found if not name.startswith("_")])
    return {name: found[name] for name in names if inspect.isclass(found.get(name))}


# Of each package's public classes, how many may come back unknown, and how many open although `inspect` says closed.
# In torch.nn three are tensors with a metaclass, one takes *args, Module itself is not read; one derives from C.
AGREEMENT = {
    "torch.nn": (5, 1),
    "torch.optim": (0, 0),
    "torch.optim.lr_scheduler": (0, 0),
    "lightning.pytorch.callbacks": (0, 0),
    "lightning.pytorch.loggers": (0, 0),
    "torchmetrics": (0, 0),
    "timm.optim": (0, 0),
}


@pytest.mark.parametrize("module", AGREEMENT)
def test_agrees_with_inspect_on_every_public_class(module: str) -> None:
    classes = public_classes(module)
    unknown, needlessly_open, literals = [], [], 0
    for name, cls in classes.items():
        signature = read(f"{module}:{name}")
        if not signature.known:
            unknown.append(f"{name}: {signature.reason}")
            continue
        live = inspect.signature(cls).parameters.values()
        named = {p.name: p for p in live if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        takes_more = any(p.kind is p.VAR_KEYWORD for p in live)
        own = list(signature.parameters)[: len(named)]
        assert own == list(named), name
        assert takes_more or len(own) == len(signature.parameters), name
        if signature.open and not takes_more:
            needlessly_open.append(name)
        for key, parameter in named.items():
            read_one = signature.parameters[key]
            assert read_one.required == (parameter.default is parameter.empty), (name, key)
            assert read_one.literal is MISSING or read_one.literal == parameter.default, (name, key)
            literals += read_one.literal is not MISSING
    assert len(classes) > 5
    assert literals > len(classes)
    assert (len(unknown) <= AGREEMENT[module][0], unknown) == (True, unknown)
    assert (len(needlessly_open) <= AGREEMENT[module][1], needlessly_open) == (True, needlessly_open)


@pytest.mark.parametrize("target", ["torch.optim:AdamW", "lightning.pytorch:LightningModule", "torch.nn:LSTM"])
def test_bases_are_the_method_resolution_order_in_defining_modules(target: str) -> None:
    module, name = target.split(":")
    live = getattr(importlib.import_module(module), name)
    assert read(target).bases == tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in live.__mro__[1:-1])


def test_the_trainer_is_read_whole() -> None:
    from lightning.pytorch import Trainer

    signature = read("lightning.pytorch.trainer.trainer:Trainer")
    assert (signature.known, signature.open) == (True, False)
    assert list(signature.parameters) == list(inspect.signature(Trainer).parameters)
    assert Path(signature.file or "").name == "trainer.py"
    assert "lightning.pytorch.callbacks.Callback" in signature.parameters["callbacks"].names


def test_reading_imports_neither_torch_nor_lightning() -> None:
    code = """
        import sys
        from lab.signature import read
        for target in ["torch.nn:Conv2d", "torch.optim:AdamW", "lightning.pytorch:Trainer", "torchmetrics:Accuracy"]:
            found = read(target)
            assert found.known, found.reason
            assert all(isinstance(parameter.names, tuple) for parameter in found.parameters.values())
        print(sorted({"torch", "lightning", "torchmetrics", "numpy"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ended.stdout.strip() == "[]"


def test_kwargs_to_super_bring_the_bases_arguments_but_those_bound_in_the_call(write: Write) -> None:
    write(
        {
            "passing.": "",
            "passing.base": """
                class Base:
                    def __init__(self, network, objective, *, lr: float = 1e-3, name="base", steps): ...
            """,
            "passing.child": """
                from .base import Base
                class Child(Base):
                    '''A child.'''
                    def __init__(self, weight=-0.5, **base):
                        super().__init__(make(weight), name="child", **base)
                class Grandchild(Child):
                    pass
            """,
        }
    )
    signature = read("passing.child:Grandchild")
    assert list(signature.parameters) == ["weight", "objective", "lr", "steps"]
    assert required(signature) == ["objective", "steps"]
    assert not signature.open
    weight, lr = signature.parameters["weight"], signature.parameters["lr"]
    assert (weight.default, weight.literal, weight.owner) == ("-0.5", -0.5, "passing.child:Child")
    assert (lr.annotation, lr.default, lr.literal, lr.owner) == ("float", "1e-3", 1e-3, "passing.base:Base")
    assert (signature.doc, read("passing.child:Child").doc) == ("", "A child.")


@pytest.mark.parametrize(
    "body",
    [
        "self.rate = kwargs.pop('rate', 1)\n        super().__init__(**kwargs)",
        "kwargs['need'] = 1\n        super().__init__(**kwargs)",
        "if self.ready:\n            super().__init__(**kwargs)",
        "if self.ready:\n            return\n        super().__init__(**kwargs)",
        "super().__init__(**{**kwargs, 'need': 1})",
        "super().__init__(**kwargs, **self.more)",
        "self.kwargs = kwargs\n        super().__init__()",
        "pass",
    ],
)
def test_kwargs_that_may_go_elsewhere_leave_the_signature_open_and_nothing_required(write: Write, body: str) -> None:
    source = f"""
class Base:
    def __init__(self, need, option=1): ...
class Child(Base):
    def __init__(self, own, **kwargs):
        {body}
"""
    write({"elsewhere": source})
    signature = read("elsewhere:Child")
    assert signature.known
    assert signature.open
    assert required(signature) == ["own"]


def test_arguments_that_may_be_handed_on_keep_their_annotations(write: Write) -> None:
    write(
        {
            "loose": """
                class Base:
                    def __init__(self, need: int, option=1): ...
                class Child(Base):
                    def __init__(self, **kwargs):
                        kwargs.setdefault("need", 3)
                        super().__init__(**kwargs)
            """
        }
    )
    need = read("loose:Child").parameters["need"]
    assert (need.annotation, need.default, need.literal) == ("int", "...", MISSING)


def test_star_args_handed_to_super_are_empty_where_arguments_have_names(write: Write) -> None:
    write(
        {
            "starred": """
                class Base:
                    def __init__(self, mode, width, depth=1): ...
                class Middle(Base):
                    def __init__(self, *args, **kwargs):
                        super().__init__("fast", *args, **kwargs)
                class Child(Middle):
                    def __init__(self, width, **kwargs):
                        super().__init__(width, **kwargs)
                class Changed(Base):
                    def __init__(self, *args, **kwargs):
                        args = ("fast", 8)
                        super().__init__(*args, **kwargs)
            """
        }
    )
    assert required(read("starred:Middle")) == ["width"]
    assert list(read("starred:Child").parameters) == ["width", "depth"]
    assert (required(read("starred:Changed")), read("starred:Changed").open) == ([], True)


def test_initializers_are_inherited_in_method_resolution_order(write: Write) -> None:
    write(
        {
            "diamond": """
                class Root:
                    def __init__(self, root): ...
                class Left(Root):
                    pass
                class Right(Root):
                    def __init__(self, right, **kwargs):
                        super().__init__(**kwargs)
                class Bottom(Left, Right):
                    pass
            """
        }
    )
    signature = read("diamond:Bottom")
    assert signature.bases == ("diamond.Left", "diamond.Right", "diamond.Root")
    assert list(signature.parameters) == ["right", "root"]


def test_a_dataclass_has_the_constructor_of_its_fields(write: Write) -> None:
    source = """
        import dataclasses as dc
        from dataclasses import KW_ONLY, InitVar, dataclass, field
        from typing import ClassVar

        @dataclass
        class Base:
            width: int
            depth: int = 2
            kind: ClassVar[str] = "base"

        @dc.dataclass(order=True)
        class Child(Base):
            width: int = 8
            made: list = field(default_factory=list)
            hidden: int = dc.field(default=0, init=False)
            scale: "InitVar[float]" = 1.0
            _: KW_ONLY
            name: str
            rate: float = field(default=0.1)

        class Plain(Child):
            pass

        @dataclass
        class Named:
            _: KW_ONLY
            name: str
            later: int = field(kw_only=False)

        class Rated:
            rate = 0.5

        @dataclass
        class Given(Rated):
            rate: float

        class Positional(Named):
            def __init__(self, **kwargs):
                super().__init__(1, **kwargs)
    """
    write({"fields": source})
    live = importlib.import_module("fields")
    for name in ("Base", "Child", "Plain", "Given"):
        signature, expected = read(f"fields:{name}"), inspect.signature(getattr(live, name)).parameters
        assert sorted(signature.parameters) == sorted(expected)
        assert required(signature) == [key for key, p in expected.items() if p.default is p.empty]
        assert not signature.open
    assert required(read("fields:Positional")) == ["name"]
    assert read("fields:Child").parameters["rate"].literal == 0.1
    assert read("fields:Child").attributes["kind"] == "base"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("class A:\n    def __init__(self, *args): ...", "*args"),
        ("class A:\n    def __init__(self, x, /, y=1): ...", "by position"),
        ("class A:\n    def __new__(cls, *args, **kwargs): ...", "__new__"),
        ("class M(type): ...\nclass A(metaclass=M): ...", "metaclass"),
        ("from enum import Enum\nclass A(Enum):\n    ONE = 1", "metaclass"),
        ("from typing import NamedTuple\nclass A(NamedTuple):\n    x: int", "NamedTuple"),
        ("class A(dict): ...", "dict"),
        ("class A(make_base()): ...", "make_base()"),
        ("from pydantic.dataclasses import dataclass\n@dataclass\nclass A:\n    x: int", "decorated"),
        ("import attr\n@attr.s\nclass A:\n    x = attr.ib()", "decorated"),
        ("class A:\n    def f(self, x): ...\n    __init__ = f", "not a plain function"),
        ("class A:\n    def __init__(self): ...\nA.__init__ = other", "not a class or function"),
        ("from functools import partial\nA = partial(print, end='')", "not a class or function"),
        ("A = 3", "not a class or function"),
        ("@remade\nclass A:\n    def __new__(cls, value): ...", "__new__"),
        ("if here:\n    class A: ...\nelse:\n    class A:\n        def __init__(self, x): ...", "more than one way"),
        ("from _thread import RLock as A", "not written in Python"),
        ("def __getattr__(name): ...", "not written in"),
    ],
)
def test_what_source_text_cannot_tell_is_unknown_with_a_reason_but_not_broken(
    write: Write, source: str, why: str
) -> None:
    write({"untold": source})
    signature = read("untold:A")
    assert not signature.known
    assert signature.parameters == {}
    assert why in signature.reason
    assert not signature.broken


def test_a_constructor_under_an_unknown_decorator_claims_nothing(write: Write) -> None:
    write(
        {
            "decorated": """
                from lab.ranges import checked
                class Renamed:
                    @rename_argument("old", "new")
                    def __init__(self, new): ...
                class Checked:
                    @checked
                    def __init__(self, new): ...
                class Passing(Checked):
                    @rename_argument("old", "new")
                    def __init__(self, **kwargs):
                        super().__init__(**kwargs)
            """
        }
    )
    passing = read("decorated:Passing")
    assert (list(passing.parameters), passing.open, required(passing)) == (["new"], True, [])
    renamed, checked = read("decorated:Renamed"), read("decorated:Checked")
    assert (list(renamed.parameters), renamed.open, required(renamed)) == (["new"], True, [])
    assert (list(checked.parameters), checked.open, required(checked)) == (["new"], False, ["new"])


def test_an_ancestor_that_cannot_be_read_leaves_the_own_arguments_and_an_open_signature(write: Write) -> None:
    write(
        {
            "orphan": """
                from not_installed_anywhere import Base
                class Child(Base):
                    def __init__(self, own, **kwargs):
                        super().__init__(**kwargs)
                class Closed(Base):
                    def __init__(self, own): ...
                class Bare(Base):
                    pass
                class Known:
                    def __init__(self, need): ...
                class Halfway(Known): ...
                class Both(Halfway, Base): ...
            """
        }
    )
    child, closed = read("orphan:Child"), read("orphan:Closed")
    assert (closed.known, closed.open) == (True, True)
    assert (child.known, child.open, list(child.parameters)) == (True, True, ["own"])
    assert child.bases == ("not_installed_anywhere.Base",)
    assert not read("orphan:Bare").known
    assert not read("orphan:Both").known  # Base may derive from Known, and then comes before it


def test_overloads_are_skipped_for_the_implementation(write: Write) -> None:
    write(
        {
            "overloaded": """
                from typing import overload
                class A:
                    @overload
                    def __init__(self, x: int): ...
                    @overload
                    def __init__(self, y: str): ...
                    def __init__(self, x=None, y=None): ...
            """
        }
    )
    assert list(read("overloaded:A").parameters) == ["x", "y"]
    assert required(read("overloaded:A")) == []


def test_functions_are_read_too(write: Write) -> None:
    write({"functions": "def build(width: int, *, depth=2, **more):\n    '''Build it.'''\n"})
    signature = read("functions:build")
    assert (required(signature), signature.open, signature.doc) == (["width"], True, "Build it.")
    assert signature.parameters["depth"].owner == "functions:build"
    assert read("timm:create_model").parameters["pretrained"].literal is False


ANNOTATED = {
    "annotated.": "from .deep import Public as Public",
    "annotated.deep": """
        from __future__ import annotations
        import typing as t
        from typing import TYPE_CHECKING, Annotated, Literal, Optional
        import torch.nn as nn
        from torch import nn as also_nn
        import lightning as L
        from . import types
        from .types import Batch, Loader
        try:
            from not_installed_anywhere import Missing
        except ImportError:
            Missing = None
        if TYPE_CHECKING:
            from pathlib import Path

        class Local: ...
        Network = nn.Module | None

        class Public:
            def __init__(
                self,
                network: nn.Module | None,
                other: Optional["also_nn.Linear"],
                trainer: L.Trainer,
                local: list[Local],
                path: Path,
                mode: Literal["Local", "b"],
                size: Annotated[int, "Local", t.Any],
                alias: Network,
                imported: Batch,
                deeper: types.Loader,
                missing: Missing,
                unsaid=None,
                several: dict[
                    str, int
                ] = None,
            ): ...
    """,
    "annotated.types": """
        from typing import TypeAlias, Union
        import torch
        Batch: TypeAlias = "Union[torch.Tensor, tuple[torch.Tensor, ...]]"
        Loader = list[Batch]
    """,
}

BATCH = ["annotated.types.Batch", "typing.Union", "torch.Tensor", "tuple"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("network", ["torch.nn.Module", "None"]),
        ("other", ["typing.Optional", "torch.nn.Linear"]),
        ("trainer", ["lightning.Trainer"]),
        ("local", ["list", "annotated.deep.Local"]),
        ("path", ["pathlib.Path"]),
        ("mode", ["typing.Literal"]),
        ("size", ["typing.Annotated", "int", "typing.Any"]),
        ("alias", ["annotated.deep.Network", "torch.nn.Module", "None"]),
        ("imported", BATCH),
        ("deeper", ["annotated.types.Loader", "list", *BATCH]),
        ("missing", ["not_installed_anywhere.Missing", "annotated.deep.Missing", "None"]),
        ("unsaid", []),
        ("several", ["dict", "str", "int"]),
    ],
)
def test_names_in_annotations_are_resolved_through_imports_and_aliases(
    write: Write, name: str, names: list[str]
) -> None:
    write(ANNOTATED)
    assert list(read("annotated:Public").parameters[name].names) == names


def test_annotations_stay_as_they_are_written(write: Write) -> None:
    arguments = "ä: 'Größe|None' = \"ß\", b : dict [str,int]={'x':(1,-2)}"
    write({"written": f"class A:\n    def __init__(self, {arguments}): ...\n"})
    first, second = read("written:A").parameters.values()
    assert (first.annotation, first.default, first.literal) == ("'Größe|None'", '"ß"', "ß")
    assert (second.annotation, second.default, second.literal) == ("dict [str,int]", "{'x':(1,-2)}", {"x": (1, -2)})


def test_classes_are_found_through_re_exports_stars_and_aliases(write: Write) -> None:
    write(
        {
            "exported.": """
                from .one import *
                from exported import two
                from .two import Second as Deuxième
                Third = two.Third
            """,
            "exported.one": """
                from .two import Second
                __all__ = ["First"]
                class First:
                    def __init__(self, one): ...
            """,
            "exported.two": """
                class Second:
                    def __init__(self, two): ...
                class Third(Second):
                    def __init__(self, three): ...
            """,
            "exporting": """
                import exported.two as e
                from exported import Deuxième
                class Fourth(e.Third, Deuxième): ...
            """,
        }
    )
    for name, argument in {"First": "one", "Deuxième": "two", "Third": "three"}.items():
        signature = read(f"exported:{name}")
        assert (signature.target, list(signature.parameters)) == (f"exported:{name}", [argument])
    assert read("exported:Third").bases == ("exported.two.Second",)
    assert read("exporting:Fourth").bases == ("exported.two.Third", "exported.two.Second")
    assert read("exported:Second").reason == "'Second' is not written in exported"
    assert (canonical("exported.Deuxième"), canonical("nowhere.Second")) == ("exported.two.Second", "nowhere.Second")


def test_lightning_as_l_leads_to_lightnings_module(write: Write) -> None:
    write(
        {
            "aliased": """
                import lightning as L
                class Mine(L.LightningModule):
                    def __init__(self, width: int = 4, **kwargs):
                        super().__init__(**kwargs)
            """
        }
    )
    signature = read("aliased:Mine")
    assert signature.bases[0] == "lightning.pytorch.core.module.LightningModule"
    assert "torch.nn.modules.module.Module" in signature.bases
    assert (list(signature.parameters), signature.open) == (["width"], False)


def test_torchs_module_ends_the_chain_unless_it_calls_super(write: Write) -> None:
    write(
        {
            "chain": """
                from torch import nn
                class Mixin:
                    def __init__(self, need): ...
                class Ends(nn.Module, Mixin): ...
                class Calls(nn.Module, Mixin):
                    call_super_init = True
            """
        }
    )
    for name, is_open in {"Ends": False, "Calls": True}.items():
        signature = read(f"chain:{name}")
        assert (signature.known, signature.open, signature.parameters) == (True, is_open, {})


def test_the_branch_that_imports_decides(write: Write) -> None:
    write(
        {
            "branches": """
                try:
                    from not_installed_anywhere import Base
                except ImportError:
                    from branches_else import Base
                class Child(Base): ...
            """,
            "branches_else": "class Base:\n    def __init__(self, fallback): ...",
        }
    )
    assert list(read("branches:Child").parameters) == ["fallback"]


def test_class_attributes_are_literals_or_references_and_the_nearest_wins(write: Write) -> None:
    write(
        {
            "facts.": "",
            "facts.base": """
                from typing import ClassVar
                class Labelled: ...
                class Base:
                    consumes = Labelled
                    facts: ClassVar[tuple[str, ...]] = ("classes", "shape")
                    monitor: str
                    rate = -1.5
                    tags = [None, True, {"a": Labelled}]
                    made = compute()
                    gone = 1
                    hidden = 2
            """,
            "facts.child": """
                from facts import base
                class Child(base.Base):
                    yields = base.Labelled
                    rate = 2
                    gone = compute()
                    @property
                    def hidden(self): ...
            """,
        }
    )
    assert read("facts.child:Child").attributes == {
        "consumes": "facts.base.Labelled",
        "facts": ("classes", "shape"),
        "rate": 2,
        "tags": [None, True, {"a": Reference("facts.base.Labelled")}],
        "yields": "facts.base.Labelled",
    }
    assert isinstance(read("facts.child:Child").attributes["yields"], Reference)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("broken.syntax:A", r"syntax error in .*syntax\.py:2: .*"),
        ("broken.null:A", r".*null.*"),
        ("broken.empty:A", r"no attribute 'A' in broken\.empty"),
        ("broken.absent:A", r"no module named 'broken\.absent'"),
        ("not_installed_anywhere.x:A", r"no module named 'not_installed_anywhere\.x'"),
        ("broken.through:A", r"no attribute 'A' in broken\.empty"),
        ("broken.needs:A", r"no module named 'not_installed_anywhere'"),
    ],
)
def test_a_broken_plugin_is_unknown_and_says_why(write: Write, target: str, reason: str) -> None:
    write(
        {
            "broken.": "",
            "broken.syntax": "class A:\n    def __init__(self x): ...\n",
            "broken.null": "class A: ...\0",
            "broken.empty": "",
            "broken.through": "from .empty import A",
            "broken.needs": "from not_installed_anywhere import A",
        }
    )
    signature = read(target)
    assert not signature.known
    assert signature.broken
    assert signature.open
    assert re.fullmatch(reason, signature.reason), signature.reason


@pytest.mark.parametrize(
    "source",
    [
        "from . import A",
        "from .other import A",
        "A = A",
        "class A(A): ...",
        "class A(B): ...\nclass B(A): ...",
        "from .other import *",
        "A = " + "(" * 300 + ")" * 300,
        "class A(" + "-" * 5000 + "x): ...",
    ],
)
def test_circles_and_depths_end(write: Write, source: str) -> None:
    write({"circle.": source, "circle.other": "from circle import *\nfrom circle import A"})
    assert not read("circle:A").known


def test_a_module_that_raises_on_import_is_read_but_not_run(write: Write, tmp_path: Path) -> None:
    raising = f"open({str(tmp_path / 'ran')!r}, 'w')\nraise RuntimeError\n"
    readable = "class A:\n    def __init__(self, x): ...\n"
    write({"raising.": raising, "raising.inner.": raising, "raising.inner.deep": readable + raising})
    assert required(read("raising.inner.deep:A")) == ["x"]
    assert not (tmp_path / "ran").exists()
    assert "raising" not in sys.modules


def test_invalid_escapes_in_source_do_not_warn(write: Write) -> None:
    write({"escaped": "class A:\n    '''\\d'''\n    def __init__(self, x): ..."})
    assert read("escaped:A").known


def test_namespace_packages_and_other_encodings_are_read(write: Write, tmp_path: Path) -> None:
    write({"space.inner.deeper.mod": ""})
    text = "# -*- coding: latin-1 -*-\nclass A:\n    def __init__(self, x='ü'): ...\n"
    (tmp_path / "site/space/inner/deeper/mod.py").write_bytes(text.encode("latin-1"))
    assert read("space.inner.deeper.mod:A").parameters["x"].literal == "ü"


def test_editable_installs_with_a_finder_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "somewhere" / "src"
    (source / "inner").mkdir(parents=True)
    (source / "__init__.py").write_text("raise RuntimeError")
    (source / "inner" / "__init__.py").write_text("from ..models import A")
    (source / "models.py").write_text("class A:\n    def __init__(self, x): ...")

    class Finder:
        """As setuptools writes it: it knows where the top package lies."""

        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
            if name == "mapped":
                return importlib.util.spec_from_file_location(
                    name, source / "__init__.py", submodule_search_locations=[str(source)]
                )
            return None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert required(read("mapped.inner:A")) == ["x"]


def test_a_large_file_is_parsed_once(write: Write) -> None:
    classes = "\n".join(f"class C{i}:\n    def __init__(self, x{i}): ...\n" for i in range(3000))
    write({"large": classes})
    start = time.perf_counter()
    read("large:C0")
    first = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(1, 20):
        assert required(read(f"large:C{i}")) == [f"x{i}"]
    assert time.perf_counter() - start < first


def test_a_live_class_without_source_is_inspected() -> None:
    code = """
        from __future__ import annotations
        import torch
        from torch import nn
        class Head: ...
        class Mine(nn.LSTM):
            '''Mine.'''
            consumes = Head
            rate = 0.5
            def __init__(self, network: nn.Module | None, width: int = -4, *, done: Head = Head(), **kwargs): ...
    """
    sys.modules["notebook"] = type(sys)("notebook")
    try:
        exec(textwrap.dedent(code), vars(sys.modules["notebook"]))
        signature = inspected(sys.modules["notebook"].Mine, "notebook:Mine")
        names = signature.parameters["network"].names
    finally:
        del sys.modules["notebook"]
    assert (signature.known, signature.open, signature.doc) == (True, True, "Mine.")
    assert list(signature.parameters)[:4] == ["network", "width", "done", "input_size"]
    assert required(signature) == ["network"]
    assert signature.parameters["width"].literal == -4
    assert signature.parameters["done"].literal is MISSING
    assert names == ("torch.nn.Module", "None")
    assert signature.attributes["consumes"] == Reference("notebook.Head")
    assert signature.attributes["rate"] == 0.5
    assert signature.bases[:2] == ("torch.nn.modules.rnn.LSTM", "torch.nn.modules.rnn.RNNBase")


def test_a_live_function_is_inspected() -> None:
    signature = inspected(lambda width, /, *depth: None, "notebook:f")
    assert not signature.known
    assert inspected(lambda width=2: None, "notebook:f").parameters["width"].literal == 2


def test_a_changed_file_is_read_anew_once_the_old_one_is_forgotten(write: Write) -> None:
    write({"changing": "class A:\n    def __init__(self, before): ..."})
    assert required(read("changing:A")) == ["before"]
    write({"changing": "class A:\n    def __init__(self, after): ..."})
    assert required(read("changing:A")) == ["after"]
