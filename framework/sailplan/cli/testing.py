"""Run the command in a forked process, for tests that ask it many things; and a small project to
run it in.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml

from sailplan.cli.main import main
from sailplan.config.compose import as_dict
from sailplan.curriculum.testing import write_pack


def command(folder: Path, *arguments: str, timeout: float = 120) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of `sailplan ARGUMENTS` in `folder`: a user's, without
    the seconds of its imports. timeout: seconds.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def forked() -> None:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = main(list(arguments))
        sender.send((code, out.getvalue(), err.getvalue()))

    child = context.Process(
        target=forked
    )  # no daemon: `data import` and `data validate` have processes of their own
    child.start()
    sender.close()
    try:
        assert receiver.poll(timeout), f"{arguments} did not end within {timeout} s"
        found: tuple[int, str, str] = receiver.recv()
        return found
    finally:
        child.kill()
        child.join()


SMALL_STAGE = {
    "steps": 2,
    "data": {"things": 1.0},
    "patterns": {"things": ["image_to_name"]},
    "objectives": {"infonce": 1.0},
}


def write_project(root: Path) -> None:
    """Write a project with the made-up pack into a folder: `experiment=small`, two steps of one
    stage, and `texts`, the same of texts.
    """
    config = write_pack(root)
    config.data.root, config.data.tokenizer, config.data.mel_bins = (
        ".",
        "tokenizer.json",
        config.model.audio.mel_bins,
    )
    values = as_dict(config)
    for dataset in values["data"]["sets"].values():
        dataset["shards"] = dataset["shards"].replace(f"{root}/", "")
    chosen = {
        "data": values["data"],
        "model": values["model"],
        "order": ["only"],
        "stages": {"only": SMALL_STAGE},
    }
    chosen |= {
        "name": "small",
        "global_batch": 8,
        "step": {"micro_batch": 4},
        "parallel": {"threads": 1},
        "checkpoint": {"every_steps": 1},
    }
    texts = {"only": SMALL_STAGE | {"patterns": {"things": ["keyword_to_name"]}}}
    views = {
        "keyword": {"modalities": ["text"], "fields": ["tags"]},
        "name": {"modalities": ["text"], "fields": ["title"]},
    }
    things = {
        "shards": "things",
        "views": views,
        "patterns": {"keyword_to_name": {"query": "keyword", "target": "name"}},
    }
    reading = {key: value for key, value in values["data"].items() if key != "sets"}
    _write_experiment(root, "small", chosen)
    of_texts = {key: value for key, value in chosen.items() if key != "model"} | {
        "name": "texts", "data": reading | {"sets": {"things": things}}, "stages": texts,
    }  # fmt: skip
    _write_experiment(root, "texts", of_texts)


def _write_experiment(root: Path, name: str, values: dict[str, object]) -> None:
    defaults = [{"override /data": ["reading"]}, {"override /logger": ["console"]}, "_self_"]
    path = root / "conf" / "experiment" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "# @package _global_\n" + yaml.safe_dump({"defaults": defaults} | values, sort_keys=False),
        encoding="utf-8",
    )


if __name__ == "__main__":
    write_project(Path(sys.argv[1]))
