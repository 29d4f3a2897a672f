# SPDX-License-Identifier: LGPL-2.1-or-later
"""The slow part of an image: a Containerfile, built by buildah and committed to OSTree.

The build needs neither a daemon nor a registry, and nothing of it is left on this machine: images
and containers lie in a store of their own that is removed afterwards.  Where the base image cannot
be pulled, mmdebstrap makes one like it.  Packages come from this machine's mirror, of which the
result knows nothing: it has the sources that every Debian has.

What is built is a directory:

    repo/      a repository with one commit, its ref :data:`REF`
    tree/      the same as files, hard links to the repository's: nobody may write to them
    packages   what is installed: a name and a version in each line
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import commit
from harness.apt import DEFAULT_MIRROR, KEYRING, SECURITY, acquire_settings, machine_mirror
from harness.cache import key
from harness.errors import BuildError
from harness.host import need, need_disk
from harness.programs import Timer, need_root, run
from harness.trees import describe, remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.apt import Apt

REF: Final = "harness/base"
DEBIAN: Final = "docker.io/library/debian"
SIZE: Final = 3 << 30
"""Bytes of disk that a build takes at its height."""
TOOLS: Final = {
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "ostree": "ostree",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}

APT_CONFIG: Final = "/run/harness/apt.conf"
"""Where the build finds APT's configuration."""

_PULL_TIMEOUT: Final = 180.0  # seconds; without a registry it fails at once
_BUILD_TIMEOUT: Final = 1800.0
_SOURCES: Final = "/etc/apt/sources.list.d/debian.sources"
_IMAGE_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_STANDARD: Final = f"""\
Types: deb
URIs: http://deb.debian.org/debian
Suites: {{suite}} {{suite}}-updates
Components: main
Signed-By: {_IMAGE_KEYRING}

Types: deb
URIs: http://deb.debian.org/debian-security
Suites: {{suite}}-security
Components: main
Signed-By: {_IMAGE_KEYRING}
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A Containerfile and what it reads.

    The Containerfile takes its base image from the argument ``BASE``, and the path of an APT
    configuration for the time of the build from ``APT_CONFIG``.
    """

    context: Path
    containerfile: str = "images/Containerfile"
    files: tuple[str, ...] = ("images",)
    """Files and directories of *context*: the build sees no others."""
    packages: str = "images/packages"
    """A list of what is installed, ``#`` begins a comment; its versions count into the key."""
    target: str = "base"
    """The stage to build."""
    suite: str = "trixie"
    image: str = ""
    """The base image; default: the suite's of Debian's, or one like it where it is out of reach."""


def inputs(recipe: Recipe, apt: Apt) -> Iterator[str | bytes | Path]:
    """Yield all that the result depends on, for a cache's key."""
    here = Path(__file__)
    yield from (here, here.with_name("commit.py"), recipe.image, recipe.target, recipe.suite)
    for name in recipe.files:
        yield name
        yield b"".join(describe(recipe.context / name))
    yield from _offered(apt, ["apt", "?essential", "?priority(required)", *package_names(recipe)])


def package_names(recipe: Recipe) -> list[str]:
    """Return the names in the recipe's list of packages."""
    lines = (recipe.context / recipe.packages).read_text(encoding="utf-8").splitlines()
    return [name for line in lines for name in line.partition("#")[0].split()]


def _offered(apt: Apt, packages: list[str]) -> list[str]:
    """Return *packages* and all they depend on, with versions, as APT has them now.

    Working that out takes it two seconds, so it is kept beside the lists, with their time.
    """
    apt.update()
    lists = (apt.directory / "updated").stat().st_mtime_ns
    kept = apt.directory / f"offered-{key(*packages)}"
    with contextlib.suppress(FileNotFoundError):
        if kept.stat().st_mtime_ns == lists:
            return kept.read_text(encoding="utf-8").splitlines()
    lines = [f"{package.name}={package.version}" for package in apt.closure(packages)]
    fresh = kept.with_name(f"{kept.name}.{os.getpid()}")
    with contextlib.suppress(PermissionError):  # somebody else's lists serve as well
        fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.utime(fresh, ns=(lists, lists))
        fresh.replace(kept)
    return lines


def build(recipe: Recipe, out: Path, *, say: Callable[[str], object] = lambda _line: None) -> None:
    """Build *recipe* into *out*, an empty directory; needs root and takes minutes.

    *say* gets a line for each step that is done, with the seconds it took.

    :raises BuildError: if the build fails.
    :raises HostError: if this machine lacks something for it.
    """
    need(TOOLS)
    need_root("building an image")
    need_disk(out, SIZE, what="building an image")
    work = out / "work"
    work.mkdir()
    timed = Timer(say, "base")
    store = _Store(work / "containers")
    (out / "repo").mkdir()
    try:
        context = work / "context"
        for name in recipe.files:
            _copy(recipe.context / name, context / name)
        image = _base_image(recipe, store, work, timed)
        store.build(recipe, context, image, volumes(recipe.suite, work))
        timed("the Containerfile's base")
        store.export(work / "tree")
        packages = _installed(work / "tree")
        timed("its files")
        commit.arrange(work / "tree")
        commit.init(out / "repo")
        subject = f"{recipe.target} of {recipe.containerfile}, Debian {recipe.suite}"
        commit.commit(out / "repo", REF, work / "tree", subject=subject, consume=True)
        checkout = ("ostree", f"--repo={out / 'repo'}", "checkout", "--require-hardlinks")
        run([*checkout, "--fsync=false", REF, out / "tree"], what="checking out the commit")
        timed("the commit")
        (out / "packages").write_text(packages, encoding="utf-8")
    finally:
        remove_tree(work)


class _Store:
    """A store of images and containers that nobody else sees."""

    built: Final = "localhost/harness-built"

    def __init__(self, directory: Path) -> None:
        self._options = (
            *("--root", str(directory / "root")),
            *("--runroot", str(directory / "run")),
            # The one copies whole trees, again and again, but works on every file system.
            *("--storage-driver", "overlay" if _has_overlays(directory) else "vfs"),
        )

    def run(self, *arguments: str | Path, what: str, timeout: float = _BUILD_TIMEOUT) -> str:
        command = ["buildah", *self._options, *arguments]
        return run(command, what=what, apart=True, timeout=timeout).strip()

    def pull(self, image: str) -> None:
        self.run("pull", "--quiet", image, what=f"pulling {image}", timeout=_PULL_TIMEOUT)

    def load(self, archive: Path, name: str) -> None:
        """Make an image of one layer."""
        what = f"importing {name}"
        container = self.run("from", "scratch", what=what)
        self.run("add", "--quiet", container, archive, "/", what=what)
        self.run("commit", "--quiet", "--rm", container, name, what=what)

    def build(self, recipe: Recipe, context: Path, image: str, volumes: dict[str, Path]) -> None:
        """Build the recipe's stage; each of *volumes* is shown there at its path."""
        options = [f"--volume={path}:{place}:ro" for place, path in volumes.items()]
        self.run(
            # This isolation needs no network namespace and no control groups.
            *("bud", "--quiet", "--isolation=chroot", "--layers=false", "--pull-never"),
            *("--target", recipe.target, "--tag", self.built),
            *("--build-arg", f"BASE={image}", "--build-arg", f"APT_CONFIG={APT_CONFIG}"),
            *options,
            *("--file", context / recipe.containerfile, context),
            what=f"building {recipe.containerfile}",
        )

    def export(self, tree: Path) -> None:
        """Put the files of what was built into *tree*."""
        what = "taking the files out of the image"
        container = self.run("from", "--pull-never", self.built, what=what)
        # What is mounted is seen by one command only.
        script = 'root=$(buildah "$@") && exec cp -a --reflink=auto "$root" "$tree"'
        command = ["sh", "-c", script, "sh", *self._options, "mount", container]
        run(command, what=what, apart=True, env={"tree": str(tree)})


def _has_overlays(directory: Path) -> bool:
    """Return whether overlayfs can write to *directory*: not to an overlay, for example."""
    parts = [directory / name for name in ("lower", "upper", "work", "merged")]
    for part in parts:
        part.mkdir(parents=True)
    lower, upper, work, merged = parts
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    try:
        command = ("mount", "-t", "overlay", "overlay", "-o", options, merged)
        run(command, what="trying overlayfs", apart=True)
    except BuildError:
        return False
    finally:
        shutil.rmtree(directory)
    return True


def _base_image(recipe: Recipe, store: _Store, work: Path, timed: Timer) -> str:
    """Get the base image, or make one; return its name in the store."""
    image = recipe.image or f"{DEBIAN}:{recipe.suite}"
    try:
        store.pull(image)
    except BuildError:
        if recipe.image:
            raise
    else:
        timed(f"pulling {image}")
        return image
    image = f"localhost/debian:{recipe.suite}"
    archive = work / "debian.tar"
    run(debian_of_its_own(recipe.suite, archive, work), what="mmdebstrap", apart=True)
    store.load(archive, image)
    archive.unlink()
    timed(f"no registry: a Debian {recipe.suite} of its own")
    return image


def debian_of_its_own(suite: str, archive: Path, work: Path) -> list[str]:
    """Return the command for a Debian like that of a registry, with the standard sources."""
    standard = work / "debian.sources"
    standard.write_text(_STANDARD.format(suite=suite), encoding="utf-8")
    return [
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--skip=output/dev"),
        *(f"--aptopt={setting}" for setting in acquire_settings()),
        '--customize-hook=rm "$1/etc/apt/sources.list"',
        f"--customize-hook=copy-in {standard} /etc/apt/sources.list.d",
        *(suite, str(archive), *_one_line_sources(suite)),
    ]


def _one_line_sources(suite: str) -> list[str]:
    lines = [f"deb [signed-by={KEYRING}] {machine_mirror() or DEFAULT_MIRROR} {suite} main"]
    if security := machine_mirror(SECURITY):
        lines.append(f"deb [signed-by={KEYRING}] {security} {suite}-security main")
    return lines


def volumes(suite: str, work: Path) -> dict[str, Path]:
    """Write what APT needs for the build, and return where it has to be seen."""
    # The same archives as the key's.
    places = [(machine_mirror() or DEFAULT_MIRROR, suite)]
    if security := machine_mirror(SECURITY):
        places.append((security, f"{suite}-security"))
    sources = work / "build.sources"
    sources.write_text(
        "\n".join(
            f"Types: deb\nURIs: {uri}\nSuites: {name}\nComponents: main\n"
            f"Signed-By: {_IMAGE_KEYRING}\n"
            for uri, name in places
        ),
        encoding="utf-8",
    )
    config = work / "apt.conf"
    settings = ["Acquire::Languages none", *acquire_settings()]
    config.write_text("".join(f"{setting};\n" for setting in settings), encoding="utf-8")
    return {_SOURCES: sources, APT_CONFIG: config}


def _installed(tree: Path) -> str:
    admin = f"--admindir={tree / 'var/lib/dpkg'}"
    form = "--showformat=${Package} ${Version}\\n"
    return run(["dpkg-query", admin, form, "--show"], what="reading the list of packages")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, symlinks=True, ignore=ignored)
    else:
        shutil.copy2(source, target, follow_symlinks=False)
