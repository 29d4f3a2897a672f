# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documents name what there is: commands, options, keys, modules, what the bus offers."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import pytest

from overlayd import config, errors, interface
from overlayd.cli import app

ROOT = Path(__file__).parents[2]
MAN = ROOT / "data/man"
COMMON = {"--json", "--verbose", "-v", "--config", "--help", "-h"}
CONTEXT = click.Context(app, info_name="overlayd")
COMMANDS = app.list_commands(CONTEXT)
DEFAULTS = tomllib.loads((ROOT / "overlayd/overlayd.toml").read_text())
KEYS = [(table, key) for table, keys in DEFAULTS.items() for key in keys]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PAGES = sorted(MAN.iterdir())


def page(name: str) -> str:
    """Return the text of a man page, as plain as a search needs it."""
    text = (MAN / name).read_text(encoding="utf-8")
    return re.sub(r"\\f[BIRP]", "", text).replace("\\-", "-").replace("\\(dq", '"')


def options_of(name: str) -> set[str]:
    """Return every spelling of every option of a command."""
    command = app.get_command(CONTEXT, name)
    assert command is not None
    return {
        option
        for parameter in command.get_params(click.Context(command, info_name=name))
        if isinstance(parameter, click.Option)
        for option in [*parameter.opts, *parameter.secondary_opts]
    }


def names(option: str, text: str) -> bool:
    """Whether *text* has *option*, and not only one that begins with it."""
    return re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text) is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_a_page_with_all_of_its_options(name: str) -> None:
    text = page(f"overlayd-{name}.8")
    missing = [option for option in options_of(name) if not names(option, text)]
    assert not missing
    for section in ("SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "EXIT STATUS", "SEE ALSO"):
        assert f".SH {section}\n" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_overview_names_the_command_and_its_options(name: str) -> None:
    text = page("overlayd.8")
    found = re.search(rf"^\.SS {name}\b.*?(?=^\.S[HS] )", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    common = re.search(r"^\.SH OPTIONS\n.*?(?=^\.SH )", text, re.DOTALL | re.MULTILINE)
    assert common is not None
    own = options_of(name) - COMMON
    assert not [option for option in own if not names(option, found[0])]
    assert not [option for option in COMMON if not names(option, common[0])]


def test_package_has_every_page() -> None:
    listed = (ROOT / "debian/overlayd.manpages").read_text().split()
    assert listed == sorted(str(path.relative_to(ROOT)) for path in PAGES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page_refers_to_pages_that_there_are(path: Path) -> None:
    text = page(path.name)
    for name, section in re.findall(r"^\.BR (overlayd[\w.-]*) \((\d)\)", text, re.MULTILINE):
        assert (MAN / f"{name}.{section}").exists(), name


def _section(table: str) -> str:
    text = page("overlayd.toml.5")
    found = re.search(rf"^\.SS \[{table}\]\n.*?(?=^\.S[HS] )", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[0]


@pytest.mark.parametrize(("table", "key"), KEYS, ids=str)
def test_key_of_the_configuration_is_documented_with_its_default(table: str, key: str) -> None:
    entry = re.search(rf"^\.B {key}\n.*?(?=^\.TP|\Z)", _section(table), re.DOTALL | re.MULTILINE)
    assert entry is not None
    default = DEFAULTS[table][key]
    if table != "critical" or key != "trees":  # too long for a page
        written = str(default).lower() if isinstance(default, bool) else str(default)
        shown = re.sub(r"\s+", " ", entry[0])
        quoted = f'"{default}"' if isinstance(default, str) else written.replace("'", '"')
        assert f"Default: {quoted}." in shown
    assert "Unit: " in entry[0]
    chapter = (ROOT / "docs/configuration.md").read_text().partition(f"\n### [{table}]\n")[2]
    assert f"\n| `{key}` |" in chapter.partition("\n### ")[0]


def test_page_of_the_configuration_has_no_key_that_is_not_there() -> None:
    for table in DEFAULTS:
        for key in re.findall(r"^\.B (\w+)$", _section(table), re.MULTILINE):
            assert (table, key) in KEYS


def test_every_key_has_a_default() -> None:
    known = {(table, key) for table, keys in config._KEYS.items() for key in keys}
    assert known == set(KEYS)


def test_exit_codes_are_documented() -> None:
    text, overview = (ROOT / "docs/exit-codes.md").read_text(), page("overlayd.8")
    for kind in errors.OverlaydError.__subclasses__():
        assert f"| {kind.exit_code} | `{kind.code}` |" in text
        assert f".B {kind.exit_code}\n" in overview


def test_bus_is_documented() -> None:
    text = (ROOT / "docs/dbus.md").read_text()
    own = [m for m in interface.METHODS if not m.interface.startswith("org.freedesktop.")]
    words = {method.name for method in own} | {name for _, name, _ in interface.SIGNALS}
    words |= {name for name, _ in (*interface.MANAGER_PROPERTIES, *interface.OVERLAY_PROPERTIES)}
    assert not [word for word in words if f"`{word}`" not in text]
    for method in own:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{method.name}`"))
        for kind in (kind for _, kind in (*method.arguments, *method.results)):
            assert f"`{kind}`" in row


def test_rule_of_imports_is_that_of_the_linter() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    block = "\n".join(f"    {layer}" for layer in layers)
    assert f"\n\n{block}\n\n" in (ROOT / "ARCHITECTURE.md").read_text()


def test_every_module_is_introduced() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text().partition("## Modules")[2].partition("\n## ")[0]
    modules = {path.stem for path in ROOT.glob("overlayd/*.py")} - {"__init__"}
    assert not [name for name in modules if f"**`{name}`**" not in text]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target
