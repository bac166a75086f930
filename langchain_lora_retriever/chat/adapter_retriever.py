"""Adapters as the documents of a LangChain retriever."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from langchain_lora_retriever.retrieval.retriever import LoraRetriever
from langchain_lora_retriever.types import RetrievedAdapter

__all__ = ["AdapterRetriever"]

_NUM_SAMPLES = 8
"""Samples that a document shows."""


class AdapterRetriever(BaseRetriever):
    """Finds the adapters of a pool for a text, as documents: for chains, rerankers and ensembles of retrievers.

    A document's `id` is the adapter's name, its content what the adapter was trained for: some of its samples, a line
    each, or the name where it has none. `metadata` holds `name` and `score`, the cosine that found it.

    Attributes:
        retriever: Finds them; a chat model has one (`llm.retriever`).
        top_k: How many.
        exclude: Names to leave out.

    Example:
        >>> AdapterRetriever(retriever=llm.retriever).invoke("How many users signed up?")  # doctest: +SKIP
        [Document(id='sql', metadata={'name': 'sql', 'score': 0.83}, page_content='How many users ...'), ...]
    """

    retriever: LoraRetriever
    top_k: int = Field(default=3, ge=1)
    exclude: list[str] = Field(default_factory=list)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        del run_manager
        return self._documents(self.retriever.retrieve(query, top_k=self.top_k, exclude=self.exclude))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        del run_manager
        return self._documents(await self.retriever.aretrieve(query, top_k=self.top_k, exclude=self.exclude))

    def _get_ls_params(self, **kwargs: Any) -> Any:
        return {**super()._get_ls_params(**kwargs), "ls_embedding_model": self.retriever.encoder.name}

    def _documents(self, found: list[RetrievedAdapter]) -> list[Document]:
        entries = self.retriever.pool.state.entries
        documents = []
        for adapter in found:
            samples = entries[adapter.name].samples[:_NUM_SAMPLES] if adapter.name in entries else ()
            content = "\n".join(sample.input for sample in samples) or adapter.name
            metadata = {"name": adapter.name, "score": adapter.score}
            documents.append(Document(id=adapter.name, page_content=content, metadata=metadata))
        return documents
