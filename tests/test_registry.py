"""Names: entry points, decorators, and the project's own table of them."""

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins.install import install, run
from torch import nn

from lab import registry
from lab.check import check
from lab.document import RecipeError
from lab.recipe import load
from lab.registry import KINDS, BrokenPlugin, DuplicateName, Entry, UnknownName
from lab.slots import read_signature
from lab.types import check_types

ROOT = Path(__file__).parent.parent
OWN = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
OWN_ENTRIES = [
    Entry(group.removeprefix("lab."), name, target, "lightning-lab")
    for group, entries in OWN.items()
    for name, target in entries.items()
]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What a test registers, imports or installs is gone after it."""
    path, imported = sys.path[:], set(registry._imported)
    registered = {kind: dict(kind._registered) for kind in KINDS.values()}
    yield
    sys.path[:] = path
    registry._installed.cache_clear()
    registry._imported.clear()
    registry._imported.update(imported)
    for kind, before in registered.items():
        kind._registered.clear()
        kind._registered.update(before)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder on ``sys.path``, to install into; call ``found`` after."""
    folder = tmp_path / "site"
    folder.mkdir()
    sys.path.insert(0, str(folder))
    registry._installed.cache_clear()
    return folder


class Tiny(nn.Module):
    """One layer."""

    def __init__(self, num_classes: int, input_shape: tuple[int, ...], width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, x: Any) -> Any:
        return self.layer(x.flatten(1))


def supervised(network: dict[str, Any]) -> dict[str, Any]:
    return {"data": "digits", "module": {"name": "supervised", "network": network}}


# Entry points


def test_an_entry_point_is_found_with_its_packages_name(site: Path) -> None:
    install(site, "north-star", {"lab.networks": {"polaris": "north.nets:Polaris"}})
    assert registry.networks.find("polaris") == Entry("networks", "polaris", "north.nets:Polaris", "north-star")


def test_comments_extras_and_other_groups_of_entry_points_are_passed_over(site: Path) -> None:
    install(site, "star", {"console_scripts": {"polaris": "star:main"}, "lab.networks": {"a": "star:A [gpu]"}})
    file = site / "star-1.0.dist-info" / "entry_points.txt"
    file.write_text(file.read_text() + "# b = star:B\n; c = star:C\n\n  d=star:D  \n[lab.nonsense]\ne = star:E\n")
    found = {entry.name: entry.target for entries in registry._installed().values() for entry in entries}
    assert {name: target for name, target in found.items() if target.startswith("star")} == {
        "a": "star:A",
        "d": "star:D",
    }


def test_the_first_distribution_on_the_path_hides_another_of_its_name(site: Path) -> None:
    install(site, "star", {"lab.networks": {"polaris": "star:Polaris"}})
    older = site.parent / "older"
    install(older, "Star", {"lab.networks": {"polaris": "star.old:Polaris", "sirius": "star.old:Sirius"}})
    sys.path.append(str(older))
    assert registry.networks.find("polaris").target == "star:Polaris"
    assert "sirius" not in registry.networks.names()


def test_what_importlib_finds_is_found(site: Path) -> None:
    import importlib.metadata

    install(site, "north-star", {"lab.networks": {"polaris": "north.nets:Polaris"}, "lab.callbacks": {"x": "north:X"}})
    for kind in KINDS:
        points = importlib.metadata.entry_points(group=f"lab.{kind}")
        expected = {(p.name, p.value, p.dist.name) for p in points if p.dist is not None}
        assert {(e.name, e.target, e.package) for e in registry._installed()[kind]} == expected


def test_a_path_that_is_no_folder_is_passed_over(site: Path) -> None:
    (site / "packed.zip").write_bytes(b"")
    (site / "flat.egg-info").write_text("Name: flat\n")
    sys.path[:0] = [str(site / "packed.zip"), str(site / "nowhere"), ""]
    assert "mlp" in registry.networks.names()


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no network named 'mpl' \(did you mean 'mlp'\?\)"):
        registry.networks.find("mpl")


def test_a_name_of_another_kind_is_told_which() -> None:
    with pytest.raises(UnknownName, match="no network named 'adam': it is an optimizer"):
        registry.networks.find("adam")


def test_a_name_that_only_pyproject_knows_is_told_to_install(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project.entry-points."lab.networks"]\nfresh = "fresh:Net"\n')
    with pytest.raises(UnknownName, match=r"pyproject.toml has it, but it is not installed: run `pip install -e \.`"):
        registry.networks.find("fresh")


def test_a_pyproject_that_is_no_toml_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[[[")
    with pytest.raises(UnknownName, match="no network named 'fresh'"):
        registry.networks.find("fresh")


def test_a_missing_extra_is_named(site: Path) -> None:
    install(site, "star", {"lab.networks": {"polaris": "star_missing_module:Polaris"}})
    (site / "star-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: star\nVersion: 1.0\nRequires-Dist: star-missing-module>=2; extra == 'all'\n"
        "Requires-Dist: moon; extra == 'all'\nRequires-Dist: star-missing-module>=2; extra == 'sky'\n"
    )
    with pytest.raises(BrokenPlugin, match=r"; pip install 'star\[sky\]'$"):
        registry.networks.find("polaris").load()


# Decorators


def test_a_registered_class_is_found_by_check() -> None:
    registry.networks.register("tiny")(Tiny)
    plan = check(load(supervised({"name": "tiny", "width": 8})))
    check_types(plan)
    [network] = [c for c in plan.stages["main"].components() if getattr(c, "name", "") == "tiny"]
    assert network.entry.load() is Tiny


def test_a_registered_class_is_checked_by_its_constructor() -> None:
    registry.networks.register("tiny")(Tiny)
    with pytest.raises(RecipeError, match=r"tiny has no argument 'widht' \(did you mean 'width'\?\)"):
        check(load(supervised({"name": "tiny", "widht": 8})))


def test_a_class_without_source_is_read_from_itself() -> None:
    namespace: dict[str, Any] = {"nn": nn, "__name__": "__main__"}
    exec("class Cell(nn.Module):\n    'A cell.'\n    def __init__(self, size: int, depth: int = 2): ...\n", namespace)
    registry.networks.register("cell")(namespace["Cell"])
    signature = read_signature(registry.networks.find("cell"))
    assert signature.known
    assert {name: parameter.required for name, parameter in signature.parameters.items()} == {
        "size": True,
        "depth": False,
    }


def test_a_scripts_own_class_is_found_by_check(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from lab import load_recipe, registry\n\n\n"
        "@registry.networks.register('cell')\n"
        "class Cell:\n    '''A cell.'''\n\n    def __init__(self, size: int = 3): ...\n\n\n"
        "recipe = {'data': 'digits', 'module': {'name': 'supervised', 'network': {'name': 'cell', 'size': 4}}}\n"
        "print(load_recipe(recipe).resolved()['module']['network'])\n"
    )
    finished = run([str(script)], site=None, folder=tmp_path)
    assert finished.stdout == "{'name': 'cell', 'size': 4}\n", finished.stderr


def test_a_second_class_of_a_name_is_refused_and_both_are_named() -> None:
    registry.networks.register("tiny")(Tiny)

    class Other(nn.Module): ...

    with pytest.raises(DuplicateName) as refused:
        registry.networks.register("tiny")(Other)
    assert f"{__name__}:Tiny" in str(refused.value)
    assert "<locals>.Other" in str(refused.value)


def test_the_name_of_an_installed_package_is_refused() -> None:
    with pytest.raises(DuplicateName, match=r"claimed by lightning-lab \(lab.networks.mlp:MLP\) and module"):
        registry.networks.register("mlp")(Tiny)


def test_one_name_may_serve_two_kinds() -> None:
    registry.networks.register("tiny")(Tiny)
    registry.transforms.register("tiny")(Tiny)
    assert registry.transforms.find("tiny").kind == "transforms"


def test_running_a_cell_again_replaces_its_class() -> None:
    def cell() -> type:
        @registry.networks.register("cell")
        class Cell(nn.Module): ...

        return Cell

    first, second = cell(), cell()
    assert first is not second
    assert registry.networks.find("cell").load() is second


def test_a_constructor_that_needs_a_name_is_refused() -> None:
    class Named(nn.Module):
        def __init__(self, name: str, size: int = 1) -> None: ...

    with pytest.raises(
        ValueError, match=r"network 'named' .*Named\) needs an argument 'name', which a recipe cannot give"
    ):
        registry.networks.register("named")(Named)
    assert "named" not in registry.networks.names()


def test_a_name_that_may_be_left_out_is_out_of_reach() -> None:
    @registry.networks.register("named")
    class Named(nn.Module):
        def __init__(self, name: str = "x", size: int = 1) -> None: ...

    plan = check(load(supervised({"name": "named"})))
    assert plan.resolved()["module"]["network"] == {"name": "named", "size": 1}


def test_an_entry_point_whose_constructor_needs_a_name_is_an_error_of_the_recipe(site: Path) -> None:
    source = "class Star:\n    '''S.'''\n\n    def __init__(self, name: str): ...\n"
    install(site, "needs-name", {"lab.networks": {"star": "needs_name:Star"}}, {"needs_name.py": source})
    with pytest.raises(RecipeError, match=r"star needs the argument 'name': str \(which a recipe cannot say"):
        check(load(supervised({"name": "star"})))


def test_a_dotted_name_is_allowed_where_its_package_was_imported(site: Path) -> None:
    (site / "dotted_package.py").write_text("class Net: ...\n")
    with pytest.raises(UnknownName, match="`--import dotted_package` allows"):
        registry.networks.find("dotted_package.Net")
    registry.allow("dotted_package")
    assert registry.networks.find("dotted_package.Net").load().__name__ == "Net"


def test_import_finds_a_module_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "beside_the_recipe.py").write_text("class Net: ...\n")
    registry.allow("beside_the_recipe")
    assert "beside_the_recipe" in sys.modules


def test_an_import_that_exits_is_a_broken_plugin(site: Path) -> None:
    (site / "exiting.py").write_text("raise SystemExit('bye')\n")
    with pytest.raises(BrokenPlugin, match="--import exiting: SystemExit: bye"):
        registry.allow("exiting")


# The project's own table


FAMILIES = {
    "continual": ("ewc", "si", "mas", "lwf", "replay", "naive", "joint"),
    "adaptation": ("cdan", "mmd", "coral", "adabn"),
    "meta_learning": ("anil", "reptile", "protonet"),
    "reinforcement": (),  # each has all four
}
"""Techniques that stand side by side: they share a base, a recipe, a test file and a page."""
RECIPES = {"meta_learning": "maml_glyphs"}
"""The recipe of a family that has another name."""


@pytest.mark.parametrize("name", OWN["lab.modules"])
def test_a_technique_has_its_file_recipe_test_and_page(name: str) -> None:
    home = next((family for family, members in FAMILIES.items() if name in members), name)
    recipe = RECIPES.get(home, home)
    parts = [f"lab/modules/{name}.py", f"recipes/{recipe}.yaml", f"tests/modules/test_{home}.py", f"docs/{home}.md"]
    assert [part for part in parts if not (ROOT / part).is_file()] == [], "missing"
    assert f"name: {name}" in (ROOT / "recipes" / f"{recipe}.yaml").read_text() or name == home
    assert f"`{name}`" in (ROOT / "docs" / f"{home}.md").read_text() or name == home


def test_a_technique_file_has_its_name() -> None:
    files = {file.stem for file in (ROOT / "lab" / "modules").glob("*.py") if not file.stem.startswith("_")}
    assert files - set(OWN["lab.modules"]) == set(FAMILIES), "files without an entry point"


def test_every_own_group_is_a_kind() -> None:
    assert {group.removeprefix("lab.") for group in OWN} <= set(KINDS)


def test_what_is_installed_is_what_pyproject_says() -> None:
    installed = [entry for entries in registry._installed().values() for entry in entries]
    assert {e for e in installed if e.package == "lightning-lab"} == set(OWN_ENTRIES)


@pytest.mark.parametrize("entry", OWN_ENTRIES, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_an_own_entry_loads_and_is_of_its_kind(entry: Entry) -> None:
    from lab.types import named_class

    target = entry.load()
    assert callable(target)
    if isinstance(target, type):
        assert callable(target)
        assert issubclass(target, named_class(KINDS[entry.kind].base or "builtins.object"))


@pytest.mark.parametrize(
    "kind", [kind.name for kind in KINDS.values() if kind.base and kind.name in {e.kind for e in OWN_ENTRIES}]
)
def test_a_kinds_base_is_a_class(kind: str) -> None:
    from lab.types import named_class

    assert named_class(KINDS[kind].base) is not object


@pytest.mark.parametrize(
    "entry", [e for e in OWN_ENTRIES if e.target.startswith("lab.")], ids=lambda entry: f"{entry.kind}-{entry.name}"
)
def test_an_own_class_says_in_a_line_what_it_does(entry: Entry) -> None:
    line = read_signature(entry).doc.partition("\n")[0]
    assert line.endswith(".")
    assert len(line) <= 120


# The commands' start


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "networks"], ["describe", "distill"]], ids=" ".join
)
def test_a_command_that_reads_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import contextlib, io, json, sys\n"
        "from lab.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:])\n"
        "print(json.dumps([len(output.getvalue()), sorted({name.partition('.')[0] for name in sys.modules})]))\n"
    )
    shown, modules = json.loads(run(["-c", script, *arguments], site=None, folder=tmp_path).stdout)
    assert shown
    assert not {"torch", "lightning", "lightning_fabric", "pandas", "numpy", "pydantic", "wandb", "sklearn"} & set(
        modules
    )
