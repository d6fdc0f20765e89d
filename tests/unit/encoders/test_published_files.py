"""Risk: an export of a model with pictures and sound whose two processors share one file, of which
the last one written is left.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers.config import TransformersConfig
from sailplan.model.encoders.transformers.files import (
    open_feature_extractor,
    open_image_processor,
    save_files,
)

PICTURES = {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 12, "width": 12}}
SOUND = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 96}


def published(folder: Path) -> TransformersConfig:
    """A folder as such models are published: each processor's entries apart."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    transformers.BertConfig(vocab_size=1).save_pretrained(folder)
    both = {"image_processor": PICTURES, "feature_extractor": SOUND}
    (folder / "processor_config.json").write_text(json.dumps(both))
    return TransformersConfig(source=str(folder), modalities=["text", "vision", "audio"])


def test_pictures_and_sound_are_made_as_before(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    before = published(tmp_path / "in")
    save_files(before, tmp_path / "out")
    after = TransformersConfig(source=str(tmp_path / "out"))
    for opened in (open_image_processor, open_feature_extractor):
        first, second = opened(before), opened(after)
        assert type(first) is type(second)
        ours = PICTURES | SOUND
        for name in ours.keys() - {"image_processor_type", "feature_extractor_type"}:
            if hasattr(first, name):
                assert getattr(first, name) == getattr(second, name) == ours[name]
    assert open_image_processor(after).crop_size == {"height": 12, "width": 12}
    assert open_feature_extractor(after).feature_size == 96


def test_what_cannot_share_a_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = published(tmp_path)
    extractor = open_feature_extractor(settings)
    extractor.do_normalize = "otherwise"
    monkeypatch.setattr(
        transformers.AutoFeatureExtractor, "from_pretrained", lambda *_, **__: extractor
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigurationError, match="want do_normalize True and otherwise") as caught:
        save_files(settings, tmp_path / "out")
    assert "\n" not in str(caught.value)
