"""`lora-retriever evaluate`: how often the right adapter is found, and how well composed adapters answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from langchain_lora_retriever.cli.options import (
    BaseModelOption,
    EncoderOption,
    JsonOption,
    PoolOption,
    WordsOption,
    encoder_source,
    make_chat_model,
    make_encoder,
    new_commands,
    sees_words,
)
from langchain_lora_retriever.cli.terminal import bar, new_progress, print_json, print_table
from langchain_lora_retriever.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from langchain_lora_retriever.evaluation import (
        Benchmark,
        CompositionReport,
        RetrievalReport,
        Setting,
        SplitsReport,
    )
    from langchain_lora_retriever.evaluation.retrieval import Accuracy
    from langchain_lora_retriever.pool.pool import AdapterPool
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever

__all__ = ["commands"]

commands = new_commands("Measure retrieval and composition on test rows.")

TestOption = Annotated[
    Path,
    typer.Option(
        "--test", metavar="FILE", help="JSON list of rows: inputs, targets, task, and perhaps domain, metric.",
        exists=True, dir_okay=False,
    ),
]  # fmt: skip
CardsOption = Annotated[
    Path | None,
    typer.Option(
        "--cards", metavar="FILE", help="JSON list of adapters and their samples; the pool's by default.",
        show_default=False, exists=True, dir_okay=False,
    ),
]  # fmt: skip
RowsOption = Annotated[
    int | None,
    typer.Option("--rows", metavar="N", help="Maximum number of rows per task.", min=1, show_default=False),
]
PlotsOption = Annotated[
    Path | None,
    typer.Option(
        "--plots", metavar="FOLDER", help="Folder to draw pictures in (needs matplotlib).", show_default=False
    ),
]


@commands.command(short_help="How often is the right adapter found?")
def retrieval(
    test: TestOption,
    *,
    cards: CardsOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    words: WordsOption = None,
    top_k: Annotated[list[int], typer.Option("--top-k", metavar="K", help="May be repeated.", min=1)] = [1, 3, 5, 8],  # noqa: B006 - typer reads it
    rows: RowsOption = None,
    splits: Annotated[
        int, typer.Option("--splits", metavar="N", help="Train on so many random shares of the adapters.", min=0)
    ] = 0,
    fraction: Annotated[
        float,
        typer.Option("--fraction", metavar="SHARE", help="Share of the adapters to train on.", min=0.0, max=1.0),
    ] = 0.4,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="Folder for the encoders of the splits.", show_default=False),
    ] = None,
    plots: PlotsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score how often the right adapter is among the first k, all adapters competing."""
    from langchain_lora_retriever.evaluation import evaluate_retrieval, evaluate_splits  # noqa: PLC0415 - seconds
    from langchain_lora_retriever.evaluation.benchmark import CardPool  # noqa: PLC0415 - the same
    from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder  # noqa: PLC0415 - the same
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever  # noqa: PLC0415 - the same

    if splits and output is None:
        raise InvalidRequestError("--splits trains encoders: name a folder for them with --output.")
    benchmark = _benchmark(cards, None if cards else _pool(pool), test, rows)
    embedder = make_encoder(encoder, words=words)
    with new_progress() as progress:
        report = evaluate_retrieval(benchmark, embedder, top_k=top_k, progress=bar(progress, "Retrieving"))
    trained = None
    if output is not None and splits:
        trained = evaluate_splits(
            benchmark,
            encoder_source(encoder),
            output_dir=output,
            fraction=fraction,
            seeds=range(splits),
            top_k=top_k,
            wrap=HybridEncoder if sees_words(encoder, words) else None,
            show_progress=not as_json and sys.stderr.isatty(),
        )
    if as_json:
        print_json({"retrieval": report.to_dict(), "splits": trained and trained.to_dict()})
    else:
        _print_retrieval(report, trained)
    if plots is not None:
        retriever = LoraRetriever(CardPool(benchmark.cards), embedder)
        _plot(plots, retriever, benchmark, "accuracy.png", _curves(report, trained), "right adapter among them, %")


@commands.command(short_help="How well does each composition answer?")
def composition(
    test: TestOption,
    *,
    cards: CardsOption = None,
    base_model: BaseModelOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    words: WordsOption = None,
    top_k: Annotated[
        list[int], typer.Option("--top-k", metavar="K", help="Adapters of a fusion or mixture; may be repeated.", min=1)
    ] = [3],  # noqa: B006 - typer reads it
    weight_temperature: Annotated[
        list[float] | None,
        typer.Option("--weight-temperature", metavar="T", help="A mixture with similarity weights; may be repeated."),
    ] = None,
    soup: Annotated[
        bool, typer.Option("--soup", metavar="", help="One uniform fusion for all prompts (AdapterSoup).")
    ] = False,
    random_fusion: Annotated[
        bool,
        typer.Option("--random-fusion", metavar="", help="A fusion of adapters drawn at random (LoraHub's start)."),
    ] = False,
    rows: RowsOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            min=1,
            show_default=False,
            help="Maximum number of tokens of an answer; follows the task's samples by default.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FILE", help="File of answers already generated.", show_default=False),
    ] = None,
    plots: PlotsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the base model, the oracle, selection, fusion, mixture and the default, right adapter there and masked."""
    from langchain_lora_retriever.evaluation import Setting, evaluate_composition, paper_settings  # noqa: PLC0415 - seconds

    is_given = encoder is not None or words is not None
    llm = make_chat_model(base_model, pool, make_encoder(encoder, words=words) if is_given else None)
    benchmark = _benchmark(cards, llm.pool, test, rows)
    retriever = llm.retriever
    settings = [*paper_settings(top_k), Setting.default()]
    settings += [
        Setting("mixture", top_k=k, weights="similarity", temperature=temperature)
        for temperature in weight_temperature or ()
        for k in top_k
    ]
    settings += [Setting("soup", top_k=k) for k in top_k if soup]
    settings += [Setting("random", top_k=k) for k in top_k if random_fusion]
    with new_progress() as progress:
        report = evaluate_composition(
            benchmark,
            llm.pool,
            llm.runtime.engine,
            retriever,
            settings=settings,
            max_tokens=max_tokens,
            cache=cache,
            progress=bar(progress, "Answering"),
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _print_composition(report)
    if plots is not None:
        _plot(plots, retriever, benchmark, "composition.png", _score_curves(report, settings), "macro average, %")


def _pool(folder: Path | None) -> AdapterPool:
    from langchain_lora_retriever.demo import demo_pool  # noqa: PLC0415 - loads torch
    from langchain_lora_retriever.pool.pool import AdapterPool  # noqa: PLC0415 - the same

    return demo_pool() if folder is None else AdapterPool(folder)


def _benchmark(cards: Path | None, pool: AdapterPool | None, test: Path, rows: int | None) -> Benchmark:
    from langchain_lora_retriever.evaluation import benchmark_from_pool, load_benchmark  # noqa: PLC0415 - seconds

    if cards is not None:
        benchmark = load_benchmark(cards, test)
    else:
        assert pool is not None, "without cards there is a pool"
        benchmark = benchmark_from_pool(pool, test)
    return benchmark if rows is None else benchmark.subset(rows)


def _curves(report: RetrievalReport, trained: SplitsReport | None) -> dict[str, Accuracy]:
    curves = {"as it is": report.accuracy}
    if trained is not None:
        curves |= {f"trained, {part} adapters": accuracy for part, accuracy in trained.mean.items()}
    return curves


def _score_curves(report: CompositionReport, settings: Iterable[Setting]) -> dict[str, Accuracy]:
    """Macro average by k, for each method that has a k and each condition."""
    curves: dict[str, dict[int, float]] = {}
    for score in report.scores:
        if score.setting in settings and score.setting.label.startswith(f"{score.setting.method} k="):
            label = score.setting.label.replace(f" k={score.setting.top_k}", "") + ", masked" * score.is_masked
            curves.setdefault(label, {})[score.setting.top_k] = score.overall.value
    return dict(curves)


def _plot(
    folder: Path,
    retriever: LoraRetriever,
    benchmark: Benchmark,
    name: str,
    curves: Mapping[str, Accuracy],
    label: str,
) -> None:
    from langchain_lora_retriever.evaluation import plots  # noqa: PLC0415 - loads numpy

    names, vectors = plots.adapter_vectors(retriever)
    plots.plot_similarity(folder / "similarity.png", names, vectors, domains=benchmark.domains)
    plots.plot_map(folder / "map.png", names, vectors, domains=benchmark.domains)
    plots.plot_accuracy(folder / name, curves, label=label)


def _print_retrieval(report: RetrievalReport, trained: SplitsReport | None) -> None:
    rows = [(report.encoder, *(f"{share:.1%}" for share in report.accuracy.values()))]
    if trained is not None:
        for part, accuracy in trained.mean.items():
            label = f"trained on {trained.fraction:.0%}, {part}"
            spread = trained.deviation[part]
            rows.append((label, *(f"{share:.1%} ± {spread[k]:.1%}" for k, share in accuracy.items())))
    columns = ("retrieval", *(f"top {k}" for k in report.accuracy))
    print_table(columns, rows, title=f"{report.num_rows} rows, {report.num_adapters} adapters")


def _print_composition(report: CompositionReport) -> None:
    scores: dict[str, dict[bool, str]] = {}
    for score in report.scores:
        value, low, high = score.overall
        scores.setdefault(score.setting.label, {})[score.is_masked] = f"{value:.1%} ({low:.1%} to {high:.1%})"
    rows = [(label, by_mask.get(False, "-"), by_mask.get(True, "-")) for label, by_mask in scores.items()]
    print_table(("composition", "all adapters", "right adapter masked"), rows, title=f"{report.num_rows} rows")
