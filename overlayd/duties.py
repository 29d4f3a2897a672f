# SPDX-License-Identifier: LGPL-2.1-or-later
"""What calls over the bus change, once it is known who calls: permission, limits, the manager.

Everything that a caller says is a claim.  What he sends is received before anybody is asked about
it, so that what is permitted is what will be shown.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Final

from overlayd import (
    config,
    examine,
    history,
    interface,
    plan,
    policy,
    polkit,
    receiver,
    wire,
)
from overlayd.errors import (
    BusyError,
    NoPermissionError,
    OverlaydError,
    RefusedError,
    shown,
)
from overlayd.lines import Lines
from overlayd.looks import Looks, with_uuid
from overlayd.manager import Manager, User
from overlayd.model import Options, Request, human_size
from overlayd.polkit import Action
from overlayd.targets import Streamed, moved

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.bus import Connection
    from overlayd.calls import Call
    from overlayd.config import Config, UserLimits
    from overlayd.model import Overlay
    from overlayd.receiver import Received

    Result = tuple[object, ...]

_FRESH: Final = 1.0
"""Seconds for which the configuration is not read again."""
_MAX_NAMED: Final = 20
_MAX_SHOWN: Final = 160
"""Characters of a claimed path that an administrator has to read."""
_MAX_SOURCE: Final = 4096
_OPTIONS: Final = {
    "read-only": ("b", "read_only"),
    "allow-other": ("b", "allow_other"),
    "default-permissions": ("b", "default_permissions"),
    "allow-critical": ("b", "allow_critical"),
}


class Duties:
    """What there is to do, for all callers; from several threads."""

    def __init__(self, bus: Connection) -> None:
        """Read the configuration when it is needed first."""
        self._bus = bus
        self._config: Config | None = None
        self._read = 0.0
        self._lock = threading.Lock()
        self._copies = 0
        self._looks = Looks(bus, self._manager)
        self.lines = Lines()
        self._by_name: dict[tuple[str, str], Callable[[Call], Result]] = {
            (wire.MANAGER, "Apply"): self._apply,
            (wire.MANAGER, "Reset"): self._reset,
            (wire.MANAGER, "Remove"): self._remove,
            (wire.MANAGER, "Cleanup"): self._cleanup,
            (wire.OVERLAY, "Reset"): self._reset,
            (wire.OVERLAY, "Remove"): self._remove,
        }

    def do(self, call: Call) -> Result:
        """Do what is called, and return the results.

        :raises OverlaydError: if it is refused or fails.
        """
        if call.method.name == "OpenStream":
            return self._open_stream(call)
        if call.method.access is interface.Access.ANYONE:
            return self._looks.do(call)
        duty = self._by_name[call.method.interface, call.method.name]
        at, start = time.time(), time.monotonic()
        failed: OverlaydError | None = None
        try:
            return duty(call)
        except OverlaydError as error:
            failed = error
            raise
        except BaseException as error:
            failed = OverlaydError(repr(error))
            raise
        finally:
            if call.method.name != "Cleanup" or not call.body[0]:  # that would only look
                self._note(call, failed, at, time.monotonic() - start)

    def _note(self, call: Call, failed: OverlaydError | None, at: float, seconds: float) -> None:
        """Have it in the history; whatever comes of that, the call is answered."""
        caller, facts = call.caller, call.facts
        allowed, rule = history.judged(failed)
        if rule == "root" and caller.uid != 0:
            rule = ""  # it failed before anybody was asked
        limits = None
        if self._config is not None:
            limits = history.Limits(self._config.history_days, self._config.history_size)
        attempt = history.Attempt(
            at=at,
            uid=caller.uid,
            session_id=caller.number("sessionid"),
            pid=caller.pid,
            via="bus",
            verb=call.method.name.lower(),
            name=facts.get("name", ""),
            target=facts.get("target", ""),
            source=facts.get("source", ""),
            uuid=facts.get("uuid", ""),
            allowed=allowed,
            rule=facts.get("rule", rule) if allowed or rule == "permission" else rule,
            digest=facts.get("digest", ""),
            outcome=history.DONE if failed is None else failed.code,
            message="" if failed is None else failed.message,
            seconds=seconds,
            login_uid=caller.number("loginuid"),
        )
        history.note(attempt, limits=limits)

    # -- configuration -------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The configuration, at most a second old.

        :raises OverlaydError: if it cannot be understood.
        """
        with self._lock:
            now = time.monotonic()
            if self._config is None or now - self._read > _FRESH:
                self._config, self._read = config.load(), now
            return self._config

    def limits(self) -> UserLimits:
        """Return what each user may have and do; a broken configuration keeps nobody waiting."""
        try:
            return self.config.users
        except OverlaydError:
            with self._lock:
                return (self._config or config.defaults()).users

    def _manager(self, warn: Callable[[str], None] = lambda _text: None) -> Manager:
        return Manager(lambda: self.config, warn=warn)

    # -- apply ---------------------------------------------------------------------------------

    def _open_stream(self, call: Call) -> Result:
        """Hand out the far end of a line; the message keeps a copy of it, and closes that."""
        limits = self.limits()
        most = limits.queued + limits.copies
        number, far = self.lines.make(call.caller.name, call.caller.uid, most)
        call.message.fds.append(far.detach())
        return number, call.message.fds[-1]

    def _apply(self, call: Call) -> Result:
        number = call.body[3]
        assert isinstance(number, int)  # noqa: S101  # by its signature
        fd = self.lines.take(number, call.caller.name)
        try:
            return self._apply_from(call, fd)
        finally:
            os.close(fd)

    def _apply_from(self, call: Call, fd: int) -> Result:
        """Do the same with the source that comes from *fd*, which stays the caller's."""
        request = _request(call.body)
        call.facts |= {"name": request.name, "target": request.target, "source": request.source}
        if call.caller.uid != 0 and not request.options.allow_other:
            message = "everybody would see this overlay, which takes --allow-other"
            raise RefusedError(message, hint="an administrator is asked")
        warnings: list[str] = []
        limits = self.config
        stream = receiver.Receiver(
            os.dup(fd),
            limits=examine.source_limits(limits, user=True),
            flagged=policy.flag_pattern(limits.flagged_patterns),
            seconds=limits.receive_seconds,
            patience=limits.stall_seconds,
            progress=call.progress,
        )
        try:
            self._take_copy(limits.copies)
            try:
                overlay = self._received(call, request, stream, warnings.append)
            finally:
                self._copies_done()
        finally:
            stream.close()
        return wire.path_of(overlay.record.uuid), wire.to_wire(overlay, full=True), warnings

    def _take_copy(self, limit: int) -> None:
        with self._lock:
            if self._copies >= limit:
                message = f"{limit} sources are being received, and no more may at a time"
                raise BusyError(message, hint="try again; limits.copies in the configuration")
            self._copies += 1

    def _copies_done(self) -> None:
        with self._lock:
            self._copies -= 1

    def _received(
        self,
        call: Call,
        request: Request,
        stream: receiver.Receiver,
        warn: Callable[[str], None],
    ) -> Overlay:
        """Receive, ask, show: in this order."""
        caller = call.caller
        kind = stream.header().kind
        owner = plan.Owner(caller.uid, caller.number("sessionid"))
        user = User(owner, Streamed(kind, request.source, stream))
        manager = self._manager(warn)
        critical, covered = manager.consider(request, user)
        if critical and caller.uid != 0 and not self.config.critical_users:
            raise examine.for_root_alone(critical)
        action = Action.CRITICAL if critical else Action.APPLY
        details = _details(request, caller.uid, critical, covered)
        # What is refused whoever is asked is refused before anything is received.
        self._permit(call, action, details, interactive=False)
        prepared = manager.prepare(request, call.progress, user)
        try:
            _check_same(request, critical, prepared.critical)
            received = stream.received
            call.facts |= {"digest": received.digest, "uuid": prepared.record.uuid}
            examine.report_flagged(received, self.config.flagged_users, warn, whose="users")
            self._permit(
                call,
                action,
                details | _more(received, details),
                interactive=call.interactive,
                last=True,
            )
        except BaseException:
            prepared.abandon()
            raise
        return prepared.commit()

    def _permit(
        self,
        call: Call,
        action: Action,
        details: dict[str, str],
        *,
        interactive: bool,
        last: bool = False,
    ) -> None:
        """Ask polkit unless it is root who calls; a challenge will do unless this is the *last*.

        :raises NoPermissionError: if the answer is no.
        """
        if call.caller.uid == 0:
            call.facts["rule"] = "root"
            return
        call.facts["rule"] = str(action)
        caller = call.caller.name
        try:
            answer = polkit.ask(
                self._bus,
                caller,
                action,
                details,
                interactive=interactive and last,
                stopped=call.stopped,
            )
        except NoPermissionError:
            call.progress.check()
            raise
        if answer.authorized or (answer.challenge and not last and call.interactive):
            return
        if answer.dismissed:
            message, hint = "nobody authenticated as an administrator", None
        elif answer.challenge:
            message = "an administrator has to authenticate for this, and nobody could be asked"
            hint = "use a terminal or a desktop session; or sudo"
        else:
            message = f"polkit does not permit {action}"
            hint = "a rule says no, or no administrator authenticated"
        raise NoPermissionError(message, hint=hint)

    # -- changes -------------------------------------------------------------------------------

    @staticmethod
    def _meant(call: Call, manager: Manager) -> Overlay:
        """Return the overlay that is called, or is named by the first argument."""
        if (uuid := interface.uuid_of(call.path)) is None:
            call.facts["name"] = str(call.body[0])
            return manager.status(str(call.body[0]))
        return with_uuid(manager, uuid)

    def _permit_change(self, call: Call, overlay: Overlay, verb: str) -> None:
        record = overlay.record
        call.facts |= {
            "name": record.name,
            "target": record.target,
            "uuid": record.uuid,
        }
        if call.caller.uid in {0, record.owner}:
            call.facts["rule"] = "root" if call.caller.uid == 0 else "owner"
            call.facts["source"] = record.source
            return
        text = f"Authentication is required to {verb} the overlay $(name) of user $(owner)"
        details = {
            "name": record.name,
            "target": shown(record.target),
            "owner": str(record.owner),
            "operation": verb,
            "polkit.message": text,
        }
        self._permit(call, Action.MANAGE_OTHERS, details, interactive=call.interactive, last=True)
        # Not before: what is noted of his own attempts the caller can read.
        call.facts["source"] = record.source

    def _reset(self, call: Call) -> Result:
        manager = self._manager()
        overlay = self._meant(call, manager)
        self._permit_change(call, overlay, "reset")
        version = call.body[-1]
        assert isinstance(version, int)  # noqa: S101  # by its signature
        record = overlay.record
        done = manager.reset(record.name, version, call.progress, uuid=record.uuid)
        return (wire.to_wire(done, full=True),)

    def _remove(self, call: Call) -> Result:
        manager = self._manager()
        overlay = self._meant(call, manager)
        self._permit_change(call, overlay, "remove")
        record, lazy = overlay.record, bool(call.body[-1])
        done = manager.remove(record.name, lazy=lazy, progress=call.progress, uuid=record.uuid)
        return (wire.to_wire(done, full=True),)

    def _cleanup(self, call: Call) -> Result:
        if call.caller.uid != 0:
            text = "Authentication is required to remove what overlays have left behind"
            details = {"operation": "cleanup", "polkit.message": text}
            self._permit(
                call, Action.MANAGE_OTHERS, details, interactive=call.interactive, last=True
            )
        actions = self._manager().cleanup(dry_run=bool(call.body[0]))
        return ([(a.kind, shown(a.subject), a.text, a.failed or "") for a in actions],)


def _request(body: Result) -> Request:
    """Return what is asked for.

    :raises RefusedError: for options that are unknown or of another type.
    """
    name, source, target, _, options = body
    assert isinstance(name, str)  # noqa: S101  # all of them by the signature
    assert isinstance(source, str)  # noqa: S101
    assert isinstance(target, str)  # noqa: S101
    assert isinstance(options, dict)  # noqa: S101
    if len(source) > _MAX_SOURCE or len(target) > _MAX_SOURCE:
        message = f"a path has at most {_MAX_SOURCE} characters"
        raise RefusedError(message)
    flags: dict[str, bool] = {}
    size = None
    for key, (kind, value) in options.items():
        if key == "size" and kind == "t" and value:
            size = value
        elif key in _OPTIONS and kind == _OPTIONS[key][0]:
            flags[_OPTIONS[key][1]] = value
        else:
            message = f"no such option, or not of this type: {shown(key)}"
            raise RefusedError(message, hint=f"there are size and {', '.join(_OPTIONS)}")
    if size is not None and (flags.get("read_only") or size > 1 << 50):
        message = "size is the room for edits, and of a read-only overlay there is none"
        raise RefusedError(message)
    return Request(name, source, target, Options(**flags, writable_dirs=()), size)


def _brief(text: str) -> str:
    """Return a text that leaves room for others in a dialog."""
    return (
        text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]}…{text[-_MAX_SHOWN // 2 :]}"
    )


def _check_same(request: Request, asked: str, found: str) -> None:
    """Refuse a target that is critical now and was not when it was asked about, or the reverse.

    :raises BusyError: saying so.
    """
    if bool(asked) != bool(found):
        raise moved(request.target)


def _details(request: Request, uid: int, critical: str, covered: str) -> dict[str, str]:
    """Return what polkit and the administrator are told before anything is received."""
    text = "Authentication is required to show everybody the overlay $(name) on $(target)"
    if critical:
        text += ", a critical target"
    return {
        "name": request.name,
        "target": shown(request.target),
        "source": _brief(shown(request.source)),
        "covers": shown(covered),
        "user": str(uid),
        "critical": critical,
        "polkit.message": text,
    }


def _more(received: Received, details: dict[str, str]) -> dict[str, str]:
    """Return what is known of a source once it is here."""
    text = "Authentication is required to show everybody the overlay $(name) on $(target)"
    text += "" if details["covers"] == details["target"] else ", covering $(covers)"
    text += ", a critical target:" if details["critical"] else ":"
    text += f" $(files) {'file' if received.file_count == 1 else 'files'}, $(size),"
    text += " from $(source) as the user says"
    if received.flagged_count:
        text += "; among them $(flagged)"
    return {
        "files": str(received.file_count),
        "entries": str(received.entries),
        "size": human_size(received.size),
        "digest": received.digest,
        "flagged": examine.flagged_text(received) if received.flagged_count else "",
        "flagged_names": ", ".join(map(shown, received.flagged[:_MAX_NAMED])),
        "polkit.message": text,
    }
