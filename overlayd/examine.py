# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking at what an apply is about: source, target, policy, sizes. Changes nothing."""

from __future__ import annotations

import glob
import os
import stat
import sys as python
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from overlayd import caller, ops, overlayfs, plan, policy, targets, walker
from overlayd import syscalls as sys
from overlayd.config import FlaggedAction
from overlayd.errors import OverlaydError, RefusedError, from_oserror, shown
from overlayd.model import SourceKind, check_name
from overlayd.places import RUN
from overlayd.targets import OpenSource, Streamed

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.config import Config
    from overlayd.model import Request
    from overlayd.mountinfo import Table
    from overlayd.progress import Progress
    from overlayd.targets import OpenPlace, Place, Source
    from overlayd.walker import Flagged, Limits, Measure

_WARN_NAMES: Final = 10


@dataclass(slots=True)
class Examined:
    """Source and target, open, and what the source holds, or is said to hold.

    ``critical`` says why the target is critical; empty if it is not.
    """

    source: Source
    place: OpenPlace
    measure: Measure
    limits: Limits
    critical: str

    def close(self) -> None:
        """Close both."""
        self.source.close()
        self.place.close()


def examine(  # noqa: PLR0913  # what it is about, and what it is held against
    request: Request,
    config: Config,
    check_free: Callable[[Place], None],
    *,
    table: Table,
    progress: Progress,
    warn: Callable[[str], None],
    given: Source | None = None,
    user: bool = False,
    private: bool = False,
) -> Examined:
    """Check all of *request* that needs no lock, the cheap things first.

    The source is the one that is *given*, if it is, and belongs to the caller if this raises.
    With *user* the limits are those of users other than root, by whose rights it is looked at
    for the service; with *private* for an overlay that nobody else sees.

    :raises OverlaydError: for the first thing that is wrong.
    """
    check_name(request.name)
    source = given or targets.open_source(request.source)
    own = private and os.geteuid() != 0
    limits = source_limits(config, user=user or own or isinstance(source, Streamed))
    place = None
    critical = ""
    try:
        # What a user's path leads to he has found out himself, by his own rights.
        streamed = isinstance(source, Streamed)
        target = request.target if streamed else targets.resolve_target(request.target)
        place = targets.open_target(target, source)
        if not private:
            critical = _critical(place, config)
            _check_critical(request, critical, for_root=user and not config.critical_users)
        check_free(place.place)
        plan.check_mounts(place.place, table, private=private)
        if not user:
            _check_depth(place)
        if isinstance(source, Streamed):
            measure = source.receiver.declared
        else:
            assert isinstance(source, OpenSource)  # noqa: S101  # there are no others
            targets.check_apart(source, place.place, table)
            measure = _measure(request, source, place, limits, config, progress)
            if not (user or private):
                report_flagged(measure, config.flagged_root, warn)
        plan.check_memory(measure, request.source, memory_available(), config.memory_reserve)
    except BaseException as error:
        if given is None:
            source.close()
        if place is not None:
            place.close()
        if isinstance(error, OSError):
            raise from_oserror(error, f"looking at {shown(request.target)}") from None
        raise
    return Examined(source, place, measure, limits, critical)


def source_limits(config: Config, *, user: bool) -> Limits:
    """Return what a source may hold: root's, or that of a *user*."""
    if user:
        own = config.users
        return walker.Limits(own.source_entries, own.source_size, own.source_depth, "users")
    return walker.Limits(config.source_entries, config.source_size, config.source_depth)


def _measure(  # noqa: PLR0913, PLR0917  # one question, all of it needed
    request: Request,
    source: OpenSource,
    place: OpenPlace,
    limits: Limits,
    config: Config,
    progress: Progress,
) -> Measure:
    flagged = policy.flag_pattern(config.flagged_patterns)
    where = place.place
    if source.kind is SourceKind.DIRECTORY:
        return walker.measure_tree(
            source.fd,
            request.source,
            base_fd=None if where.prefix else place.base_fd,
            base_label=where.mount_point,
            limits=limits,
            flagged=flagged,
            progress=progress,
        )
    measure = walker.measure_file(source.file, source.fd, request.source, limits)
    if flagged.match(where.prefix[-1]):
        walker.note_flagged(measure, request.source)
    walker.check_file_over(request.source, place.base_fd, where.prefix[0], where.mount_point)
    return measure


def report_flagged(
    measure: Flagged, action: FlaggedAction, warn: Callable[[str], None], *, whose: str = "root"
) -> None:
    """Do with flagged files what the configuration says.

    :raises RefusedError: naming the first of them, if they are to be refused.
    """
    if not measure.flagged_count or action is FlaggedAction.IGNORE:
        return
    text = flagged_text(measure)
    if action is FlaggedAction.REFUSE:
        message = f"the source holds {text}"
        raise RefusedError(message, hint=f"flagged.{whose} in the configuration decides this")
    warn(text)


def flagged_text(measure: Flagged) -> str:
    """Say how many flagged files there are, and name the first."""
    names = ", ".join(map(shown, measure.flagged[:_WARN_NAMES]))
    if (more := measure.flagged_count - _WARN_NAMES) > 0:
        names += f" and {more} more"
    return f"{measure.flagged_count} flagged files: {names}"


def _critical(place: OpenPlace, config: Config) -> str:
    """Return why the target is critical; empty if it is not."""
    where = place.place
    facts = _file_facts(place.place_fd) if where.entry else None
    for path in dict.fromkeys((where.mount_point, where.target)):
        reason = policy.critical_reason(
            path, config.critical_trees, single_file=facts, exists=_exists
        )
        if reason is not None:
            covers = "" if path == where.target else ", and the overlay has to cover it"
            return f"{shown(reason)}{covers}"
    return ""


def _check_critical(request: Request, critical: str, *, for_root: bool) -> None:
    if critical and for_root:
        raise for_root_alone(critical)
    if critical and not request.options.allow_critical:
        message = f"critical target: {critical}"
        raise RefusedError(message, hint="--allow-critical, if you mean it")


def for_root_alone(critical: str) -> RefusedError:
    """Return the error for a critical target of a user's, saying why it is critical."""
    message = f"critical target: {critical}; only root covers it here"
    return RefusedError(message, hint="critical.users in the configuration")


def _exists(pattern: str) -> bool:
    """Whether there is a directory at *pattern*; its wildcards match within components."""
    return any(os.path.isdir(path) for path in glob.iglob(pattern))


def _file_facts(fd: int) -> policy.FileFacts:
    try:
        os.getxattr(f"/proc/self/fd/{fd}", "security.capability")
        capabilities = True
    except OSError:
        capabilities = False
    facts = os.fstat(fd)
    needed = False
    for own in (python.executable, python.argv[0]):
        try:
            needed |= os.path.samestat(os.stat(own), facts)
        except OSError:
            continue
    set_id = bool(facts.st_mode & (stat.S_ISUID | stat.S_ISGID))
    return policy.FileFacts(set_id, capabilities, needed)


def _check_depth(place: OpenPlace) -> None:
    """Refuse a target on which the kernel can lay no overlay any more, by trying.

    :raises KernelError: naming the depth.
    """
    if sys.fstatfs(place.base_fd).type != sys.OVERLAYFS_SUPER_MAGIC:
        return
    # In a user namespace no directory will do that others' mounts lie in.
    beside = f"{RUN}/quarantine" if caller.in_user_namespace() else "/"
    other = os.open(beside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(overlayfs.make_overlay("probe", [place.base_fd, other], None, 0))
    except OSError:
        # A mount that was detached meanwhile is refused with the same EINVAL.
        targets.check_still_there(place)
        raise ops.depth_error() from None
    finally:
        os.close(other)


def memory_available() -> int:
    """Return the bytes that can be had without swapping: MemAvailable of /proc/meminfo."""
    fd = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.read(fd, 4096)
    finally:
        os.close(fd)
    for line in head.split(b"\n"):
        if line.startswith(b"MemAvailable:"):
            return int(line.split()[1]) * 1024
    message = "/proc/meminfo does not say how much memory is available"
    raise OverlaydError(message)
