"""Risks: a language, a field or a data set called `no` or `on` that becomes a truth value, and
is lost or is called False.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sailplan.config.compose import as_dict, compose, from_dict, to_yaml
from sailplan.config.words import plain_words
from sailplan.errors import ConfigurationError


def project(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "odd.yaml").write_text(
        f"# @package data.sets.no\nshards: somewhere\n{body}", encoding="utf-8"
    )
    monkeypatch.chdir(folder)


def test_words_of_yaml_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "language_weights: {en: 0.5, no: 0.25, on: 0.1}\nsymmetric: off\nviews:\n  yes: {fields: [title, no, off, 010, 12:30, 2024-05-01, 2024]}\n"
    project(
        tmp_path, monkeypatch, body + "patterns:\n  on: {query: yes, target: yes, weight: 1_000}\n"
    )
    config = compose(["data=[reading,odd]"])
    found = config.data.sets["no"]
    assert found.language_weights == {"en": 0.5, "no": 0.25, "on": 0.1} and found.symmetric is False
    assert (
        found.views["yes"].fields == ["title", "no", "off", "010", "12:30", "2024-05-01", "2024"]
        and found.patterns["on"].weight == 1000
    )
    assert (
        "'no': 0.25" in to_yaml(config)
        and from_dict(OmegaConf.to_container(OmegaConf.create(as_dict(config)))) == config
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["true", "False", "null", "~"])
def test_words_that_are_no_names_are_told_to_be_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    project(tmp_path, monkeypatch, f"views:\n  name: {{fields: [title, {word}]}}\n")
    with pytest.raises(ConfigurationError) as caught:
        compose(["data=[reading,odd]"])
    assert "\n" not in str(caught.value) and "data.sets.no.views.name.fields" in str(caught.value)


def test_other_readers_of_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: no\nb: 12:30\n")
    with plain_words():
        assert OmegaConf.load(tmp_path / "x.yaml") == {"a": "no", "b": "12:30"}
    assert OmegaConf.load(tmp_path / "x.yaml") == {"a": False, "b": 750}
