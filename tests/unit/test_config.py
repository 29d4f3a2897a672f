# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the configuration accepts, which file wins, and that mistakes are named."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from overlayd import config, history
from overlayd.config import Config, FlaggedAction, load, parse
from overlayd.errors import NotFoundError, OverlaydError, RefusedError
from tests.unit.conftest import is_one_printable_line, needs_root, open_fds, time_limit

KEYS = {
    "limits": (
        *("overlays", "upper_size", "upper_inodes", "source_size", "source_entries"),
        *("source_depth", "memory_reserve"),
    ),
    "critical": ("trees",),
    "flagged": ("patterns", "root"),
    "history": ("days", "size"),
}

FLAGGED = (
    *("*.so", "*.dll", "*.exe", "*.sh", "*.py", "*.rb", "*.pl"),
    *("*.conf", "*.config", "*.ini", "*.cfg"),
)


def test_defaults_are_the_documented_ones(defaults: Config) -> None:
    limits = {key: getattr(defaults, key) for key in KEYS["limits"]}
    assert limits == {
        "overlays": 1000,
        "upper_size": 256 << 20,
        "upper_inodes": 65536,
        "source_size": 4 << 30,
        "source_entries": 500_000,
        "source_depth": 100,
        "memory_reserve": 128 << 20,
    }
    assert defaults.flagged_root is FlaggedAction.WARN
    assert history.Limits(defaults.history_days, defaults.history_size) == history.Limits()
    assert set(defaults.flagged_patterns) == set(FLAGGED)


def test_only_what_is_set_is_returned() -> None:
    assert parse("", "f") == {}
    assert parse('[limits]\nupper_size = "1G"\n', "f") == {"upper_size": 1 << 30}


def test_every_key_can_be_set() -> None:
    text = """
        [limits]
        overlays = 1
        upper_size = "1K"
        upper_inodes = 2
        source_size = "2M"
        source_entries = 3
        source_depth = 200
        memory_reserve = "3G"
        [critical]
        trees = ["/usr/bin", "/usr/lib/*/x", "/usr"]
        [flagged]
        patterns = []
        root = "refuse"
        [history]
        days = 36500
        size = "256K"
    """
    assert parse(text, "f") == {
        "overlays": 1,
        "upper_size": 1024,
        "upper_inodes": 2,
        "source_size": 2 << 20,
        "source_entries": 3,
        "source_depth": 200,
        "memory_reserve": 3 << 30,
        "critical_trees": ("/usr/bin", "/usr/lib/*/x", "/usr"),
        "flagged_patterns": (),
        "flagged_root": FlaggedAction.REFUSE,
        "history_days": 36500,
        "history_size": 256 << 10,
    }


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[limits]\noverlays = 0", "limits.overlays"),
        ("[limits]\noverlays = -1", "limits.overlays"),
        ("[limits]\noverlays = true", "limits.overlays"),
        ("[limits]\noverlays = 1.0", "limits.overlays"),
        ('[limits]\noverlays = "1"', "limits.overlays"),
        ("[limits]\noverlays = []", "limits.overlays"),
        ("[limits]\noverlays = 1180591620717411303424", "limits.overlays"),
        ("[limits]\nupper_inodes = 0", "limits.upper_inodes"),
        ("[limits]\nsource_entries = inf", "limits.source_entries"),
        ("[limits]\nsource_depth = 0", "limits.source_depth"),
        ("[limits]\nsource_depth = 201", "limits.source_depth"),
        ("[history]\ndays = 0", "history.days"),
        ("[history]\ndays = 36501", "history.days"),
        ('[history]\nsize = "255K"', "history.size"),
        ("[history]\nsize = 64", "history.size"),
        ("[limits]\nupper_size = 64", "limits.upper_size"),
        ('[limits]\nupper_size = "64"', "limits.upper_size"),
        ('[limits]\nupper_size = "0M"', "limits.upper_size"),
        ('[limits]\nupper_size = "1.5G"', "limits.upper_size"),
        ('[limits]\nsource_size = ""', "limits.source_size"),
        ('[limits]\nmemory_reserve = "1T"', "limits.memory_reserve"),
        ("[limits]\nmemory_reserve = 2020-01-01", "limits.memory_reserve"),
        ('[limits]\nuper_size = "1M"', "limits.uper_size"),
        ('[limits]\n"a\\nb" = "1M"', r"limits.a\nb"),
        ('[critical]\ntrees = "/usr/bin"', "critical.trees"),
        ("[critical]\ntrees = [1]", "critical.trees"),
        ('[critical]\ntrees = [""]', "critical.trees"),
        ('[critical]\ntrees = ["/etc"]', "critical.trees"),
        ('[critical]\ntrees = ["/usrx"]', "critical.trees"),
        ('[critical]\ntrees = ["usr/bin"]', "critical.trees"),
        ('[critical]\ntrees = ["/usr/"]', "critical.trees"),
        ('[critical]\ntrees = ["/usr//bin"]', "critical.trees"),
        ('[critical]\ntrees = ["/usr/../etc"]', "critical.trees"),
        ('[critical]\ntrees = ["/usr/./bin"]', "critical.trees"),
        ('[flagged]\npatterns = "*.so"', "flagged.patterns"),
        ('[flagged]\npatterns = ["a/*.so"]', "flagged.patterns"),
        ('[flagged]\npatterns = [["*.so"]]', "flagged.patterns"),
        ('[flagged]\nroot = "allow"', "flagged.root"),
        (f"[flagged]\nroot{'.a' * 2000} = 1", "flagged.root"),
        (f"[flagged]\nroot{'.a' * 8000} = 1", "too many dots"),
        ('[flagged]\nroot = "WARN"', "flagged.root"),
        ("[flagged]\nroot = 1", "flagged.root"),
        ("[flagged]\nroot = true", "flagged.root"),
        ("[limit]\noverlays = 1", "[limit]"),
        ("[a.b]\nc = 1", "[a]"),
        ("overlays = 1", "[overlays]"),
        ("limits = 1", "[limits]"),
        ("[[limits]]\noverlays = 1", "[limits]"),
        ("[limits", "not TOML"),
        ("\0", "not TOML"),
        ("[limits]\noverlays = 1\noverlays = 2", "not TOML"),
    ],
)
def test_mistake_is_refused_with_file_and_key(text: str, where: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse(text, "the-file")
    assert caught.value.message.startswith("the-file: ")
    assert where in caught.value.message
    assert is_one_printable_line(caught.value.message)


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000], ids=["digits", "brackets"])
def test_toml_that_python_gives_up_on_is_refused_with_the_file(value: str) -> None:
    with pytest.raises(RefusedError, match=r"^the-file: not TOML"):
        parse(f"[limits]\noverlays = {value}", "the-file")


@given(st.text(alphabet=st.characters(blacklist_categories=()), max_size=80))
def test_any_text_is_accepted_or_refused_and_nothing_else(text: str) -> None:
    _settings_or_refusal(text)


@given(
    st.lists(
        st.sampled_from(
            [
                *(
                    "[",
                    "]",
                    "[limits]\n",
                    "[critical]\n",
                    "[flagged]\n",
                    "[[",
                    "=",
                    '"',
                    "'",
                    '"""',
                ),
                *("overlays", "trees", "root", ".", "\n", ",", "{", "}", "1", "-", "+", "_", "e9"),
                *(
                    "0x",
                    "inf",
                    "nan",
                    "true",
                    "2020-01-01",
                    "T25:61:61",
                    "+99:99",
                    "\\u",
                    "\\ud800",
                ),
                *("/usr", '"1M"', "#", "\t", "\r", "é", "9" * 400),
            ]
        ),
        max_size=30,
    ).map("".join)
)
def test_pieces_of_toml_are_accepted_or_refused_and_nothing_else(text: str) -> None:
    _settings_or_refusal(text)


_values = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1M", "/usr/bin", "*.so", "warn"])
    | st.datetimes()
    | st.dates()
    | st.times(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(sorted(KEYS)) | st.text(max_size=4),
        st.dictionaries(
            st.sampled_from([key for keys in KEYS.values() for key in keys]) | st.text(max_size=4),
            _values,
            max_size=4,
        )
        | _values,
        max_size=3,
    )
)
def test_any_toml_is_accepted_or_refused_and_nothing_else(tables: dict[str, object]) -> None:
    _settings_or_refusal(tomli_w.dumps(tables))


def _settings_or_refusal(text: str) -> None:
    try:
        settings = parse(text, "f")
    except RefusedError as error:
        message = error.message
    else:
        assert set(settings) <= set(Config.__dataclass_fields__) - {"files"}
        return
    assert is_one_printable_line(message)


def test_file_given_is_read_over_the_defaults_and_named(tmp_path: Path, defaults: Config) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[limits]\noverlays = 7\n")
    file.chmod(0o666)  # whoever names a file answers for it
    settings = load(file)
    assert settings.overlays == 7
    assert settings.critical_trees == defaults.critical_trees
    assert settings.files == (str(file),)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep a machine's configuration below a directory: ``vendor``, ``local``, ``drop-ins/``."""
    monkeypatch.setattr(config, "VENDOR", tmp_path / "vendor")
    monkeypatch.setattr(config, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(config, "DROP_INS", tmp_path / "drop-ins")
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o644)


def test_machine_without_files_has_the_defaults(machine: Path, defaults: Config) -> None:
    assert load() == Config(
        **{key: getattr(defaults, key) for key in Config.__dataclass_fields__ if key != "files"},
        files=(),
    )
    assert machine.exists()


@needs_root
def test_later_files_override_earlier_ones_key_by_key(machine: Path) -> None:
    _write(machine / "vendor", "[limits]\noverlays = 1\nupper_inodes = 1\nsource_depth = 1\n")
    _write(machine / "local", "[limits]\noverlays = 2\nupper_inodes = 2\n")
    _write(machine / "drop-ins/20-b.toml", "[limits]\noverlays = 4\n")
    _write(machine / "drop-ins/10-a.toml", '[limits]\noverlays = 3\n[flagged]\nroot = "ignore"\n')
    _write(machine / "drop-ins/30-c.toml.bak", "[limits]\noverlays = 5\n")
    settings = load()
    assert (settings.overlays, settings.upper_inodes, settings.source_depth) == (4, 2, 1)
    assert settings.flagged_root is FlaggedAction.IGNORE
    assert [Path(file).name for file in settings.files] == [
        *("vendor", "local", "10-a.toml", "20-b.toml")
    ]


@needs_root
def test_drop_ins_are_read_in_the_order_of_their_names(machine: Path) -> None:
    numbers = [7, 3, 9, 1, 8, 2, 6, 4, 5]
    for number in numbers:
        _write(machine / f"drop-ins/{number}.toml", f"[limits]\noverlays = {number}\n")
    assert [Path(file).stem for file in load().files] == sorted(map(str, numbers))
    assert load().overlays == 9


@needs_root
@pytest.mark.parametrize("where", ["vendor", "local", "drop-ins/x.toml"])
def test_file_that_another_user_could_have_written_is_refused(machine: Path, where: str) -> None:
    _write(machine / where, "")
    load()
    for mode in (0o664, 0o646):
        (machine / where).chmod(mode)
        with pytest.raises(RefusedError, match="writable by root alone"):
            load()
    (machine / where).chmod(0o644)
    os.chown(machine / where, 1000, 0)
    with pytest.raises(RefusedError, match="must belong to root"):
        load()


@pytest.mark.skipif(os.geteuid() == 0, reason="files of root's are trusted")
def test_file_of_an_ordinary_user_is_refused(machine: Path) -> None:
    _write(machine / "local", "")
    with pytest.raises(RefusedError, match="must belong to root"):
        load()


def test_file_that_does_not_exist_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=re.escape(f"{tmp_path}/none")):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"\xff", "not UTF-8"), (b"#" * ((1 << 20) + 1), "larger than 1 MiB"), (b"[", "not TOML")],
)
def test_file_that_cannot_be_understood_is_refused_with_its_name(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(data)
    with pytest.raises(RefusedError, match=reason) as caught:
        load(file)
    assert caught.value.message.startswith(str(file))


def test_fifo_and_directory_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = open_fds()
    for path in (tmp_path / "fifo", tmp_path):
        with time_limit(5), pytest.raises(OverlaydError, match=re.escape(str(path))):
            load(path)
    assert open_fds() == before


def test_name_of_a_file_is_safe_to_print_in_errors(tmp_path: Path) -> None:
    file = tmp_path / "a\nb\udcff.toml"
    for data in (b"[", b"\xff", b"[limits]\noverlays = 0", b"x = 1"):
        file.write_bytes(data)
        with pytest.raises(RefusedError) as caught:
            load(file)
        assert is_one_printable_line(caught.value.message)
