"""A comparison, or one run, as a page: one HTML file that loads nothing, with its pictures inside.

Whatever comes from a run is escaped, and the page forbids itself scripts and other files: names are shown, not obeyed.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape as _escape
from pathlib import Path
from typing import Any

from lab import pictures, report
from lab.compare import Comparison, Row
from lab.errors import UserError
from lab.files import inside
from lab.groups import Member

EMBEDDED = 8_000_000
"""Bytes of a run's pictures that a page takes in."""
MEDIA = {".png": "image/png", ".gif": "image/gif"}
SIGNATURES = {".png": b"\x89PNG\r\n", ".gif": b"GIF8"}
"""What such files begin with."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --dim: #66727f; --line: #dfe4ea; --paper: #fff; --card: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --dim: #98a4b1; --line: #323a44; --paper: #14181d; --card: #1c2128; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0; }
.dim, figcaption { color: var(--dim); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem .4rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--dim); font-size: .8125rem; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
td:first-child { font-weight: 600; }
.words td { white-space: normal; vertical-align: top; min-width: 6rem; max-width: 22rem; overflow-wrap: anywhere; }
.words td:first-child { white-space: nowrap; }
.words td:not(:first-child), pre { font: .8125rem/1.5 ui-monospace, monospace; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.25rem;
  align-items: start; }
figure { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto .5rem; border-radius: .25rem; }
pre { overflow-x: auto; padding: .75rem; background: var(--card); border-radius: .5rem; }
summary { cursor: pointer; margin: .5rem 0; }
ul { padding-left: 1.1rem; }
"""


def escape(text: str) -> str:
    """Text as HTML; characters that steer a terminal or an encoder, half ones too, are shown as Python writes them."""
    return _escape("".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text))


def page(found: Comparison) -> str:
    """A whole HTML document: figures, intervals, tests, curves, recipes, pictures, and where it all came from."""
    members = [member for group in found.groups for member in group.members]
    labels = [group.label for group in found.groups]
    title = f"{labels[0]} · {members[0].run.id}" if len(members) == 1 else " against ".join(labels)
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="dim">{escape(_subtitle(members))}</p>', _results(found)]
    drawn = [(metric, pictures.dots(found, metric)) for metric in found.metrics] if len(members) > 1 else []
    charts = [_chart(name, figure) for name, figure in (*drawn, *pictures.bands(found).items())]
    parts += [_tests(found), _section("Curves" if not drawn else "Metrics and curves", _grid(charts))]
    parts += [
        _recipe(found),
        _besides(found),
        _section("Pictures", _grid(_gallery(found.rows))),
        _runs(members),
        _recipes(found),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _subtitle(members: Sequence[Member]) -> str:
    seeds = ", ".join(dict.fromkeys(str(member.seed[0]) for member in members))
    count = (
        f"{len(members)} runs, seeds {seeds}"
        if len(members) > 1
        else f"{members[0].results.get('status')}, seed {seeds}"
    )
    started = min(str(member.manifest.get("started")) for member in members)[:16].replace("T", " ")
    return f"{count} · started {started}"


def _results(found: Comparison) -> str:
    several = any(len(row.members) > 1 for row in found.rows)
    told = '<p class="dim">Means ± half of the 95 % interval (Student’s t) over the runs.</p>' if several else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return _section(
        "Results", _table(*report.summary(found)) + told + (f'<ul class="dim">{notes}</ul>' if notes else "")
    )


def _tests(found: Comparison) -> str:
    tested = any(d.p is not None for d in found.differences)
    told = "95 % intervals in brackets; p is two-sided, with Holm’s correction over the comparisons in a metric."
    table = _table(*report.differences(found)) if found.differences else ""
    return _section("Differences", table + (f'<p class="dim">{told}</p>' if tested else ""))


def _besides(found: Comparison) -> str:
    table = _table(*report.provenance(found), "words") if found.provenance else ""
    return _section("What differs besides the recipes", table)


def _recipe(found: Comparison) -> str:
    return _section("What differs in the recipes", _table(*report.recipes(found), "words") if found.recipe else "")


def _gallery(rows: Iterable[Row]) -> list[str]:
    """The pictures of each row's first run; its curves only where there are no others to draw them with."""
    shown: list[str] = []
    room = EMBEDDED
    for row in rows:
        first = row.members[0]
        for path in _drawn(first.run.folder, row.stage):
            if path.stem == "curves" and len(row.members) > 1:
                continue
            told = f"{row.name}: {path.stem}" + (f", seed {first.seed[0]}" if len(row.members) > 1 else "")
            if (room := room - path.stat().st_size) < 0:
                return [*shown, f"<p>More pictures are in the runs’ folders, such as {escape(str(path))}.</p>"]
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="{escape(told)}" src="data:{MEDIA[path.suffix]};base64,{data}">'
            shown.append(f"<figure>{image}<figcaption>{escape(told)}</figcaption></figure>")
    return shown


def _drawn(run: Path, stage: str) -> list[Path]:
    """A stage's pictures; a file of another kind is none, whatever its name, nor is one outside the run's folder."""
    return [path for path in sorted((run / stage / "pictures").glob("*")) if _is_picture(run, path)]


def _is_picture(run: Path, path: Path) -> bool:
    signature = SIGNATURES.get(path.suffix)
    try:
        inside(run, path.relative_to(run))
    except UserError:
        return False
    if signature is None or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(signature)) == signature


def _runs(members: Sequence[Member]) -> str:
    facts: dict[str, Callable[[Member], Any]] = {
        "status": lambda m: m.results.get("status"),
        "seed": lambda m: m.seed[0] if m.seed[1] is None else f"{m.seed[0]}, fold {m.seed[1]}",
        "started": lambda m: m.manifest.get("started"),
        "ended": lambda m: m.results.get("ended"),
        "command": lambda m: " ".join(map(str, m.manifest.get("command") or ())),
        "git commit": lambda m: _commit(m.manifest.get("git")),
        "hardware": lambda m: _listed(m.manifest.get("hardware")),
        "versions": lambda m: _listed(m.manifest.get("versions")),
        "data": lambda m: _listed({k: str(v)[:12] for k, v in (m.manifest.get("data") or {}).items()}),
    }
    rows = [[name, *(_text(fact(member)) for member in members)] for name, fact in facts.items()]
    return _section("Runs", _table(["", *(member.run.id for member in members)], rows, "words"))


def _commit(git: Any) -> str:
    return f"{git.get('commit')}{' and changes' if git.get('dirty') else ''}" if isinstance(git, dict) else ""


def _listed(facts: Any) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in facts.items()) if isinstance(facts, dict) else ""


def _text(value: Any) -> str:
    return "–" if value in (None, "", []) else report.said(value)


def _recipes(found: Comparison) -> str:
    """Each group's resolved recipe, folded."""
    return "\n".join(
        f"<details><summary>{escape(group.label)}: the resolved recipe</summary>"
        f"<pre>{escape(group.members[0].run.recipe.read_text(encoding='utf-8'))}</pre></details>"
        for group in found.groups
    )


def _chart(name: str, figure: Any) -> str:
    drawing = pictures.svg(figure).replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)
    return f"<figure>{drawing}</figure>"


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _grid(parts: Sequence[str]) -> str:
    return '<div class="grid">\n' + "\n".join(parts) + "\n</div>" if parts else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "numbers") -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table class="{kind}">\n<tr>{heads}</tr>\n{body}</table></div>'
