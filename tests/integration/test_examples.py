"""The examples run as they are, on the demo model."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest

from langchain_lora_retriever import demo
from langchain_lora_retriever.testing import FakeEngine

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.demo, pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("rag", [], "fields stand in their documents"),
        ("agent", [], "function_calling"),
        ("mixed_batch", ["--prompts", "60", "--one-by-one", "6"], "tokens/s"),
        ("streaming_chain", [], "input_tokens"),
        ("multi_turn", [], "assistant"),
    ],
)
def test_example(name: str, arguments: list[str], expected: str, capsys, monkeypatch) -> None:
    """The script runs through and prints what it promises."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    spec.loader.exec_module(module)
    result = module.main()
    if inspect.iscoroutine(result):
        asyncio.run(result)
    assert expected in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:refused")
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run one after the other, on an engine without a model; none keeps what an earlier run has printed."""
    make = demo.demo_chat_model
    monkeypatch.setattr(demo, "demo_chat_model", lambda **settings: make(engine=FakeEngine(), **settings))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"]
        code = compile("".join(cell["source"]), cell["id"], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, namespace)
        if inspect.iscoroutine(result):
            asyncio.run(result)
