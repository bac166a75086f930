"""Children that end with whoever started them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import langchain_lora_retriever
from makers import wait_until


def is_there(process: int) -> bool:
    """Whether a process lives; one that has ended and is not asked for yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_worker_ends_with_its_parent() -> None:
    """Also in the middle of its work, and by no interrupt of the terminal's before."""
    child = """
        import os, sys, time
        from langchain_lora_retriever.support.parents import end_with
        end_with(os.getppid())
        print(os.getpid(), flush=True)
        time.sleep(60)
    """
    parent = f"""
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", {textwrap.dedent(child)!r}])
        time.sleep(60)
    """
    path = str(Path(langchain_lora_retriever.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as started:
        assert started.stdout is not None
        worker = int(started.stdout.readline())
        os.kill(worker, 2)
        time.sleep(0.2)
        assert is_there(worker)
        started.kill()
        wait_until(lambda: not is_there(worker))
