"""What is in the wheel that users install. `make wheel` builds it and names it in `WHEEL`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif("WHEEL" not in os.environ, reason="no wheel was built: run `make wheel`")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(os.environ["WHEEL"]) as wheel:
        wheel.extractall(folder)
    return folder


def test_both_packages_are_in_it_and_typed(unpacked: Path) -> None:
    """The package, the kernels, their type markers and the demo's adapters; no tests, no `kernels` package."""
    for path in (
        "langchain_lora_retriever/py.typed",
        "lora_retriever_kernels/py.typed",
        "langchain_lora_retriever/demo/pool",
    ):
        assert (unpacked / path).exists(), path
    assert not (unpacked / "kernels").exists()
    assert not (unpacked / "tests").exists()


def test_it_imports_by_itself(unpacked: Path) -> None:
    """The unpacked wheel imports and shows its public names, without the checkout on the path."""
    code = "import langchain_lora_retriever as l; print(l.__file__); [getattr(l, n) for n in l.__all__]"
    result = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(unpacked)!r}); {code}"],
        capture_output=True, text=True, check=True, cwd=unpacked,
    )  # fmt: skip
    assert result.stdout.startswith(str(unpacked))
