"""Retrieval-augmented generation: answer questions from documents, routed on the question.

    python examples/rag.py

The corpus is the documentation of Python's standard library that every Python brings along. It lies in a FAISS index,
embedded by the demo's encoder. The prompt holds documents and question; the adapters are chosen for the question alone
(`route_text`), and control tokens in a document cannot end the user's turn.
"""

from __future__ import annotations

import importlib
import inspect
from operator import itemgetter

import faiss
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from langchain_lora_retriever.demo import demo_chat_model
from langchain_lora_retriever.demo.model import encoder_source
from langchain_lora_retriever.encoder import SentenceTransformerEncoder

MODULES = ("textwrap", "shutil", "heapq", "bisect", "random", "statistics", "fnmatch", "glob", "tempfile", "difflib")
QUESTIONS = ("How can I copy a file?", "Which function finds the median?", "How do I wrap a paragraph of text?")


class DocumentStore:
    """Documents in a FAISS index."""

    def __init__(self, documents: list[str]) -> None:
        self.documents = documents
        self._encoder = SentenceTransformerEncoder(encoder_source())
        vectors = self._encoder.encode(documents)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)

    def search(self, question: str, *, num: int = 2) -> list[str]:
        """Return the documents nearest to a question."""
        _, found = self._index.search(self._encoder.encode([question]), num)
        return [self.documents[i] for i in found[0]]


def load_corpus() -> list[str]:
    """Collect the first paragraph of the documentation of public functions, one document each."""
    documents = []
    for name in MODULES:
        module = importlib.import_module(name)
        for function_name, function in inspect.getmembers(module, inspect.isfunction):
            text = inspect.getdoc(function)
            if text and not function_name.startswith("_") and function.__module__ == name:
                documents.append(f"{name}.{function_name}: {text.split(chr(10) * 2)[0]}")
    return documents


def main() -> None:
    """Answer the questions, and show which documents and adapters answered."""
    store = DocumentStore(load_corpus())
    llm = demo_chat_model(max_tokens=48)
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer the question in one sentence from the documents."),
         ("human", "Documents:\n{documents}\n\nQuestion: {question}")]
    )  # fmt: skip

    chain = (
        RunnablePassthrough.assign(found=itemgetter("question") | RunnableLambda(store.search))
        | RunnablePassthrough.assign(documents=lambda inputs: "\n".join(inputs["found"]))
        | RunnablePassthrough.assign(prompt=prompt)
        | RunnableLambda(lambda inputs: llm.invoke(inputs["prompt"], route_text=inputs["question"]))
        | StrOutputParser()
    )
    print(f"{len(store.documents)} documents")
    answers = chain.batch([{"question": question} for question in QUESTIONS])
    for question, text in zip(QUESTIONS, answers, strict=True):
        print(f"\nQ: {question}\n   {llm.route(question).names}\n   {store.search(question, num=1)[0][:90]}\nA: {text}")


if __name__ == "__main__":
    main()
