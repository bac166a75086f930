"""The settings of one call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.errors import InvalidRequestError

NONE = SimpleNamespace()


def test_a_call_overrides_the_settings() -> None:
    """Arguments of the call win; where None is no value, an argument of None leaves the setting."""
    settings = SimpleNamespace(top_k=5, temperature=0.7, seed=None, stop=("x",))
    options = CallOptions.merge(settings, {"top_k": 1, "temperature": None, "stop": None})
    assert (options.top_k, options.temperature, options.seed, options.stop) == (1, 0.7, None, ("x",))


def test_none_resets_what_may_be_none() -> None:
    """`adapters=None` unpins, `timeout=None` sets no limit, whatever the chat model's settings are."""
    settings = SimpleNamespace(adapters=["sql"], min_score=0.3, timeout=5.0, seed=1, logprobs=2, repetition_penalty=1.2)
    names = vars(settings).keys()
    options = CallOptions.merge(settings, dict.fromkeys(names))
    assert {name: getattr(options, name) for name in names} == dict.fromkeys(names)
    assert CallOptions.merge(settings, {}).adapters == ["sql"]


def test_an_empty_list_of_adapters_is_not_none() -> None:
    """`adapters=[]` asks for the base model; it must not be taken for "not given"."""
    assert CallOptions.merge(NONE, {"adapters": []}).adapters == []


def test_unknown_arguments_are_refused_with_a_near_name() -> None:
    """A misspelt argument is an error, never silently dropped."""
    with pytest.raises(InvalidRequestError, match=r"Unknown argument 'adaptors'\. Did you mean 'adapters'"):
        CallOptions.merge(NONE, {"adaptors": ["sql"]})


def test_langchains_own_arguments_are_let_through() -> None:
    """LangChain passes `stream` along; it changes nothing here."""
    assert CallOptions.merge(NONE, {"stream": True}) == CallOptions()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 0),
        ("top_k", True),
        ("n", -1),
        ("adapters", "sql"),
        ("exclude_adapters", [1]),
        ("composition", "soup"),
        ("weights", "softmax"),
        ("weight_temperature", 0),
        ("weight_temperature", float("nan")),
        ("min_score", 1.5),
        ("min_score", float("nan")),
        ("min_score", "low"),
        ("timeout", -1),
        ("stop", "text"),
        ("stop", [""]),
        ("stop", [f"s{i}" for i in range(257)]),
        ("stop", ["a" * 10_000, "b" * 10_000]),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [2**70]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", range(2000)),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", "1.2"),
        ("repetition_penalty", True),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 10**400),
        ("route_text", 3),
        ("chat_template_kwargs", "enable_thinking"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    """The error names the argument and the value met."""
    with pytest.raises(InvalidRequestError, match=f"{name}="):
        CallOptions.merge(NONE, {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("max_tokens", 0), ("sampling_top_k", -1)],
)
def test_sampling_values_out_of_range_are_refused(name: str, value: Any) -> None:
    """Negative and NaN sampling values never reach the sampler."""
    with pytest.raises(InvalidRequestError, match=name.removeprefix("sampling_")):
        CallOptions.merge(NONE, {name: value}).sampling()


def test_answers_of_one_call_differ_in_their_seeds() -> None:
    """With n > 1 and a seed, every answer is repeatable and no two are drawn alike."""
    options = CallOptions(n=2, seed=7)
    assert [options.sampling(i).seed for i in range(2)] == [7, 8]


@pytest.mark.parametrize(
    ("call", "expected"), [({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3), ({"logprobs": 2}, 2),
                           ({"logprobs": False}, None), ({}, None)]
)  # fmt: skip
def test_logprobs_may_be_a_switch_or_a_number(call: dict[str, Any], expected: int | None) -> None:
    """Both OpenAI's pair of arguments and a plain number are understood."""
    assert CallOptions(**call).sampling().logprobs == expected


def test_model_and_adapters_exclude_each_other() -> None:
    """Two ways of naming the adapters at once are refused."""
    with pytest.raises(InvalidRequestError, match="Both adapters and model"):
        CallOptions(model="sql", adapters=["sql"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 129), ("n", 10**30), ("n", True), ("adapters", ["x" * 256]), ("exclude_adapters", ["a"] * 20_000),
        ("exclude_adapters", [""]), ("stop", {"a"}), ("composition", ["mixture"]), ("min_score", float("nan")),
        ("weight_temperature", float("inf")), ("timeout", float("nan")), ("timeout", 10**400), ("top_logprobs", 3),
        ("stream_usage", "no"), ("route_text", "\ud800"), ("stop", ["\ud800"]), ("model", "x" * 256),
        ("chat_template_kwargs", {"a": "\ud800"}),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_values_at_their_extremes_are_refused_in_words(name: str, value: Any) -> None:
    """Never by an error of Python's own."""
    with pytest.raises(InvalidRequestError, match=name):
        CallOptions(**{name: value})


def test_a_setting_of_the_model_is_no_argument_of_a_call() -> None:
    """The hint says how to change it instead."""
    with pytest.raises(InvalidRequestError, match=r"'pool' is a setting of the chat model.*model_copy"):
        CallOptions.merge(SimpleNamespace(pool=None), {"pool": "folder"})
