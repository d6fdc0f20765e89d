"""`sailplan COMMAND [Hydra overrides]`: parses the command line, runs the command, turns errors
into exit codes.

The same line works alone, under torchrun and under Slurm. Exit codes: 0 done; 64 bad configuration;
65 bad data over the limit; 70 hang detected; 75 stopped on request, resume me; 1 anything else.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from sailplan import __version__
from sailplan.cli import completion
from sailplan.cli.import_command import add_import_arguments, add_new_arguments
from sailplan.errors import EXIT_DONE, EXIT_FAILURE, ConfigurationError, SailplanError
from sailplan.runtime.leaving import NOTES, end_now, first_to_say, name_lines, note_code, say

ABOUT = """Train, look at and export omni-modal embedding models; settings are Hydra overrides of the files in conf/.

  sailplan plan experiment=quickstart                             what would run
  sailplan train experiment=quickstart name=NAME resume=auto      run it, or go on with it
  sailplan train --multirun experiment=quickstart seed=0,1,2      one run for each value
  sailplan data import photos/ --name shoes                       your own data: shards and their YAML
  sailplan new shoes --data shoes                                 an experiment over them
  sailplan list                                                   what can be chosen: experiments, models, losses, data
  sailplan COMMAND --help                                         flags of a command"""
EXIT_CODES = """exit codes: 0 done; 64 bad configuration, one line says which key; 65 bad data over the limit; 70 hang detected;
75 stopped on request and saved, start again with resume=auto; 1 anything else (check parity: the loss is not exact)
SAILPLAN_CONF: a folder of your own configuration files, instead of ./conf; what it lacks is taken from sailplan's conf/"""
COMMANDS = {
    "train": "train the stages of an experiment (name=NAME resume=auto continues after a stop)",
    "plan": "print stages, steps, data, learning rates and memory; trains nothing; equals what then runs",
    "check": "check configuration, data and ranks before a long run; sailplan check parity --loss module:function: is this loss exact across ranks",
    "list": "print the configuration groups and the files of each: sailplan list [GROUP ...]",
    "data": "import, index or validate data sets: sailplan data import SOURCE --name NAME, sailplan data index|validate",
    "new": "write an experiment over imported data sets: sailplan new NAME --data SET[,SET]",
    "teachers": "factorise training histories into ID embeddings: files that data.teachers takes, as a recommender's own",
    "mine": "mine hard negatives with a run's newest checkpoint",
    "balance": "compute data weights with a run's newest checkpoint",
    "evaluate": "evaluate a run's newest checkpoint on all tasks, or --model PATH on --data FOLDER in BEIR's form; JSON out",
    "embed": "embed a data set's view: vectors, ids and, if asked, semantic IDs",
    "encode": "encode a file of items with a trained or published model: .npy, .parquet or a faiss index; resumable",
    "export": "write a run's model as a folder: --to sentence-transformers for other programs; sailplan export merge: an average of checkpoints",
    "report": "write report.html of a run folder",
}


LAUNCHED = ("train", "plan", "check")
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class _Parser(argparse.ArgumentParser):
    """Bad usage is bad configuration: one line, exit code 64."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see: {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sailplan",
        description=ABOUT,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sailplan {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == "list":
            command.add_argument(
                "groups", nargs="*", metavar="GROUP", help="groups to print (default: all)"
            )
            continue
        if name == "new":
            add_new_arguments(command)
            continue
        if name == "data":
            command.add_argument("action", choices=["index", "validate"], help="what to do")
            command.add_argument(
                "--processes",
                type=int,
                default=None,
                help="how many processes read the shards (default: one a CPU)",
            )
        if name in LAUNCHED:
            command.add_argument(
                "--cfg",
                choices=["job"],
                default=None,
                help="print the configuration as YAML, and do nothing else",
            )
            command.add_argument(
                "--info",
                choices=INFOS,
                default=None,
                help="print what Hydra composed it from, and do nothing else",
            )
        if name == "teachers":
            command.add_argument(
                "--dataset", required=True, help="sequences with recorded histories"
            )
            command.add_argument(
                "--dimension", type=int, default=64, help="of the vectors, at most (default: 64)"
            )
            command.add_argument("--out", required=True, help="folder to write")
        if name == "train":
            command.add_argument(
                "-m",
                "--multirun",
                action="store_true",
                help="a run for each combination of values (seed=0,1,2), by hydra/launcher",
            )
        if name == "plan":
            command.add_argument(
                "--ranks",
                type=int,
                default=None,
                help="world size to plan for (default: this launch's)",
            )
            command.add_argument(
                "--json",
                action="store_true",
                help="as JSON, with the digest of every step's samples",
            )
        if name == "check":
            command.add_argument(
                "--loss",
                default=None,
                metavar="MODULE:FUNCTION",
                help="check parity: a function of (queries, keys), or an Objective class",
            )
            command.add_argument(
                "--world-size", type=int, default=4, help="check parity: ranks to fork (default: 4)"
            )
            command.add_argument(
                "--timeout",
                type=float,
                default=60.0,
                help="check parity: seconds after which a hang is reported (default: 60)",
            )
        if name in ("mine", "balance", "evaluate", "embed", "export", "report"):
            command.add_argument(
                "--run-folder",
                default=None,
                help="run folder (default: runs/NAME of the overrides)",
            )
        if name == "export":
            command.add_argument(
                "--checkpoint",
                action="append",
                default=None,
                help="checkpoint folder (default: the run's newest); merge: once for each",
            )
            to = "sentence-transformers: a folder that SentenceTransformer, AutoModel and AutoProcessor open; sailplan: one that this program goes on from"
            command.add_argument(
                "--to",
                default="sailplan",
                choices=["sailplan", "sentence-transformers"],
                help=f"{to} (default: sailplan)",
            )
            command.add_argument(
                "--weights",
                default=None,
                metavar="W,W",
                help="merge: one positive number for each checkpoint (default: equal)",
            )
            command.add_argument(
                "--last",
                type=int,
                default=None,
                metavar="K",
                help="merge: the K newest checkpoints of the run",
            )
            command.add_argument(
                "--decay",
                type=float,
                default=1.0,
                help="merge --last: weight of a checkpoint over the next newer one's (default: 1)",
            )
        if name in ("mine", "balance", "evaluate", "embed"):
            command.add_argument(
                "--checkpoint",
                default=None,
                help="checkpoint or exported folder (default: the run's newest complete checkpoint)",
            )
        if name in ("mine", "balance", "embed", "export"):
            command.add_argument(
                "--out", default=None, help="where to write (default: below the run folder)"
            )
        if name in ("mine", "balance"):
            command.add_argument(
                "--stage", required=True, help="stage whose settings and data sets are used"
            )
        if name == "embed":
            command.add_argument("--dataset", required=True, help="data set name")
            command.add_argument("--view", required=True, help="view of the data set")
            command.add_argument(
                "--semantic-ids",
                default=None,
                metavar="SIZES",
                help="also write residual k-means codes, e.g. 64,64,64",
            )
        if name == "evaluate":
            command.add_argument(
                "--model",
                default=None,
                help="with --data: what sailplan encode takes, in place of a run's own tasks",
            )
            command.add_argument(
                "--data",
                default=None,
                metavar="FOLDER",
                help="in BEIR's form: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv",
            )
            command.add_argument(
                "--split", default="test", help="--data: of the judgments (default: test)"
            )
            command.add_argument(
                "--at",
                default="1,10,100",
                metavar="K,K",
                help="--data: cuts of nDCG and recall (default: 1,10,100)",
            )
            command.add_argument(
                "--depth",
                type=int,
                default=1000,
                help="--data: documents a query that count for MRR and MAP (default: 1000)",
            )
            command.add_argument(
                "--same-ids",
                action="store_true",
                help="--data: keep documents with the query's own id, which BEIR leaves out",
            )
            for role in ("query", "document"):
                command.add_argument(
                    f"--{role}-view",
                    default=None,
                    help=f"--data: view or prompt's name (default: one of the model's named {role})",
                )
                command.add_argument(
                    f"--{role}-prompt",
                    default=None,
                    help=f"--data: a prompt as text, instead of --{role}-view",
                )
            command.add_argument(
                "--dimension",
                type=int,
                default=None,
                help="--data: cut vectors to so many dimensions (default: whole)",
            )
            command.add_argument(
                "--batch", type=int, default=32, help="--data: items encoded together (default: 32)"
            )
            command.add_argument(
                "--shard-rows",
                type=int,
                default=8192,
                help="--data: documents in memory at once on each rank (default: 8192)",
            )
        if name == "encode":
            command.add_argument(
                "--model",
                required=True,
                help="run folder, checkpoint, exported folder, or a published model's folder or hub id",
            )
            command.add_argument(
                "--input",
                required=True,
                help=".jsonl, .txt or .parquet of items (id, text, image, audio), or a folder of pictures and sound",
            )
            command.add_argument(
                "--output",
                required=True,
                help="file to write: .npy, .parquet or .faiss; after a stop the same command goes on",
            )
            command.add_argument(
                "--view", default=None, help="view whose prompt is used, such as emoji.name"
            )
            command.add_argument(
                "--prompt", default=None, help="a prompt as text, instead of --view"
            )
            command.add_argument(
                "--dimension",
                type=int,
                default=None,
                help="cut vectors to so many dimensions (default: whole)",
            )
            command.add_argument(
                "--precision",
                default="float32",
                choices=["float32", "float16", "int8", "binary"],
                help="of the numbers (default: float32)",
            )
            command.add_argument(
                "--batch", type=int, default=32, help="items encoded together (default: 32)"
            )
            command.add_argument(
                "--shard-rows",
                type=int,
                default=8192,
                help="items of a shard, in memory at once (default: 8192)",
            )
            command.add_argument(
                "--device", default=None, help="cpu or cuda (default: cuda where there is one)"
            )
        settings = command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="Hydra overrides, e.g. experiment=quickstart seed=1",
        )
        settings.completer = completion.overrides  # type: ignore[attr-defined]
    return parser


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

    parser = _Parser(
        prog="sailplan data import",
        description="Turn data as you have it into shards, conf/data/NAME.yaml and a tokenizer.",
        allow_abbrev=False,
    )
    add_import_arguments(parser)
    return import_command.run(parser.parse_args(arguments))


def run(arguments: list[str]) -> int:
    parser = _parser()
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
    return run_safely(lambda: run(sys.argv[1:] if arguments is None else arguments))


def run_safely(command: Callable[[], int]) -> int:
    """Return a command's exit code; an error is said once in a job, and turned into its code."""
    name_lines()
    try:
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
