"""YAML's own words, read as a person means them: `no`, `on` and a time of day are text, as in
YAML 1.2.

YAML 1.1, which OmegaConf reads, makes a truth value of `no` (Norwegian), 8 of `010` and 750 of
`12:30`. A setting that is typed as a truth value still takes `yes`, `no`, `on` and `off`: OmegaConf
turns their text into one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml
from omegaconf import _utils

BOOL, INT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:int"
PLAIN = {
    BOOL: re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    INT: re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
}


@contextmanager
def plain_words() -> Iterator[None]:
    """Let OmegaConf read files by YAML 1.2's words while the block runs."""
    before: Callable[[], type[yaml.SafeLoader]] = _utils.get_yaml_loader

    def loader() -> type[yaml.SafeLoader]:
        made = before()
        made.yaml_implicit_resolvers = {
            first: [(tag, PLAIN.get(tag, pattern)) for tag, pattern in resolvers]
            for first, resolvers in made.yaml_implicit_resolvers.items()
        }
        return made

    _utils.get_yaml_loader = loader
    try:
        yield
    finally:
        _utils.get_yaml_loader = before
