"""What will happen with a model, told from its configuration alone: no weight is read.

The model is made on the meta device and followed through one pass, as the probe does it with numbers: which layers
attend to what, which modules adapters may target, and whether anything waits for the host. What needs numbers (that a
layer computes what its fused forward and the paged cache do) is found out when an engine starts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from langchain_lora_retriever.engine.config import EngineConfig
from langchain_lora_retriever.engine.model.attention import attending
from langchain_lora_retriever.engine.model.fused_layers import num_fusable_layers
from langchain_lora_retriever.engine.model.host_reads import HostReads
from langchain_lora_retriever.engine.model.linear_calls import group_calls, is_inner
from langchain_lora_retriever.engine.model.load import (
    default_dtype,
    make_empty,
    read_config,
    weight_bytes,
)
from langchain_lora_retriever.engine.model.memory import (
    activation_bytes,
    default_lora_bytes,
    longest_sequence,
    step_limits,
)
from langchain_lora_retriever.engine.model.probe import (
    HALF_TOKENS,
    AttentionRecorder,
    ModelProbe,
    read_geometries,
    require_all_layers,
    require_groups,
    run_pass,
    use_attention,
)
from langchain_lora_retriever.engine.model.quantisation import missing_packages, quantisation_of
from langchain_lora_retriever.engine.model.recurrent import find_recurrent, probed_recurrent
from langchain_lora_retriever.engine.model.rotary_tables import RotaryTables
from langchain_lora_retriever.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DeviceFit", "ModelOutlook", "look_ahead"]


class DeviceFit(NamedTuple):
    """What of a model fits on a device beside its weights.

    Attributes:
        device: Its name.
        total_bytes: Its memory.
        free_bytes: What is left of it, once the weights and a step's activations are there; negative: they do not fit.
        num_requests: Requests of so many tokens whose keys, values and states fit beside the adapters.
        num_adapters: Adapters of rank 16, for all modules, that fit in the share that adapters get.
    """

    device: str
    total_bytes: int
    free_bytes: int
    num_requests: int
    num_adapters: int


@dataclass(frozen=True)
class ModelOutlook:
    """What is known of a model before it is loaded.

    Attributes:
        name: As it was asked for.
        architecture: Its class.
        model_type: By which transformers knows it.
        refusal: Why it will not be served; None if nothing speaks against it.
        dtype: Of its weights.
        quantisation: How they are quantised, if they are.
        missing_packages: By which transformers reads them, and which are not installed here.
        num_parameters: How many there are.
        weight_bytes: What they take.
        max_model_len: Tokens of prompt and answer together.
        attention: Kinds of layers, and how many there are of each.
        num_layers: Layers that attend.
        num_fusable: Layers of a shape that runs fused on a GPU, where the check at the start agrees.
        host_reads: Operations that no CUDA graph can hold; () lets steps be captured.
        has_states: Whether layers keep states beside keys and values: prefixes are not shared then, and only steps
            without prompts are captured.
        module_shapes: `(in_features, out_features)` of every module that an adapter may target.
        token_bytes: Keys and values of one token, all layers together.
        state_bytes: States of one request.
        rank_bytes: One rank of an adapter for all modules.
        hidden_size: Of its layers.
    """

    name: str
    architecture: str
    model_type: str
    refusal: str | None = None
    dtype: str = ""
    quantisation: str | None = None
    missing_packages: tuple[str, ...] = ()
    num_parameters: int = 0
    weight_bytes: int = 0
    max_model_len: int = 0
    attention: tuple[tuple[str, int], ...] = ()
    num_layers: int = 0
    num_fusable: int = 0
    host_reads: tuple[str, ...] = ()
    has_states: bool = False
    module_shapes: dict[str, tuple[int, int]] | None = None
    token_bytes: int = 0
    state_bytes: int = 0
    rank_bytes: int = 0
    hidden_size: int = 0

    @property
    def targets(self) -> dict[str, int]:
        """Names that an adapter's `target_modules` may have, and how many modules each is."""
        return dict(Counter(name.rsplit(".", 1)[-1] for name in self.module_shapes or ()))

    def fit(self, config: EngineConfig | None = None, *, request_tokens: int = 2048, rank: int = 16) -> DeviceFit:
        """What fits beside the model on the first GPU, or in this machine's memory if it has none.

        Args:
            config: Limits; the defaults by default.
            request_tokens: Tokens of a request.
            rank: Of an adapter.
        """
        config = config or EngineConfig()
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            device, total = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
            usable = int(config.gpu_memory_utilization * total)
        else:
            device, total = "CPU", psutil.virtual_memory().total
            usable = psutil.virtual_memory().available
        limits = step_limits(config, on_gpu=has_gpu)
        activations = activation_bytes(limits.max_num_batched_tokens, self.hidden_size) if has_gpu else 0
        free = usable - self.weight_bytes - activations
        lora_bytes = config.lora_cache_bytes
        if lora_bytes is None:
            lora_bytes = default_lora_bytes(total if has_gpu else None)
        lora_bytes = min(lora_bytes, max(free, 0))
        request_bytes = request_tokens * self.token_bytes + self.state_bytes
        return DeviceFit(
            device,
            total,
            free,
            max(free - lora_bytes, 0) // request_bytes if request_bytes else 0,
            lora_bytes // (rank * self.rank_bytes) if self.rank_bytes else 0,
        )


def look_ahead(name: str | Path, config: EngineConfig | None = None, **model_kwargs: Any) -> ModelOutlook:
    """Say what will happen with a model.

    Args:
        name: A hub name or a folder.
        config: Limits; the defaults by default.
        **model_kwargs: As for `load_base_model`.

    Raises:
        EngineError: If there is no such model, or it asks to run code of its own without `trust_remote_code`.
    """
    name = str(name)
    model_kwargs.setdefault("dtype", default_dtype())
    model_config = read_config(name, **model_kwargs)
    outlook = ModelOutlook(name, type(model_config).__name__.removesuffix("Config"), model_config.model_type)
    try:
        model = make_empty(model_config, name, **model_kwargs)
    except EngineError as error:
        return _refused(outlook, error)
    quantisation = quantisation_of(model_config, model_kwargs)
    known: dict[str, Any] = {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantisation": quantisation,
        "missing_packages": missing_packages(quantisation),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": (quantisation and _stored_bytes(name)) or weight_bytes(model, quantisation),
    }
    try:
        longest = longest_sequence(model, config or EngineConfig())
        probe, reads = _follow(model, longest)
    except EngineError as error:
        return _refused(outlook, error, **known)
    groups = probe.linear_groups
    return replace(
        outlook,
        **known,
        max_model_len=longest,
        attention=_kinds(probe),
        num_layers=len(probe.attention),
        num_fusable=num_fusable_layers(model, probe),
        host_reads=reads,
        has_states=bool(probe.recurrent),
        module_shapes=probe.module_shapes,
        token_bytes=sum(geometry.token_bytes for geometry in probe.attention.values()),
        state_bytes=sum(geometry.state_bytes for geometry in probe.recurrent),
        rank_bytes=sum((len(g.names) * g.in_features + sum(g.out_features)) * g.dtype.itemsize for g in groups),
        hidden_size=model_config.get_text_config().hidden_size,
    )


def _follow_model(model: PreTrainedModel, max_model_len: int) -> ModelProbe:
    """What `probe_model` reports, as far as no numbers are needed: of a model on the meta device.

    Raises:
        EngineError: As `probe_model`, but for what only numbers tell.
    """
    device = torch.device("meta")
    recurrent = find_recurrent(model, device)
    half = min(HALF_TOKENS, max(max_model_len, 2) // 2)
    first = max(max_model_len, 2) - 2 * half
    with probed_recurrent(model, recurrent):
        recorder, calls = run_pass(model, [0] * 2 * half, range(first, first + 2 * half), first, device)
    require_all_layers(model, recorder, recurrent)
    groups = tuple(group_calls([call for call in calls if is_inner(call, 2 * half)]))
    require_groups(model, groups)
    sources = {
        layer: call if call.source is None else call._replace(source=call.source._replace(device=torch.device("cpu")))
        for layer, call in recorder.calls.items()
    }
    recorder.calls.update(sources)
    with _NoPadding():  # type: ignore[no-untyped-call]
        geometries = read_geometries(model, recorder, max_model_len)
    return ModelProbe(geometries, recorder.calls, groups, recurrent=recurrent)


class _NoPadding(TorchDispatchMode):
    """Lets masks be read that were made on the meta device: the tensors that they hold are amounts of padding, 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_to_zeros, (args, kwargs or {}))
        return func(*args, **kwargs)


def _to_zeros(value: Any) -> Any:
    is_meta = isinstance(value, torch.Tensor) and value.is_meta
    return torch.zeros(value.shape, dtype=value.dtype) if is_meta else value


def _run_unmasked(model: PreTrainedModel, probe: ModelProbe) -> None:
    """Run a model on the meta device over some tokens as it is served: without masks."""
    device = torch.device("meta")
    before = use_attention(model)
    try:
        with probed_recurrent(model, probe.recurrent), torch.inference_mode(), attending(AttentionRecorder()):
            model(
                input_ids=torch.zeros(1, 2 * HALF_TOKENS, dtype=torch.int64, device=device),
                position_ids=torch.arange(2 * HALF_TOKENS, device=device)[None],
                use_cache=False,
                logits_to_keep=torch.zeros(1, dtype=torch.int64, device=device),
            )
    finally:
        use_attention(model, before)


def _follow(model: PreTrainedModel, max_model_len: int) -> tuple[ModelProbe, tuple[str, ...]]:
    """Follow a model to see what it has, and then as it is served, to see what a step asks of the host."""
    with HostReads():
        probe = _follow_model(model, max_model_len)
    tables = RotaryTables(model, max_model_len)
    try:
        names = _reads_of_a_step(model, probe)
        if names:  # some may have been asked while the tables were made
            names = _reads_of_a_step(model, probe)
    finally:
        tables.detach()
    return probe, tuple(sorted(names))


def _reads_of_a_step(model: PreTrainedModel, probe: ModelProbe) -> set[str]:
    reads = HostReads()
    with reads:
        _run_unmasked(model, probe)
    return reads.names


def _kinds(probe: ModelProbe) -> tuple[tuple[str, int], ...]:
    """What layers attend to or keep, in words, and how many do."""
    kinds = Counter(geometry.kind for geometry in probe.attention.values())
    if probe.recurrent:
        kinds["state of the sequence"] = len({geometry.layer_idx for geometry in probe.recurrent})
    return tuple(kinds.items())


def _stored_bytes(name: str) -> int:
    """What the weights of a folder take on disk; 0 if they are not there."""
    return sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) if Path(name).is_dir() else 0


def _refused(outlook: ModelOutlook, error: EngineError, **known: Any) -> ModelOutlook:
    return replace(outlook, refusal=str(error), **known)
