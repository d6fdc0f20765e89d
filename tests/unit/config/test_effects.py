"""Risk: a setting that was changed and that nothing reads in this composition, found out after the
run.
"""

from __future__ import annotations

import pytest

from sailplan.cli.train_commands import _check
from sailplan.config.compose import compose, from_dict
from sailplan.config.rules import check
from sailplan.errors import ConfigurationError

QUICK = ["experiment=quickstart"]
FROZEN = [f"+stages.{name}.trainable=[tower]" for name in ("diverse", "nearest", "hard")]
FROZEN += [f"+stages.{name}.trainable=[tower]" for name in ("seq2item", "id2item")]
ALONE = " ".join(f"~stages.seq2item.data.{name}" for name in ("emoji", "icon_choices", "prompts"))
REFUSED = {
    "parallel.replicas=4": "has no effect with parallel.sharding=auto",
    "data.prefetch=4": "has no effect with data.workers=0",
    "data.image_patch=16": "expected null with model.vision.backbone=own",
    "initialise_parts=[encoder,objectives]": "has no effect with initialise_from=None",
    "model.vision.merge=4": "has no effect with model.vision.backbone=own; leave it out, or set backbone to qwen3_vl",
    "model.audio.swin.hidden=48": "model.audio.swin=",
    "model.pooling_heads=4": "has no effect with model.pooling=tanh_mean",
    "model.lora.alpha=8": "has no effect with model.lora.rank=0",
    "model.lora.rank=8 " + " ".join(FROZEN): "model.lora.rank=8: no stage trains lora",
    "data.sets.emoji.history_length=5": "has no effect with data.sets.emoji.kind=items",
    "data.sets.emoji.positive_score=0.5": "has no effect with data.sets.emoji.kind=items",
    "data.sets.prompts.views.speech={modalities:[text],fields:[asr],prompt:sound}": "no view shows a picture or sound",
    "data.sets.prompts.views.speech.pick=one": "in a view that shows no text",
    "data.sets.prompts.views.transcript.frames=spread": "in a view that shows no vision",
    "+stages.seq2item.mixed_rows=64": "has no effect with",
    f"{ALONE} stages.seq2item.mixed_fraction=0.5": "has no effect on the one data set",
    "+stages.id2item.subset={sets:[emoji]}": "keeps every record: expected nearest or drop_noisy",
    "stages.hard.patterns={emoji:[keyword_to_image]}": "image_to_name is not trained",
    "evaluation.tasks.emoji_subgroups.target=name": "has no effect with evaluation.tasks.emoji_subgroups.kind=clustering",
    "evaluation.tasks.emoji_subgroups.metrics=[nmi,auc]": "kind clustering computes no auc",
    "evaluation.tasks.icon_choice.clusters=8": "has no effect without nmi",
    "evaluation.tasks.icon_choice.label=group": "has no effect with evaluation.tasks.icon_choice.kind=retrieval",
    "evaluation.tasks.emoji_pair_order.metrics=[gap] evaluation.tasks.emoji_pair_order.recall_at=[3]": "has no effect without recall",
    "objectives.id2item.similarity_temperature=0.5": "has no effect with form=cosine",
    "objectives.seq2item.layers=2": "expected pooling=encoder",
    "stages.hard.objectives={infonce:0,micl:1}": "takes no mined negatives",
    "+data.sets.emoji.label=group": "data.sets.emoji.label=group: has no effect, as no stage draws 'emoji' with an objective that reads it",
    "data.sets.icon_choices.negatives=1 +data.sets.icon_choices.teacher_scores=scores": "data.sets.icon_choices.teacher_scores=scores: has no effect",
    "+data.sets.emoji.label=group +objective=multi_positive stages.hard.objectives={infonce:1,multi_positive:0}": "data.sets.emoji.label=group: has no effect",
    "objectives.infonce.shared_hard_negatives=true order=[nearest]": "has no effect, as no stage mines",
}


@pytest.mark.parametrize("lines", sorted(REFUSED))
def test_a_setting_that_nothing_reads_is_refused_in_one_line(lines: str) -> None:
    config = compose([*QUICK, *lines.split()])
    with pytest.raises(ConfigurationError) as found:
        check(config, 1)
        _check(config)
    assert "\n" not in str(found.value) and REFUSED[lines] in str(found.value)


def test_a_label_is_accepted_once_a_stage_learns_from_it() -> None:
    lines = ["+data.sets.emoji.label=group", "+objective=multi_positive"]
    _check(compose([*QUICK, *lines, "+stages.hard.objectives.multi_positive=1"]))


def test_a_saved_run_may_hold_one_as_an_older_version_took_it() -> None:
    saved = {"parallel": {"replicas": 4}, "model": {"pooling_heads": 4}}
    assert from_dict(saved).parallel.replicas == 4
