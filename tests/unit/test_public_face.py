"""What `import langchain_lora_retriever` offers, and what it costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import langchain_lora_retriever

HEAVY = ("torch", "transformers", "langchain_core", "faiss", "sentence_transformers", "triton", "peft")


def test_importing_loads_nothing_heavy() -> None:
    """Neither torch nor LangChain is loaded until a name that needs it is used."""
    code = f"import sys, langchain_lora_retriever; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_all_is_sorted_and_complete() -> None:
    """`__all__` is sorted, every name in it resolves, and `dir` shows them all."""
    assert langchain_lora_retriever.__all__ == sorted(langchain_lora_retriever.__all__)
    for name in langchain_lora_retriever.__all__:
        assert getattr(langchain_lora_retriever, name).__name__ == name
    assert set(langchain_lora_retriever.__all__) <= set(dir(langchain_lora_retriever))


def test_unknown_names_are_attribute_errors() -> None:
    """A typo says which module lacks which name."""
    with pytest.raises(AttributeError, match="no attribute 'ChatLoraRetreiver'"):
        langchain_lora_retriever.ChatLoraRetreiver  # noqa: B018 - the access is the test


def test_errors_are_all_in_the_tree() -> None:
    """Every exception derives from the one base and is drawn in the module's docstring."""
    errors = importlib.import_module("langchain_lora_retriever.errors")
    for name in sorted(set(errors.__all__) - {"fresh", "without_frames"}):
        assert issubclass(getattr(errors, name), errors.LoraRetrieverError)
        assert name in errors.__doc__ or name == "LoraRetrieverError"


def test_kernels_is_no_package() -> None:
    """A regular package called `kernels` would shadow the PyPI project that transformers probes for."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin
