"""The command line: what all commands share. Results to stdout, progress and errors to stderr."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import streammerge
from streammerge import signals
from streammerge.commands.demo import demo
from streammerge.commands.diagnose import diagnose
from streammerge.commands.eval import eval
from streammerge.commands.fisher import fisher
from streammerge.commands.merge import merge, plan
from streammerge.commands.methods import methods
from streammerge.commands.printing import printed, safe_lines
from streammerge.commands.push import push
from streammerge.commands.sweep import sweep
from streammerge.commands.verify import verify
from streammerge.errors import StreammergeError
from streammerge.options import (
    Debug,
    calibration_options,
    diagnose_options,
    evaluation_options,
    fisher_options,
    method_options,
    push_options,
)
from streammerge.schema import suggest


class _FlagsWithoutValue:
    """Typer shows a flag with the value <bool>, which it does not take."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_FlagsWithoutValue, TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """An option is no other option's value: what was to stand between them is mostly an empty variable."""
        options = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
        valued = {name for option in options if not option.is_flag for name in option.opts}
        for name, value in pairwise(args):
            if name in valued and value in names:
                ctx.fail(f"Option {name!r} requires an argument, and {value!r} is an option.")
        rest: list[str] = super().parse_args(ctx, args)
        return rest


class _Group(_FlagsWithoutValue, TyperGroup): ...


app = typer.Typer(
    name="streammerge",
    cls=_Group,
    help="Merge large language-model checkpoints, streamed: never two models in memory.\n\n"
    "Without a command, `merge` is meant: streammerge --base A --ft B --out merged",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 1 for an error of ours, 2 for usage, 130 and 143 by signals."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args:
        args = ["--help"]
    elif args[0] not in _COMMANDS and args[0] not in ("-h", "--help", "--version"):
        if re.fullmatch("[A-Za-z_-]+", args[0]) and args[0][0] != "-" and not os.path.lexists(args[0]):
            print(
                f"streammerge: error: there is no command {args[0]!r}: {suggest(args[0], _COMMANDS)}", file=sys.stderr
            )
            return 2
        args = ["merge", *args]
    status = 0
    try:
        app(args, prog_name="streammerge")
    except SystemExit as stop:
        status = int(stop.code or 0)
    except StreammergeError:  # with --debug
        raise
    except OSError:
        if _has_arrived():
            raise
        status = 1  # help, which is printed by typer
    return status or int(not _has_arrived())


def _has_arrived() -> bool:
    """Whether all that was printed went where standard output goes; if not, that is said."""
    try:
        with printed():
            return True
    except BrokenPipeError:
        pass
    except StreammergeError as error:
        _say_error(error)
    return False


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Errors of ours become one line and exit 1; Ctrl-C becomes advice and exit 130, SIGTERM and exit 143."""

    def run(debug: bool = False, **options: Any) -> None:
        again = _given_again(command.__name__, options)
        try:
            with signals.under_way(again):
                command(**options)
        except StreammergeError as error:
            if debug:
                raise
            _say_error(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stop:
            signals.say_farewell(again)
            raise typer.Exit(stop.status if isinstance(stop, signals.Stopped) else 130) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def _say_error(error: StreammergeError) -> None:
    print(f"streammerge: error: {safe_lines(str(error))}", file=sys.stderr)


def _given_again(command: str, options: Mapping[str, Any]) -> str:
    """What a command that was stopped does when it is given again."""
    if options.get("overwrite"):
        return "begins anew, as --overwrite asks"
    if command == "eval":
        if options["out"] is None:
            return "begins anew; with --out it would keep the tasks that are done"
        return "goes on with the tasks that are not in --out; the one it was at starts over"
    resumed = command in ("merge", "fisher", "push", "sweep") and not options.get("dry_run")
    return "goes on where it was" if resumed else "begins anew"


def _register(command: Callable[..., None], *extra: inspect.Parameter, like: Any = None, drop: str = "") -> None:
    """Add a command whose `**options` are spelled out as the parameters `extra`."""
    source = inspect.signature(like or command, eval_str=True)
    named = [p for p in source.parameters.values() if p.kind != p.VAR_KEYWORD and p.name not in drop.split()]
    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*named, *extra, debug)]
    run = _guarded(command)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(command.__name__, cls=_Command)(run)


def _version(value: bool) -> None:
    if value:
        print(f"streammerge {streammerge.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


_options = [*method_options(), *fisher_options(), *calibration_options(), *push_options()]
_register(merge, *_options)
_register(plan, *_options, like=merge, drop="no_disk_check no_report dry_run quiet")
_register(fisher, *fisher_options(bare=True))
_register(push, *push_options())
_register(verify)
_register(sweep)
_register(methods)
_register(diagnose, *diagnose_options())
_register(eval, *evaluation_options())
_register(demo)
_COMMANDS = [command.name or "" for command in app.registered_commands]
