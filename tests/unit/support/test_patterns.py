"""Regular expressions of strangers: the meaning of `re`, in bounded time."""

from __future__ import annotations

import contextlib
import random
import re
import time

import pytest

from langchain_lora_retriever.support.patterns import Pattern, PatternError, StepBudget

MODULES = [
    f"model.{tower}layers.{i}.{module}"
    for tower in ("", "visual.")
    for i in (0, 1, 11)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.experts.3.up_proj", "input_layernorm")
] + ["lm_head", "transformer.h.10.attn.c_attn", "Model.Layers.1", "q_proj"]

# What training programs write.
REAL_PATTERNS = [
    r".*\.self_attn\.(q|v)_proj",
    r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*",
    r"^(?!.*visual).*(?:q_proj|v_proj).*",
    r"(?<!visual\.)layers\.\d+\.mlp.*|.*(?<=self_attn\.)[qkv]_proj",
    r"model\.layers\.(?:[0-9]|1[0-1])\.self_attn\.[qkv]_proj$",
    r".*?layers\.(?P<layer>\d{1,2})\.(?:mlp|self_attn)\.(?:q_proj|down_proj)",
    r"(?i)MODEL\.LAYERS\.\d",
    r"\bmodel\b.*\blayers\b[^k]*",
    r"(?s:.)+_proj\Z",
    r"(?:.*\.)?[a-z]{1,5}_proj|lm_head",
    r"q_proj",
    r"",
]


def is_full(pattern, text, num_steps=500_000):
    """Match a whole text."""
    return Pattern(pattern).fullmatch(text, StepBudget(num_steps))


@pytest.mark.parametrize("pattern", REAL_PATTERNS)
def test_real_patterns_match_as_in_re(pattern):
    """On every module both kinds of match give what `re` gives."""
    compiled, ours = re.compile(pattern), Pattern(pattern)
    for module in MODULES:
        assert ours.fullmatch(module, StepBudget(10_000)) == bool(compiled.fullmatch(module)), module
        assert ours.match(module, StepBudget(10_000)) == bool(compiled.match(module)), module


def random_pattern(rng, depth):
    """A random expression over a few letters, without repeats of what may be empty, which `re` itself gets wrong."""
    kind = rng.random() if depth else 0.0
    if kind < 0.3:
        return rng.choice(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", r"[a-c.]", "A", r"\W", r"[^\w.]", r"\S"])
    if kind < 0.5:
        return random_pattern(rng, depth - 1) + random_pattern(rng, depth - 1)
    if kind < 0.6:
        return f"(?:{random_pattern(rng, depth - 1)}|{random_pattern(rng, depth - 1)})"
    if kind < 0.7:
        return rng.choice(["(", "(?i:", "(?s:", "(?a:"]) + random_pattern(rng, depth - 1) + ")"
    if kind < 0.8:
        return rng.choice([r"\b", r"\B", "^", "", r"\A"]) + random_pattern(rng, depth - 1)
    if kind < 0.9:
        return f"(?:{random_pattern(rng, depth - 1)}){rng.choice(['*', '+', '?', '*?', '+?', '{2}', '{1,3}', '{,2}?'])}"
    return rng.choice(["(?=", "(?!"]) + random_pattern(rng, depth - 1) + ")" + random_pattern(rng, depth - 1)


def test_random_patterns_match_as_in_re():
    """Three thousand expressions of every construct agree with `re` on short texts."""
    rng = random.Random(7)
    num_matches = num_compared = 0
    for _ in range(3000):
        pattern = random_pattern(rng, 3)
        compiled, ours = re.compile(pattern), Pattern(pattern)
        for _ in range(4):
            text = "".join(rng.choices("aabb.cA1_ é", k=rng.randint(1, 6)))
            met = (ours.fullmatch(text, StepBudget(10_000)), ours.match(text, StepBudget(10_000)))
            assert met == (bool(compiled.fullmatch(text)), bool(compiled.match(text))), (pattern, text)
            num_compared += 1
            num_matches += any(met)
    assert num_compared == 12_000
    assert num_matches > 3000


SLOW_PATTERNS = [
    r"(([a-z._0-9]+)+)+\$",
    r"(.*)*(.*)*(.*)*x$",
    r"(?:[a-z]|[a-z.]|.)*\$",
    r"(x+x+)+y",
    r"(?!((.*)*)*Q).*Z",
    "(.*)" * 50 + "Q",
    r"(?:(?:(?:.?){30}){30}){30}Q",
    r"(?:a?|.){500}Q",
    r"(?:){4000000000}x",
    r"(?:\b){99999999}Q",
    r"(?:.{999999999}|.){99999999}Q",
    "(?=.*" * 50 + ")" * 50 + "Q",
    "(" * 50_000,
    "(?:" * 6000 + "a" + ")" * 6000,
    "(" * 80 + "a" + ")+" * 80 + "Q",
    "(?i)" + r"[\x00-\U0010ffff]" * 900,
    "|" * 19_999,
    "(?<!" * 40 + "a" + ")" * 40,
    "[" + "a-z" * 6000 + "]*Q",
]


@pytest.mark.parametrize("pattern", SLOW_PATTERNS, ids=range(len(SLOW_PATTERNS)))
def test_no_pattern_takes_long(pattern):
    """What makes `re` backtrack for ever, or other engines fill memory, is told apart or refused at once."""
    start = time.perf_counter()
    with contextlib.suppress(PatternError):
        assert not is_full(pattern, "model.layers.12.self_attn.q_proj" * 6)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("(", "no regular expression"),
        ("*", "no regular expression"),
        (r"(a)\1", "groupref"),
        (r"(?>a+)b", "atomic_group"),
        (r"a++b", "possessive_repeat"),
        (r"(a)?(?(1)b|c)", "groupref_exists"),
        (r"(?<=a+)a", "no fixed length"),
        ("a" * 20_001, "20001 characters"),
        ("a{99999999999}", "no regular expression"),
    ],
)
def test_what_is_not_matched_is_said(pattern, named):
    """An expression that is none, or uses what is not matched here, is refused in words."""
    with pytest.raises(PatternError, match=named):
        is_full(pattern, "aa")


def test_matches_share_a_budget():
    """Many matches together are as bounded as one."""
    pattern, budget = Pattern(r".*\.q_proj"), StepBudget(100)
    assert pattern.fullmatch("model.layers.0.q_proj", budget)
    with pytest.raises(PatternError, match="too long"):
        [pattern.fullmatch("model.layers.0.q_proj", budget) for _ in range(20)]
    budget.allow(1000)
    assert pattern.fullmatch("model.layers.0.q_proj", budget)
