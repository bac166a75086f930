"""The worker's side: which adapters are on the device, and compositions taken apart into them.

vLLM has no official hook for these two classes; `patches.py` puts `CompositionWorkerManager` in the place of its own.
They override methods of vLLM's and leave all else (loading, LRU caches, pinning, warm-up) to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from langchain_lora_retriever.vllm.compositions import folder_of, members_of
from langchain_lora_retriever.vllm.layers import LoraLayer, LoraStep, StepAdapters
from langchain_lora_retriever.vllm.limits import PluginConfig, why_not

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CompositionWorkerManager", "KernelModelManager"]


class KernelModelManager(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's cache of adapters on the device, whose linear layers hold true ranks and run on our kernels.

    Attributes:
        compositions: Members and weights of the compositions of the current step, by number.
    """

    supported_lora_modules: list[str]

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        """Called by vLLM's constructor before it wraps the layers."""
        self.compositions: dict[int, list[tuple[int, float]]] = {}
        self._layers: list[LoraLayer] = []
        self._step = LoraStep(
            max_loras=self.lora_slots,
            max_rank=self.lora_config.max_lora_rank,
            max_num_tokens=max_num_batched_tokens,
            max_k=PluginConfig.of(vllm_config).max_adapters_per_request,
            device=self.device,
            max_captured_tokens=_max_captured_tokens(vllm_config),
        )
        self.supports_mm = False
        self.punica_wrapper_mapping = {DEFAULT_LANGUAGE_WRAPPER_KEY: StepAdapters(self._step, self.compositions)}
        # The embedding and the output layer stay the base model's: vLLM's layers for them know one adapter per token.
        vocabulary = {
            name for module in self.model.modules() for name in getattr(module, "embedding_modules", None) or ()
        }
        self.supported_lora_modules = [name for name in self.supported_lora_modules if name not in vocabulary]

    def register_module(self, module_name: str, module: Any) -> None:
        """Called by vLLM for every layer that it has wrapped."""
        if not isinstance(module, BaseLinearLayerWithLoRA):
            raise TypeError(
                f"{module_name} became a {type(module).__name__}, which our kernels do not know: "
                "VLLM_PLUGINS= runs vLLM without them (or names the other plug-ins)."
            )
        super().register_module(module_name, module)
        self._layers.append(LoraLayer(module, self._step))

    def activate_adapter(self, lora_id: int) -> bool:
        """Put an adapter on the device; True if it was not there."""
        is_new: bool = super().activate_adapter(lora_id)
        if is_new:
            slot = self.lora_index_to_id.index(lora_id)
            self._step.assign(slot, max((layer.rank(slot) for layer in self._layers), default=0))
        return is_new


def _max_captured_tokens(vllm_config: Any) -> int:
    """Most tokens of a step that becomes a CUDA graph; 0 if none does."""
    compilation, device = vllm_config.compilation_config, vllm_config.device_config.device_type
    if device != "cuda" or compilation.cudagraph_mode is None or compilation.cudagraph_mode.name == "NONE":
        return 0
    return compilation.max_cudagraph_capture_size or 0


class CompositionWorkerManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """Takes compositions apart; each of their members is an adapter of vLLM's.

    Where our kernels cannot run the model's adapters it does what vLLM's does, and compositions are refused.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._refusal = why_not(vllm_config)
        if self._refusal is None:
            self._manager_cls = KernelModelManager

    def _apply_adapters(self, lora_requests: Iterable[Any]) -> None:
        """Have what the next step runs on the device; vLLM calls it before every step."""
        plain: dict[int, Any] = {}
        compositions: dict[int, list[tuple[int, float]]] = {}
        for request in filter(None, lora_requests):
            members = self._members(request)
            if members:
                compositions[request.lora_int_id] = [(member.lora_int_id, member.weight) for member in members]
            plain |= {r.lora_int_id: r for r in map(_adapter, members)} if members else {request.lora_int_id: request}
        super()._apply_adapters(plain.values())
        if self._refusal is None:
            self._adapter_manager.compositions.clear()
            self._adapter_manager.compositions.update(compositions)

    def add_adapter(self, lora_request: Any) -> bool:
        """Load an adapter, or the members of a composition, and put them on the device.

        Raises:
            ValueError: If compositions are refused, or it has more members than there are slots.
        """
        members = self._members(lora_request)
        if not members:
            return bool(super().add_adapter(lora_request))
        if len({member.lora_int_id for member in members}) > self.lora_config.max_loras:
            raise ValueError(
                f"The composition has {len(members)} adapters, and max_loras={self.lora_config.max_loras}: raise it."
            )
        are_loaded = [super(CompositionWorkerManager, self).add_adapter(_adapter(member)) for member in members]
        return all(are_loaded)

    def _load_adapter(self, lora_request: Any) -> Any:
        """Read a checkpoint; its path may tell its contents, too."""
        folder = folder_of(lora_request.lora_path)
        if folder != lora_request.lora_path:
            lora_request = LoRARequest(
                lora_request.lora_name,
                lora_request.lora_int_id,
                folder,
                base_model_name=lora_request.base_model_name,
                is_3d_lora_weight=lora_request.is_3d_lora_weight,
            )
        return super()._load_adapter(lora_request)

    def _members(self, lora_request: Any) -> Any:
        members = members_of(lora_request)
        if members and self._refusal is not None:
            raise ValueError(self._refusal)
        return members


def _adapter(member: Any) -> Any:
    return LoRARequest(member.name, member.lora_int_id, member.path)
