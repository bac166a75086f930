"""Who may import whom, read from the source: the floors of docs/architecture.md."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "langchain_lora_retriever"
KERNELS = "lora_retriever_kernels"

GROUND = {"errors", "types", "support"}
# Each folder or module of the package, and what else of it that may import. A name stands for all that is in it.
FLOORS: dict[str, set[str]] = {
    "errors": set(),
    "support": {"errors"},
    "types": {"errors", "support"},
    "pool": GROUND,
    "retrieval": GROUND | {"pool"},
    "engine": GROUND,
    "output": GROUND | {"engine.api", "engine.grammar"},
    "runtime": GROUND | {"engine.api", "retrieval", "pool"},
    "registry": GROUND | {"engine", "retrieval", "pool", "runtime"},
    "chat": GROUND | {"engine", "retrieval", "pool", "output", "runtime", "registry"},
    "testing": GROUND | {"engine"},
    "adapter_training": GROUND | {"pool", "demo"},
    "evaluation": GROUND | {"engine", "retrieval", "pool", "chat"},
    "remote": GROUND | {"engine", "retrieval", "pool"},
    "vllm": GROUND | {"engine"},
    "serving": GROUND | {"engine.api", "engine.config", "output", "chat", "runtime", "remote", "evaluation", "demo"},
    "demo": GROUND | {"engine", "retrieval", "pool", "chat", "registry", "evaluation"},
    "cli": GROUND
    | {"engine", "retrieval", "pool", "chat", "registry", "runtime", "evaluation", "demo", "serving"}
    | {"adapter_training"},
}
# What of the outside only some may import: the floors that a new version of it may change.
OUTSIDE: dict[str, set[str]] = {
    "langchain_core": {"output", "chat", "serving", "demo", "cli"},
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "ray": {"remote.engine", "remote.replica", "remote.router", "serving.cluster"},
    "uvicorn": {"serving"},
    "prometheus_client": {"serving"},
    "faiss": {"retrieval"},
    "sentence_transformers": {"retrieval", "demo"},
    "peft": {"pool", "demo", "adapter_training"},
    "triton": set(),
    "tqdm": {"support", "cli"},
    KERNELS: {"engine.model", "vllm.layers"},
    "vllm": {"vllm"},
    "accelerate": {"engine.model"},
}
# Files of `engine` that must do without torch: those above it import them.
WITHOUT_TORCH = {"engine.api", "engine.config", "engine.generation", "engine.stats"}


def imports(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Every module a file imports, with dots; with `at_run_time` those alone that importing it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(ast.walk(tree))
    if at_run_time:
        nodes = list(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    """`engine.api` of `langchain_lora_retriever/engine/api.py`; a package's `__init__` is the package."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_in(module: str, names: set[str]) -> bool:
    """Whether a module is one of some names, or in one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
OWN = {module_of(path): path for path in FILES}


def own_imports(path: Path) -> set[str]:
    """The package's own modules among a file's imports."""
    found = {module.removeprefix(f"{PACKAGE}.") for module in imports(path) if module.startswith(f"{PACKAGE}.")}
    return {module for module in found if module in OWN}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_kernels_know_torch_and_triton_only(path: Path) -> None:
    """The kernels can be used without the rest of the package."""
    others = {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names
    assert others <= {"torch", "triton", KERNELS}


@pytest.mark.parametrize("module", sorted(set(OWN) - {""}))
def test_each_floor_imports_what_is_below_it(module: str) -> None:
    """No arrow goes up, and none to a neighbour that the floors do not name."""
    floor = module.split(".", maxsplit=1)[0]
    allowed = FLOORS[floor] | {floor}
    assert {other for other in own_imports(OWN[module]) if not is_in(other, allowed)} <= {""}


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_the_outside_is_known_in_few_places(name: str) -> None:
    """So that a new version of it changes few places."""
    found = {module for module, path in OWN.items() if name in {other.split(".")[0] for other in imports(path)}}
    assert {module for module in found if not is_in(module, OUTSIDE[name])} == set()


def test_nothing_of_the_engine_knows_the_model_but_its_room() -> None:
    """Model classes, configurations and caches of transformers; tokenizers are everybody's."""
    allowed = {"PreTrainedTokenizerBase", "PreTrainedTokenizerFast", "PreTrainedTokenizer"}
    for module, path in OWN.items():
        if is_in(module, {"engine"}) and not is_in(module, {"engine.model"}):
            known = {other for other in imports(path) if other.split(".")[0] == "transformers"} - {"transformers"}
            assert {other.removeprefix("transformers.") for other in known} <= allowed, module


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_the_seam_imports_no_torch(module: str) -> None:
    """Callers in processes without it can hold an engine."""
    assert "torch" not in {other.split(".")[0] for other in imports(OWN[module], at_run_time=True)}


def test_every_room_says_what_it_is() -> None:
    """A package's docstring says what may be touched there."""
    for module, path in OWN.items():
        if path.name == "__init__.py" and module:
            assert len(ast.get_docstring(ast.parse(path.read_text())) or "") > 60, module
