"""Compositions in requests to vLLM's own server: by the model's name, or in the field `lora_retriever`."""

from __future__ import annotations

import math
from typing import Any

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.vllm.compositions import (
    NAME_PREFIX,
    Compositions,
    Member,
    composed_name,
    parse_name,
    with_contents,
)
from langchain_lora_retriever.vllm.limits import PLUGIN_NAME, PluginConfig, why_not

__all__ = ["NamedAdapters"]

_FORM = '{"adapters": ["sql", "json"]} mixes them evenly, {"adapters": {"sql": 0.7, "json": 0.3}} as it says'


class NamedAdapters(dict[str, Any]):
    """The adapters that vLLM's server knows by name, and the compositions that were asked of them.

    An adapter that is loaded is kept by the contents of its folder: what the prefix cache holds of a name is never
    another adapter's. Compositions are made when they are asked for; they are not listed as models.

    Args:
        vllm_config: The server's.
    """

    def __init__(self, vllm_config: Any) -> None:
        super().__init__()
        self._max_loras = getattr(vllm_config.lora_config, "max_loras", 0)
        self._max_members = PluginConfig.of(vllm_config).max_adapters_per_request
        self._refusal = why_not(vllm_config)
        if self._refusal is None and vllm_config.parallel_config._api_process_count > 1:  # noqa: SLF001 - vLLM's own name for it
            self._refusal = (
                "Compositions cannot be served here: --api-server-count is above 1, and compositions are numbered by "
                "one process."
            )
        self._compositions = Compositions()

    def __setitem__(self, name: str, lora_request: Any) -> None:
        lora_request.lora_path = with_contents(lora_request.lora_path)
        super().__setitem__(name, lora_request)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or self._compositions.named(name) is not None

    def __missing__(self, name: str) -> Any:
        composition = self._compositions.named(name)
        if composition is None:
            raise KeyError(name)
        return composition

    def compose(self, request: Any) -> None:
        """Replace a request's model by the composition that it asks for, if it does.

        Raises:
            InvalidRequestError: If it asks for one that cannot be served.
        """
        weights = self._asked(request)
        if weights is None:
            return
        if self._refusal is not None:
            raise InvalidRequestError(self._refusal)
        limit = min(self._max_members, self._max_loras)
        if len(weights) > limit:
            raise InvalidRequestError(
                f"The request composes {len(weights)} adapters; the server takes at most {limit}: raise --max-loras "
                f"({self._max_loras}), or max_adapters_per_request ({self._max_members}) by --additional-config "
                f'\'{{"{PLUGIN_NAME}": {{"max_adapters_per_request": 8}}}}\'.'
            )
        unknown = [name for name in weights if not super(NamedAdapters, self).__contains__(name)]
        if unknown:
            raise InvalidRequestError(
                f"The adapter {shown(unknown[0])} is not loaded; these are: {', '.join(map(repr, self)) or 'none'}."
            )
        members = [
            Member(self[name].lora_int_id, name, self[name].lora_path, weight) for name, weight in weights.items()
        ]
        request.model = self._compositions.request(composed_name(weights), members).lora_name

    def _asked(self, request: Any) -> dict[str, float] | None:
        """The weights that a request asks for; None if it asks for no composition."""
        fields = (getattr(request, "model_extra", None) or {}).get(PLUGIN_NAME)
        if fields is None:
            model = request.model or ""
            is_composed = model.startswith(NAME_PREFIX) and not super().__contains__(model)
            return parse_name(model) if is_composed else None
        adapters: Any = fields.get("adapters") if isinstance(fields, dict) else None
        if isinstance(adapters, list) and adapters and all(isinstance(name, str) for name in adapters):
            adapters = dict.fromkeys(adapters, 1 / len(set(adapters)))
        are_weights = isinstance(adapters, dict) and adapters and all(map(_is_weight, adapters.values()))
        if not are_weights or set(fields) != {"adapters"}:
            raise InvalidRequestError(
                f"{PLUGIN_NAME}={shown(fields)} is not allowed: vLLM does not route, so the field says which adapters, "
                f"and nothing else. {_FORM}."
            )
        return {name: float(weight) for name, weight in adapters.items()}


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
