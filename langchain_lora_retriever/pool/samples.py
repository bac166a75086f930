"""Samples of an adapter's training data, and the `samples.jsonl` they are kept in."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import InvalidSamplesError
from langchain_lora_retriever.pool.regular_files import RegularFile, parse_json, said
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "MAX_CHARACTERS",
    "MAX_SAMPLES_BYTES",
    "SAMPLES_FILE",
    "Sample",
    "hash_inputs",
    "make_samples",
    "parse_samples",
    "read_samples",
    "write_samples",
]

SAMPLES_FILE = "samples.jsonl"
MAX_SAMPLES_BYTES = 16 << 20
_MAX_SAMPLES = 10_000
MAX_CHARACTERS = 100_000  # of an input or an output
_MAX_LINE = 1 << 20
_MAX_LINES = 2 * _MAX_SAMPLES
_MAX_CONTAINERS = 2 * MAX_CHARACTERS  # in a line; texts may be full of brackets
_ADVICE = "A dozen to 20 samples are enough"


@dataclass(frozen=True, slots=True)
class Sample:
    """One example of what an adapter was trained on.

    Attributes:
        input: The prompt; the adapter's embedding is the mean over its samples' inputs.
        output: The answer, if it is known. Retrieval does not use it.
    """

    input: str
    output: str | None = None


def make_samples(values: Iterable[str | Mapping[str, Any] | Sample], *, where: str) -> tuple[Sample, ...]:
    """Turn what a caller passes as samples into `Sample`s.

    Args:
        values: Inputs as strings, mappings with an `input` and perhaps an `output`, or samples.
        where: What to call the place in an error, such as "adapter 'sql'".

    Raises:
        InvalidSamplesError: If there is none, one has no `input` that is a non-blank string, or they are too large.
    """
    if isinstance(values, str | Mapping):
        raise InvalidSamplesError(f"{where}: samples is a single {type(values).__name__}; pass a list of them.")
    try:
        given = list(islice(values, _MAX_SAMPLES + 1))
    except TypeError as error:
        raise InvalidSamplesError(f"{where}: samples is {shown(values)}; pass a list of them.") from error
    samples = tuple(_make_sample(value, f"{where}: sample {i}") for i, value in enumerate(given))
    if not samples:
        raise InvalidSamplesError(f"{where} has no samples. Pass a dozen inputs of its training data.")
    if len(samples) > _MAX_SAMPLES:
        raise InvalidSamplesError(f"{where} has more than {_MAX_SAMPLES:,} samples. {_ADVICE}.")
    _check_size(samples, where)
    return samples


def _check_size(samples: Iterable[Sample], where: str) -> None:
    """Refuse what could not be read again once it is written."""
    num_bytes = 0
    for i, sample in enumerate(samples):
        line = _line(sample)
        if len(line) > _MAX_LINE:
            raise InvalidSamplesError(
                f"{where}: sample {i} has {len(line):,} characters as JSON; allowed are {_MAX_LINE:,}. Shorten it."
            )
        num_bytes += len(line.encode())
        if num_bytes > MAX_SAMPLES_BYTES:
            raise InvalidSamplesError(
                f"{where} has samples of more than {MAX_SAMPLES_BYTES:,} bytes in all, as JSON lines. {_ADVICE}."
            )


def hash_inputs(texts: Iterable[str]) -> str:
    """Sha256 of texts that something is found by."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def read_samples(file: Path, *, where: str) -> tuple[Sample, ...]:
    """Read a `samples.jsonl`: one JSON object with an `input` per line; blank lines are skipped.

    Raises:
        InvalidSamplesError: If the file cannot be read or is too large, or a line is something else; the line is named.
    """
    try:
        with contextlib.closing(RegularFile(file, MAX_SAMPLES_BYTES)) as opened:
            data = opened.read()
    except OSError as error:
        raise InvalidSamplesError(f"{where}: cannot read {file}: {said(error)}. {_ADVICE}.") from error
    return parse_samples(data, file=str(file), where=where)


def parse_samples(data: bytes, *, file: str, where: str) -> tuple[Sample, ...]:
    """Parse the content of a `samples.jsonl`, as `read_samples` does.

    Args:
        data: Utf-8.
        file: What to call the file in an error.
        where: What to call the adapter in an error.

    Raises:
        InvalidSamplesError: If a line is something else than a sample; the line is named.
    """
    try:
        lines = data.decode("utf-8-sig").split("\n", _MAX_LINES)
    except UnicodeDecodeError as error:
        raise InvalidSamplesError(f"{where}: cannot read {file}: {error}") from error
    if len(lines) > _MAX_LINES:
        raise InvalidSamplesError(f"{where}: {file} has more than {_MAX_LINES:,} lines. {_ADVICE}.")
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{where}: line {number} of {file}"
        if len(line) > _MAX_LINE:
            raise InvalidSamplesError(f"{place} has {len(line):,} characters; allowed are {_MAX_LINE:,}.")
        try:
            value = parse_json(line.encode(), _MAX_CONTAINERS)
        except (ValueError, RecursionError) as error:
            raise InvalidSamplesError(
                f"{place} is not JSON ({said(error)}): {line[:80]!r}. "
                'Write one object a line: {"input": "...", "output": "..."}.'
            ) from error
        samples.append(_make_sample(value, place))
    if not samples:
        raise InvalidSamplesError(f"{where}: {file} is empty. Write a dozen samples of the training data.")
    if len(samples) > _MAX_SAMPLES:
        raise InvalidSamplesError(f"{where}: {file} has more than {_MAX_SAMPLES:,} samples. {_ADVICE}.")
    return tuple(samples)


def write_samples(file: Path, samples: Iterable[Sample]) -> None:
    """Write a `samples.jsonl`."""
    file.write_text("".join(map(_line, samples)), encoding="utf-8")


def _line(sample: Sample) -> str:
    row = {"input": sample.input} | ({} if sample.output is None else {"output": sample.output})
    return json.dumps(row, ensure_ascii=False) + "\n"


def _make_sample(value: object, where: str) -> Sample:
    if isinstance(value, str):
        value = {"input": value}
    if isinstance(value, Sample):
        value = {"input": value.input, "output": value.output}
    if not isinstance(value, Mapping):
        raise InvalidSamplesError(f"{where} is a {type(value).__name__}; allowed is an object with an input.")
    text, output = value.get("input"), value.get("output")
    if not isinstance(text, str) or not text.strip():
        raise InvalidSamplesError(f"{where} has input={shown(text)}; allowed is a string that is not blank.")
    if output is not None and not isinstance(output, str):
        raise InvalidSamplesError(f"{where} has output={shown(output)}; allowed is a string, or none.")
    _check_text(text, f"{where}: its input")
    _check_text(output or "", f"{where}: its output")
    return Sample(text, output)


def _check_text(text: str, what: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise InvalidSamplesError(f"{what} has {len(text):,} characters; allowed are {MAX_CHARACTERS:,}. Shorten it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidSamplesError(
            f"{what} holds half a surrogate pair, {text[error.start]!a}, at character {error.start}, which is no "
            "Unicode text and no encoder can read. Remove it, or write the character in full."
        ) from error
