"""YAML text to nodes: the core schema of YAML 1.2, places, what is refused, and the way back."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import document
from lab.document import Node, Place, RecipeError

FILE = Place("recipe.yaml", is_file=True)


def value(text: str) -> Any:
    return document.parse(f"key: {text}\n", FILE).plain()["key"]


def said(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        document.parse(text, FILE)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), ("1.5", 1.5), (".5", 0.5), ("5.", 5.0), ("-2.5e+2", -250.0), ("1.e3", 1000.0),
        ("0", 0), ("+3", 3), ("-3", -3), ("014", 14), ("0o14", 12), ("0x1F", 31), ("9223372036854775807", 2**63 - 1),
        ("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False), ("FALSE", False),
        ("null", None), ("Null", None), ("NULL", None), ("~", None), ("", None), ("# a comment", None),
        (".inf", math.inf), ("-.INF", -math.inf), ("+.Inf", math.inf),
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("OFF", "OFF"), ("y", "y"), ("tRUE", "tRUE"), ("nUll", "nUll"),
        ("0b11", "0b11"), ("0o8", "0o8"), ("0o", "0o"), ("0x", "0x"), ("-0x1", "-0x1"), ("1e", "1e"), (".e3", ".e3"),
        ("1_000", "1_000"), ("12:30:00", "12:30:00"), ("2026-01-01", "2026-01-01"), ("NaN", "NaN"), (".", "."),
        ("=", "="), ("<<", "<<"), ("٣", "٣"), ("1²", "1²"), ("...", "..."),
        ("'1'", "1"), ('"1e-3"', "1e-3"), ("'null'", "null"), ('"true"', "true"), ("''", ""), ("'it''s'", "it's"),
        ('"\\e[31m\\0"', "\x1b[31m\0"), ("|\n  a\n  b", "a\nb\n"), (">\n  a\n  b", "a b\n"), ("a\n  b", "a b"),
    ],
)  # fmt: skip
def test_a_scalar_is_what_yaml_1_2_says_it_is(text: str, expected: Any) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


def test_nan_is_a_number() -> None:
    assert math.isnan(value(".nan"))
    assert math.isnan(value(".NaN"))


@pytest.mark.parametrize("text", ["9" * 5000, "-" + "9" * 25, "0x" + "f" * 10_000, "0o" + "7" * 10_000, "1" * 400_000])
def test_a_whole_number_of_more_than_64_bits_is_refused(text: str) -> None:
    assert said(f"key: {text}\n") == "recipe.yaml:1:6: a whole number of more than 64 bits"


def test_keys_are_text_as_it_is_written() -> None:
    assert document.parse("1: a\n0x1: b\nyes: c\n~: d\nnull: e\n", FILE).plain() == {
        "1": "a", "0x1": "b", "yes": "c", "~": "d", "null": "e"
    }  # fmt: skip


def test_a_value_knows_its_place_and_that_of_its_key() -> None:
    root = document.parse("# comment\na: 1\nb:\n  - x\n  - {c: y}\n", FILE)
    inner = root.mapping["b"].items[1].mapping["c"]
    assert (str(inner.place), str(inner.key)) == ("recipe.yaml:5:9", "recipe.yaml:5:6")
    assert (str(root.mapping["a"].place), str(root.mapping["a"].key)) == ("recipe.yaml:2:4", "recipe.yaml:2:1")
    assert str(root.mapping["b"].place) == "recipe.yaml:4:3"


def test_windows_line_ends_and_a_byte_order_mark_do_not_move_places() -> None:
    Path("recipe.yaml").write_bytes("\ufeffa: 1\r\nb: 2\r\n".encode())
    root = document.read(Path("recipe.yaml"))
    assert root.plain() == {"a": 1, "b": 2}
    assert str(root.mapping["b"].place) == "recipe.yaml:2:4"


def test_columns_count_characters_not_bytes() -> None:
    assert str(document.parse("{é🙂: 1, b: 2}", FILE).mapping["b"].place) == "recipe.yaml:1:12"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "recipe.yaml:3:1: a: the key stands twice in one mapping, first in line 1"),
        ("x:\n  a: 1\n  'a': 2\n", "recipe.yaml:3:3: a: the key stands twice in one mapping, first in line 2"),
        ("x: [{a: 1, a: 1}]", "recipe.yaml:1:12: a: the key stands twice in one mapping, first in line 1"),
        ("<<: {a: 1}\n", "recipe.yaml:1:1: merge keys (<<) are not YAML 1.2: use `extends`"),
        ("? [a]\n: 1\n", "recipe.yaml:1:3: a key must be text"),
        ("? {a: 1}\n: 1\n", "recipe.yaml:1:3: a key must be text"),
        ("'': 1\n", "recipe.yaml:1:1: a key must be text"),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2:1: a second document: a recipe is one"),
        ("a: !!python/object/apply:os.system [ls]\n", "recipe.yaml:1:4: the tag !!python/object/apply:os.system"),
        ("a: !!str 3\n", "recipe.yaml:1:4: the tag !!str is not allowed"),
        ("a: !mine 3\n", "recipe.yaml:1:4: the tag !mine is not allowed"),
        ("a: ! 3\n", "recipe.yaml:1:4: the tag ! is not allowed"),
        ("%TAG ! tag:evil,2000:\n---\na: !b c\n", "recipe.yaml:3:4: the tag tag:evil,2000:b is not allowed"),
        ("!!map {a: 1}\n", "recipe.yaml:1:1: the tag !!map is not allowed"),
        ("a: !!set {x, y}\n", "recipe.yaml:1:4: the tag !!set is not allowed"),
        ("a: *nowhere\n", "recipe.yaml:1:4: the alias *nowhere names no finished anchor"),
        ("a: &x [1, *x]\n", "recipe.yaml:1:11: the alias *x names no finished anchor"),
        ("a: [1,\nb: 2\n", "recipe.yaml:"),
        ("a: 'open\n", "recipe.yaml:2:1: not YAML: found unexpected end of stream"),
        ("a: b: c\n", "recipe.yaml:1:5: not YAML: mapping values are not allowed in this context"),
        ("a: @x\n", "recipe.yaml:1:4: not YAML: found character that cannot start any token"),
        ("a:\n\tb: 1\n", "recipe.yaml:2:1: not YAML: "),
        ("seed: 0\na: \x00\n", "recipe.yaml:2:4: not YAML: control characters are not allowed"),
        ("a: \x07\n", "recipe.yaml:1:4: not YAML: control characters are not allowed"),
        ("", "recipe.yaml: is empty"), ("# nothing\n", "recipe.yaml: is empty"), ("---\n", "recipe.yaml: is empty"),
        ("null\n", "recipe.yaml: is empty"),
    ],
)  # fmt: skip
def test_what_a_recipe_never_needs_is_refused_where_it_stands(text: str, expected: str) -> None:
    assert said(text).startswith(expected)


def test_tabs_are_named_as_what_is_wrong() -> None:
    assert "YAML forbids tabs for indentation, use spaces" in said("a:\n\tb: 1\n")


def test_64_levels_are_read_and_65_are_not() -> None:
    assert document.parse("[" * 64 + "]" * 64, FILE).items
    assert said("[" * 65 + "]" * 65) == "recipe.yaml:1:65: more than 64 levels deep"


def test_levels_reached_through_aliases_count() -> None:
    half = "a: &a " + "[" * 40 + "]" * 40
    assert said(f"{half}\nb: " + "[" * 40 + "*a" + "]" * 40) == "recipe.yaml:2:44: more than 64 levels deep"


def test_an_alias_is_what_it_names_at_its_own_key() -> None:
    root = document.parse("a: &x {b: 1}\nc: *x\nd: &k word\n*k : 2\n", FILE)
    assert root.plain() == {"a": {"b": 1}, "c": {"b": 1}, "d": "word", "word": 2}
    assert str(root.mapping["c"].key) == "recipe.yaml:2:1"


def laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 1000 + "]" * 1000, "more than 64 levels deep"),
        ("".join(" " * i + "a:\n" for i in range(1000)), "more than 64 levels deep"),
        ("{a: " * 100_000, "more than 64 levels deep"),
        ("? " * 400_000, "more than 64 levels deep"),
        ("- " * 400_000, "more than 64 levels deep"),
        (laughs(), "aliases that explode?"),
        ("x: &x [" + "1, " * 150 + "]\ny: [" + "*x, " * 150 + "]", "aliases that explode?"),
        ("a: [" + "x, " * 300_000 + "]", "more than 20,000 values"),
        ("\n".join(f"k{i}: 1" for i in range(80_000)), "more than 20,000 values"),
    ],
    ids=["flow", "block", "mappings", "complex keys", "dashes", "laughs", "two levels", "a long list", "many keys"],
)  # fmt: skip
def test_a_text_made_to_choke_the_reader_is_refused_soon(text: str, expected: str) -> None:
    began = time.process_time()
    assert expected in said(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "text",
    ["a: " + "x" * 990_000, "a: b\n" + "\n" * 990_000, "a: b\n" + "  c\n" * 240_000, 'a: "' + "\\x41" * 240_000 + '"'],
    ids=["a long word", "empty lines", "folded lines", "escapes"],
)  # fmt: skip
def test_a_large_text_of_few_values_is_read_soon(text: str) -> None:
    began = time.process_time()
    assert list(document.parse(text, FILE).mapping) == ["a"]
    assert time.process_time() - began < 2


def test_more_than_a_megabyte_is_refused_unread() -> None:
    with Path("big.yaml").open("wb") as file:
        file.truncate(10_000_000_000)
    with pytest.raises(RecipeError, match=r"^big\.yaml: 10,000,000,000 bytes are more than a recipe's 1,000,000$"):
        document.read(Path("big.yaml"))


def test_a_text_from_the_command_line_has_its_source_for_a_place() -> None:
    with pytest.raises(RecipeError, match=r"^override a=\[1: not YAML: "):
        document.parse("[1", Place("override a=[1"))
    with pytest.raises(RecipeError, match=r"^override x: a: the key stands twice in one mapping$"):
        document.parse("{a: 1, a: 2}", Place("override x"))


def test_half_a_character_from_the_command_line_is_refused() -> None:
    with pytest.raises(RecipeError, match="is no UTF-8 text"):
        document.parse("a: \udcff", Place("override"))


class TestRead:
    def said(self, path: str) -> str:
        with pytest.raises(RecipeError) as caught:
            document.read(Path(path))
        return str(caught.value)

    def test_a_missing_file(self) -> None:
        assert self.said("none.yaml") == "none.yaml: no such file"

    def test_a_folder(self) -> None:
        Path("folder.yaml").mkdir()
        assert self.said("folder.yaml") == "folder.yaml: is a folder, not a file"

    def test_a_link_to_itself_or_to_nothing(self) -> None:
        Path("loop.yaml").symlink_to("loop.yaml")
        Path("dangling.yaml").symlink_to("gone.yaml")
        assert self.said("loop.yaml") == "loop.yaml: is a link that leads nowhere"
        assert self.said("dangling.yaml") == "dangling.yaml: is a link that leads nowhere"

    def test_a_pipe_or_a_device_is_not_waited_for(self) -> None:
        os.mkfifo("pipe.yaml")
        assert self.said("pipe.yaml") == "pipe.yaml: is no file but a pipe or a device"
        assert self.said("/dev/zero") == "/dev/zero: is no file but a pipe or a device"

    def test_a_name_that_no_file_can_have(self) -> None:
        assert self.said("x" * 5000).endswith(": cannot be read: File name too long")
        assert self.said("a\0b") == "a\0b: no such file"

    @pytest.mark.parametrize(
        "content", [b"seed: 0\nname: caf\xe9\n", "a: b\n".encode("utf-16"), bytes(range(128, 256))]
    )
    def test_bytes_that_are_no_text(self, content: bytes) -> None:
        Path("recipe.yaml").write_bytes(content)
        line = 2 if content.startswith(b"seed") else 1
        assert self.said("recipe.yaml").startswith(f"recipe.yaml:{line}:1: is no UTF-8 text (byte ")

    def test_a_path_is_shown_as_short_as_it_can_be_typed(self, tmp_path: Path) -> None:
        assert self.said(str(tmp_path / "none.yaml")) == "none.yaml: no such file"
        assert self.said("/none.yaml") == "/none.yaml: no such file"


class TestNodesOfPlainData:
    def test_are_that_data_again(self) -> None:
        data = {"a": [1, 2.5, None, True, "x"], "b": {"c": (1, 2)}, "path": Path("x/y")}
        assert Node.of(data, Place("here")).plain() == {
            "a": [1, 2.5, None, True, "x"], "b": {"c": [1, 2]}, "path": "x/y"
        }  # fmt: skip

    @pytest.mark.parametrize("data", [{1, 2}, b"bytes", object(), 1j, {"a": [print]}, 1 << 64, {"a": -(10**30)}])
    def test_refuse_what_yaml_has_not(self, data: Any) -> None:
        with pytest.raises(
            RecipeError, match=r"^here: (a recipe holds mappings, lists and scalars, not |a whole number)"
        ):
            Node.of(data, Place("here"))

    def test_refuse_data_that_hold_themselves(self) -> None:
        data: dict[str, Any] = {}
        data["self"] = data
        with pytest.raises(RecipeError, match="more than 64 levels deep"):
            Node.of(data, Place("here"))


NASTY = [
    "yes", "No", "on", "y", "null", "~", "", "true", "1", "01", "0o14", "0x1F", "0b1", "1e-3", "1E3", "+1", ".5", "5.",
    "1_000", "12:30", "1:2.5", "2026-01-01", ".inf", ".nan", "NaN", "=", "<<", "-", "- a", "--- a", "...", "?", "? a",
    ":", ": a", "a: b", "a:", "#c", "a #c", "&a", "*a", "!a", "!!str a", "%a", "@a", "`a", "|", ">", "{a}", "[a]", ",",
    "'", '"', "\\", "it's", " a", "a ", "a\nb", "a\n", "\na", "\n", "\ta", "a\tb", "\r", "a\r\nb", "\x00", "\x1b[31m",
    "\x7f", "\x85", "\u2028", "\ufeff", "\ufeffa", "é", "🙂", "\u202eabc", "a" * 300, "a " * 200, "[bold]x[/bold]",
    "\ud7ff\ue000",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_text_comes_back_from_yaml_as_it_went(text: str) -> None:
    for data in ({"key": text}, {"key": [text, text]}, {"key": {"a": {"b": text}}}):
        assert document.parse(document.dump(data), FILE).plain() == data
    if text not in ("", "<<"):  # no keys
        assert document.parse(document.dump({text: 1}), FILE).plain() == {text: 1}


TEXT = st.one_of(st.sampled_from(NASTY), st.text(max_size=20))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1), st.floats(), TEXT)
KEYS = TEXT.filter(lambda text: text not in ("", "<<"))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=5))
def test_any_data_come_back_from_yaml_as_they_went(data: dict[str, Any]) -> None:
    found = document.parse(document.dump(data), FILE).plain()
    assert repr(found) == repr(data)  # 1 is not 1.0 is not True, and nan is itself


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=60) | st.text("ab :-[]{}&*!|>'\"%#?,\n\t01", max_size=60))
def test_no_text_makes_the_reader_fail_but_with_a_recipe_error(text: str) -> None:
    problems = []
    try:
        document.parse(text, FILE)
    except RecipeError as error:
        problems = error.problems
    assert all(problem.message and problem.place.source == "recipe.yaml" for problem in problems)


def test_short_leaves_stand_on_one_line() -> None:
    data = {"module": {"name": "mlp", "hidden": [1, 2]}, "long": {"a": {"b": {"c": "word" * 20}, "d": 1}}}
    assert document.dump(data) == (
        f"module: {{name: mlp, hidden: [1, 2]}}\nlong:\n  a:\n    b: {{c: {'word' * 20}}}\n    d: 1\n"
    )


def test_a_problem_is_one_line_whatever_it_is_about() -> None:
    problem = document.Problem(FILE, "a\nb", "no\nway")
    assert str(problem) == "recipe.yaml: a\\nb: no\\nway"
