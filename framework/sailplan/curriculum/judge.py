"""The model that balancing embeds its samples with: the run's as it is, or another one's weights
(`balance.initialise_from`).

Similarities of vectors from a model that has learned nothing say nothing. A run whose first stage is
balanced names a checkpoint of an earlier run of the same model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sailplan.checkpoint.loading import load_model_only
from sailplan.checkpoint.source import initial_source
from sailplan.config.schema import BalanceConfig
from sailplan.embed.embedder import Embedder
from sailplan.errors import ConfigurationError
from sailplan.model.build import build_encoder
from sailplan.model.lora import is_lora
from sailplan.runtime.turns import everywhere

KEY = "balance.initialise_from"


def judge_of(embedder: Embedder, settings: BalanceConfig, folder: Path) -> Embedder:
    """Return the embedder of the balancing's model, whose vectors lie below `folder`: `embedder`
    itself where the settings name no other. Collective.

    Raises ConfigurationError on all ranks for weights that are not there, or not this model's.
    """
    given = settings.initialise_from
    if given is None:
        return embedder
    run = embedder.context
    source = everywhere(run.parallel, f"looking for {given}", lambda: initial_source(given, KEY))
    encoder = build_encoder(run.config.model, run.config.parallel, run.parallel, run.config.seed)
    try:
        load_model_only(
            source,
            model=encoder,
            parallel=run.parallel,
            prefix="encoder.",
            exact=True,
            may_lack=is_lora,
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"{KEY}={given}: {error}; name weights of this model") from error
    return Embedder(replace(run, encoder=encoder, store=folder))
