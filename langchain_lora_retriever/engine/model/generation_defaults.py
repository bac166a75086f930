"""What a model's `generation_config.json` asks of every answer, as `generate(do_sample=False)` would honour it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from langchain_lora_retriever.errors import EngineError
from langchain_lora_retriever.support.checks import is_allowed
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.types import RepetitionPenalty

if TYPE_CHECKING:
    from langchain_lora_retriever.engine.model.load import BaseModel

__all__ = ["GenerationDefaults"]

_logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

# What `generate` reads and no greedy token depends on: calls say how long an answer may be, the engine keeps the cache,
# outputs and speculation are its own affair, and log-softmax changes no order.
_WITHOUT_EFFECT = frozenset(
    {
        *("max_length", "max_new_tokens", "bos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp", "compile_config"),
        *("disable_compile", "continuous_batching_config", "renormalize_logits", "transformers_version"),
        *("early_stopping", "length_penalty"),  # of beam search, which `num_beams` asks for
        *_SAMPLING,
    }
)
_NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "guidance_scale": 1,
            "encoder_repetition_penalty": 1}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The rules that hold for every answer of a model.

    Attributes:
        eos_token_ids: Tokens that end an answer: the generation config's and the tokenizer's.
        repetition_penalty: Divides positive logits of tokens that prompt or answer have, multiplies negative ones.
        no_repeat_ngram_size: Prompt and answer have no sequence of so many tokens twice; 0 allows it.
        min_length: Prompt and answer together end at this length at the earliest.
        min_new_tokens: The answer ends at this length at the earliest.
        suppress_tokens: Tokens that never come.
        begin_suppress_tokens: Tokens that do not come first.
        bad_words_ids: Sequences of tokens that never come.
        forced_eos_token_ids: What the last token is one of, if an answer reaches its token limit.
    """

    eos_token_ids: frozenset[int] = frozenset()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_eos_token_ids: tuple[int, ...] = ()

    @cached_property
    def has_rules(self) -> bool:
        """Whether any of them changes what is chosen, beside the tokens that end an answer."""
        return replace(self, eos_token_ids=frozenset()) != GenerationDefaults()

    @classmethod
    def of(cls, base: BaseModel) -> GenerationDefaults:
        """Read a model's, and warn once of what it asks for that is not supported.

        Raises:
            EngineError: If a value is not allowed.
        """
        config = base.model.generation_config or GenerationConfig()
        _warn(base.name, config)
        eos_token_ids = _token_ids(config, "eos_token_id")
        words = config.bad_words_ids or []
        _require(isinstance(words, list | tuple) and all(map(_is_token_ids, words)), "bad_words_ids", words)
        penalty = config.repetition_penalty
        _require(is_allowed(penalty, RepetitionPenalty), "repetition_penalty", penalty)
        return cls(
            eos_token_ids=frozenset(i for i in (*eos_token_ids, base.tokenizer.eos_token_id) if i is not None),
            repetition_penalty=1.0 if penalty is None else float(penalty),
            no_repeat_ngram_size=_count(config, "no_repeat_ngram_size"),
            min_length=_count(config, "min_length"),
            min_new_tokens=_count(config, "min_new_tokens"),
            suppress_tokens=tuple(_token_ids(config, "suppress_tokens")),
            begin_suppress_tokens=tuple(_token_ids(config, "begin_suppress_tokens")),
            bad_words_ids=tuple(tuple(word) for word in words if len(word) > 1 or word[0] not in eos_token_ids),
            forced_eos_token_ids=tuple(_token_ids(config, "forced_eos_token_id")),
        )


def _warn(name: str, config: GenerationConfig) -> None:
    supported = GenerationDefaults.__dataclass_fields__.keys() | {"eos_token_id", "forced_eos_token_id"}
    asked = {
        field: value
        for field in GenerationConfig().to_dict()
        if not field.startswith("_")
        and (value := getattr(config, field, None)) not in (None, False, 0, [], {}, _NEUTRAL.get(field))
    }
    ignored = asked.keys() - supported - _WITHOUT_EFFECT
    if ignored:
        _logger.warning(
            "The generation_config of %s asks for %s, which is not supported: answers may differ from generate()'s.",
            name,
            ", ".join(f"{field}={shown(asked[field])}" for field in sorted(ignored)),
        )
    if config.do_sample:
        _logger.warning(
            "The generation_config of %s asks to sample (%s); here a call says so, and the default is greedy: pass "
            "temperature=, top_p= and sampling_top_k=.",
            name,
            ", ".join(f"{field}={asked[field]}" for field in ("do_sample", *_SAMPLING) if field in asked),
        )


def _is_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(i, int) and not isinstance(i, bool) and abs(i) < 2**63 for i in value)
    )


def _token_ids(config: GenerationConfig, field: str) -> list[int]:
    value = getattr(config, field)
    if value is None or (isinstance(value, list | tuple) and not value):
        return []
    ids = [value] if isinstance(value, int) else value
    _require(_is_token_ids(ids), field, value)
    return list(ids)


def _count(config: GenerationConfig, field: str) -> int:
    value = getattr(config, field)
    _require(value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0), field, value)
    return value or 0


def _require(condition: bool, field: str, value: object) -> None:
    allowed = {
        "repetition_penalty": "a number from 0.01 to 100",
        "bad_words_ids": "a list of lists of token ids",
        **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), "an integer >= 0"),
    }
    if not condition:
        raise EngineError(
            f"The model's generation_config has {field}={shown(value)}, which is not allowed: set "
            f"model.generation_config.{field}, or the field in generation_config.json, to "
            f"{allowed.get(field, 'token ids')}, or remove it."
        )
