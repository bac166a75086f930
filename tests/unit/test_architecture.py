"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "langchain_lora_retriever"

# The parts that know LangChain; everything else is a library of its own.
LANGCHAIN_ROOMS = {
    "answer_format",
    "answers",
    "ask",
    "chat_model",
    "chat_settings",
    "concurrency",
    "messages",
    "profiles",
    "readers",
    "structured_output",
    "template_reader",
    "tool_calls",
    "tools",
}
# What every part may import.
GROUND_FLOOR = {"base_names", "errors", "forking", "shown", "types"}
# Retrieval and composition: no LangChain, no engine.
RETRIEVAL_ROOMS = {
    "adapter_config", "adapter_folder", "adapters", "answer_fit", "aside", "composer", "encoder", "file_weights",
    "forking", "fusion", "hybrid_encoder", "index", "micro_batcher", "nesting", "patterns", "pool", "pool_folder",
    "retriever", "samples", "shown", "training", "vector_cache",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every module a file imports, at any level, with dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(*parts: str) -> list[Path]:
    """The Python files below a folder."""
    return sorted((ROOT.joinpath(*parts)).rglob("*.py"))


def room_of(module: str) -> str | None:
    """`encoder` of `langchain_lora_retriever.encoder.Encoder`; None for other packages."""
    match = re.match(rf"{PACKAGE}\.(\w+)", module)
    return match and match[1]


@pytest.mark.parametrize("path", files_of("kernels"), ids=lambda p: p.stem)
def test_kernels_know_torch_and_triton_only(path: Path) -> None:
    """The kernels can be used without the rest of the package."""
    own = {folder.name for folder in (ROOT / "kernels").iterdir() if folder.is_dir()}
    others = {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names - own
    assert others <= {"torch", "triton"}


@pytest.mark.parametrize("path", files_of(PACKAGE, "engine"), ids=lambda p: p.stem)
def test_the_engine_knows_no_langchain_and_no_retrieval(path: Path) -> None:
    """The engine gets token ids and adapters, and knows nothing of where they come from."""
    found = imports(path)
    assert {room for module in found if (room := room_of(module))} <= {"engine"} | GROUND_FLOOR
    assert not {module.split(".")[0] for module in found} & {"langchain_core", "faiss", "sentence_transformers", "peft"}


@pytest.mark.parametrize("room", sorted(RETRIEVAL_ROOMS))
def test_retrieval_knows_neither_langchain_nor_the_engine(room: str) -> None:
    """Adapters can be pooled, retrieved and composed without a model."""
    found = imports(ROOT / PACKAGE / f"{room}.py")
    assert "langchain_core" not in {module.split(".")[0] for module in found}
    assert {r for module in found if (r := room_of(module))} <= RETRIEVAL_ROOMS | GROUND_FLOOR


def test_only_the_rooms_that_face_langchain_import_it() -> None:
    """LangChain is known in few places, so that a new version of it changes few places."""
    found = {
        path.stem
        for path in files_of(PACKAGE)
        if any(module.split(".")[0] == "langchain_core" for module in imports(path))
    }
    assert found <= LANGCHAIN_ROOMS | {path.stem for path in files_of(PACKAGE, "demo")}


def test_the_ground_floor_knows_nobody() -> None:
    """Everything may import the ground floor because it imports nothing of the package but itself."""
    for stem in sorted(GROUND_FLOOR):
        rooms = {room for module in imports(ROOT / PACKAGE / f"{stem}.py") if (room := room_of(module))}
        assert rooms <= {"errors", "shown"}
