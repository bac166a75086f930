"""The one place where parts of vLLM are replaced that have no official hook. Each is looked at first.

- `LRUCacheWorkerLoRAManager`, as the model runners make it, by one that takes compositions apart (`manager.py`).
- `SchedulerConfig.get_scheduler_cls`: the class that it gives counts adapters by composition (`scheduler.py`). A
  scheduler set by `--scheduler-cls`, the official hook, would turn vLLM's asynchronous scheduling off.
- `LoRAConfig.compute_hash`: vLLM finds compiled graphs on the disk by it, and those of ours call our operators.
- `BaseServing._check_model` and the adapters that `OpenAIServingModels` knows by name (`serving.py`).
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever import __version__
from langchain_lora_retriever.errors import EngineError, InvalidRequestError
from langchain_lora_retriever.vllm.versions import waiting_methods

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["apply_patches"]

_MARK = "__lora_retriever__"


def apply_patches() -> None:
    """Replace them, once in a process.

    Raises:
        EngineError: If one of them is not as it is in the vLLM that this was tested with. Nothing is replaced then.
    """
    from vllm.config.lora import LoRAConfig  # noqa: PLC0415 - vLLM may be absent
    from vllm.config.scheduler import SchedulerConfig  # noqa: PLC0415
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels  # noqa: PLC0415
    from vllm.entrypoints.serve.engine.serving import BaseServing  # noqa: PLC0415
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA  # noqa: PLC0415
    from vllm.lora.model_manager import LRUCacheLoRAModelManager  # noqa: PLC0415
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperABC  # noqa: PLC0415
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager  # noqa: PLC0415
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415
    from vllm.v1.worker import lora_model_runner_mixin as runner  # noqa: PLC0415

    from langchain_lora_retriever.vllm.manager import CompositionWorkerManager  # noqa: PLC0415
    from langchain_lora_retriever.vllm.scheduler import counting  # noqa: PLC0415
    from langchain_lora_retriever.vllm.serving import NamedAdapters  # noqa: PLC0415

    if hasattr(SchedulerConfig.get_scheduler_cls, _MARK):
        return
    if runner.LRUCacheWorkerLoRAManager is not LRUCacheWorkerLoRAManager:
        raise EngineError(
            f"vLLM's adapter manager has been replaced already, by {runner.LRUCacheWorkerLoRAManager.__module__}: use "
            "one of the two plug-ins (VLLM_PLUGINS names those that are loaded)."
        )
    for owner, name, parameters in (
        (LRUCacheWorkerLoRAManager, "_apply_adapters", "lora_requests"),
        (LRUCacheWorkerLoRAManager, "add_adapter", "lora_request"),
        (LRUCacheWorkerLoRAManager, "_load_adapter", "lora_request"),
        (LRUCacheLoRAModelManager, "_init_punica_wrapper", "max_num_batched_tokens vllm_config"),
        (LRUCacheLoRAModelManager, "register_module", "module_name module"),
        (LRUCacheLoRAModelManager, "activate_adapter", "lora_id"),
        (BaseLinearLayerWithLoRA, "apply", "x bias"),
        (BaseLinearLayerWithLoRA, "_get_quant_method", ""),
        (BaseLinearLayerWithLoRA, "set_lora", "index lora_a lora_b"),
        (BaseLinearLayerWithLoRA, "reset_lora", "index"),
        (BaseLinearLayerWithLoRA, "slice_lora_a", "lora_a"),
        (BaseLinearLayerWithLoRA, "slice_lora_b", "lora_b"),
        (PunicaWrapperABC, "update_metadata", "mapping lora_index_to_id max_loras vocab_size kwargs"),
        (
            PunicaWrapperABC,
            "add_lora_linear",
            "y x lora_a_stacked lora_b_stacked scale output_slices buffer kwargs",
        ),
        *((Scheduler, name, parameters) for name, parameters in waiting_methods(Scheduler)),
        (Scheduler, "schedule", "throttle_prefills"),
        (SchedulerConfig, "get_scheduler_cls", ""),
        (LoRAConfig, "compute_hash", ""),
        (BaseServing, "_check_model", "request"),
        (OpenAIServingModels, "__init__", "engine_client base_model_paths lora_modules"),
    ):
        _check(owner, name, parameters)

    runner.LRUCacheWorkerLoRAManager = CompositionWorkerManager
    OpenAIServingModels.__init__ = _naming(OpenAIServingModels.__init__, NamedAdapters)
    BaseServing._check_model = _composing(BaseServing._check_model, NamedAdapters)  # noqa: SLF001 - the patch
    LoRAConfig.compute_hash = _hashing(LoRAConfig.compute_hash)
    SchedulerConfig.get_scheduler_cls = _counting(SchedulerConfig.get_scheduler_cls, counting)


def _check(owner: type, name: str, parameters: str) -> None:
    found = getattr(owner, name, None)
    num_bound = 0 if isinstance(inspect.getattr_static(owner, name, None), staticmethod) else 1
    met = list(inspect.signature(found).parameters)[num_bound:] if callable(found) else None
    if met != parameters.split():
        what = "is missing" if met is None else f"takes ({', '.join(met)})"
        raise EngineError(
            f"vLLM's {owner.__name__}.{name} {what}, where ({', '.join(parameters.split())}) was expected: this is "
            "not the build that the plug-in was tested with, and it was left as it is. Install the vllm that the extra "
            "langchain-lora-retriever[vllm] asks for."
        )


def _naming(init: Callable[..., None], names: Callable[[Any], Any]) -> Callable[..., None]:
    @wraps(init)
    def with_names(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        init(self, engine_client, *args, **kwargs)
        self.lora_requests = names(engine_client.vllm_config)

    return with_names


def _composing(check_model: Callable[..., Any], names: type) -> Callable[..., Any]:
    @wraps(check_model)
    async def with_compositions(self: Any, request: Any) -> Any:
        if isinstance(self.models.lora_requests, names):
            try:
                self.models.lora_requests.compose(request)  # type: ignore[attr-defined]
            except InvalidRequestError as error:
                return self.create_error_response(str(error), param="model")
        return await check_model(self, request)

    return with_compositions


def _hashing(compute_hash: Callable[..., str]) -> Callable[..., str]:
    @wraps(compute_hash)
    def hashed(self: Any) -> str:
        return f"{compute_hash(self)}-lora-retriever-{__version__}"

    return hashed


def _counting(get_scheduler_cls: Callable[..., type], counting: Callable[[type], type]) -> Callable[..., type]:
    @wraps(get_scheduler_cls)
    def counted(self: Any) -> type:
        return counting(get_scheduler_cls(self))

    setattr(counted, _MARK, True)
    return counted
