"""Mixed-task evaluation of retrieval and of composition, as the paper does it, on any pool."""

from langchain_lora_retriever.evaluation.benchmark import (
    Benchmark,
    CardPool,
    TestRow,
    benchmark_from_pool,
    load_benchmark,
)
from langchain_lora_retriever.evaluation.composition import (
    CompositionReport,
    Setting,
    evaluate_composition,
    paper_settings,
)
from langchain_lora_retriever.evaluation.inspection import PoolInspection, inspect_pool
from langchain_lora_retriever.evaluation.likelihood import AnswerLikelihood
from langchain_lora_retriever.evaluation.retrieval import (
    RetrievalReport,
    SplitsReport,
    evaluate_retrieval,
    evaluate_splits,
)

__all__ = [
    "AnswerLikelihood",
    "Benchmark",
    "CardPool",
    "CompositionReport",
    "PoolInspection",
    "RetrievalReport",
    "Setting",
    "SplitsReport",
    "TestRow",
    "benchmark_from_pool",
    "evaluate_composition",
    "evaluate_retrieval",
    "evaluate_splits",
    "inspect_pool",
    "load_benchmark",
    "paper_settings",
]
