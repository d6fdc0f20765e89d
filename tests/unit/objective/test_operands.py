"""The losses' door: once rounded, shared by all readers, gradients summed in float32; every loss
that calls kernels goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import sailplan_kernels
from sailplan.objective import patterns, sigmoid
from sailplan.objective.protocol import EncodedStep, EncodedView, Objective, ObjectiveContext
from sailplan.objective.registry import build_objectives
from sailplan.objective.temperature import Temperatures
from sailplan.parity.testing import HARD_NEGATIVES, WEIGHTS, global_batches, step_config
from sailplan_kernels.exchange import Local
from sailplan_kernels.infonce import infonce_sum

NO_KERNELS = ("cosent", "id2item", "score_distillation", "late_interaction")


def context(dtype: torch.dtype = torch.bfloat16) -> ObjectiveContext:
    return ObjectiveContext({}, Local(), None, (8,), compute_dtype=dtype)


def given(*shape: int, length: float = 1.0) -> Tensor:
    return (
        length * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ).requires_grad_()


@pytest.mark.parametrize("length", [1e-9, 1e-3, 1.0, 1e25])
def test_vectors_are_normalised_in_float32_and_rounded_once(length: float) -> None:
    vectors = given(6, 32, length=length)
    found = context().operands(vectors)
    assert found.dtype is torch.bfloat16 and torch.equal(
        found, normalize(vectors.detach().double(), dim=1).float().bfloat16()
    )
    weights = given(6, 32).detach().bfloat16()
    (found * weights).sum().backward()
    exact = vectors.detach().double().requires_grad_()
    (normalize(exact, dim=1) * weights.double()).sum().backward()
    assert vectors.grad is not None and vectors.grad.dtype is torch.float32
    torch.testing.assert_close(
        vectors.grad.double() * length, exact.grad * length, rtol=0, atol=1e-6
    )


def test_readers_share_the_numbers_and_their_gradients_add_up_in_float32() -> None:
    vectors, door = given(4, 16), context()
    readers = [door.operands(vectors) for _ in range(300)]
    assert len({reader.data_ptr() for reader in readers}) == 1 and len(door.rounded) == 1
    assert door.operands(readers[0]) is readers[0]
    # 300 equal numbers with more than 8 bits in their sum: a sum in bfloat16 would stop growing
    # early.
    sum(reader[:, 0].float().sum() for reader in readers).backward()  # type: ignore[union-attr]
    one = given(4, 16)
    context().operands(one)[:, 0].float().sum().backward()
    torch.testing.assert_close(vectors.grad, 300 * one.grad, rtol=1e-5, atol=1e-6)


def test_padding_may_hold_anything_and_wider_dtypes_pass() -> None:
    vectors = given(5, 8)
    with torch.no_grad():
        vectors[0], vectors[1], vectors[2, 3], vectors[3] = 0, torch.nan, torch.inf, 1e-20
    found = context().operands(vectors)
    assert torch.equal(found[0], torch.zeros(8).bfloat16()) and torch.equal(found[3], found[0])
    assert not found[1].isfinite().any() and not found[2].isfinite().all()
    (found[4].float().sum() + found[0].float().sum() + found[3].float().sum()).backward()
    assert vectors.grad is not None and not vectors.grad[:4].any() and vectors.grad[4].any()
    for dtype in (torch.float32, torch.float64):
        assert context(dtype).operands(vectors) is vectors


def _losses(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, only: str
) -> tuple[Tensor, dict[int, Tensor], list[dict[str, Tensor]]]:
    """Loss of an objective on encodings of every kind, gradient of each view, and what the
    kernels were given.
    """
    calls: list[dict[str, Tensor]] = []

    def spy(given: Sequence[dict[str, Any]], *rest: Any, **options: Any) -> Any:
        for call in given:
            hard = (
                {}
                if call["negatives"] is None or call["negatives"].hard is None
                else {"hard": call["negatives"].hard}
            )
            calls.append({"queries": call["queries"], "keys": call["keys"]} | hard)
        return infonce_sum(given, *rest, **options)

    def spy_sigmoid(given: Sequence[dict[str, Any]], *rest: Any, **options: Any) -> Any:
        calls.extend({"queries": call["queries"], "keys": call["keys"]} for call in given)
        return sailplan_kernels.sigmoid_sum(given, *rest, **options)

    monkeypatch.setattr(patterns, "infonce_sum", spy)
    monkeypatch.setattr(sigmoid, "sigmoid_sum", spy_sigmoid)
    config = step_config()
    del config.objectives["infonce"][
        "margin_absolute"
    ]  # a limit may fall between a score and the rounded one
    objective = build_objectives(config.objectives, config.model.embedding, config.data.sets)[only]
    assert isinstance(objective, Objective)
    place = ObjectiveContext(
        config.data.sets,
        Local(),
        Temperatures(config.data.sets),
        tuple(config.model.prefixes),
        compute_dtype=dtype,
    )
    total, leaves = torch.zeros(()), {}
    generator = torch.Generator().manual_seed(2)
    for batch in global_batches(config, 1):
        views = {}
        for name, view in batch.views.items():
            mine = {
                kind: torch.randn(
                    len(view.ids), config.model.embedding, generator=generator
                ).requires_grad_()
                for kind in ("fused", "vision", "text")
            }
            if only == "late_interaction":
                shape = (len(view.ids), 4, config.model.embedding)
                mine["tokens"] = torch.randn(shape, generator=generator).requires_grad_()
            leaves |= {f"{batch.dataset}/{name}/{kind}": leaf for kind, leaf in mine.items()}
            tokens = mine.pop("tokens", None)
            views[name] = EncodedView(
                valid=view.valid,
                ids=view.ids,
                group=view.group,
                fused=mine.pop("fused"),
                by_modality=mine,
                tokens=tokens,
                token_mask=None if tokens is None else tokens[..., 0] < 1,
            )
        if objective.applies(config.data.sets[batch.dataset]):
            total = (
                total
                + objective(
                    EncodedStep(
                        batch.dataset,
                        views,
                        batch.patterns,
                        batch.scores,
                        batch.teachers,
                        batch.teacher_scores,
                        batch.labels,
                    ),
                    place,
                ).loss
            )
    total.backward()
    return (
        total.detach(),
        {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None},
        calls,
    )  # type: ignore[misc]


@pytest.mark.parametrize("name", [*sorted(WEIGHTS), "late_interaction"])
def test_every_loss_gives_its_kernels_rounded_vectors_and_its_views_float32_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    exact, expected, _ = _losses(monkeypatch, torch.float32, name)
    loss, gradients, calls = _losses(monkeypatch, torch.bfloat16, name)
    assert loss.dtype is torch.float32 and gradients.keys() == expected.keys()
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    for view, gradient in gradients.items():
        assert gradient.dtype is torch.float32
        if not expected[view].any():  # nothing there for this loss
            assert not gradient.any(), view
            continue
        assert cosine_similarity(gradient.flatten(), expected[view].flatten(), dim=0) > 0.999, view
    assert bool(calls) == (name not in NO_KERNELS)
    for call in calls:
        assert {tensor.dtype for tensor in call.values()} == {torch.bfloat16}
    if name == "infonce":
        hard = [call["hard"] for call in calls if "hard" in call]
        assert [each.shape[1] for each in hard] == 2 * [HARD_NEGATIVES]
        # The names' view is a side of three patterns: one memory.
        assert len(
            {call["keys"].data_ptr() for call in calls}
            | {call["queries"].data_ptr() for call in calls}
        ) < 2 * len(calls)
