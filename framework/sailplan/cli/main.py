"""`sailplan COMMAND [Hydra overrides]`: parses the command line, runs the command, turns errors
into exit codes.

The same line works alone, under torchrun and under Slurm. Exit codes: 0 done; 64 bad configuration;
65 bad data over the limit; 70 hang detected; 75 stopped on request, resume me; 1 anything else.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable

from sailplan.cli import completion
from sailplan.cli.arguments import COMMANDS, LAUNCHED, Parser, build_parser
from sailplan.cli.import_command import add_import_arguments
from sailplan.errors import EXIT_DONE, EXIT_FAILURE, ConfigurationError, SailplanError
from sailplan.runtime.environment import fill_in_launcher
from sailplan.runtime.leaving import NOTES, end_now, first_to_say, name_lines, note_code, say
from sailplan.runtime.progress import showing_progress


def _check_overrides(overrides: list[str]) -> None:
    flag = next((override for override in overrides if override.startswith("-")), None)
    if flag is not None:  # before what was meant as its value
        raise ConfigurationError(
            f"unknown flag {flag} (settings are given as key=value; see: sailplan --help)"
        )
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ConfigurationError(
                f"'{override}' is not an override: write key=value, e.g. experiment=quickstart"
            )


def _import(arguments: list[str]) -> int:
    """`sailplan data import`, whose flags are its own."""
    from sailplan.cli import import_command

    parser = Parser(
        prog="sailplan data import",
        description="Turn data as you have it into shards, conf/data/NAME.yaml and a tokenizer.",
        allow_abbrev=False,
    )
    add_import_arguments(parser)
    return import_command.run(parser.parse_args(arguments))


def run(arguments: list[str]) -> int:
    parser = build_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        raise ConfigurationError(
            f"unknown command '{arguments[0]}'{f'; did you mean {close[0]!r}?' if close else ''}; "
            f"commands: {', '.join(COMMANDS)}"
        )
    if "_ARGCOMPLETE" in os.environ:
        completion.complete(parser)
    if arguments[:2] == ["data", "import"]:
        return _import(arguments[2:])
    options, rest = parser.parse_known_args(arguments)
    if options.command == "new":
        from sailplan.cli import import_command

        if rest:
            raise ConfigurationError(
                f"new: found {rest[0]}, expected a name and flags (see: sailplan new --help)"
            )
        return import_command.run_new(options)
    if options.command is None:
        _check_overrides(rest)
        parser.print_help()
        return 0
    if options.command == "list":
        from sailplan.cli.look import list_choices

        list_choices([*options.groups, *rest])
        return EXIT_DONE
    options.overrides += rest  # overrides after a flag
    if options.command == "check" and options.overrides[:1] == ["parity"]:
        from sailplan.cli import parity_command

        options.overrides = options.overrides[1:]
        return parity_command.run(options)
    if options.command == "check" and options.loss:
        raise ConfigurationError(
            "check --loss: expected the word parity: sailplan check parity --loss module:function"
        )
    options.merge = options.command == "export" and options.overrides[:1] == ["merge"]
    if options.merge:
        del options.overrides[0]
    _check_overrides(options.overrides)
    if options.command == "data":
        from sailplan.cli import data_commands

        return data_commands.run(options)
    if options.command == "teachers":
        from sailplan.cli import teachers_command

        return teachers_command.run(options)
    if options.command in LAUNCHED:
        from sailplan.cli import look
        from sailplan.cli.configuration import of_launch

        if options.cfg or options.info:
            look.show_config(options.overrides) if options.cfg else look.show_info(
                options.info, options.overrides
            )
            return EXIT_DONE
        if getattr(options, "multirun", False):
            from sailplan.cli import sweep

            return sweep.run(options.overrides)
        if getattr(options, "ranks", None) is not None and options.ranks < 1:
            raise ConfigurationError(f"--ranks {options.ranks}: expected at least 1")
        options.config = of_launch(options)
        from sailplan.cli import train_commands

        return int(getattr(train_commands, options.command)(options))
    if options.command == "semantic-ids":
        from sailplan.cli import semantic_ids_command

        return semantic_ids_command.run(options)
    if options.command == "encode":
        from sailplan.cli import encode_command

        return encode_command.run(options)
    if options.command == "report":
        from sailplan.cli import report_command

        return report_command.run(options)
    if options.command == "evaluate" and (options.model or options.data):
        from sailplan.cli import beir_command

        return beir_command.run(options)
    if not options.merge:
        from sailplan.cli.configuration import of_run

        options.config, options.folder = of_run(options)
    from sailplan.cli import run_commands

    return int(getattr(run_commands, options.command)(options))


def main(arguments: list[str] | None = None) -> int:
    """Entry of the `sailplan` script; returns the exit code."""
    if not os.environ.get("SAILPLAN_WARNINGS"):
        warnings.filterwarnings(
            "ignore"
        )  # dependencies warn about apex, TransformerEngine, pynvml on every rank
        logging.getLogger("torch.utils.cpp_extension").setLevel(
            logging.ERROR
        )  # a CUDA toolkit without a GPU is no news here
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a loss of one's own lies in the folder that one starts in
    given = sys.argv[1:] if arguments is None else arguments
    return run_safely(lambda: _shown(given))


def _shown(arguments: list[str]) -> int:
    """Run a command; training has a screen of its own, others show how far they are."""
    command = next(iter(arguments), "")
    if command in LAUNCHED or command not in COMMANDS:
        return run(arguments)
    with showing_progress(command):
        return run(arguments)


def run_safely(command: Callable[[], int]) -> int:
    """Return a command's exit code; an error is said once in a job, and turned into its code."""
    try:
        fill_in_launcher()
        name_lines()
        return _left(command())
    except SailplanError as error:
        return _refused(error)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        return _left(EXIT_FAILURE)
    except Exception:
        traceback.print_exc()
        return _left(EXIT_FAILURE)


def _left(code: int) -> int:
    note_code(code)
    return code


def _refused(error: SailplanError) -> int:
    """Say an error once in a job.

    Of several ranks, those that it did not reach are told, so that they do not wait for this one.
    """
    board, ranks = None, int(os.environ.get("WORLD_SIZE", "1"))
    one_node = NOTES in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == str(
        ranks
    )  # whose launcher ends them all
    if ranks > 1 and not one_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from sailplan.runtime.board import Board

        try:
            board = Board.of_launch(10)
        except Exception:
            board = None
    if first_to_say(str(error), board):
        say(str(error))
    if board is not None:
        end_now(error.exit_code, str(error), board)
    return _left(error.exit_code)
