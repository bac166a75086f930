"""A model that no card holds, its layers over all of them, as accelerate places it."""

from __future__ import annotations

import statistics
import zlib
from typing import Any

import accelerate
import torch
import transformers
from torch import nn

from engine_gpu.bench import DEVICE, DTYPE, Bench, free_memory

_LAYERS_OF_70B = 56  # 96 GiB in bf16, where 80 layers would have 132
_SEVENTY_B = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": _LAYERS_OF_70B,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
}  # fmt: skip


def spread(bench: Bench) -> None:
    """Tokens per second of a model of random weights that takes more than a card, without and with adapters.

    A small one first: over all cards its tokens are those of one card.
    """
    num_devices = torch.cuda.device_count()
    if num_devices < 2 and not bench.is_tiny:
        bench.put("a model over several cards", f"not run: {num_devices} CUDA devices")
        return
    bench.close_engine()
    _check_small(bench)
    large = _Placed(is_tiny=bench.is_tiny, **({} if bench.is_tiny else _SEVENTY_B))
    num_bytes = sum(p.numel() * p.element_size() for p in large.model.parameters())
    bench.put("the placed model", f"{num_bytes / 2**30:.1f} GiB over {_num_places(large.model)} devices")
    worker = large.engine(max_loras=16)
    runs = {
        "base": [[] for _ in range(large.batch)],
        "mixture of 3 of 8": [large.mixture(i, 8) for i in range(large.batch)],
        "one request": [[]],
        "one request, mixture": [large.mixture(0, 8)],
    }
    for name, pairs in runs.items():
        rates = [large.run_all(worker, pairs) for _ in range(1 + large.rounds)]
        bench.put(f"tok/s of the placed model, {name}", f"{statistics.median(rates[1:]):.0f}")
    large.close_engine()
    large.forget()


def _check_small(bench: Bench) -> None:
    """Greedy tokens of a small model in float32, placed and not."""
    found = []
    for is_placed in (False, True):
        small = _Placed(is_tiny=True, is_placed=is_placed, dtype=torch.float32)
        worker = small.engine(max_loras=8)
        running = [
            worker.submit(small.prompt(i), small.greedy(24), small.mixture(i, 6) if i % 2 else []) for i in range(8)
        ]
        found.append([generation.result(300).token_ids for generation in running])
        small.close_engine()
        small.forget()
    assert found[0] == found[1], found
    bench.put("tokens of a small model over several cards", f"{sum(map(len, found[0]))} equal to one card's")


class _Placed(Bench):
    """The bench with a model whose layers lie on all devices, one part after the other.

    Args:
        is_tiny: Whether the model is.
        is_placed: Or whether all lies on the first.
        dtype: Of the weights.
        **shape: What differs in the model's configuration.
    """

    def __init__(self, *, is_tiny: bool, is_placed: bool = True, dtype: torch.dtype = DTYPE, **shape: Any) -> None:
        super().__init__(None, is_tiny=is_tiny, dtype=dtype, **shape)
        self.num_adapters = min(self.num_adapters, 8)
        self._is_placed = is_placed

    def make_model(self) -> Any:
        """Made where it lies."""
        config = transformers.LlamaConfig(**self.shape, rope_theta=500000.0, tie_word_embeddings=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        num_devices = max(torch.cuda.device_count(), 1) if self._is_placed else 1
        places = _places(config.num_hidden_layers, num_devices)
        for path, module in list(model.named_modules()):
            place = next((places[name] for name in places if f"{path}.".startswith(f"{name}.")), None)
            for name, parameter in list(module.named_parameters(recurse=False)):
                assert place is not None, path
                made = torch.empty(parameter.shape, dtype=self.dtype, device=place)
                # By name: the same weights wherever they lie.
                generator = torch.Generator(place).manual_seed(zlib.crc32(f"{path}.{name}".encode()))
                std = 0.15 if self.is_tiny else 0.02  # of the tiny one so that no two tokens are as good as each other
                made = made.normal_(std=std, generator=generator) if made.dim() > 1 else made.fill_(1.0)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(places["model.rotary_emb"])
        model.generation_config.eos_token_id = None
        if len(set(places.values())) > 1:
            model = accelerate.dispatch_model(model, {path: place.index for path, place in places.items()})
        return model

    def forget(self) -> None:
        """Free the model."""
        self._model = None
        self._adapters = []
        free_memory()


def _places(num_layers: int, num_devices: int) -> dict[str, torch.device]:
    """A device for every part of a Llama."""
    devices = [torch.device(DEVICE.type, i) if DEVICE.type == "cuda" else DEVICE for i in range(num_devices)]
    layers = {f"model.layers.{i}": devices[i * num_devices // num_layers] for i in range(num_layers)}
    first, last = devices[0], devices[-1]
    return {"model.embed_tokens": first, "model.rotary_emb": first, **layers, "model.norm": last, "lm_head": last}


def _num_places(model: Any) -> int:
    return len({parameter.device for parameter in model.parameters()})
