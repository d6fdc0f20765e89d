"""Flags of the commands that take a model of any kind: `sailplan evaluate --model` and `encode`."""

from __future__ import annotations

import argparse


def add_evaluate_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of an evaluation of `--model` on a folder in BEIR's form."""
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
    command.add_argument("--split", default="test", help="--data: of the judgments (default: test)")
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


def add_encode_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of `sailplan encode`."""
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
    command.add_argument("--prompt", default=None, help="a prompt as text, instead of --view")
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
