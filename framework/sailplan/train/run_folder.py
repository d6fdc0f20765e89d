"""The run folder: where every file of a run lies, and how its small JSON files are written
(whole or not at all).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from sailplan.config.compose import config_hash, from_dict, identity, identity_difference, to_yaml
from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config
from sailplan.errors import ConfigurationError
from sailplan.observe.report_facts import VERSIONS
from sailplan.runtime.files import write_whole


@dataclass(frozen=True)
class RunFolder:
    """Paths below runs/<name>/."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine.jsonl"

    @property
    def skipped(self) -> Path:
        """Steps whose loss or gradient was not finite, with their records."""
        return self.root / "skipped_steps.jsonl"

    def evaluation(self, step: int) -> Path:
        return self.root / "evaluation" / f"step-{step:08d}.json"

    def curriculum(self, stage: str) -> Path:
        return self.root / "curriculum" / stage

    @property
    def vectors(self) -> Path:
        """Of evaluations and commands, while they work."""
        return self.root / "vectors"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    def write_config(self, config: Config) -> None:
        """Write config.yaml, and a copy of the tokenizer: what is exported later needs none of
        the training data.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        source = Path(config.data.tokenizer)
        if source.is_file() and source.resolve() != self.tokenizer.resolve():
            shutil.copyfile(source, self.tokenizer)
        write_whole(self.config, f"# hash: {config_hash(config)}\n{to_yaml(config)}")

    def write_versions(self, versions: JsonObject) -> None:
        """Write versions.json: what this start of the run is installed with."""
        write_whole(self.root / VERSIONS, json.dumps(versions, indent=1))

    def load_config(self) -> Config:
        """Return the resolved configuration of this run, with the run's copy of a tokenizer that
        is gone; ConfigurationError if there is none.
        """
        if not self.config.is_file():
            raise ConfigurationError(
                f"{self.config}: not found; give the folder of a run that was started by `sailplan "
                "train`"
            )
        config = from_dict(yaml.safe_load(self.config.read_text()))
        if not Path(config.data.tokenizer).is_file() and self.tokenizer.is_file():
            config.data.tokenizer = str(self.tokenizer)
        return config


def check_identity(saved: JsonObject, config: Config, where: Path) -> None:
    """Raise ConfigurationError with the differing keys if a checkpoint was made by another
    training job.
    """
    lines = identity_difference(saved, identity(config))
    if lines:
        shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
        raise ConfigurationError(
            f"{where} was made with another configuration ({shown}): restore these keys, or choose "
            "another name="
        )
