"""How well composed adapters answer, in distribution and with the right adapter masked.

Source: LoraRetriever, arXiv:2402.09997, table 1; AdapterSoup, arXiv:2302.07027; LoraHub, arXiv:2307.13269.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field

from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.chat.messages import encode_chat
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.evaluation.in_order import in_order
from langchain_lora_retriever.evaluation.metrics import Interval, bootstrap_macro, corpus_bleu, score_answers
from langchain_lora_retriever.retrieval.composer import Weighting, compose, materialize, pin
from langchain_lora_retriever.support.checks import settings
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.types import Composition, RetrievedAdapter, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from langchain_lora_retriever.engine import EngineClient, Generation
    from langchain_lora_retriever.evaluation.benchmark import Benchmark, TestRow
    from langchain_lora_retriever.pool.pool import AdapterPool
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever
    from langchain_lora_retriever.retrieval.training import Progress

__all__ = ["CompositionReport", "CompositionScores", "Method", "Setting", "evaluate_composition", "paper_settings"]

Method: TypeAlias = Literal["base", "oracle", "selection", "fusion", "mixture", "soup", "random"]
"""What answers a prompt. "base" is the base model alone, "oracle" the adapter trained for the task, "soup" one uniform
fusion of the top k of all prompts together (AdapterSoup), "random" a uniform fusion of k adapters drawn for each task
(what LoraHub starts from). The other three are the paper's."""

_ANSWER = '{"key": "'  # as its line in a cache begins
_MAIN = {"em": "em", "rouge": "rougeL", "bleu": "bleu"}


@settings(slots=True)
class Setting:
    """One way to answer prompts.

    Attributes:
        method: What answers.
        top_k: Adapters retrieved; of no effect on "base", "oracle" and "selection".
        weights: "uniform" or "similarity" weights of fusions and mixtures.
        temperature: Of similarity weights.
        label: What tables call it; made of the above by default.

    Raises:
        InvalidRequestError: If a value is out of its range.
    """

    method: Method
    top_k: Annotated[int, Field(ge=1, description="an integer >= 1")] = 3
    weights: Weighting = "uniform"
    temperature: Annotated[float, Field(gt=0, description="a finite number > 0")] = 0.05
    label: Annotated[str, Field(description="a string")] = ""

    def __post_init__(self) -> None:
        """Make the label."""
        if not self.label:
            object.__setattr__(self, "label", self._default_label())

    def _default_label(self) -> str:
        if self.method in {"base", "oracle", "selection"}:
            return self.method
        weights = "" if self.weights == "uniform" else f", softmax(score / {self.temperature:g})"
        return f"{self.method} k={self.top_k}{weights}"

    @classmethod
    def default(cls) -> Setting:
        """Return what `ChatLoraRetriever` does unless told otherwise."""
        options = CallOptions()
        return cls(
            options.composition,
            top_k=options.top_k,
            weights=options.weights,
            temperature=options.weight_temperature,
            label="default",
        )


@dataclass(frozen=True, slots=True)
class CompositionScores:
    """Scores of one setting under one condition.

    Attributes:
        setting: The setting.
        is_masked: Whether the right adapter was kept out of retrieval.
        overall: Macro average over the tasks, each by its own metric, with its 95 % bootstrap interval.
        per_domain: The same by domain, without interval.
        per_task: Every metric by task: "main", "em", "rouge1", "rouge2", "rougeL", "bleu" (of the corpus), and
            "right_adapter", the share of rows in which the right adapter has the largest weight.
        row_scores: The main metric of every row, by task, in the order of the benchmark.
    """

    setting: Setting
    is_masked: bool
    overall: Interval
    per_domain: Mapping[str, float]
    per_task: Mapping[str, Mapping[str, float]]
    row_scores: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class CompositionReport:
    """Composition on one benchmark.

    Attributes:
        base_model: Its name.
        encoder: Its name.
        num_adapters: Adapters in the pool.
        num_rows: Test rows.
        num_excluded: Rows left out because they are among the adapters' samples.
        num_generated: Answers generated in this run; the others were in the cache.
        scores: One per setting and condition.
    """

    base_model: str
    encoder: str
    num_adapters: int
    num_rows: int
    num_excluded: int
    num_generated: int
    scores: tuple[CompositionScores, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)


def paper_settings(top_k: Iterable[int] = (3,)) -> tuple[Setting, ...]:
    """Return the paper's rows: the base model, the oracle, selection, and fusion and mixture for each k."""
    ks = tuple(top_k)
    return (
        Setting("base"),
        Setting("oracle"),
        Setting("selection"),
        *(Setting("fusion", top_k=k) for k in ks),
        *(Setting("mixture", top_k=k) for k in ks),
    )


def evaluate_composition(
    benchmark: Benchmark,
    pool: AdapterPool,
    engine: EngineClient,
    retriever: LoraRetriever,
    *,
    settings: Sequence[Setting] | None = None,
    masked: Sequence[bool] = (False, True),
    max_tokens: int | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CompositionReport:
    """Answer every test row under every setting, greedily.

    The base model and the oracle have no masked condition.

    Args:
        benchmark: Its rows are answered; every task needs an adapter of its name in the pool.
        pool: The adapters.
        engine: Runs the base model.
        retriever: Retrieves among `pool`.
        settings: What to compare; `paper_settings()` and the default by default.
        masked: Conditions: False retrieves among all, True keeps the adapter of the row's task out.
        max_tokens: Longest answer. By default half as long again as the longest output among the samples of the row's
            adapter, and 8 tokens more; 48 where no sample has an output.
        cache: A JSON-lines file of answers. What is in it is not generated again, whichever settings asked for it, so
            an evaluation that was cut off goes on where it stopped.
        seed: Of the random fusions and of the bootstrap.
        progress: Called with the answers generated and those to generate.

    Raises:
        InvalidRequestError: If a task has no adapter in the pool, or `cache` is no file for answers.
        MissingDependencyError: If rouge-score or sacrebleu is not installed.
    """
    score_answers((), ())  # what is missing for it is to be told before the first answer
    settings = (*paper_settings(), Setting.default()) if settings is None else tuple(settings)
    missing = sorted({row.task for row in benchmark.rows} - set(pool.names))
    if missing:
        raise InvalidRequestError(
            f"the pool has no adapter for the tasks {', '.join(map(repr, missing))}; it has {', '.join(pool.names)}. "
            "Name adapters as the benchmark names tasks, or drop these rows."
        )
    runs = [
        (setting, is_masked)
        for setting in settings
        for is_masked in masked
        if not (is_masked and setting.method in {"base", "oracle"})
    ]
    plans = [_Planner(benchmark.rows, pool, retriever, is_masked, seed).plan(setting) for setting, is_masked in runs]
    answers = _Answers(engine, pool, None if cache is None else Path(cache))
    limits = dict.fromkeys(benchmark.domains, max_tokens) if max_tokens else _longest_answers(benchmark, engine)
    keys = [
        [answers.want(row.input, c, limits[row.task]) for row, c in zip(benchmark.rows, plan, strict=True)]
        for plan in plans
    ]
    num_generated = answers.generate(progress)
    scores = [
        _score(benchmark.rows, [answers[key] for key in run_keys], plan, setting, is_masked, seed)
        for run_keys, plan, (setting, is_masked) in zip(keys, plans, runs, strict=True)
    ]
    return CompositionReport(
        base_model=engine.info.name,
        encoder=retriever.encoder.name,
        num_adapters=len(pool),
        num_rows=len(benchmark.rows),
        num_excluded=benchmark.num_excluded,
        num_generated=num_generated,
        scores=tuple(scores),
    )


class _Planner:
    """Decides the composition of every row under a setting."""

    def __init__(
        self, rows: Sequence[TestRow], pool: AdapterPool, retriever: LoraRetriever, is_masked: bool, seed: int
    ) -> None:
        self._rows = rows
        self._pool = pool
        self._retriever = retriever
        self._is_masked = is_masked
        self._seed = seed

    def plan(self, setting: Setting) -> list[Composition]:
        """Return one composition per row."""
        match setting.method:
            case "base":
                return [Composition("selection")] * len(self._rows)
            case "oracle":
                return [pin([row.task], mode="selection") for row in self._rows]
            case "soup":
                return self._soup(setting)
            case "random":
                return self._random(setting)
            case mode:
                top_k = 1 if mode == "selection" else setting.top_k
                how = partial(compose, mode=mode, weights=setting.weights, temperature=setting.temperature)
                return [
                    how(found, tasks=self._members(row))
                    for row, found in zip(self._rows, self._retrieve(top_k), strict=True)
                ]

    def _members(self, row: TestRow) -> dict[str, list[tuple[str, float]]]:
        """The members of the pool's tasks that may run for a row."""
        return self._pool.state.members(self._masked(row))

    def _masked(self, row: TestRow) -> set[str]:
        return {row.task} if self._is_masked else set()

    def _retrieve(self, top_k: int) -> list[list[RetrievedAdapter]]:
        exclude = [
            self._masked(row) | {name for name, members in self._members(row).items() if not members}
            for row in self._rows
        ]
        return self._retriever.retrieve_batch([row.input for row in self._rows], top_k=top_k, exclude=exclude)

    def _soup(self, setting: Setting) -> list[Composition]:
        totals = dict.fromkeys(self._pool.names, 0.0)
        texts, tasks = [row.input for row in self._rows], tuple(self._pool.tasks)
        for found in self._retriever.retrieve_batch(texts, top_k=len(self._pool), exclude=tasks):
            for adapter in found:
                totals[adapter.name] += adapter.score
        ranked = sorted(totals, key=lambda name: (-totals[name], name))
        return [pin(self._allowed(ranked, row)[: setting.top_k], mode="fusion") for row in self._rows]

    def _random(self, setting: Setting) -> list[Composition]:
        drawn = {}
        for number, task in enumerate(dict.fromkeys(row.task for row in self._rows)):
            generator = np.random.default_rng((self._seed, number))
            drawn[task] = generator.permutation(np.array(self._pool.names)).tolist()
        return [pin(self._allowed(drawn[row.task], row)[: setting.top_k], mode="fusion") for row in self._rows]

    def _allowed(self, names: Sequence[str], row: TestRow) -> list[str]:
        masked = self._masked(row)
        return [name for name in names if name not in masked]


class _Answers:
    """Greedy answers by what determines them: the prompt, the adapters' contents and weights, the length allowed."""

    def __init__(self, engine: EngineClient, pool: AdapterPool, cache: Path | None) -> None:
        self._engine = engine
        self._pool = pool
        self._cache = cache
        self._texts: dict[str, str] = {}
        self._wanted: dict[str, tuple[str, Composition, int]] = {}
        if cache is not None:
            self._texts = _read_answers(cache)

    def __getitem__(self, key: str) -> str:
        return self._texts[key]

    def want(self, prompt: str, composition: Composition, max_tokens: int) -> str:
        """Note an answer to generate, unless it is known; return its key."""
        members = [(self._pool[member.name].fingerprint, round(member.weight, 6)) for member in composition.adapters]
        mode = "fusion" if composition.mode == "fusion" and len(members) > 1 else "sum"
        facts = [self._engine.info.name, prompt, mode, sorted(members), max_tokens]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        if key not in self._texts:
            self._wanted[key] = (prompt, composition, max_tokens)
        return key

    def generate(self, progress: Progress | None) -> int:
        """Generate what is wanted, as many at once as the engine runs; return how many."""
        total = len(self._wanted)
        for number, (key, text) in enumerate(self._run(), start=1):
            self._texts[key] = text
            if self._cache is not None:
                with self._cache.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n")
            if progress is not None:
                progress(number, total)
        self._wanted.clear()
        return total

    def _run(self) -> Iterator[tuple[str, str]]:
        # By composition, so that neighbours in the queue share adapters and few have to be loaded.
        wanted = sorted(self._wanted.items(), key=lambda item: item[1][1].names)
        submitted = ((key, self._submit(*answer)) for key, answer in wanted)
        for key, done in in_order(self._engine, submitted):
            yield key, done.text

    def _submit(self, prompt: str, composition: Composition, max_tokens: int) -> Generation:
        ids = encode_chat(self._engine.tokenizer, [{"role": "user", "content": prompt}])
        return self._engine.submit(ids, SamplingParams(max_tokens=max_tokens), materialize(composition, self._pool))


def _read_answers(file: Path) -> dict[str, str]:
    """The answers in a cache, by key; lines that a run left half when it was cut off are passed over.

    Raises:
        InvalidRequestError: If the file cannot be read and written, or holds something else.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+", encoding="utf-8", errors="replace", newline="\n") as stream:
            stream.seek(0)
            text = stream.read()
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"cache={shown(str(file))} cannot be read and written: {error}. Pass a file in a folder of yours."
        ) from error
    answers = {}
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("key"), str) and isinstance(entry.get("text"), str):
            answers[entry["key"]] = entry["text"]
        elif entry is not None or not (line.startswith(_ANSWER) or _ANSWER.startswith(line)):
            raise InvalidRequestError(
                f"cache={shown(str(file))} is no cache: its line {number} is no answer, {shown(line)}. Pass a new "
                "file, or one that an evaluation has written."
            )
    if text and not text.endswith("\n"):
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n")  # or the next answer would be a part of half a line
    return answers


def _longest_answers(benchmark: Benchmark, engine: EngineClient) -> dict[str, int]:
    """Tokens to allow, by task."""
    limits = {}
    for task in benchmark.domains:
        outputs = [sample.output for sample in benchmark.cards[task] if sample.output]
        lengths = [len(engine.tokenizer.encode(output, add_special_tokens=False)) for output in outputs]
        limits[task] = int(1.5 * max(lengths)) + 8 if lengths else 48
    return limits


def _score(
    rows: Sequence[TestRow],
    answers: Sequence[str],
    plan: Sequence[Composition],
    setting: Setting,
    is_masked: bool,
    seed: int,
) -> CompositionScores:
    per_task: dict[str, dict[str, float]] = {}
    row_scores: dict[str, list[float]] = {}
    for task in dict.fromkeys(row.task for row in rows):
        chosen = [i for i, row in enumerate(rows) if row.task == task]
        texts, targets = [answers[i] for i in chosen], [rows[i].target for i in chosen]
        scores = score_answers(texts, targets)
        row_scores[task] = scores[_MAIN[rows[chosen[0]].metric]]
        per_task[task] = {"main": float(np.mean(row_scores[task]))}
        per_task[task] |= {key: float(np.mean(values)) for key, values in scores.items()}
        per_task[task]["bleu"] = corpus_bleu(texts, targets)
        is_right = [bool(plan[i].adapters) and _heaviest(plan[i]) == task for i in chosen]
        per_task[task]["right_adapter"] = float(np.mean(is_right))
    domains = {row.task: row.domain for row in rows}
    return CompositionScores(
        setting=setting,
        is_masked=is_masked,
        overall=bootstrap_macro(row_scores, seed=seed),
        per_domain={
            domain: float(np.mean([per_task[task]["main"] for task in per_task if domains[task] == domain]))
            for domain in dict.fromkeys(domains.values())
        },
        per_task=per_task,
        row_scores=row_scores,
    )


def _heaviest(composition: Composition) -> str:
    return max(composition.adapters, key=lambda member: member.weight).name
