"""Samples of an adapter's training data, and the `samples.jsonl` they are kept in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import InvalidSamplesError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SAMPLES_FILE", "Sample", "make_samples", "read_samples", "write_samples"]

SAMPLES_FILE = "samples.jsonl"


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
        InvalidSamplesError: If there is none, or one has no `input` that is a non-blank string.
    """
    if isinstance(values, str | Mapping):
        raise InvalidSamplesError(f"{where}: samples is a single {type(values).__name__}; pass a list of them.")
    samples = tuple(_make_sample(value, f"{where}: sample {i}") for i, value in enumerate(values))
    if not samples:
        raise InvalidSamplesError(f"{where} has no samples. Pass a dozen inputs of its training data.")
    return samples


def read_samples(file: Path, *, where: str) -> tuple[Sample, ...]:
    """Read a `samples.jsonl`: one JSON object with an `input` per line; blank lines are skipped.

    Raises:
        InvalidSamplesError: If the file cannot be read, or a line is something else; the line is named.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSamplesError(f"{where}: cannot read {file}: {error}") from error
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InvalidSamplesError(
                f"{where}: line {number} of {file} is not JSON ({error}): {line[:80]!r}. "
                'Write one object a line: {"input": "...", "output": "..."}.'
            ) from error
        samples.append(_make_sample(value, f"{where}: line {number} of {file}"))
    if not samples:
        raise InvalidSamplesError(f"{where}: {file} is empty. Write a dozen samples of the training data.")
    return tuple(samples)


def write_samples(file: Path, samples: Iterable[Sample]) -> None:
    """Write a `samples.jsonl`."""
    rows = (
        {"input": sample.input} | ({} if sample.output is None else {"output": sample.output}) for sample in samples
    )
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _make_sample(value: object, where: str) -> Sample:
    if isinstance(value, Sample):
        return value
    if isinstance(value, str):
        value = {"input": value}
    if not isinstance(value, Mapping):
        raise InvalidSamplesError(f"{where} is a {type(value).__name__}; allowed is an object with an input.")
    text, output = value.get("input"), value.get("output")
    if not isinstance(text, str) or not text.strip():
        raise InvalidSamplesError(f"{where} has input={text!r}; allowed is a string that is not blank.")
    if output is not None and not isinstance(output, str):
        raise InvalidSamplesError(f"{where} has output={output!r}; allowed is a string, or none.")
    return Sample(text, output)
