"""Families of base models, each against `generate` and PEFT; `docs/models.md` says what is found here.

`WRITE_MODEL_TABLE=1` writes the table. What runs fused is only known where Triton runs: on a GPU, or slowly with
`TRITON_INTERPRET=1`, by `-m gpu -k fused`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from model_families import FAMILIES, Family
from peft import PeftModel

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.engine.model.host_reads import HostReads
from langchain_lora_retriever.engine.model.outlook import look_ahead
from langchain_lora_retriever.errors import EngineError
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.types import SamplingParams
from makers import make_checkpoint, make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_lora_retriever.engine.model.outlook import ModelOutlook
    from langchain_lora_retriever.engine.model.probe import ModelProbe
    from langchain_lora_retriever.types import Adapter

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = "| models | `model_type` | attention | tokens as `generate` | prefixes shared | fused layers | CUDA graphs |"
IS_WRITING = os.environ.get("WRITE_MODEL_TABLE") == "1"
NUM_TOKENS = 6
CHUNK = 24
PROMPTS = [list(range(5, 45)), [9, 200, 13], list(range(60, 85))]
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
WITHOUT_OUT_PROJ = {"falcon_h1", "nemotron_h"}  # where PEFT refuses this module of state-space layers


class Row(NamedTuple):
    """What the table says of a family."""

    models: str
    model_type: str
    attention: str
    tokens: str
    prefixes: str = ""
    fused: str = ""
    graphs: str = ""

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


def read_table() -> dict[str, Row]:
    """The rows of the page's first table of this head, by title."""
    _, _, behind = PAGE.read_text().partition(f"{HEAD}\n")
    lines = itertools.takewhile(lambda line: line.startswith("|"), behind.splitlines()[1:])
    rows = [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]
    return {row.models: row for row in rows}


TABLE = read_table()
FOUND: dict[str, Row] = {}
NONE = Row("", "", "", "")
HAS_TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def generate(model: Any, prompt: list[int]) -> list[int]:
    """What transformers answers."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return list(out[0, len(prompt) :].tolist())


def make_worker(model: Any, *, backend: str | None = None, graphs: bool = True) -> EngineWorker:
    """A small engine whose prompts come in chunks; on a GPU with Triton and captured steps."""
    is_on_gpu = model.device.type == "cuda"
    config = EngineConfig(
        max_num_seqs=4, kv_cache_bytes=4 << 20, lora_cache_bytes=8 << 20, max_num_batched_tokens=CHUNK,
        attention_backend=backend or ("triton" if is_on_gpu else "torch"), enable_cuda_graphs=is_on_gpu and graphs,
        captured_num_adapters=(0, 1), captured_ranks=(16,), freeze_heap=False,
    )  # fmt: skip
    return EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), config)


def answers(worker: EngineWorker, prompts: list[list[int]], adapters: list[list[Adapter]]) -> list[list[int]]:
    """What the engine answers to requests that run together."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    pairs = [[(adapter, 1.0) for adapter in chosen] for chosen in adapters]
    running = [worker.submit(prompt, sampling, chosen) for prompt, chosen in zip(prompts, pairs, strict=True)]
    return [list(generation.result(120).token_ids) for generation in running]


def make_adapter(model: Any, folder: Path, model_type: str) -> tuple[Adapter, list[list[int]]]:
    """An adapter for all linear modules of the decoder that PEFT adapts, and what PEFT answers with it."""
    # Of a model with experts PEFT would take `gate_proj` and its like for the experts' parameters.
    has_experts = any(name.endswith("experts") for name, _ in model.named_modules())
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and "lm_head" not in name
        and not re.search("vision|visual|multi_modal|altup", name)
        and not (has_experts and name.endswith(("gate_proj", "up_proj", "down_proj")))
        and not (name.endswith("out_proj") and model_type in WITHOUT_OUT_PROJ)
    ]
    make_checkpoint(folder, model=model, target_modules=names)
    adapted = PeftModel.from_pretrained(model, folder)
    expected = [generate(adapted, prompt) for prompt in PROMPTS[:2]]
    adapted.unload()
    return read_adapter(folder), expected


def describe_attention(worker: EngineWorker) -> str:
    """What layers of a model attend to, and what else they keep."""
    probe = worker.core.runner.probe
    words = {
        "window" if g.pattern.sliding_window else "chunks" if g.pattern.chunk_size else "full"
        for g in probe.attention.values()
    }
    more = [
        ("soft cap", any(g.softcap for g in probe.attention.values())),
        ("sinks", any(g.has_sinks for g in probe.attention.values())),
        ("other values", any(g.head_dim != g.value_dim for g in probe.attention.values())),
        ("state", bool(probe.recurrent)),
    ]
    return ", ".join([*sorted(words), *(word for word, holds in more if holds)])


def refusal(error: EngineError) -> str:
    """The error's first sentence, fit for a table."""
    return re.split(r"(?<=[a-z)])[.:] ", str(error), maxsplit=1)[0].rstrip(".").replace("|", "/")


def examine(family: Family, model: Any, folder: Path) -> Row:
    """Serve the model in every way the table speaks of."""
    expected = [generate(model, prompt) for prompt in PROMPTS]
    if TABLE.get(family.title, NONE).tokens != "yes":  # PEFT need not know the others
        try:
            make_worker(model).close()
        except EngineError as error:
            return Row(family.title, f"`{family.model_type}`", "", f"refused: {refusal(error)}")
    adapter, adapted = make_adapter(model, folder, family.model_type)
    assert adapted != expected[:2], "the adapter changes nothing"
    with make_worker(model) as worker:
        num_reads = watch(worker, lambda: answers(worker, PROMPTS[:1], [[]]) == expected[:1])
        assert answers(worker, PROMPTS, [[], [], []]) == expected, "together, the first behind its own prefix"
        num_shared = worker.stats().num_cached_tokens
        both = [[adapter], [adapter], []]
        assert answers(worker, PROMPTS, both) == [*adapted, expected[2]], "as PEFT, beside the base"
        worker.check_integrity()
        probe, attention = worker.core.runner.probe, describe_attention(worker)
    model.config.save_pretrained(folder / "config")
    told = look_ahead(folder / "config", dtype=torch.float32)
    check_told(told, model, probe)
    assert told.host_reads or not num_reads, "the engine's step waits for the host where nothing was told"
    can_capture = captures_steps(model) if model.device.type == "cuda" else not told.host_reads
    return Row(
        family.title,
        f"`{family.model_type}`",
        attention,
        "yes",
        "yes" if num_shared else "no",
        TABLE[family.title].fused if family.title in TABLE else "?",
        ("decode" if probe.recurrent else "yes") if can_capture else "no",
    )


def captures_steps(model: Any) -> bool:
    """Whether steps are captured on a GPU, in the dtype of models there.

    In float32 torch's grouped product of experts reads on the host how many tokens each has.
    """
    with make_worker(model.to(torch.bfloat16)) as worker:
        return bool(worker.core.runner.executor.graphs)


def check_told(told: ModelOutlook, model: Any, probe: ModelProbe) -> None:
    """What `check-model` says without weights is what the engine finds with them."""
    assert told.refusal is None
    assert told.module_shapes == probe.module_shapes
    assert told.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert told.token_bytes == sum(g.token_bytes for g in probe.attention.values())
    assert told.state_bytes == sum(g.state_bytes for g in probe.recurrent)
    kinds = {g.kind for g in probe.attention.values()}
    assert {kind for kind, _ in told.attention} - {"state of the sequence"} == kinds


def watch(worker: EngineWorker, is_right: Callable[[], bool]) -> int:
    """Check an answer, and count the operations of its decode steps whose results the host waits for."""
    executor, reads = worker.core.runner.executor, HostReads()
    forward = executor.forward

    def watched(batch: Any) -> torch.Tensor:
        with reads if batch.is_decode and executor.name == "torch" else contextlib.nullcontext():
            return forward(batch)

    executor.forward = watched  # type: ignore[method-assign]
    assert is_right(), "alone, its prompt in chunks"
    executor.forward = forward  # type: ignore[method-assign]
    return len(reads.names)


@pytest.fixture(autouse=True)
def _write() -> Iterator[None]:
    """Write the table as it is known now."""
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    if IS_WRITING:
        rows = [str(FOUND.get(family.title, TABLE.get(family.title, NONE))) for family in FAMILIES]
        before, _, after = PAGE.read_text().partition(HEAD)
        following = after[after.index("\n## ") :]
        PAGE.write_text(f"{before}{HEAD}\n|{'---|' * 7}\n" + "\n".join(rows) + "\n" + following)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_the_table_says_what_a_family_does(family: Family, device: str, tmp_path: Path) -> None:
    """Tokens alone, in chunks, together, behind a shared prefix and with an adapter; or the words of its refusal."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the device's run says more")
    model = make_tiny_model(family.model_type, **family.settings).to(device)
    row = FOUND[family.title] = examine(family, model, tmp_path)
    if not IS_WRITING:
        assert str(row) == str(TABLE.get(family.title)), "run with WRITE_MODEL_TABLE=1 if that is as it should be"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TRITON, reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if TABLE.get(f.title, NONE).tokens == "yes"], ids=lambda f: f.title
)
def test_the_table_says_what_runs_fused(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the check at the engine's start decides, layer by layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # the interpreter runs one program after the other
        from langchain_lora_retriever.engine.model import paged_step

        monkeypatch.setattr(paged_step, "choose_num_splits", lambda *_: 2)
    model = make_tiny_model(family.model_type, **family.settings).to(device)
    with make_worker(model, backend="triton", graphs=False) as worker:
        executor = worker.core.runner.executor
        fused = "all" if executor.is_fused else "some" if executor.num_fused_layers else "none"
    FOUND[family.title] = FOUND.get(family.title, TABLE[family.title])._replace(fused=fused)
    if not IS_WRITING:
        assert fused == TABLE[family.title].fused


def test_the_table_is_whole() -> None:
    """It has a row for every family and no other, and there are thirty at least."""
    assert len(FAMILIES) >= 30
    if not IS_WRITING:
        assert list(TABLE) == [family.title for family in FAMILIES]
