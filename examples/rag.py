"""Retrieval-augmented generation: facts from documents, routed on the question and checked against their source.

    python examples/rag.py

The corpus is what the Python packages installed here say of themselves, in a FAISS index, embedded by the encoder that
routes. The prompt holds question and document; the adapters are chosen for the question alone (`route_text`), control
tokens in a document cannot end the user's turn, and the answer is JSON of a schema whatever the model.
"""

from __future__ import annotations

from importlib.metadata import PackageMetadata, distributions
from operator import itemgetter
from typing import Any

import faiss
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from pydantic import BaseModel

from langchain_lora_retriever.demo import demo_chat_model
from langchain_lora_retriever.retrieval.encoder import DEFAULT_ENCODER, SentenceTransformerEncoder

TOPICS = ("array computing", "validating data by type hints", "progress bars", "searching similar vectors", "templates")
QUESTION = "Extract the name, version, license of this package as JSON."


class Package(BaseModel):
    """What is asked of a document."""

    name: str
    version: str
    license: str


class DocumentStore:
    """Documents in a FAISS index."""

    def __init__(self, documents: list[str]) -> None:
        self.documents = documents
        self._encoder = SentenceTransformerEncoder(DEFAULT_ENCODER)
        vectors = self._encoder.encode(documents)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)

    def nearest(self, text: str) -> str:
        """Return the document nearest to a text."""
        _, found = self._index.search(self._encoder.encode([text]), 1)
        return self.documents[found[0][0]]


def load_corpus() -> list[str]:
    """Describe every installed package that has a summary, each once."""
    found = {dist.metadata["Name"]: dist.metadata for dist in distributions()}
    return [describe(metadata) for _, metadata in sorted(found.items()) if "Summary" in metadata]


def describe(metadata: PackageMetadata) -> str:
    """Write a package's metadata as a sentence or three."""
    parts = [f"{metadata['Name']} {metadata['Version']}: {metadata['Summary'].rstrip('.')}."]
    for key in ("License-Expression", "License"):
        if key in metadata and len(metadata[key]) < 60:
            parts.append(f"License: {metadata[key]}.")
            break
    if "Requires-Python" in metadata:
        parts.append(f"Needs Python {metadata['Requires-Python']}.")
    return " ".join(parts)


def grounded(inputs: dict[str, Any]) -> dict[str, bool]:
    """Say of every field whether its value stands in the document it is said to be from."""
    return {key: bool(value) and value in inputs["document"] for key, value in inputs["answer"].model_dump().items()}


def main() -> None:
    """Ask about every topic's package, and show documents, answers and which fields are found in their source."""
    store = DocumentStore(load_corpus())
    llm = demo_chat_model(max_tokens=64)
    chain = (
        RunnablePassthrough.assign(document=itemgetter("topic") | RunnableLambda(store.nearest))
        | RunnablePassthrough.assign(
            answer=RunnableLambda(lambda inputs: f"{QUESTION}\n{inputs['document']}")
            | llm.with_structured_output(Package, route_text=QUESTION)
        )
        | RunnablePassthrough.assign(grounded=grounded)
    )
    results = chain.batch([{"topic": topic} for topic in TOPICS])
    print(f"{len(store.documents)} documents; adapters {', '.join(llm.route(QUESTION).names)}")
    for result in results:
        print(f"\n{result['topic']}\n   {result['document'][:100]}")
        for key, value in result["answer"].model_dump().items():
            print(f"   {key:8} {value}{'' if result['grounded'][key] else '   (not in the document)'}")
    fields = [is_found for result in results for is_found in result["grounded"].values()]
    print(f"\n{sum(fields)} of {len(fields)} fields stand in their documents")


if __name__ == "__main__":
    main()
