"""From a pickle to safetensors, in a process of its own that may do nothing else.

A pickle is a program. It is read here by torch's restricted unpickler (`weights_only=True`), which knows tensors and
refuses everything else; and because what it does know may still ask for any amount of memory and time, it runs in
another process, with limits on both, which is killed if it does not end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from langchain_lora_retriever.errors import InvalidAdapterError, UnsupportedAdapterError
from langchain_lora_retriever.pool.checkpoint_files import MAX_WEIGHTS_BYTES, PICKLE_FILE, WEIGHTS_FILE
from langchain_lora_retriever.pool.regular_files import RegularFile, said

__all__ = ["convert_pickle"]

MAX_SECONDS = 120.0
_MEMORY_FACTOR = 3  # of the file's size: its tensors, and each once more while they are written
_SPARE_BYTES = 256 << 20
_MAX_WORDS = 500


def convert_pickle(folder: Path, name: str, *, max_seconds: float = MAX_SECONDS) -> Path | None:
    """Write the tensors of a folder's `adapter_model.bin` beside it, as `adapter_model.safetensors`.

    Nothing of the pickle is executed, here or there. It may take three times its size and 256 MiB of memory, where the
    system can limit that (not on Windows), and is killed after `max_seconds`.

    Args:
        folder: A PEFT checkpoint.
        name: What to call it in an error.
        max_seconds: How long the process may take, its start included.

    Returns:
        The file that was written; None if the folder has its weights as safetensors already.

    Raises:
        UnsupportedAdapterError: If the pickle holds anything but tensors, or asks for too much memory or time.
        InvalidAdapterError: If there is none, it is no regular file, or the folder cannot be written to.
    """
    where, target = f"adapter {name!r} ({folder})", folder / WEIGHTS_FILE
    if target.exists():
        return None
    try:
        pickle = RegularFile(folder / PICKLE_FILE, MAX_WEIGHTS_BYTES)
    except (OSError, ValueError) as error:
        raise InvalidAdapterError(f"{where}: cannot read {PICKLE_FILE}: {said(error)}.") from error
    with contextlib.closing(pickle):
        try:
            descriptor, aside = tempfile.mkstemp(prefix=f".{WEIGHTS_FILE}.", dir=folder)
            os.close(descriptor)
        except OSError as error:
            raise InvalidAdapterError(
                f"{where}: {WEIGHTS_FILE} cannot be written beside {PICKLE_FILE}: {said(error)}. Copy the adapter to a "
                "folder that you may write to."
            ) from error
        try:
            _run(pickle, Path(aside), where, max_seconds)
            Path(aside).replace(target)
        finally:
            Path(aside).unlink(missing_ok=True)
    return target


def _run(pickle: RegularFile, target: Path, where: str, max_seconds: float) -> None:
    num_bytes = pickle.identity.num_bytes * _MEMORY_FACTOR + _SPARE_BYTES
    refused = f"{where}: {PICKLE_FILE} is refused: "
    advice = "Nothing of it was executed. Have it saved again with save_pretrained(), which writes safetensors."
    command = [sys.executable, "-m", "langchain_lora_retriever.pool.unpickle", str(target), str(num_bytes)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONSAFEPATH": "1",  # not what lies in the current folder
        "OMP_NUM_THREADS": "1",
    }
    with pickle.as_stdin() as stdin, tempfile.TemporaryFile() as words:
        try:
            code = subprocess.run(  # noqa: S603 - our own module
                command, stdin=stdin, stdout=words, stderr=words, timeout=max_seconds, check=False, env=environment
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise UnsupportedAdapterError(
                f"{refused}reading it took more than {max_seconds:g} seconds, and its process was killed. {advice}"
            ) from error
        words.seek(0, os.SEEK_END)
        words.seek(max(0, words.tell() - _MAX_WORDS))
        said_last = words.read().decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
    if code:
        reason = said_last or f"its process ended with {code}"
        raise UnsupportedAdapterError(f"{refused}{reason} (limits: {num_bytes:,} bytes, {max_seconds:g} s). {advice}")
