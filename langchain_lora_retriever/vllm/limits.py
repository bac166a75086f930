"""Which vLLM and which of its set-ups this works with; asked alike in each of vLLM's processes."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_lora_retriever.errors import EngineError, InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.vllm.versions import TESTED, installed_version, is_tested

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PLUGIN_NAME", "PluginConfig", "check_plugin", "check_version", "why_not"]

PLUGIN_NAME = "lora_retriever"
_GROUP = "vllm.general_plugins"
_MAX_RANK = 256  # of the kernels


class PluginConfig(NamedTuple):
    """What `--additional-config '{"lora_retriever": {...}}'` sets.

    Attributes:
        max_adapters_per_request: Longest composition, 1 to 8. On a GPU captured steps pay for it, used or not.
    """

    max_adapters_per_request: int = 4

    @classmethod
    def of(cls, vllm_config: Any) -> PluginConfig:
        """Read it.

        Raises:
            InvalidRequestError: If it has an unknown field or a value that is not allowed.
        """
        additional = vllm_config.additional_config
        given: Mapping[str, Any] = additional.get(PLUGIN_NAME, {}) if isinstance(additional, dict) else {}
        k = given.get("max_adapters_per_request", cls._field_defaults["max_adapters_per_request"])
        if given.keys() - set(cls._fields) or isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= 8:
            raise InvalidRequestError(
                f"additional_config[{PLUGIN_NAME!r}]={shown(given)} is not allowed: it may have "
                "max_adapters_per_request, an integer from 1 to 8."
            )
        return cls(k)


def check_version() -> None:
    """Refuse a vLLM that this was not tested with.

    Raises:
        MissingDependencyError: If there is none.
        EngineError: If it is another version.
    """
    found = installed_version()
    if found is None:
        raise MissingDependencyError('vLLM is not installed: pip install "langchain-lora-retriever[vllm]".')
    if not is_tested(found):
        raise EngineError(
            f"This works inside vLLM {' and '.join(TESTED)}, of which it replaces parts; {found} is installed, and "
            f"left as it is. Install vllm=={TESTED[-1]}.*, or serve with our own engine (EngineWorker, ProcessEngine, "
            "RemoteEngine)."
        )


def check_plugin(allowed: list[str] | None) -> None:
    """Refuse to start an engine whose processes would not load the plug-in.

    Args:
        allowed: vLLM's list of plug-ins that it may load; None for all.

    Raises:
        EngineError: If it is not installed as one, or not allowed.
    """
    if PLUGIN_NAME not in {entry.name for entry in entry_points(group=_GROUP)}:
        raise EngineError(
            f"vLLM's processes would not find the plug-in {PLUGIN_NAME!r}: langchain-lora-retriever is on the path and "
            "not installed. Install it (pip install -e . for a checkout)."
        )
    if allowed is not None and PLUGIN_NAME not in allowed:
        raise EngineError(
            f"VLLM_PLUGINS={','.join(allowed)!r} leaves out the plug-in {PLUGIN_NAME!r}, which this needs: add it, or "
            "unset VLLM_PLUGINS."
        )


def why_not(vllm_config: Any) -> str | None:
    """Say why a set-up's adapters run on vLLM's own kernels, one per request; None if they run on ours."""
    lora, model = vllm_config.lora_config, vllm_config.model_config
    device = vllm_config.device_config.device_type
    reasons = {
        "LoRA is off (--enable-lora)": lora is None,
        f"the device is {device}, not cpu or cuda": device not in {"cpu", "cuda"},
        "the model has more than one modality": model.is_multimodal_model,
        "the model is a mixture of experts": model.is_moe,
        "the model has an encoder and a decoder": model.is_encoder_decoder,
        "the model pools": model.runner_type == "pooling",
    }
    if lora is not None:
        reasons |= {
            "fully_sharded_loras is on": lora.fully_sharded_loras,
            f"max_lora_rank={lora.max_lora_rank} is above {_MAX_RANK}": lora.max_lora_rank > _MAX_RANK,
            f"lora_dtype={lora.lora_dtype} is not the model's {model.dtype}": lora.lora_dtype != model.dtype,
        }
    met = [reason for reason, is_so in reasons.items() if is_so]
    return f"Compositions cannot be served here: {'; '.join(met)}." if met else None
