"""The documentation is true: its Python runs, what it quotes is said, and what it lists is all there is."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import shlex
import shutil
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import typer.main
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from pydantic import BaseModel

import langchain_lora_retriever
from agent_tools import Weather, get_weather, multiply
from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, EngineConfig, LoraRetriever, registry
from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.cli import commands
from langchain_lora_retriever.engine import start
from langchain_lora_retriever.evaluation import retrieval
from langchain_lora_retriever.output.format import OutputRequest
from langchain_lora_retriever.pool.hub import Hub, HubAdapter
from langchain_lora_retriever.pool.origin import HubOrigin
from langchain_lora_retriever.retrieval import hybrid_encoder
from langchain_lora_retriever.retrieval import retriever as retrievers
from langchain_lora_retriever.testing import FakeEngine
from makers import make_checkpoint
from servers import running

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)

NOT_RUN = (
    "load_base_model(", "ProcessEngine(", "VllmEngine(", "serve.run(", "demo_test_set(25)", "BitsAndBytesConfig(",
    "basicConfig(",
)  # fmt: skip
"""What stands in blocks that are not run: they load a model of the hub, measure for minutes, or stay in effect."""
SAMPLES = {
    "sql": ["How many users signed up in May?", "Select the names of all users from the table."],
    "french": ["Translate the sentence into French.", "How do you say good morning in French?"],
    "old-sql": ["Which tables are there?", "Count all rows."],
}
USED = ("sql", "french")


class LetterEncoder:
    """Embeds a text by its letters: no model, and any name."""

    dimension = 32

    def __init__(self, name: Any = "letters", **_: Any) -> None:
        self.name = str(name)

    def encode(self, texts: Any) -> Any:
        """Return letter counts `[n, 32]`."""
        rows = np.ones((len(texts), self.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for letter in text.lower():
                row[ord(letter) % self.dimension] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Answer(BaseModel):
    """What any schema of the pages is satisfied by, in `answer`."""

    name: str


def answer(prompt: str, names: list[str]) -> str:
    """Answer what the pages ask for: their schemas are satisfied, and agents end."""
    return '{"city": "Lisbon", "degrees": 21, "name": "x"}' if "Lisbon" not in prompt else '{"city": "x", "degrees": 2}'


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What pages take for granted: files in the current folder, models that load at once, and a few names."""
    monkeypatch.chdir(tmp_path)
    checkpoint = make_checkpoint(tmp_path / "checkpoints" / "sql")
    for folder in ("my-pool", "path/to/pool"):
        pool = AdapterPool(folder, create=True)
        for name, samples in SAMPLES.items():
            pool.add(name, checkpoint, samples=samples)
        pool.remove("sql")
    for path in ("path/to/adapter", "trained/units", "trained/prices", "trained_again/units"):
        shutil.copytree(checkpoint, tmp_path / path)
        (tmp_path / path / "samples.jsonl").write_text('{"input": "How long is it?"}\n')
    cards = [{"adapter_name": n, "samples": [{"inputs": i, "targets": "x"} for i in s]} for n, s in SAMPLES.items()]
    rows = [
        {"inputs": f"{text} Now.", "targets": "x", "task": n} for n, s in SAMPLES.items() for text in s if n in USED
    ]
    (tmp_path / "cards.json").write_text(json.dumps(cards))
    (tmp_path / "test.json").write_text(json.dumps(rows))
    engine = FakeEngine(answer, name="SmolLM2-135M-Instruct")
    monkeypatch.setattr(start, "load_base_model", lambda source, **_: SimpleNamespace(tokenizer=engine.tokenizer))
    monkeypatch.setattr(start, "EngineWorker", lambda *_, **__: engine)
    for module in (retrievers, hybrid_encoder, registry, retrieval):
        if hasattr(module, "SentenceTransformerEncoder"):
            monkeypatch.setattr(module, "SentenceTransformerEncoder", LetterEncoder)
    monkeypatch.setattr(Hub, "fetch", lambda _, name, **__: HubAdapter(checkpoint, HubOrigin(name, "0" * 40)))
    pool = AdapterPool()
    for name in USED:
        pool.add(name, checkpoint, samples=SAMPLES[name])
    llm = ChatLoraRetriever(engine=engine, retriever=LoraRetriever(pool, LetterEncoder()))
    yield {
        "AdapterPool": AdapterPool, "LoraRetriever": LoraRetriever, "StrOutputParser": StrOutputParser,
        "demo_chat_model": lambda **_: llm, "document": "numpy 2", "get_weather": get_weather, "inputs": {"x": "y"},
        "llm": llm, "messages": [HumanMessage("Hello.")], "multiply": multiply, "my_encoder": LetterEncoder(),
        "Order": Answer, "Package": Answer, "pool": pool, "prompt": "Hello.", "prompts": ["One.", "Two."],
        "question": "How many?",
        "retrieve": RunnableLambda(lambda inputs: f"About {inputs}."),
        "schema": {"type": "object", "properties": {"name": {"type": "string"}}},
        "Weather": Weather,
    }  # fmt: skip
    registry.close_engines()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if SNIPPET.search(page.read_text(encoding="utf-8"))], ids=lambda page: page.stem
)
def test_the_python_of_a_page_runs(page: Path, stage: dict[str, Any]) -> None:
    """All of it, in order, each block knowing what the ones before it have made."""
    if page.name == "streaming.md":
        stage["prompt"] = ChatPromptTemplate.from_template("{x}")
    if page.name == "evaluate.md":
        stage["trained"] = SimpleNamespace(accuracy={1: 0.5})
    with running(stage["llm"]) if page.name == "serving.md" else nullcontext("") as address:
        for snippet in SNIPPET.findall(page.read_text(encoding="utf-8")):
            if any(mark in snippet for mark in NOT_RUN):
                continue
            source = snippet.replace(", ...]", "]").replace("http://127.0.0.1:8000", str(address))
            code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            made = eval(code, stage)
            if inspect.iscoroutine(made):
                asyncio.run(made)


def command_lines(page: str) -> list[str]:
    """Those in a page's blocks, but for Python's, and in its sentences."""
    blocks = "".join(body for language, body in BLOCK.findall(page) if language != "python").replace("\\\n", " ")
    inline = re.findall(r"`(lora-retriever [^`|.]+)`", page.replace("\n", " "))
    return re.findall(r"^(?:\$ )?(lora-retriever .*)$", blocks, re.MULTILINE) + inline


def test_the_commands_of_the_pages_are_commands() -> None:
    """With options that there are; what they name need not be there."""
    lines = {line for page in PAGES for line in command_lines(page.read_text(encoding="utf-8"))}
    assert len(lines) > 40
    for line in lines - {"lora-retriever COMMAND --help"}:
        command: Any = typer.main.get_command(commands)
        context, words = command.context_class(command), shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            _, command, words = command.resolve_command(context, words)
            context = command.context_class(command, parent=context)
        command.make_parser(context).parse_args(words)  # raises for an option that there is not


def test_the_errors_explained_are_raised() -> None:
    """What the page on troubleshooting quotes stands in the code, but for the values in it."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "langchain_lora_retriever").rglob("*.py"))
    said = re.sub(r"\s+", " ", re.sub(r'"\s*\n\s*f?"', "", code))
    quotes = [
        part.strip(" '") for quote in re.findall(r'"([^"]+)"', re.sub(r"\s+", " ", page)) for part in quote.split("...")
    ]
    assert len(quotes) > 20
    assert [quote for quote in quotes if quote not in said] == []


def test_every_setting_of_the_engine_is_explained() -> None:
    """Each once, and no other."""
    page = (ROOT / "docs/engine-config.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` ", page, re.MULTILINE)) == sorted(
        field.name for field in fields(EngineConfig)
    )


def test_every_name_of_the_pages_is_in_the_reference() -> None:
    """What a page imports can be looked up: a public name of the package, or one that the reference lists."""
    listed = set(
        re.findall(r"^::: [\w.]+\.(\w+)$", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    imported = {
        alias.name
        for page in PAGES
        for snippet in SNIPPET.findall(page.read_text(encoding="utf-8"))
        for node in ast.walk(compile(snippet, str(page), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("langchain_lora_retriever")
        for alias in node.names
    }
    assert len(imported) > 20
    assert imported - listed - set(langchain_lora_retriever.__all__) == set()


def test_the_settings_of_a_call_are_told_apart() -> None:
    """The reference names those that the chat model does not have."""
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    of_the_answer = {field.name for field in fields(OutputRequest)}
    own = {field.name for field in fields(CallOptions)} - ChatLoraRetriever.model_fields.keys() - of_the_answer
    told = page.partition("All but ")[2].partition(" and those of")[0]
    assert set(re.findall(r"`(\w+)`", told)) == own


def test_the_navigation_names_every_page() -> None:
    """A page that nobody finds is not read."""
    named = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def test_links_of_the_readme_work_on_pypi() -> None:
    """PyPI knows no relative ones; those into this repository name files that are there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)|^\[[^]]+\]: (\S+)$", readme, re.MULTILINE)
    links = [inline or referred for inline, referred in links]
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []
    own = [link.partition("/main/")[2] for link in links if "/langchain-lora-retriever/" in link]
    assert [path for path in own if not (ROOT / path).exists()] == []
