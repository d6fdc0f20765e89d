"""The document of parity is what the command makes: all its lines are planned, within the
limits, and a subset is made again here.

The whole matrix takes minutes (`python -m sailplan.parity.matrix`). Here: one rank by the command,
and on several ranks the corners that test_gradient_cache.py leaves out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sailplan.parity.layouts import trajectory
from sailplan.parity.matrix import (
    COLUMNS,
    LIMITS,
    STEPS,
    Group,
    References,
    groups,
    lines,
    main,
    written,
)
from sailplan.parity.testing import OMNI
from sailplan_kernels.exchange import EXCHANGES

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"
FEW_STEPS = 5  # of the larger worlds; the command does all
PLACE = (
    len(COLUMNS) - 3
)  # the columns that say what was compared; then come encoder calls, error and parameter


def table(text: str) -> list[list[str]]:
    """The cells of the lines after the table's head."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


@pytest.fixture(scope="module")
def references() -> References:
    return References()


def test_the_document_holds_the_whole_matrix_within_the_limits() -> None:
    documented = table(DOCUMENT.read_text())
    planned = [
        written((*group.place, *case, "", 0.0, "")) for group in groups() for case in group.cases
    ]
    assert [line[:PLACE] for line in documented] == [line[:PLACE] for line in planned]
    limits = {str(dtype)[6:]: limit for dtype, limit in LIMITS.items()}
    assert all(float(line[-2]) <= limits[line[1]] for line in documented)


def test_the_matrix_is_the_product_that_it_says() -> None:
    everything = [
        group
        for group in groups()
        if group.loss is None and not group.steps and group.dtype == torch.float64
    ]
    mixed = [group for group in everything if group.encoder == OMNI]
    published = {
        (group.encoder, group.data_parallel, tuple(case[0] for case in group.cases))
        for group in everything
        if group.encoder != OMNI
    }
    assert published == {
        (encoder, size, (1, 3, 8)) for encoder in ("bert", "clip") for size in (1, 2, 4)
    }
    assert {(group.world, group.tensor_parallel) for group in mixed} == {
        (1, 1),
        (2, 1),
        (2, 2),
        (4, 1),
        (4, 2),
    }
    assert all({case[0] for case in group.cases} == {1, 3, 8} for group in mixed)
    several = {
        (group.world, group.tensor_parallel, group.sharding, group.exchange)
        for group in mixed
        if group.data_parallel > 1
    }
    product = {
        (*layout, sharding, exchange)
        for layout in ((2, 1), (4, 1), (4, 2))
        for sharding in ("shard", "replicate")
        for exchange in EXCHANGES
    }
    assert several == product | {(4, 1, "hybrid", exchange) for exchange in EXCHANGES}


def test_the_command_makes_the_documents_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--world", "1", "--markdown", str(tmp_path / "parity.md")]) == 0
    made = table((tmp_path / "parity.md").read_text())
    documented = [
        line for line in table(DOCUMENT.read_text()) if line[COLUMNS.index("world")] == "1"
    ]
    assert len(made) == 15
    assert [line[: PLACE + 1] for line in made] == [
        line[: PLACE + 1] for line in documented
    ]  # encoder calls too
    assert capsys.readouterr().out.count("float") == len(made)


def test_an_error_above_the_limit_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sailplan.parity.matrix as matrix

    monkeypatch.setattr(matrix, "groups", lambda worlds: [Group(1, 1, ((1, 0),), loss="cosent")])
    monkeypatch.setattr(matrix, "LIMITS", {torch.float64: 0.0})
    assert main([]) == 1 and "ABOVE THE LIMIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    "group",
    [
        Group(4, 1, ((3, 0),), "hybrid", "ring"),
        Group(4, 2, ((1, 0),), "replicate", "ring"),
        Group(4, 1, ((1, 0),), "shard", "grid"),
        Group(2, 1, ((3, 0),), dtype=torch.float32),
        Group(4, 2, ((1, 0),), dtype=torch.float32),
        *(Group(4, 2, ((2, 0),), loss=loss) for loss in ("infonce", "cosent", "seq2item")),
        Group(2, 1, ((1, 0),), steps=STEPS),
        Group(4, 1, ((1, 0),), "hybrid", "ring", steps=FEW_STEPS),
        Group(4, 2, ((1, 0),), steps=FEW_STEPS),
    ],
    ids=lambda group: "-".join(map(str, group.place)),
)
def test_corners(group: Group, references: References) -> None:
    for line in lines(group, references):
        assert line[-2] <= LIMITS[group.dtype], line


def test_the_trajectory_moves_the_parameters() -> None:
    """Else twenty equal steps would prove nothing."""
    (few, before), (more, after) = trajectory(1, 1, steps=1), trajectory(1, 1, steps=3)
    assert few[0] == more[0] and len(set(more)) == 3
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {"objectives.late_interaction.projection.weight"}, "it has rows of its own"
