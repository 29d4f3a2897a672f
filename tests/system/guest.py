# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine as its operator and its users use overlayd: by the installed command alone.

What is asked of the machine goes there in as few commands as will do, since a command takes fifteen
times as long in an emulated machine as in a container; and overlayd itself takes longest.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from harness.machine import Machine, Result

RUN: Final = "/run/overlayd"
SOURCES: Final = "/var/tmp/sources"
"""Where tests put what they apply: on the disk, as an operator's sources are."""

# Types, modes, owners and links of a tree, then what its files hold; all ended by NUL, since names
# and links may hold anything else.
_LISTING: Final = r"""
cd "$0" || exit
find . -printf '%p\0%y %m %U:%G %Ts %l\0'
printf '//\0'
find . -type f -print0 | xargs -0 -r md5sum -z
"""
_LEFTOVERS: Final = r"""
grep -F ' - overlay overlayd:' /proc/self/mountinfo
grep -E '^[0-9]+ [0-9]+ [^ ]+ [^ ]+ /run/overlayd/(storage|records|quarantine|stage/)' \
    /proc/self/mountinfo
cd /run/overlayd 2>/dev/null && find records storage quarantine stage -mindepth 1
rm -rf /var/tmp/sources
"""
# All of /usr that can be told without reading it, what is mounted in it aside: no content of a file
# changes without its time of change, which nobody can set.
_USR: Final = r"""
find /usr -xdev -printf '%p %y %m %U:%G %s %i %T@ %C@ %l\0' | sort -z | md5sum
"""
# systemd reads the mount table some time after it changed.
_NOTICED: Final = r"""
for point in $(findmnt -rn -o TARGET,SOURCE | awk '$2 ~ /^overlayd/ {print $1}')
do
    unit=$(systemd-escape --path --suffix=mount "$point")
    for _ in $(seq 600); do systemctl -q is-active "$unit" && break; sleep 0.05; done
    systemctl -q is-active "$unit" || { echo "no $unit"; exit 1; }
done
"""
# Before the rules of the image, by its name.
_RULE: Final = """
polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.projectatomic.aptostree.usroverlay") == 0
        && subject.user == "%s") return polkit.Result.YES;
});
"""
# Not with overlayd: it may be what does not work.
_TIDY: Final = r"""
pkill -f 'm [o]verlayd[.]holder'
findmnt -rn -t overlay -o TARGET,SOURCE | awk '$2 ~ /^overlayd:/ {print $1}' |
while IFS= read -r target; do umount -l "$(printf '%b' "$target")"; done
umount -R -l /run/overlayd
rm -rf /run/overlayd
mkdir -m 700 /run/overlayd  # as a boot does
"""


_PRISTINE: Final[dict[tuple[str, str], str]] = {}
"""Of each kind of machine and kernel, what :meth:`Guest.usr` is when nobody touched it."""


@dataclass(frozen=True)
class Shown:
    """What overlayd says of an overlay, as far as tests ask (docs/json.md)."""

    name: str
    uuid: str
    target: str
    mount_point: str
    state: str
    version: int | None
    owner: int
    used_bytes: int | None
    deployment: str | None

    @classmethod
    def of(cls, value: object) -> Shown:
        """Take what there is to know from a decoded JSON object."""
        assert isinstance(value, dict)
        storage = value["storage"]
        return cls(
            **{key: value[key] for key in ("name", "uuid", "target", "mount_point", "state")},
            **{key: value[key] for key in ("version", "owner", "deployment")},
            used_bytes=None if storage is None else storage["used_bytes"],
        )


class Guest:
    """The machine under test, and what tests do with it again and again."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def sh(
        self,
        script: str,
        *args: str,
        user: str | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> str:
        """Run a shell script, as root or as *user*, and return what it printed."""
        result = self.machine.run(
            ["sh", "-euc" if check else "-uc", script, "sh", *args],
            user=user,
            timeout=timeout,
            check=check,
        )
        return result.out.rstrip("\n")

    @cached_property
    def emulated(self) -> bool:
        """Whether the machine's processor is emulated: everything takes much longer then."""
        return self.sh("systemd-detect-virt || true") == "qemu"

    # overlayd.

    def overlayd(
        self, *args: str, code: int = 0, user: str | None = None, timeout: float = 60
    ) -> Result:
        """Run overlayd and insist on its exit code."""
        result = self.machine.run(
            ["overlayd", *args], user=user, cwd="/", timeout=timeout, check=False
        )
        assert result.returncode == code, (shlex.join(args), result.returncode, result.err)
        return result

    def overlays(self, *options: str) -> list[Shown]:
        """Return all overlays."""
        return [
            Shown.of(item) for item in json.loads(self.overlayd("list", "--json", *options).out)
        ]

    def apply(self, name: str, source: str, target: str, *options: str) -> Shown:
        """Apply an overlay."""
        return Shown.of(
            json.loads(self.overlayd("apply", name, source, target, "--json", *options).out)
        )

    def status(self, name: str) -> Shown:
        """Look at one overlay."""
        return Shown.of(json.loads(self.overlayd("status", name, "--json").out))

    def doctor(self) -> dict[str, object]:
        """Return the doctor's report; whether it is content says ``ok``."""
        result = self.machine.run(["overlayd", "doctor", "--json"], check=False)
        report = json.loads(result.out)
        assert isinstance(report, dict)
        assert result.returncode == (0 if report["ok"] else 9), result.err
        return report

    def can(self, feature: str) -> bool:
        """Return whether the kernel can do something, as overlayd says."""
        features = self.doctor()["features"]
        assert isinstance(features, dict)
        return bool(features[feature])

    @contextlib.contextmanager
    def overlay(self, name: str, source: str, target: str, *options: str) -> Iterator[Shown]:
        """Apply an overlay and remove it at the end, which has to work."""
        yield self.apply(name, source, target, *options)
        self.overlayd("remove", name)

    def permit(self, user: str, *, permitted: bool = True) -> None:
        """Have polkit permit everything of overlayd's to *user*, or what it did before."""
        rule = "/etc/polkit-1/rules.d/10-test.rules"
        if permitted:
            self.machine.copy_in((_RULE % user).encode(), rule, mode=0o644)
        else:
            self.sh(f"rm {rule}")
        self.sh("sleep 1")  # polkit looks at its rules when they have changed for a moment

    # Trees.

    def source(self, name: str, files: Mapping[str, str | bytes]) -> str:
        """Make a source of text files and return its path; a name that ends in / is a directory.

        A text that begins with ``->`` is where a symlink leads.
        """
        place = f"{SOURCES}/{name}"
        with tempfile.TemporaryDirectory() as folder:
            top = Path(folder, "tree")
            top.mkdir(mode=0o755)
            for path, text in files.items():
                fill(top / path, text, folder=path.endswith("/"))
            self.machine.copy_in(top, place)
        return place

    def listing(self, path: str, *, times: bool = True) -> dict[str, str]:
        """Return everything of a tree that users can see: one text per path.

        Without *times*, when things were changed does not count.
        """
        output = self.machine.run(["sh", "-c", _LISTING, path]).out
        items = output.split("\0")
        end = items.index("//")
        found = {}
        for name, fact in zip(items[:end:2], items[1:end:2], strict=True):
            kind, mode, owner, time, link = fact.split(" ", 4)
            found[name] = " ".join((kind, mode, owner, *([time] if times else []), link))
        for item in filter(None, items[end + 1 :]):
            digest, _, name = item.partition("  ")
            found[name] += f" {digest}"
        return found

    def usr(self) -> str:
        """Return what is equal as long as nobody changed anything in the /usr of the commit."""
        return self.sh(_USR)

    def usr_of_the_commit(self) -> str:
        """Return what :meth:`usr` is on every machine like this one that nobody touched."""
        kind = type(self.machine).__name__, self.machine.kernel
        if kind not in _PRISTINE:
            _PRISTINE[kind] = self.usr()
        return _PRISTINE[kind]

    def wait_for_mount_units(self) -> None:
        """Return when systemd has noticed all of overlayd's mounts."""
        self.sh(_NOTICED)

    # What is left.

    def leftovers(self) -> list[str]:
        """Name all of overlayd's that would not be there if there had been no overlay.

        Sources go away on the way.
        """
        return self.sh(_LEFTOVERS, check=False).splitlines()

    def tidy(self) -> None:
        """Take away whatever a failed test has left, as docs/recovery.md says it."""
        self.sh(_TIDY, check=False)


def fill(path: Path, text: str | bytes, *, folder: bool = False) -> None:
    """Make one entry of a source."""
    (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
    if folder:
        return
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text.startswith("->"):
        path.symlink_to(text[2:].strip())
    else:
        path.write_text(text)
