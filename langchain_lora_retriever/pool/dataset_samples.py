"""Samples drawn from a data set of the hub, for adapters whose card names one and which bring no samples.

`datasets` streams it: a few hundred rows are fetched, and no code of a repository is run.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import InvalidSamplesError, LoraRetrieverError, MissingDependencyError
from langchain_lora_retriever.pool.regular_files import said
from langchain_lora_retriever.pool.samples import MAX_CHARACTERS, Sample, make_samples
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from langchain_lora_retriever.pool.hub import Hub

__all__ = ["draw_samples", "sample_of"]

_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_NUM_SAMPLES = 20
_NUM_SHUFFLED = 1_000  # rows from the beginning among which the draw is made
_NUM_TRIED = 200  # rows of the draw that are looked at for so many samples
# Columns of a row that hold what is asked, and those that hold the answer: the first that there is counts.
_INPUTS = (
    "prompt", "instruction", "question", "query", "input", "inputs", "text", "sentence", "utterance", "premise",
    "source", "document", "article", "context", "content",
)  # fmt: skip
_OUTPUTS = ("completion", "response", "output", "outputs", "answer", "target", "targets", "chosen", "summary", "sql")
_CHATS = ("messages", "conversations", "conversation", "prompt")
_ROLES = ("role", "from")
_TEXTS = ("content", "value")
_ASKING, _ANSWERING = frozenset({"user", "human"}), frozenset({"assistant", "gpt"})


def draw_samples(names: Sequence[str], *, where: str, hub: Hub, seed: int = 0) -> tuple[tuple[Sample, ...], str]:
    """Draw 20 samples from the first of some data sets.

    Args:
        names: Names on the hub, as a model card lists them.
        where: What to call the adapter in an error.
        hub: How the hub is reached.
        seed: Of the draw.

    Returns:
        The samples, and a note of how they were drawn.

    Raises:
        InvalidSamplesError: If there is no name, the data set cannot be had, or it holds no texts.
        MissingDependencyError: If `datasets` is not installed.
    """
    if not names:
        raise InvalidSamplesError(
            f"{where}: its card names no data set (`datasets:`), so no samples can be drawn. Pass samples=[...]."
        )
    name = names[0]
    try:
        import datasets  # noqa: PLC0415 - an extra, and seconds to import
    except ImportError as error:
        raise MissingDependencyError(
            "Drawing samples from a data set needs the package datasets:\n"
            "  pip install 'langchain-lora-retriever[train]'"
        ) from error
    try:
        full_name = _on_the_hub(name, hub, datasets.config.HF_ENDPOINT)
        parts = datasets.load_dataset(full_name, streaming=True, token=hub.token)
        split = "train" if "train" in parts else next(iter(parts))
        rows = parts[split].shuffle(seed=seed, buffer_size=_NUM_SHUFFLED)
        found = list(itertools.islice(_samples_of(itertools.islice(rows, _NUM_TRIED)), _NUM_SAMPLES))
    except LoraRetrieverError:
        raise
    except Exception as error:  # the hub's, the library's, the file formats'
        raise InvalidSamplesError(
            f"{where}: its card's data set {shown(name)} cannot be had: {type(error).__name__}: {said(error)}. Pass "
            "samples=[...], or leave samples_from out to find it by its card."
        ) from error
    if not found:
        raise InvalidSamplesError(
            f"{where}: its card's data set {shown(name)} holds no texts in the first {_NUM_TRIED} rows of its draw. "
            "Pass samples=[...]."
        )
    note = f"{len(found)} of the first {_NUM_SHUFFLED:,} rows of {full_name}, split {split}, seed {seed}"
    return make_samples(found, where=where), note


def _on_the_hub(name: str, hub: Hub, datasets_endpoint: str) -> str:
    """The data set's whole name: a card must lead to the hub alone, not to a file or to a format of `datasets`."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - loaded where it is needed

    if _NAME.fullmatch(name) is None:
        raise ValueError("that is no name of a data set on the hub")
    if hub.endpoint is not None and hub.endpoint.rstrip("/") != datasets_endpoint.rstrip("/"):
        raise ValueError(f"data sets are streamed from {datasets_endpoint}; set HF_ENDPOINT to {hub.endpoint}")
    whole = HfApi(endpoint=hub.endpoint, token=hub.token).dataset_info(name).id
    if _NAME.fullmatch(whole) is None or "/" not in whole or os.path.lexists(whole):
        raise ValueError(f"{shown(whole)} is no name that leads to the hub alone")
    return whole


def _samples_of(rows: Iterable[Any]) -> Iterator[Sample]:
    seen = set()
    for row in rows:
        sample = sample_of(row)
        if sample is not None and sample.input not in seen:
            seen.add(sample.input)
            yield sample


def sample_of(row: object) -> Sample | None:
    """What a row of a data set asks and answers; None if it holds no text.

    Args:
        row: Values by column.
    """
    if not isinstance(row, Mapping):
        return None
    for column in _CHATS:
        turns = row.get(column)
        if isinstance(turns, list):
            asked, answered = _turns(turns, _ASKING), _turns(turns, _ANSWERING)
            if asked:
                return Sample(asked[-1], answered[-1] if answered else _first(row, _OUTPUTS))
    text = _first(row, _INPUTS)
    if text is None:
        text = next((value for value in row.values() if _is_text(value)), None)
    elif _is_text(row.get("instruction")) and _is_text(row.get("input")):
        text = f"{row['instruction']}\n\n{row['input']}"
    return None if text is None else Sample(text, _first(row, _OUTPUTS))


def _turns(turns: list[Any], roles: frozenset[str]) -> list[str]:
    return [
        text
        for turn in turns
        if isinstance(turn, Mapping) and any(turn.get(key) in roles for key in _ROLES)
        for text in [_first(turn, _TEXTS)]
        if text is not None
    ]


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    return next((row[column] for column in columns if _is_text(row.get(column))), None)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= MAX_CHARACTERS
