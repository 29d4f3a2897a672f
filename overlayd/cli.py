# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: options in, text or JSON and an exit code out.  Nothing is decided here."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, Final, NoReturn, TextIO

import click

from overlayd import __version__, render
from overlayd.errors import (
    InterruptedByUserError,
    OverlaydError,
    SpaceError,
    UsageError,
    from_oserror,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOOK: Final = {"list": "list_", "status": "", "dump": "", "doctor": "", "cleanup": ""}
_CHANGE: Final = ("apply", "reset", "remove", "batch")
_PRIVATE: Final = ("enter", "run", "attach", "detach")
_PAST: Final = ("history", "report")


class _Commands(click.Group):
    """Loads the module of the command that is called, and no other: 'list' is to be quick."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command and see to it that what it printed arrives."""
        try:
            result: object = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read the output has seen enough; what was asked for is done.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return None
        except OSError as error:
            # What reads or writes has nothing more precise to say of it.
            doing = error.filename or ctx.invoked_subcommand or "overlayd"
            raise from_oserror(error, shown(str(doing))) from None
        return result

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands."""
        del ctx
        return sorted((*_LOOK, *_CHANGE, *_PRIVATE, *_PAST))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        del ctx
        command: click.Command | None = None
        if cmd_name in _LOOK:
            from overlayd import cli_look  # noqa: PLC0415

            command = getattr(cli_look, _LOOK[cmd_name] or cmd_name)
        elif cmd_name in _CHANGE:
            from overlayd import cli_change  # noqa: PLC0415

            command = getattr(cli_change, cmd_name)
        elif cmd_name in _PRIVATE:
            from overlayd import cli_private  # noqa: PLC0415

            command = getattr(cli_private, cmd_name)
        elif cmd_name in _PAST:
            from overlayd import cli_history  # noqa: PLC0415

            command = getattr(cli_history, cmd_name)
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 2 usage, 3 not found, 4 exists, 5 refused, 6 busy,"
    " 7 no permission, 8 no space or a limit, 9 kernel refused, 10 no service, 130 interrupted,"
    " 1 internal.",
)
@click.version_option(__version__, prog_name="overlayd")
def app() -> None:
    """Try a change to a part of a read-only /usr on the running system, and take it back.

    \b
    Examples:
      overlayd apply fix ./build/share/app /usr/share/app
      overlayd list
      overlayd reset fix            back to the base, still mounted
      overlayd reset fix --to applied
      overlayd remove fix

    A reboot removes every overlay.
    """  # noqa: D301  # \b is click's mark for text that is not rewrapped


class _Output(io.TextIOWrapper):
    """A standard stream whose own faults are told from those of what a command does."""

    def write(self, text: str, /) -> int:
        """Write *text*.

        :raises OverlaydError: if it cannot be; nothing is written from then on.
        """
        with self._told():
            return super().write(text)

    def flush(self) -> None:
        """Write what is held back, and fail as :meth:`write` does."""
        with self._told():
            super().flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise OverlaydError(f"writing the output: {error.strerror}") from None


def _guarded(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    encoding, by_lines = stream.encoding, stream.line_buffering
    # What cannot be said in the terminal's encoding is said all the same.
    return _Output(
        stream.detach(), encoding=encoding, errors="backslashreplace", line_buffering=by_lines
    )


def _report(code: str, message: str, hint: str | None, *, as_json: bool) -> None:
    with contextlib.suppress(OSError):
        if as_json:
            error = {"error": {"code": code, "message": message, "hint": hint}}
            click.echo(render.as_json(error), err=True)
            return
        click.echo(f"overlayd: {message}", err=True)
        if hint:
            click.echo(f"  hint: {hint}", err=True)


def fail(error: OverlaydError) -> NoReturn:
    """Say what is wrong, and exit with its code."""
    _report(error.code, error.message, error.hint, as_json="--json" in sys.argv)
    sys.exit(error.exit_code)


def main() -> None:
    """Run a command and exit with its documented code."""
    as_json = "--json" in sys.argv
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a caller who ignores it would take our children
    for fd in range(3):
        # A closed standard stream would give its number to the next file that is opened.
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # And printing to one must not fail.
    sys.stdout = _guarded(sys.stdout or open(os.devnull, "w"))  # noqa: SIM115
    sys.stderr = _guarded(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
    try:
        app.main(sys.argv[1:] or ["--help"], standalone_mode=False, prog_name="overlayd")
    except OverlaydError as error:
        fail(error)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help" if context is not None else "overlayd --help"
        _report(UsageError.code, shown(error.format_message()), hint, as_json=as_json)
        sys.exit(UsageError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _report(InterruptedByUserError.code, "interrupted", None, as_json=as_json)
        sys.exit(InterruptedByUserError.exit_code)
    except MemoryError:
        _report(SpaceError.code, "there is not enough memory", None, as_json=as_json)
        sys.exit(SpaceError.exit_code)
    except ImportError as error:
        _report(OverlaydError.code, shown(f"loading Python: {error}"), None, as_json=as_json)
        sys.exit(OverlaydError.exit_code)
