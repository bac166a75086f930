"""How often retrieval finds the adapter that was trained for a prompt.

Source: LoraRetriever, arXiv:2402.09997, table 2.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import numpy as np
from pydantic import Field

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.evaluation.benchmark import CardPool
from langchain_lora_retriever.evaluation.inspection import find_twins
from langchain_lora_retriever.retrieval.encoder import DEFAULT_ENCODER, DEFAULT_INSTRUCTION
from langchain_lora_retriever.retrieval.retriever import LoraRetriever
from langchain_lora_retriever.retrieval.training import TrainingConfig, split_adapters, train_encoder
from langchain_lora_retriever.support.checks import is_allowed
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from langchain_lora_retriever.evaluation.benchmark import Benchmark, TestRow
    from langchain_lora_retriever.retrieval.encoder import Encoder
    from langchain_lora_retriever.retrieval.training import Progress

__all__ = [
    "Accuracy",
    "Confusion",
    "RetrievalReport",
    "SplitsReport",
    "evaluate_retrieval",
    "evaluate_splits",
]

Accuracy: TypeAlias = Mapping[int, float]
"""Share of the rows whose own adapter is among the first k, by k."""

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Confusion:
    """Rows of one task whose best adapter was another's."""

    task: str
    taken_for: str
    count: int


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """Retrieval on one benchmark.

    Attributes:
        encoder: Its name.
        num_adapters: Adapters that compete.
        num_rows: Test rows.
        num_excluded: Rows left out because they are among the adapters' samples.
        accuracy: Over all rows.
        per_task: By task.
        per_domain: By domain.
        seen: Over rows of the adapters the encoder was trained on; None if none was named, or none has rows.
        unseen: Over the others; None if none was named as seen, or none of the others has rows.
        confusions: Most frequent first.
        twins: Pairs of adapters whose samples cannot be told apart better than by chance.
        twin_error: Share of the top-1 errors that took an adapter for its twin.
        ceiling: Top-1 accuracy if every error were one between twins, and each twin were drawn by chance.
    """

    encoder: str
    num_adapters: int
    num_rows: int
    num_excluded: int
    accuracy: Accuracy
    per_task: Mapping[str, Accuracy]
    per_domain: Mapping[str, Accuracy]
    seen: Accuracy | None
    unseen: Accuracy | None
    confusions: tuple[Confusion, ...]
    twins: tuple[tuple[str, str], ...]
    twin_error: float
    ceiling: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SplitsReport:
    """Retrieval with encoders trained on several random shares of the adapters.

    Attributes:
        fraction: Share of the adapters trained on.
        runs: One report per split.
        seconds: Training time of each.
        mean: Of the splits, by "all", "seen" and "unseen", as far as every split has such rows.
        deviation: Standard deviation over the splits, likewise.
    """

    fraction: float
    runs: tuple[RetrievalReport, ...]
    seconds: tuple[float, ...]
    mean: Mapping[str, Accuracy]
    deviation: Mapping[str, Accuracy]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)


def evaluate_retrieval(
    benchmark: Benchmark,
    encoder: str | Path | Encoder | None = None,
    *,
    instruction: str = DEFAULT_INSTRUCTION,
    top_k: Iterable[int] = (1, 3, 5, 8),
    seen: Collection[str] = (),
    twins: Sequence[tuple[str, str]] | None = None,
    progress: Progress | None = None,
) -> RetrievalReport:
    """Retrieve for every test row, all adapters competing.

    Args:
        benchmark: Cards and test rows.
        encoder: Name or folder of an encoder, or an encoder; by default what a `LoraRetriever` uses.
        instruction: Put before every text and sample.
        top_k: The k to report.
        seen: Names of the adapters the encoder was trained on.
        twins: Pairs that no input can tell apart, where you know them; by default `find_twins` looks for them.
        progress: Called with the rows done and all rows.
    """
    retriever = LoraRetriever(CardPool(benchmark.cards), encoder, instruction=instruction)
    rows = benchmark.rows
    ranked: list[list[str]] = []
    for start in range(0, len(rows), _BATCH):
        texts = [row.input for row in rows[start : start + _BATCH]]
        found = retriever.retrieve_batch(texts, top_k=len(benchmark.cards))
        ranked += [[adapter.name for adapter in row] for row in found]
        if progress is not None:
            progress(len(ranked), len(rows))
    ranks = np.array([names.index(row.task) + 1 for names, row in zip(ranked, rows, strict=True)])
    pairs = [(pair.first, pair.second) for pair in find_twins(retriever)] if twins is None else twins
    best = [names[0] for names in ranked]
    ks = tuple(sorted(set(top_k)))
    is_seen = np.array([row.task in set(seen) for row in rows])
    return RetrievalReport(
        encoder=retriever.encoder.name,
        num_adapters=len(benchmark.cards),
        num_rows=len(rows),
        num_excluded=benchmark.num_excluded,
        accuracy=_accuracy(ranks, ks),
        per_task=_grouped(ranks, [row.task for row in rows], ks),
        per_domain=_grouped(ranks, [row.domain for row in rows], ks),
        seen=_accuracy(ranks[is_seen], ks) if is_seen.any() else None,
        unseen=_accuracy(ranks[~is_seen], ks) if seen and not is_seen.all() else None,
        confusions=_confusions(rows, best),
        twins=tuple(pairs),
        twin_error=_twin_error(rows, best, pairs),
        ceiling=_ceiling(rows, pairs),
    )


def evaluate_splits(
    benchmark: Benchmark,
    encoder: str | Path = DEFAULT_ENCODER,
    *,
    output_dir: str | Path,
    fraction: float = 0.4,
    seeds: Iterable[int] = range(5),
    config: TrainingConfig | None = None,
    instruction: str = DEFAULT_INSTRUCTION,
    top_k: Iterable[int] = (1, 3, 5, 8),
    wrap: Callable[[Path], Encoder] | None = None,
    show_progress: bool = False,
) -> SplitsReport:
    """Train on random shares of the adapters, and retrieve among all with each encoder.

    Splits whose encoder lies in `output_dir` already are not trained again, and one that was cut off is gone on with.

    Args:
        benchmark: Cards and test rows.
        encoder: Name or folder of the encoder every split starts from.
        output_dir: Folder for the trained encoders.
        fraction: Share of the adapters to train on.
        seeds: One split each.
        config: Training settings; the seed is the split's.
        instruction: Put before every text and sample.
        top_k: The k to report.
        wrap: Makes an encoder of a trained model's folder, `HybridEncoder` for one; by default the model as it is.
        show_progress: Draw progress bars on stderr.

    Raises:
        InvalidRequestError: If `fraction` is no share, there is no seed, or `output_dir` has an encoder of another
            fraction, benchmark, encoder, instruction or config.
    """
    if not is_allowed(fraction, Annotated[float, Field(gt=0, le=1)]):
        raise InvalidRequestError(f"fraction={shown(fraction)} is not allowed: pass a number in (0, 1], such as 0.4.")
    config = config or TrainingConfig(holdout_fraction=0.0)
    names, ks = tuple(benchmark.cards), tuple(top_k)
    runs, seconds = [], []
    for seed in seeds:
        trained, _ = split_adapters(names, fraction, seed)
        folder = Path(output_dir) / f"split-{seed}"
        own = replace(config, seed=seed)
        samples = {name: [sample.input for sample in benchmark.cards[name]] for name in trained}
        note = _note(folder / "split.json", (samples, str(encoder), instruction, asdict(own)))
        if "seconds" not in note:
            report = train_encoder(
                samples,
                encoder,
                output_dir=folder,
                config=own,
                instruction=instruction,
                resume=True,
                show_progress=show_progress,
            )
            note |= report.to_dict()
            (folder / "split.json").write_text(json.dumps(note, indent=1), encoding="utf-8")
        seconds.append(float(note["seconds"]))
        tuned = wrap(folder) if wrap else folder
        runs.append(evaluate_retrieval(benchmark, tuned, instruction=instruction, top_k=ks, seen=trained))
    if not runs:
        raise InvalidRequestError("seeds is empty: pass at least one, such as range(5).")
    parts: dict[str, list[Accuracy | None]] = {
        "all": [run.accuracy for run in runs],
        "seen": [run.seen for run in runs],
        "unseen": [run.unseen for run in runs],
    }
    tables = {part: [t for t in table if t is not None] for part, table in parts.items() if all(table)}
    return SplitsReport(
        fraction=fraction,
        runs=tuple(runs),
        seconds=tuple(seconds),
        mean={part: {k: float(np.mean([t[k] for t in table])) for k in table[0]} for part, table in tables.items()},
        deviation={part: {k: float(np.std([t[k] for t in table])) for k in table[0]} for part, table in tables.items()},
    )


def _note(file: Path, recipe: object) -> dict[str, Any]:
    """What is noted of a split's encoder; one that is not trained yet is noted with what it is to be made from.

    Raises:
        InvalidRequestError: If the encoder there, or its beginning, was made from something else.
    """
    made_from = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        note = {"made_from": made_from}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(note), encoding="utf-8")
    except ValueError:  # it was cut off
        note = {}
    if note.get("made_from") != made_from:
        raise InvalidRequestError(
            f"{file.parent} has an encoder that was trained on other samples or otherwise: with another fraction, "
            "benchmark, encoder, instruction or config. Pass another output_dir, or remove that folder."
        )
    return dict(note)


def _accuracy(ranks: NDArray[np.int64], top_k: Sequence[int]) -> dict[int, float]:
    return {k: float((ranks <= k).mean()) for k in top_k}


def _grouped(ranks: NDArray[np.int64], groups: Sequence[str], top_k: Sequence[int]) -> dict[str, dict[int, float]]:
    names = np.array(groups)
    return {name: _accuracy(ranks[names == name], top_k) for name in dict.fromkeys(groups)}


def _confusions(rows: Sequence[TestRow], best: Sequence[str]) -> tuple[Confusion, ...]:
    counts = Counter((row.task, name) for row, name in zip(rows, best, strict=True) if row.task != name)
    return tuple(Confusion(task, name, count) for (task, name), count in counts.most_common())


def _twin_error(rows: Sequence[TestRow], best: Sequence[str], twins: Sequence[tuple[str, str]]) -> float:
    pairs = {frozenset(pair) for pair in twins}
    errors = [frozenset((row.task, name)) for row, name in zip(rows, best, strict=True) if row.task != name]
    return float(np.mean([error in pairs for error in errors])) if errors else 0.0


def _ceiling(rows: Sequence[TestRow], twins: Sequence[tuple[str, str]]) -> float:
    num_twins = Counter(name for pair in twins for name in pair)
    return float(np.mean([1 / (1 + num_twins[row.task]) for row in rows]))
