"""The option matrix notices what it is there to notice."""

from __future__ import annotations

import pytest

from sailplan_kernels import AllGather, infonce, options


def test_a_refused_call_is_its_message():
    text = options.cell("infonce", "triton", {"dtype": options.torch.float64})
    assert text.startswith("options.backend: found 'triton', but ") and "expected" in text
    assert options.cell("sigmoid", "chunked", {"symmetric": True}) == "-"


def test_a_wrong_result_is_seen(monkeypatch):
    def wrong(queries, keys, temperature, *, options, **more):
        return infonce(
            queries,
            keys,
            temperature * (2 if options.backend == "chunked" else 1),
            options=options,
            **more,
        )

    def alone(queries, keys, temperature, *, options, exchange):
        return infonce(queries, keys, temperature, options=options)

    wrong.__signature__ = options.inspect.signature(infonce)
    monkeypatch.setitem(options.LOSSES, "infonce", wrong)
    assert options.cell("infonce", "reference", {"symmetric": True}) == "ok"
    assert options.cell("infonce", "chunked", {"symmetric": True}).startswith("WRONG")
    monkeypatch.setitem(options.LOSSES, "infonce", alone)
    assert options.exchange_cell("infonce", "chunked", AllGather).startswith("WRONG")


def test_a_new_argument_without_a_row_is_an_error(monkeypatch):
    def more(queries, keys, temperature, *, sharpness=1.0, exchange=None, options=None): ...

    monkeypatch.setitem(options.LOSSES, "infonce", more)
    with pytest.raises(RuntimeError, match=r"found the arguments \['sharpness'\] in no row"):
        options.matrix()
