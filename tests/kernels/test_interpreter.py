"""Run in Triton's interpreter what needs it: it can only be chosen before Triton is first imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
# Files, and which of their tests; a long file in two parts, each with a time limit of its own.
PARTS = (
    ("kernels/test_chosen_tokens.py", ""),
    ("kernels/test_decoder_kernels.py", ""),
    ("kernels/test_few_tokens.py", ""),
    ("kernels/test_lora_kinds.py", ""),
    ("kernels/test_paged_attention.py", ""),
    ("integration/test_engine_paged.py", "triton_backend_gives"),
    ("integration/test_engine_paged.py", "triton_backend and not triton_backend_gives"),
    ("integration/test_engine_kinds.py", "triton_backend"),
)


@pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="they run where they stand"
)
@pytest.mark.parametrize(("file", "which"), PARTS)
def test_in_the_interpreter(file: str, which: str) -> None:
    """The file's Triton tests pass in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), "-k", which]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
