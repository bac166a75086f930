"""Which adapters an engine can run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from langchain_lora_retriever.engine.adapter_fit import AdapterFit
from langchain_lora_retriever.errors import AdapterError, InvalidRequestError, UnsupportedAdapterError
from langchain_lora_retriever.types import Adapter, LoraWeights

SHAPES = {"layers.0.q": (4, 6), "layers.1.q": (4, 6)}


def make_adapter(name: str, r: int = 2, **modules: tuple[int, int]) -> Adapter:
    """An adapter of rank `r` for modules of `(in_features, out_features)`; both layers' `q` by default."""
    shapes = {key.replace("_", "."): shape for key, shape in modules.items()} or SHAPES
    weights = {key: LoraWeights(torch.zeros(r, a), torch.zeros(b, r), 1.0) for key, (a, b) in shapes.items()}
    return Adapter(name, f"fp-{name}", weights, base_model="org/other", is_target=lambda key: key.endswith(".q"))


def make_fit(num_rows: int = 12, max_loras: int = 3) -> AdapterFit:
    """A model of two layers and kernels up to rank 16."""
    return AdapterFit("org/base", SHAPES, max_rank=16, num_rows=num_rows, max_loras=max_loras)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            make_adapter("a", layers_0_q=(4, 6), layers_0_v=(4, 6)),
            r"'a' .*adapts 'layers.0.v', which is no linear module of the base model 'org/base'.*names 'org/other'",
        ),
        (
            make_adapter("a", layers_0_q=(4, 5)),
            r"'layers.0.q': it has .* = \(4, 5\), the base model 'org/base' \(4, 6\)",
        ),
        (make_adapter("a", 17), r"rank 17; the kernels go up to 16"),
        (make_adapter("a", 13), r"takes 13 rank rows; .* holds 12: raise EngineConfig.lora_cache_bytes"),
    ],
    ids=["module", "shape", "kernels", "memory"],
)
def test_an_adapter_that_can_never_run_is_refused(adapter: Adapter, message: str) -> None:
    """By name, with what was met and what is allowed; the first thing wrong gives the reason."""
    with pytest.raises(AdapterError, match=message):
        make_fit().check(adapter)


def test_an_engine_may_run_plain_adapters_alone() -> None:
    """Others are refused there by their kind."""
    weights = {"q": LoraWeights(torch.ones(2, 4), torch.ones(6, 2), 1.0)}
    dora = {"q": replace(weights["q"], magnitude=torch.ones(6))}
    sizes = {"max_rank": 16, "num_rows": 12, "max_loras": 3}
    anything = AdapterFit("base", {"q": (4, 6)}, **sizes)
    plain = AdapterFit("base", {"q": (4, 6)}, **sizes, plain_alone="that engine")
    plain.check(Adapter("plain", "f0", weights))
    for adapter, kind in (
        (Adapter("dora", "f1", dora), "a DoRA"),
        (Adapter("activated", "f2", weights, invocation_tokens=(5,)), "an activated LoRA"),
    ):
        anything.check(adapter)
        with pytest.raises(UnsupportedAdapterError, match=f"'{adapter.name}' .* is {kind}, which that engine does not"):
            plain.check(adapter)


def test_knows_what_an_adapter_lacks() -> None:
    """Modules that its configuration targets and its file has not; a whole one, or one made here, lacks none."""
    fit = make_fit()
    half = make_adapter("a", layers_0_q=(4, 6))
    fit.check(half)
    assert fit.missing(half) == ("layers.1.q",)
    assert fit.missing(make_adapter("b")) == ()
    assert fit.missing(Adapter("c", "fp-c", half.weights)) == ()


def test_an_adapter_that_fits_is_looked_at_once() -> None:
    """The second time its contents are not read."""
    fit, adapter = make_fit(), make_adapter("a")
    fit.check(adapter)
    fit.check(
        Adapter("renamed", adapter.fingerprint, {"unknown": LoraWeights(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)})
    )


def test_a_composition_that_never_fits_is_refused() -> None:
    """More ranks than rows, or more adapters than slots: an error that names both and the settings to raise."""
    fit = make_fit()
    a, b, *others = (make_adapter(name, r) for name, r in (("a", 8), ("b", 6), ("c", 1), ("d", 1), ("e", 1)))
    with pytest.raises(InvalidRequestError, match=r"'a', 'b' need 2 slots and 14 rank rows.*has 3 and 12.*lora_cache"):
        fit.check_together([a, b])
    with pytest.raises(InvalidRequestError, match=r"need 4 slots and 11 rank rows.*has 3 and 12.*max_loras"):
        fit.check_together([a, *others])
    fit.check_together([a, a])
