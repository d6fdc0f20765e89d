"""The Triton engine on CPU, in the interpreter.

Not collected by name: test_triton.py runs this file in a process of its own, with the plugin
exact_interpreter.

Oracle: the contract of tiling/tile.py written out in float64 with whole matrices.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sailplan_kernels import infonce, sigmoid
from sailplan_kernels.arguments import grouped
from sailplan_kernels.tiling.engines import triton_schedule
from sailplan_kernels.tiling.tile import Coefficients, MaskConfig, TileOperand
from sailplan_kernels.tiling.triton_engine import TritonEngine
from sailplan_kernels.triton_kernels.configurations import INTERPRETER_PROGRAMS

torch.set_num_threads(1)
HALF, FULL = 3e-3, 1e-5
TOLERANCE = {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: FULL}


def problem(
    seed,
    n,
    m,
    prefixes,
    dtype,
    columns,
    sigmoid,
    tags,
    limits,
    correction,
    temperature,
    trained,
    moments=True,
    behind=None,
    one=False,
):
    g = torch.Generator().manual_seed(seed)
    d, p = (
        prefixes[-1] + (seed % 3 if behind is None else behind),
        len(prefixes),
    )  # dimensions behind the last prefix belong to nobody
    x = torch.randn(n, d, generator=g)
    y = torch.randn(m, d, generator=g)
    if trained:
        y[: min(n, m)] = x[: min(n, m)] + 0.5 * y[: min(n, m)]
    x[0] = 0
    y[-1] = y[0]

    def side(vectors, with_correction):
        v = torch.nn.functional.normalize(vectors, dim=1).to(dtype)
        norms = torch.stack([v[:, :e].float().norm(dim=1) for e in prefixes])
        k = len(v)
        ids = torch.randint(-1, 12, (k, 3), generator=g)
        ids[:, 0] = (
            torch.arange(k) + 2**40
        )  # the low 32 bits alone would not tell: the other side has the high ones alone
        ids[1::5, 0] -= 2**40
        return TileOperand(
            vectors=v,
            inverse_norm=torch.where(norms > 0, 1 / norms.clamp_min(1e-30), 0.0),
            tags=ids,
            valid=torch.rand(k, generator=g) < 0.9,
            max_cosine=0.3 + 0.4 * torch.rand(p, k, generator=g) if limits else None,
            inverse_temperature=torch.full((k,), 1 / temperature)
            if one
            else (0.7 + torch.rand(k, generator=g)) / temperature,
            correction=torch.randn(k, generator=g) if with_correction else None,
        )

    return (
        side(x, False),
        side(y, correction),
        MaskConfig(prefixes, tags, columns, moments, one, sigmoid),
    )


def oracle(rows, columns, rule, coefficients=None):
    """All of the contract, in float64."""
    same = torch.zeros(len(rows.valid), len(columns.valid), dtype=torch.bool)
    for t in rule.tags_in_use:
        same |= (rows.tags[:, t, None] == columns.tags[None, :, t]) & (rows.tags[:, t, None] >= 0)
    cached = columns.valid[None] & ~same
    rt, ct = rows.inverse_temperature.double()[:, None], columns.inverse_temperature.double()[None]
    out = {
        name: []
        for name in ("rmax", "rsum", "cmax", "csum", "g", "rmom", "cmom", "rtemp", "ctemp", "rtot")
    }
    for p, end in enumerate(rule.prefixes):
        rn, cn = rows.inverse_norm[p].double()[:, None], columns.inverse_norm[p].double()[None]
        cosine = (rows.vectors[:, :end].double() @ columns.vectors[:, :end].double().T) * rn * cn
        mask = (
            cached
            if rows.max_cosine is None
            else cached & (cosine <= rows.max_cosine[p].double()[:, None])
        )
        shift = 0 if columns.correction is None else columns.correction.double()[None]
        z = (cosine * rt - shift).masked_fill(~mask, -torch.inf)
        zc = None
        if rule.columns:
            mask = cached & rows.valid[:, None]
            mask = (
                mask
                if columns.max_cosine is None
                else mask & (cosine <= columns.max_cosine[p].double()[None])
            )
            zc = (cosine * ct).masked_fill(~mask, -torch.inf)
            out["cmax"].append(zc.amax(0))
            out["csum"].append(
                torch.where(zc.isinf(), 0.0, (zc - zc.amax(0).clamp_min(-1e9)).exp()).sum(0)
            )
        if rule.sigmoid:
            out["rmax"].append(torch.zeros(len(z), dtype=torch.float64))
            out["rsum"].append(
                torch.where(z.isinf(), 0.0, -torch.nn.functional.logsigmoid(-z)).sum(1)
            )
        else:
            out["rmax"].append(z.amax(1))
            out["rsum"].append(
                torch.where(z.isinf(), 0.0, (z - z.amax(1, True).clamp_min(-1e9)).exp()).sum(1)
            )
        if coefficients is None:
            continue
        negative_grad = coefficients.row_negative_grad[p].double()[:, None]
        share = negative_grad * (
            torch.sigmoid(z)
            if rule.sigmoid
            else (z - coefficients.row_log_negatives[p].double()[:, None]).exp()
        )
        r = torch.where(z.isinf(), 0.0, share) * rt
        out["rtot"].append(torch.where(z.isinf(), 0.0, share).sum(1))
        out["rtemp"].append((r * cosine).sum(1))
        if zc is not None:
            c = (
                coefficients.column_negative_grad[p].double()[None]
                * (zc - coefficients.column_log_negatives[p].double()[None]).exp()
                * ct
            )
            c = torch.where(zc.isinf(), 0.0, c)
            out["ctemp"].append((c * cosine).sum(0))
            r = r + c
        out["rmom"].append((r * cosine).sum(1))
        out["cmom"].append((r * cosine).sum(0))
        out["g"].append(r * rn * cn)
    return {name: torch.stack(x) if x else None for name, x in out.items()}


def log_of(maximum, total):
    return torch.where(total > 0, maximum + total.log(), 0.0)


def close(found, expected, tolerance, what):
    assert found.isfinite().all(), what
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.1e}, expected <= {tolerance:.0e}"


def check(rows, columns, rule, tolerance):
    engine = TritonEngine()
    found = engine.tile(rows, columns, rule, cached=False).statistics()
    expected = oracle(rows, columns, rule)
    read = rows.valid if rule.columns else torch.ones_like(rows.valid)
    assert torch.equal(found.row_sum[:, read] == 0, expected["rsum"][:, read] == 0)
    logs = log_of(found.row_maximum, found.row_sum) if not rule.sigmoid else found.row_sum
    right = log_of(expected["rmax"], expected["rsum"]) if not rule.sigmoid else expected["rsum"]
    torch.testing.assert_close(logs[:, read].double(), right[:, read], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        found.row_maximum[-1, read].double(), expected["rmax"][-1, read], rtol=1e-5, atol=1e-4
    )
    g = torch.Generator().manual_seed(1)
    row_negative_grad = torch.rand(found.row_sum.shape, generator=g) * rows.valid
    coefficients = Coefficients(logs, row_negative_grad)
    if rule.columns:
        column_logs = log_of(found.column_maximum, found.column_sum)
        torch.testing.assert_close(
            column_logs.double(), log_of(expected["cmax"], expected["csum"]), rtol=1e-5, atol=1e-4
        )
        column_negative_grad = torch.rand(found.column_sum.shape, generator=g) * columns.valid
        coefficients = Coefficients(logs, row_negative_grad, column_logs, column_negative_grad)
    expected = oracle(rows, columns, rule, coefficients)
    gradient, again = (
        engine.tile(rows, columns, rule, cached).gradient(coefficients) for cached in (False, True)
    )
    kept = engine.tile(rows, columns, rule, cached=True)
    kept.statistics()
    kept = kept.gradient(coefficients)
    for s, weights in enumerate(gradient.weights):
        assert torch.equal(weights, again.weights[s])
        assert (
            torch.equal(weights == 0, kept.weights[s] == 0) or weights.dtype != torch.float32
        )  # half types may round small ones to 0
        close(kept.weights[s], expected["g"][s:].sum(0), tolerance, f"weights[{s}] of a kept tile")
        assert weights.dtype == rows.vectors.dtype
        close(weights, expected["g"][s:].sum(0), tolerance, f"weights[{s}]")
    if not (rule.moments or rule.columns or rule.sigmoid):
        assert (
            not gradient.row_moment.any()
            and gradient.column_moment.shape == columns.inverse_norm.shape
        )
        return
    sums = [("row_moment", "rmom"), ("column_moment", "cmom"), ("row_temperature", "rtemp")]
    sums += [("column_temperature", "ctemp")] * rule.columns + [
        ("row_total", "rtot"),
        ("row_sum", "rsum"),
    ] * rule.sigmoid
    if rule.sigmoid and not rule.moments:
        assert not gradient.column_moment.any()
        sums.remove(("column_moment", "cmom"))
    if rule.columns and rule.one_temperature:  # both in one, wherever an engine puts it
        together = gradient.row_temperature.sum(1) + gradient.column_temperature.sum(1)
        close(
            together, expected["rtemp"].sum(1) + expected["ctemp"].sum(1), 1e-4, "the temperature's"
        )
        sums = [x for x in sums if "temperature" not in x[0]]
    for name, key in sums:
        assert torch.equal(getattr(gradient, name), getattr(again, name))
        close(getattr(gradient, name), expected[key], 1e-4, name)


@settings(max_examples=16, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 100),
    n=st.integers(1, 70),
    m=st.integers(1, 70),
    prefixes=st.sampled_from([(33,), (48,), (16, 40), (8, 32, 64), (5, 20, 37, 70)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    kind=st.sampled_from(["rows", "columns", "symmetric", "sigmoid"]),
    tags=st.sampled_from([(), (0,), (0, 2), (0, 1, 2)]),
    limits=st.booleans(),
    correction=st.booleans(),
    trained=st.booleans(),
    moments=st.booleans(),
)
def test_options_against_the_oracle(
    seed, n, m, prefixes, dtype, kind, tags, limits, correction, trained, moments
):
    both, one = kind in ("columns", "symmetric"), kind == "symmetric"
    case = problem(
        seed,
        n,
        m,
        prefixes,
        dtype,
        both,
        kind == "sigmoid",
        tags,
        limits,
        correction and not one,
        0.1,
        trained,
        moments,
        one=one,
    )
    check(*case, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_kept_tiles_are_rescaled(dtype):
    case = problem(
        3, 70, 65, (48,), dtype, False, False, (0, 1), True, True, 0.05, True, moments=False
    )
    check(*case, TOLERANCE[dtype])
    kept = TritonEngine().tile(*case, cached=True)
    kept.statistics()
    assert kept.kept is not None and kept.kept[0].dtype == dtype


@pytest.mark.parametrize(
    "kind, schedule, temperature",
    [("rows", "auto", 0.1), ("symmetric", "auto", 0.1), ("symmetric", "tiles", 0.01)],
)
def test_tiles_are_clean_but_for_those_with_a_match(kind, schedule, temperature):
    """Ids that no two share, but for one pair in a tile off the diagonal and one of which only
    the lower half agrees: nothing else is masked.
    """
    rows, columns, rule = problem(
        8,
        96,
        96,
        (32, 64),
        torch.bfloat16,
        kind != "rows",
        False,
        (0, 1, 2),
        False,
        False,
        temperature,
        True,
        one=True,
        behind=0,
    )
    rows.tags[:], columns.tags[:] = (
        torch.arange(288).view(96, 3) * 2**33,
        torch.arange(288).view(96, 3) * 2**33 + 2**20,
    )
    columns.tags[70, 1] = rows.tags[5, 1]
    columns.tags[40, 2] = rows.tags[80, 2] + 2**34
    rows.valid[5] = columns.valid[70] = True
    tile = TritonEngine(schedule).tile(rows, columns, rule, False)
    assert tile.tiles == (3, 3)
    found = tile.gradient(
        Coefficients(
            *(torch.full((2, 96), -20.0), torch.ones(2, 96)) * (1 if kind == "rows" else 2)
        )
    )
    for weights in found.weights:
        masked = (
            (weights == 0)
            & rows.valid[:, None]
            & columns.valid[None]
            & (rows.inverse_norm[0] > 0)[:, None]
        )
        assert masked.nonzero().tolist() == [[5, 70]]
    check(rows, columns, rule, HALF)


@pytest.mark.parametrize("one", [True, False])
def test_what_is_no_candidate_may_score_anything(one):
    """Invalid rows and columns at cosine 1 with others whose candidates are all at -1: 576 units
    of log2 above the logsumexp at t = 0.005.
    """
    rows, columns, rule = problem(
        2,
        40,
        40,
        (32,),
        torch.bfloat16,
        True,
        False,
        (),
        False,
        False,
        0.005,
        True,
        behind=0,
        one=one,
    )
    rows.vectors[:], columns.vectors[:] = -rows.vectors[1], rows.vectors[1].clone()
    rows.vectors[3], columns.vectors[5] = -rows.vectors[1], -columns.vectors[1]
    rows.inverse_norm[:], columns.inverse_norm[:] = (
        rows.inverse_norm[:, 1:2].clone(),
        rows.inverse_norm[:, 1:2].clone(),
    )
    rows.valid[:], columns.valid[:] = torch.arange(40) != 3, torch.arange(40) != 5
    check(rows, columns, rule, HALF)


def test_ranks_with_different_numbers_as_temperature_get_none():
    rows, columns, rule = problem(
        1,
        40,
        40,
        (32,),
        torch.bfloat16,
        True,
        False,
        (0,),
        False,
        False,
        0.1,
        True,
        behind=0,
        one=True,
    )
    columns.inverse_temperature[3] *= 1.5
    assert TritonEngine().tile(rows, columns, rule, False).statistics().row_sum.isnan().any()


KINDS = {
    "rows": (False, False, False),
    "moments": (False, False, True),
    "columns": (True, False, True),
    "symmetric": (True, False, True),
    "sigmoid": (False, True, False),
}


def outputs(case, schedule, cached):
    """Everything a tile says, and by which schedule it went."""
    tile = TritonEngine(schedule).tile(*case, cached)
    found = tile.statistics()
    g = torch.Generator().manual_seed(1)
    pushes = [torch.rand(x.inverse_norm.shape, generator=g) * x.valid for x in case[:2]]
    logs = (
        [torch.zeros_like(found.row_sum), None]
        if case[2].sigmoid
        else [log_of(found.row_maximum, found.row_sum), None]
    )
    if case[2].columns:
        logs[1] = log_of(found.column_maximum, found.column_sum)
    gradient = tile.gradient(Coefficients(logs[0], pushes[0], logs[1], pushes[1]))
    return tile, [
        x
        for x in (*vars(found).values(), *gradient.weights, *list(vars(gradient).values())[1:])
        if x is not None
    ]


@pytest.mark.parametrize("masks, dtype", [("ids", torch.bfloat16), ("limits", torch.float16)])
@pytest.mark.parametrize("kind", KINDS)
def test_persistent_programs_go_from_tile_to_tile(kind, masks, dtype):
    """Three programs and six tiles, ragged both ways, dimensions in use that are no whole BK and
    others behind them.
    """
    columns, pairwise, moments = KINDS[kind]
    if (kind, masks) in (("symmetric", "limits"), ("sigmoid", "limits")):
        pytest.skip("no such tile")
    one = kind == "symmetric"
    case = problem(
        7,
        70,
        60,
        (48,),
        dtype,
        columns,
        pairwise,
        (0, 2),
        masks == "limits",
        not one,
        0.1,
        True,
        moments,
        behind=32,
        one=one,
    )
    for cached in (False, True) if kind == "rows" else (False,):
        (tile, found), (plain, right) = (
            outputs(case, schedule, cached) for schedule in ("auto", "tiles")
        )
        assert tile.masks == masks and (tile.config.schedule, plain.config.schedule) == (
            "persistent",
            "tiles",
        )
        assert tile.tiles[0] * tile.tiles[1] == 6 and INTERPRETER_PROGRAMS == 3
        assert tile.kind == kind.replace("rows", "plain") and all(
            torch.equal(a, b) for a, b in zip(found, right, strict=True)
        )
    check(*case, TOLERANCE[dtype])  # and calls each gradient twice, for equal bits


@pytest.mark.parametrize("masks, dtype", [("ids", torch.float16), ("limits", torch.bfloat16)])
@pytest.mark.parametrize("kind", ["moments", "columns", "symmetric", "sigmoid"])
def test_persistent_programs_with_prefixes(kind, masks, dtype):
    """All prefixes but the longest in whole BKs, which are 32 here."""
    if (kind, masks) in (("symmetric", "limits"), ("sigmoid", "limits")):
        pytest.skip("no such tile")
    both, one = kind in ("columns", "symmetric"), kind == "symmetric"
    case = problem(
        7,
        70,
        60,
        (32, 96, 112),
        dtype,
        both,
        kind == "sigmoid",
        (0, 2),
        masks == "limits",
        not one,
        0.1,
        True,
        behind=16,
        one=one,
    )
    (tile, found), (plain, right) = (
        outputs(case, schedule, False) for schedule in ("auto", "tiles")
    )
    assert tile.masks == masks and (tile.config.schedule, plain.config.schedule) == (
        "persistent",
        "tiles",
    )
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    check(*case, TOLERANCE[dtype])


@pytest.mark.parametrize("n, m", [(1, 1), (33, 32), (31, 97), (200, 1)])
def test_persistent_tiles_at_the_edges(n, m):
    case = problem(
        6, n, m, (64,), torch.bfloat16, False, False, (0,), False, False, 0.05, True, moments=False
    )
    assert outputs(case, "auto", True)[0].config.schedule == "persistent"
    check(*case, HALF)


def misaligned(side):
    """The same rows, starting 8 bytes behind a multiple of 16."""
    vectors = (
        torch.empty(side.vectors.numel() + 4, dtype=side.vectors.dtype)[4:]
        .view_as(side.vectors)
        .copy_(side.vectors)
    )
    return replace(side, vectors=vectors)


@pytest.mark.parametrize("why", ["float32", "prefixes", "length", "rows", "columns"])
def test_what_descriptors_do_not_reach_goes_one_program_a_tile(why):
    prefixes = {"prefixes": (16, 48), "length": (44,)}.get(why, (48,))
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    rows, columns, rule = problem(
        3, 40, 50, prefixes, dtype, False, False, (0,), False, False, 0.1, True, moments=False
    )
    rows, columns = (
        misaligned(rows) if why == "rows" else rows,
        misaligned(columns) if why == "columns" else columns,
    )
    assert TritonEngine().tile(rows, columns, rule, False).config.schedule == "tiles"
    check(rows, columns, rule, TOLERANCE[dtype])


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule: found 'fast', expected one of auto, tiles"):
        TritonEngine("fast")


def test_slices_of_larger_sides():
    """As the driver cuts them: rows of norms and limits are then not contiguous, and vectors
    start anywhere.
    """
    rows, columns, rule = problem(
        4, 60, 50, (16, 48), torch.float32, True, False, (0, 1), True, False, 0.1, True
    )
    cut = slice(7, 40)
    part = TileOperand(
        rows.vectors[cut],
        rows.inverse_norm[:, cut],
        rows.tags[cut],
        rows.valid[cut],
        rows.max_cosine[:, cut],
        rows.inverse_temperature[cut],
    )
    check(part, columns, rule, FULL)


def test_many_prefixes_are_rounded_twice_at_most():
    prefixes = tuple(range(16, 16 * 13, 16))
    rows, columns, rule = problem(
        0, 40, 40, prefixes, torch.bfloat16, False, False, (0,), False, False, 0.2, False
    )
    coefficients = Coefficients(
        torch.full((12, 40), 10.0), torch.ones(12, 40)
    )  # above every logit, as a logsumexp is
    found = TritonEngine().tile(rows, columns, rule, False).gradient(coefficients)
    right = oracle(rows, columns, rule, coefficients)["g"]
    for s, weights in enumerate(found.weights):
        expected = right[s:].sum(0)
        assert (
            (weights.double() - expected).abs() <= 2 * 2**-8 * 1.02 * expected
        ).all()  # 2**-8: half a step of bfloat16


@pytest.mark.parametrize(
    "temperature", [0.005, 0.0151, 0.0153, 1.0]
)  # 0.0152: where one exponential begins to serve both losses
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_low_and_high_temperatures(temperature, trained, one):
    # Logits of up to 340 at 0.005: float32 cosines, right to about 1e-7, leave 3e-5 in an
    # exponential there.
    check(
        *problem(
            5,
            65,
            97,
            (64,),
            torch.float32,
            True,
            False,
            (0,),
            False,
            False,
            temperature,
            trained,
            one=one,
        ),
        FULL * max(1, 0.04 / temperature),
    )
    check(
        *problem(
            5,
            65,
            97,
            (64,),
            torch.bfloat16,
            True,
            False,
            (0,),
            False,
            False,
            temperature,
            trained,
            one=one,
        ),
        HALF,
    )


@pytest.mark.parametrize("kind", ["rows", "columns", "symmetric", "sigmoid"])
def test_nothing_left_is_zero(kind):
    both, one = kind in ("columns", "symmetric"), kind == "symmetric"
    rows, columns, rule = problem(
        0,
        40,
        40,
        (16, 32),
        torch.bfloat16,
        both,
        kind == "sigmoid",
        (0,),
        False,
        False,
        0.05,
        True,
        one=one,
    )
    columns.valid[:] = False
    found = TritonEngine().tile(rows, columns, rule, False).statistics()
    assert not found.row_sum.any() and (rule.sigmoid or found.row_maximum.isneginf().all())
    zeros, ones = torch.zeros(2, 40), torch.ones(2, 40)
    gradient = (
        TritonEngine()
        .tile(rows, columns, rule, False)
        .gradient(Coefficients(zeros, ones, zeros, ones))
    )
    assert (
        not any(w.any() for w in gradient.weights)
        and not gradient.row_moment.any()
        and not gradient.column_moment.any()
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True, "prefixes": (16, 48)}],
    ids=["plain", "symmetric with prefixes"],
)
def test_the_loss_through_the_engine(options):
    """The driver over this engine against the same driver over torch."""
    g = torch.Generator().manual_seed(2)
    start = torch.randn(2, 70, 48, generator=g)
    found = []
    for backend in ("chunked", "triton"):
        queries, keys = start.clone().requires_grad_().unbind(0)
        queries.retain_grad(), keys.retain_grad()
        out = infonce(queries, keys, 0.05, **grouped(options | {"backend": backend}))
        assert out.backend == backend
        out.loss.backward()
        found.append((out.loss.detach(), queries.grad, keys.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_by_both_schedules():
    """Half precision through the driver, in tiles of a small budget; the statement around the
    call is what benchmarks use.
    """
    start = torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    for options in ({}, {"symmetric": True, "memory_budget": 20_000}, {"prefixes": (32, 64)}):
        found = []
        for schedule in ("auto", "tiles"):
            queries, keys = (x.clone().requires_grad_() for x in start)
            with triton_schedule(schedule):
                out = infonce(queries, keys, 0.05, **grouped(options | {"backend": "triton"}))
            out.loss.backward()
            found.append((out.loss.detach(), queries.grad, keys.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"prefixes": (16, 48), "memory_budget": 20_000}],
    ids=["plain", "prefixes in tiles"],
)
def test_the_sigmoid_loss_through_the_engine(options):
    """Against the definition, in one tile and in many; also without a gradient, which is another
    kernel.
    """
    g = torch.Generator().manual_seed(2)
    start = torch.randn(2, 70, 48, generator=g)
    found = []
    for backend in ("reference", "triton"):
        leaves = [
            x.clone().requires_grad_() for x in (*start, torch.tensor(0.1), torch.tensor(-2.0))
        ]
        out = sigmoid(*leaves, **grouped(options | {"backend": backend}))
        assert out.backend == backend
        out.loss.backward()
        with torch.no_grad():
            value = sigmoid(*leaves, **grouped(options | {"backend": backend})).loss
        found.append(
            (
                out.loss.detach(),
                value,
                out.prefix_losses,
                out.positive_score,
                *(x.grad for x in leaves),
            )
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_float64_is_refused():
    rows, columns, rule = problem(
        0, 4, 4, (8,), torch.float64, False, False, (), False, False, 0.1, False
    )
    with pytest.raises(
        ValueError, match="backend triton: found float64, expected bfloat16, float16 or float32"
    ):
        TritonEngine().tile(rows, columns, rule, False)
