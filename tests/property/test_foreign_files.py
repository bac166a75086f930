"""Folders of strangers: whatever lies in them is loaded or refused by name, soon, and the good ones beside it serve.

`FOREIGN_FILES=100000 FOREIGN_FILES_SEED=1 python -m pytest tests/property/test_foreign_files.py` runs longer.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import random
import shutil
import socket
import struct
import time
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.errors import AdapterError, InvalidRequestError, LoraRetrieverError
from langchain_lora_retriever.pool.pool import AdapterPool
from langchain_lora_retriever.types import SamplingParams
from makers import make_tiny_model, make_tokenizer

NUM_FOLDERS = int(os.environ.get("FOREIGN_FILES", "2000"))
SEED = int(os.environ.get("FOREIGN_FILES_SEED", "0"))
NUM_IN_POOL = 50
MAX_SECONDS = 30  # of a pool of fifty, each of which may spend a second on its patterns
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAMPLES, EMBEDDING = "samples.jsonl", "embedding.npy"
FILES = [CONFIG, WEIGHTS, SAMPLES, EMBEDDING, "embedding.json"]

EXTREMES = [
    None, True, False, 0, 1, -1, 4, 1.5, 1e308, -1e308, 10**400, float("nan"), float("inf"), "", "x", "q_proj",
    "\ud800", "\x00", "a" * 50_000, [], [[]], [None], ["q_proj"], [1, 2], ["x"] * 5000, {}, {"a": {}}, {"q_proj": 4},
    {"": None}, {"q_proj": 10**400}, {"r": "x"}, "all-linear", "((((", "(?i)", r"\d{9999999999}", "[" * 200, "../../x",
    {"x": [{}] * 100},
]  # fmt: skip
PATTERNS = [
    r"(([a-z._0-9]+)+)+\$", r"(a|a)*b", r"(.*)*(.*)*x$", "(?:" * 500 + "a" + ")" * 500, r"(?:a?|.){500}Q", r".*q_proj",
    r"(?:\b){99999999}Q", r"(.)\1", "(?P<a>.)(?P<a>.)", r"(?<=.*)q", "|" * 9999, r"^(model)(?!.*lm_head).*", "(" * 9000,
    "[" + "a-z" * 3000 + "]+", r"(?>a)", r"a++", "\\", "(?i)" + r"[\x00-\U0010ffff]" * 100, ".*" * 200, "",
]  # fmt: skip
TEXTS = [
    b"", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 1_000_000, b"-", b"nul", b"NaN",
    b'"\\ud800"', b"\x00" * 5000, b"{}", b"[]", b'{"input": "a"}', b'{"input": 1e999}',
    b'{"input": ' + b"1" * 5000 + b"}",
    b'{"input": "\\ud800 abc"}', b"\n" * 100_000, b'"' + b"a" * 200_000 + b'"',
    b'{"input": "' + b"b" * 2_000_000 + b'"}',
    b"PK\x03\x04" * 20, b"\x93NUMPY", b"\x80\x04K\x01.", b'{"input": "a", "input": "b"}', b"\r\n\r\n",
    b"1e" + b"9" * 5000,
]  # fmt: skip


def in_file(rng, folder):
    """Any file."""
    return folder / rng.choice(FILES)


def flip_bytes(rng, folder):
    """Change some bytes of a file."""
    file = in_file(rng, folder)
    data = bytearray(file.read_bytes())
    limit = rng.choice([len(data), min(len(data), 400)])
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(limit)] = rng.choice([0, 255, 34, 123, 91, rng.randrange(256)])
    file.write_bytes(data)


def cut(rng, folder):
    """Shorten a file, or lengthen it."""
    file = in_file(rng, folder)
    data = file.read_bytes()
    file.write_bytes(
        data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + rng.randbytes(rng.randrange(1, 99))
    )


def write_text(rng, folder):
    """Put something else in place of a file's content, or after it."""
    file = in_file(rng, folder)
    text = rng.choice(TEXTS)
    file.write_bytes(text if rng.random() < 0.7 else file.read_bytes() + text)


def swap(rng, folder):
    """Give a file another one's content."""
    in_file(rng, folder).write_bytes(in_file(rng, folder).read_bytes())


def set_value(rng, folder):
    """Set a field of the configuration, or an unknown one, to an extreme value."""
    config = json.loads((folder / CONFIG).read_text())
    config[rng.choice([*config, "unknown", "\ud800"])] = rng.choice(EXTREMES)
    (folder / CONFIG).write_text(json.dumps(config))


def set_pattern(rng, folder):
    """Set a field that is matched with modules to a pattern."""
    config = json.loads((folder / CONFIG).read_text())
    pattern, field = (
        rng.choice(PATTERNS),
        rng.choice(["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"]),
    )
    config[field] = {pattern: rng.choice(EXTREMES), "q_proj": 4} if field.endswith("pattern") else pattern
    if rng.random() < 0.2:
        config |= {"layers_to_transform": [0, 1], "layers_pattern": pattern, "target_modules": ["q_proj", "v_proj"]}
    (folder / CONFIG).write_text(json.dumps(config))


def set_header(rng, folder):
    """Change an entry of the weights' header, add or drop one, or lie about the header's length."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    key = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.randrange(6)
    if kind == 0:
        header[key][rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(
            [*EXTREMES, "I8", "F64", "F4", [4, 64, 1], [4], [64, 4], [1 << 40, 1 << 40], [0, 1 << 62], [-1, 3], [0, 0]]
        )
    elif kind == 1:
        header[
            rng.choice(["x", key + "x", key.replace("weight", "default.weight"), "", "\ud800", key.replace("_A", "_B")])
        ] = rng.choice([header[key], *EXTREMES])
    elif kind == 2:
        del header[key]
    elif kind == 3:
        header[key.replace("layers", rng.choice(["", "layers._orig_mod", "a" * 600, "\n"]))] = header.pop(key)
    elif kind == 4:
        header["__metadata__"] = rng.choice(EXTREMES)
    text = json.dumps(header).encode()
    length = rng.choice([0, 1, 7, 1 << 24, 1 << 40, (1 << 64) - 1, len(text) + 1]) if kind == 5 else len(text)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + text + rest)


def set_numbers(rng, folder):
    """Put NaN, infinite or huge numbers into the weights."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    place = len(data) - 4 * rng.randrange(1, 100)
    data[place : place + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), 3e38, -1e30, 1e-45, 0.0]))
    (folder / WEIGHTS).write_bytes(data)


def set_embedding(rng, folder):
    """Write an array of another kind, or a header that promises one."""
    header = rng.choice([
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }", "(" * 900, "-" * 900, "[" * 60_000,
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "{'descr': '''", "{'descr': '<f4', 'shape': (-1,)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (8,), }", "{**" * 100, "'a'" * 300,
        "1if 1else " * 90,
        "{'descr': '<V999999999', 'fortran_order': False, 'shape': (8,), }", "__import__('os').abort()", "{}", "\x00",
    ])  # fmt: skip
    text = header.encode("latin-1") + b"\n"
    if rng.random() < 0.6:
        (folder / EMBEDDING).write_bytes(
            b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) & 0xFFFF) + text + bytes(32)
        )
        return
    array = rng.choice([
        np.array([]), np.zeros(8), np.ones((2, 2)), np.array([np.nan]), np.array(["a"]), np.array(3.0),
        np.full(4, 1e39), np.array([1 + 2j]), np.array([True]), np.arange(9, dtype=">f2"),
        np.full(3, np.iinfo(np.uint64).max),
        np.ones(1 << 18),
    ])  # fmt: skip
    stream = io.BytesIO()
    np.save(stream, array)
    (folder / EMBEDDING).write_bytes(stream.getvalue())


INVOCATIONS = [
    [], [5], [5, 6], [319], [320], [1 << 30], [1 << 40], [-1], ["5"], [None], [5.0], [True], [[5]], "5", 5, {},
    [7] * 1024, [7] * 1025, [7] * 100_000,
]  # fmt: skip


def set_kind(rng, folder):
    """Say that it is of another kind than its tensors are, or invoked by other tokens."""
    config = json.loads((folder / CONFIG).read_text())
    field = rng.choice(["use_dora", "alora_invocation_tokens", "ensure_weight_tying", "use_rslora", "target_modules"])
    if field == "alora_invocation_tokens":
        config[field] = rng.choice(INVOCATIONS)
    elif field == "target_modules":
        config[field] = rng.choice(["all-linear", ["lm_head"], ["embed_tokens"], r".*", r".*(q_proj|embed_tokens)"])
    else:
        config[field] = not config[field]
    (folder / CONFIG).write_text(json.dumps(config))


def set_tensor(rng, folder):
    """Drop a tensor, or change its size, its numbers, its type or its name: of a magnitude, an embedding, any other."""
    tensors = load_file(folder / WEIGHTS)
    key = rng.choice(sorted(tensors))
    tensor = tensors.pop(key)
    change = rng.choice([
        lambda t: None, lambda t: t[:-1], lambda t: torch.cat([t, t], -1), lambda t: torch.cat([t, t[:8]]),
        lambda t: t[None], lambda t: t * 0, lambda t: -t, lambda t: t * 1e30, lambda t: t * 1e-30, lambda t: t / 0,
        lambda t: t * math.nan, torch.Tensor.half, torch.Tensor.double, torch.Tensor.int, torch.flatten, torch.t,
    ])  # fmt: skip
    changed = change(tensor)
    if changed is not None:
        old, new = rng.choice([("", ""), ("", ""), ("q_proj", "k_proj"), ("embed_tokens", "lm_head"), ("_A", "_B")])
        tensors[key.replace(old, new) if old else key] = changed.clone(memory_format=torch.contiguous_format)
    save_file(tensors, folder / WEIGHTS)


def replace_file(rng, folder):
    """Put something in a file's place that is none, or a link."""
    file = in_file(rng, folder)
    file.unlink()
    kind = rng.randrange(9)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        with contextlib.chdir(folder), contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
            listening.bind(file.name)
    elif kind == 3:
        file.symlink_to(
            rng.choice(["/dev/zero", "/dev/null", "/dev/urandom", "/proc/self/mem", "/proc/self/environ", "/"])
        )
    elif kind == 4:
        file.symlink_to(rng.choice([file.name, "nowhere", "..", rng.choice(FILES), "x" * 200]))
    elif kind == 5:
        file.touch()
        os.truncate(file, rng.choice([0, 1, 8, 1 << 20, 1 << 30, 1 << 40]))  # sparse: nothing on disk
    elif kind == 6:
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    elif kind == 7:
        file.touch(mode=0o000)


MUTATIONS = [
    flip_bytes, flip_bytes, flip_bytes, cut, write_text, swap, set_value, set_value, set_value, set_pattern, set_header,
    set_header, set_numbers, set_embedding, replace_file, set_kind, set_kind, set_tensor, set_tensor,
]  # fmt: skip


def mutate(rng, folder):
    """Change a good folder in one to three ways."""
    rng.choice(MUTATIONS)(rng, folder)
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        files = [folder / name for name in FILES]
        if all(file.is_file() and not file.is_symlink() and file.stat().st_size < 1 << 25 for file in files):
            with contextlib.suppress(Exception):  # an earlier change has left nothing that this one could change
                rng.choice(MUTATIONS)(rng, folder)


def add_rest(folder):
    """Write the other files that an adapter may have."""
    (folder / "README.md").unlink(missing_ok=True)
    (folder / SAMPLES).write_text("".join(json.dumps({"input": f"question {i}"}) + "\n" for i in range(5)))
    np.save(folder / EMBEDDING, np.ones(8, np.float32))
    (folder / "embedding.json").write_text('{"encoder": "words"}')
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory, make_checkpoint):
    """A folder with all files that an adapter may have."""
    return add_rest(make_checkpoint(tmp_path_factory.mktemp("good") / "good"))


@pytest.fixture(scope="module")
def rich(tmp_path_factory, make_checkpoint):
    """One with all kinds of tensors: magnitudes, an embedding's factors, and the base's own weight of it."""
    lora = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "saves_base": "auto"}
    return add_rest(make_checkpoint(tmp_path_factory.mktemp("rich") / "rich", **lora))


@pytest.fixture(scope="module")
def worker():
    """An engine over the model that the adapters are for, ready for every kind."""
    config = EngineConfig(
        max_num_seqs=8, kv_cache_bytes=2 << 20, lora_cache_bytes=16 << 20, adapter_kinds=("vocabulary", "dora")
    )
    with EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config) as worker:
        yield worker
        worker.check_integrity()


def serve(worker, pool, names):
    """What the good adapter answers beside all others that were loaded; those are refused in words, or run."""
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    prompt = [5, 6, 17, 99, 5, 6, 8]
    errors = {n: r.error for n, r in zip(names, worker.register([pool[n] for n in names]), strict=True)}
    running = {name: worker.submit(prompt, sampling, [(pool[name], 1.0)]) for name in names if errors[name] is None}
    for name, error in errors.items():
        assert error is None or (isinstance(error, AdapterError) and f"{name!r}" in str(error))
        if error is not None:
            with pytest.raises(InvalidRequestError):
                worker.submit(prompt, sampling, [(pool[name], 1.0)])
    good = worker.submit(prompt, sampling, [(pool["good-a"], 1.0)]).result(60)
    for generation in running.values():
        with contextlib.suppress(LoraRetrieverError):
            generation.result(60)
    return good.token_ids


def test_whatever_lies_in_a_folder_the_others_serve(good, rich, worker, tmp_path, caplog):
    """Thousands of folders, each changed at random: none is unhandled, none hangs, the good ones are what they were.

    Those that load are run in an engine, where they fit, and change nothing that the good ones answer.
    """
    rng = random.Random(SEED)
    caplog.set_level(logging.CRITICAL)
    alone = AdapterPool(good.parent)["good"]
    fingerprint, answer = alone.fingerprint, None
    num_loaded = num_refused = 0
    while num_loaded + num_refused < NUM_FOLDERS:
        root = tmp_path / "pool"
        names = [f"bad-{i}" for i in range(min(NUM_IN_POOL, NUM_FOLDERS - num_loaded - num_refused))]
        for name in ("good-a", *names, "good-z"):
            shutil.copytree(rich if name.startswith("bad") and rng.random() < 0.3 else good, root / name)
        for name in names:
            mutate(rng, root / name)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pool = AdapterPool(root)
        assert time.perf_counter() - start < MAX_SECONDS
        assert {pool["good-a"].fingerprint, pool["good-z"].fingerprint} == {fingerprint}
        assert {*pool.names, *pool.rejected} <= {"good-a", *names, "good-z"}
        for name in names:
            if name in pool:
                weights = dict(pool[name].weights)
                tensors = [t for w in weights.values() for t in (w.lora_A, w.lora_B, w.magnitude) if t is not None]
                assert all(torch.isfinite(tensor).all() for tensor in tensors)
                assert all(torch.isfinite(tensor).all() for tensor in pool[name].base_weights.values())
                num_loaded += 1
            else:
                error = pool.rejected[name]
                assert isinstance(error, AdapterError)
                assert f"{name!r}" in str(error)
                assert len(str(error).encode()) < 2000
                num_refused += 1
        served = serve(worker, pool, [name for name in names if name in pool])
        assert served == (answer := answer or served)
        shutil.rmtree(root)
    assert num_loaded + num_refused == NUM_FOLDERS
    assert num_refused > NUM_FOLDERS // 2
    assert num_loaded > NUM_FOLDERS // 50
