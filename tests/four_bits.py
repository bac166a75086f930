"""Checkpoints of GPTQ's and AWQ's layouts, made by rounding to nearest: without calibration, by no package.

Both hold a matrix as integers of four bits, eight in an int32, with a scale and a zero point for each output and group
of inputs: `w[o, i] = scales[g(i), o] * (q[i, o] - zeros[g(i), o])`. GPTQ packs along the inputs, with the zero point
less one; AWQ along the outputs, eight of them in an order of its own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def rounded_to_nearest(
    weight: torch.Tensor, group_size: int, *, is_symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The integers `[in, out]` from 0 to 15, scales (fp16) and zero points (integers), both `[groups, out]`."""
    groups = weight.float().T.reshape(-1, group_size, weight.shape[0])
    if is_symmetric:
        scales = (groups.abs().amax(1) / 7).half()
        zeros = torch.full(scales.shape, 8, device=weight.device)
    else:
        least, most = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scales = ((most - least) / 15).half()
        zeros = (-least / scales.float()).round().clamp(0, 15).long()
    numbers = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15).long()
    return numbers.reshape(-1, weight.shape[0]), scales, zeros


def packed(numbers: torch.Tensor) -> torch.Tensor:
    """Eight numbers of the last dimension in an int32, the first lowest: `[..., n]` becomes `[..., n / 8]`."""
    eights = numbers.unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4, device=numbers.device)
    whole = eights.sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int()


def gptq_tensors(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """What GPTQ's layout keeps of a weight `[out, in]`: `qweight`, `qzeros`, `scales`, `g_idx`."""
    numbers, scales, zeros = rounded_to_nearest(weight, group_size, is_symmetric=True)
    g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // group_size
    return {"qweight": packed(numbers.T).T, "qzeros": packed(zeros - 1), "scales": scales, "g_idx": g_idx}


def awq_tensors(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """What AWQ's layout ("gemm") keeps of a weight `[out, in]`: `qweight`, `qzeros`, `scales`."""
    numbers, scales, zeros = rounded_to_nearest(weight, group_size, is_symmetric=False)

    def shuffled(each: torch.Tensor) -> torch.Tensor:
        return packed(each.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2))

    return {"qweight": shuffled(numbers), "qzeros": shuffled(zeros), "scales": scales}


MAKERS = {"gptq": gptq_tensors, "awq": awq_tensors}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "zero_point": True, "version": "gemm"},
}


def save_four_bits(model: Any, folder: Path, method: str, group_size: int = 32) -> None:
    """Write a model of `nn.Linear` modules as a checkpoint of `method`; its head and the rest are kept as they are.

    Args:
        model: As transformers makes it.
        folder: Where the checkpoint is written, in one file.
        method: `gptq` or `awq`.
        group_size: How many inputs share a scale; divides every module's `in_features`.
    """
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            made = MAKERS[method](tensors.pop(f"{name}.weight"), group_size)
            tensors |= {f"{name}.{key}": value for key, value in made.items()}
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = {"quant_method": method, "group_size": group_size, **CONFIGS[method]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
