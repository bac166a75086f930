"""How a checkpoint is quantised, told from its configuration: by what, how small it is, which packages read it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["bits_per_weight", "missing_packages", "quantisation_of", "require_packages"]

_BITS = {"bitsandbytes": 4.5, "hqq": 4.5, "mxfp4": 4.25, "fp8": 8.1, "fbgemm_fp8": 8.1, "finegrained_fp8": 8.1,
         "compressed-tensors": 8.1}  # fmt: skip
_PACKED = ("gptq", "awq")  # integers, with a scale (fp16) and a zero point for each group of them
_PACKAGES = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
}
_BUILT_ON_INSTALLATION = {
    "gptqmodel": "gptqmodel takes PyPcre, which PyPI has as source alone: where there is no C compiler, bring a wheel "
    "of it that was built elsewhere (`pip wheel --no-deps pypcre`)."
}


def quantisation_of(config: PreTrainedConfig, model_kwargs: dict[str, Any]) -> str | None:
    """By what a checkpoint is quantised, or is to be."""
    asked = model_kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
    method = _entry(asked, "quant_method")
    return None if asked is None else str(getattr(method, "value", method))


def bits_per_weight(config: PreTrainedConfig, method: str | None) -> float | None:
    """What a weight of a layer takes when it is quantised, scales and zero points included.

    Args:
        config: The checkpoint's; GPTQ and AWQ say there how they are packed.
        method: As `quantisation_of` gives it, or another that is considered.

    Returns:
        None if nothing is known of the method, or it is no quantisation.
    """
    if method not in _PACKED:
        return _BITS.get(method or "")
    known = getattr(config, "quantization_config", None)
    bits, group_size = (_entry(known, key) for key in ("bits", "group_size"))
    bits = bits if isinstance(bits, int) else 4
    has_groups = isinstance(group_size, int) and group_size > 0
    return bits + ((16 + bits) / group_size if has_groups else 0.0)


def missing_packages(method: str | None) -> tuple[str, ...]:
    """Packages by which transformers reads weights that are quantised so, and that are not installed here."""
    return tuple(name for name in _PACKAGES.get(method or "", ()) if importlib.util.find_spec(name) is None)


def require_packages(name: str, method: str | None) -> None:
    """Refuse a model whose weights cannot be read here.

    Raises:
        MissingDependencyError: If packages are missing; it says which, and how to install them.
    """
    missing = missing_packages(method)
    if missing:
        notes = " ".join(_BUILT_ON_INSTALLATION[each] for each in missing if each in _BUILT_ON_INSTALLATION)
        raise MissingDependencyError(
            f"The weights of {name!r} are quantised ({method}), and transformers reads them by packages that are not "
            f"installed: pip install {' '.join(missing)}. {notes}".rstrip()
        )


def _entry(quantization_config: Any, key: str) -> Any:
    if isinstance(quantization_config, dict):
        return quantization_config.get(key)
    return getattr(quantization_config, key, None)
