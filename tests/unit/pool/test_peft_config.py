"""What a PEFT configuration says about modules: PEFT's own answers, whatever a stranger wrote."""

from __future__ import annotations

import contextlib
import itertools
import time

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from langchain_lora_retriever.errors import AdapterError, InvalidAdapterError
from langchain_lora_retriever.pool.peft_config import AdapterConfig

MODULES = [
    *(f"model.layers.{i}.{module}" for i in (0, 1, 11) for module in ("self_attn.q_proj", "mlp.experts.1.up_proj")),
    "lm_head",
    "q_proj",
    "transformer.h.1.attn.c_attn",
    "model.visual.blocks.1.attn.q_proj",
    "model.layers.1.xq_proj",
]
KEYS = ["q_proj", r"self_attn\.q_proj", "layers.1.*", "model.layers.11.self.attn.q_proj", "proj"]
SLOW = r"(([a-z._0-9]+)+)+\$" + r"(?=.*" * 60 + ")" * 60


def make(**config):
    """A configuration with the usual fields and these."""
    return AdapterConfig({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config, "here")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["self_attn.q_proj", "lm_head"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*\.(q_proj|up_proj)"},
        {"target_modules": r"^(model)(?!.*(lm_head|visual)).*"},
        {"target_modules": "q_proj"},
        {"exclude_modules": ["visual.blocks.1.attn.q_proj", "lm_head"]},
        {"exclude_modules": r".*visual.*"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1},
        {"layers_to_transform": []},
        {"layers_to_transform": [0, 11], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "blocks"], "target_modules": ["c_attn", "q_proj"]},
        {"target_modules": ["q_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [11]},
    ],
)
def test_targets_are_pefts(config):
    """Lists, expressions, exclusions and layers name the modules that PEFT's own function names."""
    ours, theirs = make(**config), LoraConfig(**{"target_modules": ["q_proj"]} | config)
    for module in MODULES:
        assert ours.is_target(module, "here") == bool(check_target_module_exists(theirs, module)), module


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "keys",
    itertools.permutations(
        ["q_proj", r"self_attn\.q_proj", "layers.1.*", "model.layers.11.self.attn.q_proj", "proj"], 3
    ),
)
def test_the_first_pattern_counts_as_in_peft(field, keys):
    """Of several keys that match a module the first one counts, whatever their order."""
    config = make(target_modules="all-linear", **{field: {key: i + 1 for i, key in enumerate(keys)}})
    for module in MODULES:
        value = {key: i + 1 for i, key in enumerate(keys)}.get(get_pattern_key(keys, module))
        r, scaling = config.rank_and_scaling(module, "here")
        if field == "rank_pattern":
            assert r == (value or 4)
        else:
            assert scaling == (value or 8) / 4


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}},
        {"rank_pattern": {f"{SLOW[:40]}{i}": 4 for i in range(100_000)}},
        {"alpha_pattern": {f"name{i}": 4 for i in range(100_000)}},
        {"layers_to_transform": [1], "layers_pattern": "(a+)+"},
    ],
)
def test_slow_patterns_are_refused_or_matched_in_time(config):
    """Patterns that would be matched for ever, and a hundred thousand of them, end soon."""
    start = time.perf_counter()
    with contextlib.suppress(InvalidAdapterError):
        made = make(**config)
        for i in range(200):
            made.rank_and_scaling(f"model.layers.{i}.self_attn.q_proj", "here")
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": 5},
        {"target_modules": "((("},
        {"target_modules": [["q_proj"]]},
        {"target_modules": {"q_proj": 1}},
        {"exclude_modules": 5},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"q_proj": None}},
        {"rank_pattern": {"q_proj": True}},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"layers_to_transform": "x"},
        {"layers_to_transform": [1.5]},
        {"layers_to_transform": [0], "layers_pattern": "("},
        {"layers_to_transform": [0], "layers_pattern": 5},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("inf")},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"r": 10**400},
        {"r": 0},
        {"r": 4.0},
        {"r": None},
        {"use_rslora": "yes"},
        {"base_model_name_or_path": 5},
        {"base_model_name_or_path": "x" * 5000},
        {"peft_type": ["LORA"]},
        {"bias": [[]]},
    ],
)
def test_impossible_values_are_refused(config):
    """A value that PEFT would not write is refused with the adapter's name, in a short text."""
    with pytest.raises(AdapterError, match="here") as caught:
        make(**config).rank_and_scaling("model.layers.0.self_attn.q_proj", "here")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("default", [None, False, 0, "", [], {}, 0.0])
def test_unknown_fields_at_their_defaults_pass(default):
    """A field of a later PEFT says nothing while it is empty."""
    assert make(from_a_later_peft=default).rank_and_scaling("q_proj", "here") == (4, 2.0)


@pytest.mark.parametrize("off", [False, None])
def test_fields_of_a_method_that_is_off_pass(off):
    """As a later PEFT writes them, with the numbers they have by default; on, or without a switch, they are refused."""
    fields = {"later_size": 16, "later_kind": "fast", "later_parts": {"a": 1}, "later": off}
    assert make(use_later=off, **fields).rank_and_scaling("q_proj", "here") == (4, 2.0)
    assert make(use_late_one=off, late_one_size=16).rank_and_scaling("q_proj", "here") == (4, 2.0)
    for config in ({"use_later": True, "later_size": 16}, {"later_size": 16}, {"use_late": off, "later_size": 16}):
        with pytest.raises(AdapterError, match="later"):
            make(**config)
    with pytest.raises(AdapterError, match="QALoRA"):
        make(use_qalora=True)


def test_the_recipe_keeps_the_order_that_counts():
    """Configurations of one recipe differ in the order of target_modules alone."""
    assert make(target_modules=["a", "b"]).recipe == make(target_modules=["b", "a"]).recipe
    one = make(alpha_pattern={"a": 1, "b": 2}).recipe
    assert one != make(alpha_pattern={"b": 2, "a": 1}).recipe
