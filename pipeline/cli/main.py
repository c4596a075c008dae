"""The entry point: parse, run a verb, turn errors into messages and exit codes."""

from __future__ import annotations

import atexit
import difflib
import gc
import json
import sys
import traceback
from typing import Any

import click

from ..errors import PipelineError
from .options import Reporter, hang_up

USAGE, INTERRUPTED = 2, 130
OBJECTS_BEFORE_COLLECTION = 50_000


class _LazyGroup(click.Group):
    """Verbs by name; their modules are imported when one is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from .verbs import VERBS

        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from .verbs import VERBS

        return VERBS.get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it; a verb that does not exist is told of with the nearest that do."""
        verbs = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in verbs:
            near = difflib.get_close_matches(args[0].replace("_", "-"), verbs, 3, 0.6)
            hint = f" Did you mean {' or '.join(near)}?" if near else f" There are {', '.join(verbs)}."
            ctx.fail(f"There is no verb {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="image-transfer-pipeline")
def cli() -> None:
    """A folder of images becomes a classifier, and the expensive part is paid once."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 usage or params, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _collect_seldom()
    reporter = Reporter(as_json="--json" in arguments, verbose=bool({"-v", "--verbose"} & set(arguments)))
    sys.exit(_run(arguments, reporter))


def _collect_seldom() -> None:
    """Importing torch makes objects by the hundred thousand, none of them garbage: searching them for some, again and
    again on the way and once more at the exit, would take a fifth of a short command.
    """
    gc.set_threshold(OBJECTS_BEFORE_COLLECTION)
    atexit.register(gc.freeze)


def _run(arguments: list[str], reporter: Reporter) -> int:
    try:
        code = cli.main(args=arguments, prog_name="pipeline", standalone_mode=False)
        return code if isinstance(code, int) else 0  # a verb's own, by `click.exceptions.Exit`
    except PipelineError as error:
        return _fail(reporter, error.as_dict(), str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail(reporter, {"type": "Interrupted", "what": "Interrupted."}, "Interrupted.", INTERRUPTED)
    except click.ClickException as error:
        return _fail(reporter, {"type": "UsageError", "what": error.format_message()}, _usage(error), USAGE)
    except (BrokenPipeError, SystemExit):  # click and rich exit where the reader of our output has gone
        hang_up(1)  # it has seen enough of it (`| head`), which is no error
    except Exception as error:  # noqa: BLE001 - the last line of defence: a message, and a traceback with -v
        remedy = "run again with -v for the traceback, and report it: this is a fault of the program"
        what = f"Unexpected {type(error).__name__}: {error}"
        return _fail(reporter, {"type": type(error).__name__, "what": what}, f"{what}\n  remedy: {remedy}", 1)
    return 0


def _fail(reporter: Reporter, error: dict[str, Any], text: str, code: int) -> int:
    if reporter.verbose:
        traceback.print_exc()
    click.echo(f"Error: {_printable(text)}", err=True)
    if reporter.as_json:
        click.echo(json.dumps({"error": error}))
    return code


def _usage(error: click.ClickException) -> str:
    hint = f"\n{error.ctx.get_usage()}" if isinstance(error, click.UsageError) and error.ctx else ""
    return f"{error.format_message()}{hint}"


def _printable(text: str) -> str:
    """Text that any terminal takes: names that are not UTF-8 are shown escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
