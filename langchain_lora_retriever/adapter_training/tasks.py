"""What adapters are trained on: one task each, read from files or made by the demo's generators."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from langchain_lora_retriever.errors import InvalidRequestError, InvalidSamplesError, UnknownAdapterError
from langchain_lora_retriever.pool.arguments import check_name
from langchain_lora_retriever.support.near_names import near_names
from langchain_lora_retriever.support.nesting import check_unicode
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Row", "Task", "demo_tasks", "read_tasks"]

Row: TypeAlias = dict[str, Any]
"""`input` and `output`, and perhaps `messages`: the conversation up to the answer, in place of the input alone."""

_ROW = '{"input": "...", "output": "..."}'
_NUM_TEST_ROWS = 25
_HELD_OUT = 10  # every tenth row


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter to train.

    Attributes:
        name: The adapter's name.
        train: Rows to train on.
        test: Rows held out.
        lora: Fields of `peft.LoraConfig`.
    """

    name: str
    train: list[Row]
    test: list[Row]
    lora: Mapping[str, Any]


def read_tasks(
    folder: Path,
    *,
    lora: Mapping[str, Any],
    names: Sequence[str] = (),
    max_rows: int,
    holds_out: bool = False,
    seed: int = 0,
) -> list[Task]:
    """Read a folder of tasks: `<name>.jsonl` with a row a line, and perhaps `<name>.json` with fields of its LoRA.

    Args:
        folder: The folder.
        lora: Fields of `peft.LoraConfig` for tasks that bring none.
        names: Which tasks to read; all by default.
        max_rows: Maximum number of rows to train on.
        holds_out: Keep every tenth row for a test.
        seed: Shuffles the rows.

    Raises:
        InvalidAdapterError: If a task's name cannot be an adapter's.
        InvalidSamplesError: If a line is no row; it is named.
        InvalidRequestError: If there is no task, too few rows of one, or a row is no Unicode text.
        UnknownAdapterError: If there is no task of a name.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise InvalidRequestError(f"{folder} holds no task: put a <name>.jsonl into it, with {_ROW} on each line.")
    tasks = []
    for name in _chosen(names, files):
        check_name(name)
        rows = _read_rows(files[name], name)
        random.Random(seed).shuffle(rows)  # noqa: S311 - row order
        test = rows[::_HELD_OUT] if holds_out else []
        train = [row for i, row in enumerate(rows) if i % _HELD_OUT] if holds_out else rows
        if not train:
            raise InvalidRequestError(f"{files[name]} has {len(rows)} rows, which leaves none to train on: add some.")
        tasks.append(Task(name, train[:max_rows], test, _read_lora(files[name].with_suffix(".json")) or dict(lora)))
    return tasks


def demo_tasks(*, names: Sequence[str] = (), max_rows: int, seed: int = 0) -> list[Task]:
    """Generate the demo's tasks; train and test rows share no entity.

    Raises:
        UnknownAdapterError: If there is no task of a name.
    """
    from langchain_lora_retriever.demo.tasks import TASKS, make_examples  # noqa: PLC0415 - not needed for own tasks

    def rows(name: str, split: Literal["train", "test"], num: int) -> list[Row]:
        return [
            {"input": each.input, "output": each.output, "messages": each.prompt_messages()}
            for each in make_examples(name, split, num, seed)
        ]

    return [
        Task(name, rows(name, "train", max_rows), rows(name, "test", _NUM_TEST_ROWS), dict(TASKS[name].lora))
        for name in _chosen(names, TASKS)
    ]


def _chosen(names: Sequence[str], known: Mapping[str, object]) -> Sequence[str]:
    for name in names:
        if name not in known:
            near = near_names(name, known) or list(known)
            raise UnknownAdapterError(f"there is no task {shown(name)}. There are {', '.join(near[:10])}.")
    return names or list(known)


def _read_rows(path: Path, name: str) -> list[Row]:
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSamplesError(f"task {name!r}: cannot read {path}: {error}. Save it as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidSamplesError(
                f"task {name!r}: line {number} of {path} is not JSON ({error}): {shown(line)}. Write {_ROW}."
            ) from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("input", "output")):
            raise InvalidSamplesError(f"task {name!r}: line {number} of {path} is {shown(line)}; allowed is {_ROW}.")
        if not _are_messages(row.get("messages") or []):
            raise InvalidSamplesError(
                f"task {name!r}: line {number} of {path} has messages={shown(row['messages'])}; allowed is a list of "
                'turns, {"role": "...", "content": "..."}.'
            )
        check_unicode(json.dumps(row, ensure_ascii=False), f"task {name!r}: line {number} of {path}")
        rows.append(row)
    return rows


def _are_messages(value: object) -> bool:
    """Whether a chat template may make something of it; what a turn holds beside its role differs between models."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value
    )


def _read_lora(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        lora = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidSamplesError(f"{path} is not JSON: {error}. Write fields of peft.LoraConfig.") from error
    if not isinstance(lora, dict):
        raise InvalidSamplesError(f"{path} is {shown(lora)}; allowed is an object of fields of peft.LoraConfig.")
    return lora
