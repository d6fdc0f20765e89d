"""The command line: commands, their flags and what `--help` says of them."""

from __future__ import annotations

import argparse
from typing import NoReturn

from sailplan import __version__
from sailplan.cli import completion
from sailplan.cli.import_command import add_new_arguments
from sailplan.cli.model_arguments import add_encode_arguments, add_evaluate_arguments
from sailplan.errors import ConfigurationError

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
    "check": "check configuration, hosts, network and data before a long run; sailplan check parity --loss module:function: is this loss exact across ranks",
    "list": "print the configuration groups and the files of each: sailplan list [GROUP ...]",
    "data": "import, index or validate data sets: sailplan data import SOURCE --name NAME, sailplan data index|validate",
    "new": "write an experiment over imported data sets: sailplan new NAME --data SET[,SET]",
    "teachers": "factorise training histories into ID embeddings: files that data.teachers takes, as a recommender's own",
    "mine": "mine hard negatives with a run's newest checkpoint",
    "balance": "compute data weights with a run's newest checkpoint",
    "evaluate": "evaluate a run's newest checkpoint on all tasks, or --model PATH on --data FOLDER in BEIR's form; JSON out",
    "embed": "embed a data set's view: vectors, ids and, if asked, semantic IDs",
    "semantic-ids": "turn the vectors of embed into short tuples of codes: parquet, code books, collision rate; resumable",
    "encode": "encode a file of items with a trained or published model: .npy, .parquet or a faiss index; resumable",
    "export": "write a run's model as a folder: --to sentence-transformers for other programs; sailplan export merge: an average of checkpoints",
    "report": "write report.html of a run folder",
}


LAUNCHED = ("train", "plan", "check")
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class Parser(argparse.ArgumentParser):
    """Bad usage is bad configuration: one line, exit code 64."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see: {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `sailplan`."""
    parser = Parser(
        prog="sailplan",
        description=ABOUT,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sailplan {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
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
        if name == "report":
            command.add_argument(
                "--compare", nargs="+", default=None, help="run folders to show beside each other"
            )
            command.add_argument(
                "--out", default="comparison.html", help="with --compare: the page"
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
                action="append",
                default=[],
                metavar="SIZES",
                help="also write residual k-means codes, e.g. 64,64,64; may be given several times",
            )
            command.add_argument(
                "--label",
                default=None,
                metavar="KEY",
                help="also write the records' values of this key, which semantic IDs are compared with",
            )
            command.add_argument(
                "--part",
                default=None,
                metavar="K/N",
                help="embed part K (from 0) of N alone, beside the jobs of the other parts; the last one to end writes embeddings.json",
            )
            command.add_argument(
                "--shard-rows",
                type=int,
                default=65536,
                help="rows a file, which is the least that a part embeds (default: 65536)",
            )
        if name == "semantic-ids":
            command.add_argument("--vectors", required=True, help="folder that embed wrote")
            command.add_argument(
                "--sizes",
                action="append",
                default=[],
                metavar="SIZES",
                help="code books to fit, e.g. 64,64,64; may be given several times",
            )
            command.add_argument(
                "--code-books",
                action="append",
                default=[],
                metavar="FOLDER",
                help="code books of an earlier call, for new items; may be given several times",
            )
            command.add_argument(
                "--out", default=None, help="where to write (default: VECTORS/semantic_ids)"
            )
            command.add_argument("--seed", type=int, default=0, help="of the fit (default: 0)")
        if name == "evaluate":
            add_evaluate_arguments(command)
        if name == "encode":
            add_encode_arguments(command)
        settings = command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="Hydra overrides, e.g. experiment=quickstart seed=1",
        )
        settings.completer = completion.overrides  # type: ignore[attr-defined]
    return parser
