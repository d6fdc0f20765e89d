"""Embedding a view on all ranks, where users look for it. The curriculum embeds too and lies below the evaluation, so
the code is in `sailplan.curriculum.embedding`."""

from sailplan.curriculum.embedding import EmbeddedRows, embed_view, evaluating, exchange_of

__all__ = ["EmbeddedRows", "embed_view", "evaluating", "exchange_of"]
