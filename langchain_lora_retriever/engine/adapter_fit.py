"""Which adapters an engine can run: asked when a pool is looked at, and again when a request is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from langchain_lora_retriever.engine.api import Registration
from langchain_lora_retriever.errors import (
    AdapterError,
    InvalidAdapterError,
    InvalidRequestError,
    UnsupportedAdapterError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from langchain_lora_retriever.types import Adapter

__all__ = ["AdapterFit"]

_NUM_REMEMBERED = 10_000
_NUM_NAMED = 4


class AdapterFit:
    """What a base model, the kernels and the device memory ask of adapters. Any thread may ask.

    Args:
        base_model: The base model's name, for error texts.
        module_shapes: `(in_features, out_features)` of every module an adapter may target, by module path.
        max_rank: Largest rank the kernels run.
        num_rows: Rank rows of device memory for adapters.
        max_loras: Most distinct adapters in device memory.
        vocabulary: The paths of the embedding and of the output layer, and which of their two widths is the vocabulary:
            0 or 1. An adapter may target those that `module_shapes` has too.
        vocab_size: Tokens that the model has, from 0; None if that is not known.
        plain_alone: Who runs the adapters, for error texts, if it runs neither DoRA nor activated LoRA.
        is_base_weight: Whether a tensor is the base model's own weight of one of these two, given its path; None of
            another module. It stays behind when this is pickled: elsewhere such a weight passes, and is looked at by
            the engine.
    """

    def __init__(
        self,
        base_model: str,
        module_shapes: Mapping[str, tuple[int, int]],
        *,
        max_rank: int,
        num_rows: int,
        max_loras: int,
        vocabulary: Mapping[str, int] | None = None,
        vocab_size: int | None = None,
        plain_alone: str | None = None,
        is_base_weight: Callable[[str, torch.Tensor], bool | None] | None = None,
    ) -> None:
        self._base_model = base_model
        self._vocabulary = vocabulary or {}
        self._vocab_size = vocab_size
        self._plain_alone = plain_alone
        self._is_base_weight = is_base_weight
        self._module_shapes = module_shapes
        self._max_rank = max_rank
        self._num_rows = num_rows
        self._max_loras = max_loras
        self._fitting: set[str] = set()  # fingerprints that were checked

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what looks at the model's weights."""
        return {**vars(self), "_is_base_weight": None}

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter that could never run. Contents are looked at once.

        Raises:
            InvalidAdapterError: If it is for another base model, or invoked by tokens that the model lacks.
            UnsupportedAdapterError: If its rank is beyond the kernels or beyond the device memory for adapters, or its
                kind is not run.
        """
        if adapter.fingerprint in self._fitting:
            return
        for member, _ in adapter.members:
            self.check(member)
        if not adapter.members:
            self._check_kind(adapter)
            self._check_modules(adapter)
            self._check_invocation(adapter)
            self._check_base_weights(adapter)
        self._check_rank(adapter)
        if len(self._fitting) >= _NUM_REMEMBERED:
            self._fitting.clear()
        self._fitting.add(adapter.fingerprint)

    def register(self, adapter: Adapter) -> Registration:
        """What `EngineClient.register` says of an adapter."""
        try:
            self.check(adapter)
        except AdapterError as error:
            return Registration(error)
        return Registration(missing_modules=self.missing(adapter))

    def missing(self, adapter: Adapter) -> tuple[str, ...]:
        """Name the modules that an adapter's configuration targets and its file lacks: they run as the base model's."""
        if adapter.is_target is None:
            return ()
        return tuple(name for name in self._module_shapes if name not in adapter.weights and adapter.is_target(name))

    def check_together(self, adapters: Sequence[Adapter]) -> None:
        """Refuse a composition that could never be in device memory at once.

        Raises:
            InvalidRequestError: If it has more adapters than slots, or more ranks than rows, or `check` refuses one.
        """
        for adapter in adapters:
            try:
                self.check(adapter)
            except AdapterError as error:
                raise InvalidRequestError(str(error)) from error
        distinct = {adapter.fingerprint: adapter for adapter in adapters}.values()
        num_rows = sum(adapter.num_rows for adapter in distinct)
        if len(distinct) > self._max_loras or num_rows > self._num_rows:
            names = ", ".join(repr(adapter.name) for adapter in distinct)
            raise InvalidRequestError(
                f"The adapters {names} need {len(distinct)} slots and {num_rows} rank rows of device memory, but the "
                f"engine has {self._max_loras} and {self._num_rows}: raise EngineConfig.max_loras or lora_cache_bytes, "
                "or compose fewer of them (top_k)."
            )

    def _check_kind(self, adapter: Adapter) -> None:
        kind = "a DoRA" if adapter.is_dora else "an activated LoRA" if adapter.invocation_tokens else None
        if kind is not None and self._plain_alone is not None:
            raise UnsupportedAdapterError(
                f"adapter {adapter.name!r} ({adapter.path}) is {kind}, which {self._plain_alone} does not run: "
                "serve it with our own engine, or merge it into the base model."
            )

    def _check_modules(self, adapter: Adapter) -> None:
        where = f"adapter {adapter.name!r} ({adapter.path})"
        for name, weights in adapter.shapes.items():
            met = (weights.lora_A.shape[1], weights.lora_B.shape[0])
            allowed = self._module_shapes.get(name)
            if allowed is None and name in self._vocabulary:
                raise UnsupportedAdapterError(
                    f"{where} adapts {name!r}, which knows the vocabulary, and the engine has no memory for it: start "
                    'it with EngineConfig(adapter_kinds=("vocabulary",)), or with a pool that has such an '
                    "adapter."
                )
            if allowed is None:
                raise InvalidAdapterError(
                    f"{where} adapts {name!r}, which is no linear module of the base model {self._base_model!r} that "
                    f"sees every token{self._made_for(adapter)}. Allowed are, for example: "
                    f"{', '.join(list(self._module_shapes)[:_NUM_NAMED])}."
                )
            if met != allowed and name in self._vocabulary:
                self._refuse_vocabulary(adapter, name, met, allowed)
            if met != allowed:
                raise InvalidAdapterError(
                    f"{where} does not fit {name!r}: it has (in_features, out_features) = {met}, the base model "
                    f"{self._base_model!r} {allowed}{self._made_for(adapter)}. It is for another base model."
                )

    def _refuse_vocabulary(
        self, adapter: Adapter, name: str, met: tuple[int, int], allowed: tuple[int, int]
    ) -> NoReturn:
        """Say whether it is the vocabulary that is of another size, or the model."""
        side = self._vocabulary[name]
        if met[1 - side] != allowed[1 - side]:
            why = f"it is {met[1 - side]:,} wide, the base model {allowed[1 - side]:,}"
        else:
            why = f"it is for a vocabulary of {met[side]:,} tokens, the base model has {allowed[side]:,}"
        raise InvalidAdapterError(
            f"adapter {adapter.name!r} ({adapter.path}) does not fit {name!r}: {why} ({self._base_model!r}"
            f"{self._made_for(adapter)}). It is for another base model, or for one whose vocabulary was resized: serve "
            "that, or merge the adapter into it."
        )

    def _check_invocation(self, adapter: Adapter) -> None:
        """An activated LoRA of tokens that no prompt can have would answer as the base model, whatever is asked."""
        token_id = max(adapter.invocation_tokens, default=0)
        if self._vocab_size is not None and token_id >= self._vocab_size:
            raise InvalidAdapterError(
                f"adapter {adapter.name!r} ({adapter.path}) is an activated LoRA, and its invocation has the token "
                f"{token_id}, but the base model {self._base_model!r} has {self._vocab_size:,} tokens, from 0: no "
                f"prompt can invoke it{self._made_for(adapter)}. It is for another base model, or for one whose "
                "vocabulary was resized: serve that."
            )

    def _check_base_weights(self, adapter: Adapter) -> None:
        """Weights of the base's own that a file repeats must be the base's: they are not served."""
        where = f"adapter {adapter.name!r} ({adapter.path})"
        for name, theirs in adapter.base_weights.items():
            is_ours: bool | None = name in self._vocabulary or None
            if self._is_base_weight is not None:
                is_ours = self._is_base_weight(name, theirs)
            if is_ours is None:
                raise UnsupportedAdapterError(
                    f"{where} brings a whole weight of the base model's ({name!r}), which is not supported here. Save "
                    "it again without, or merge it into the base model (merge_and_unload) and serve that."
                )
            if not is_ours:
                raise UnsupportedAdapterError(
                    f"{where} brings a weight of {name!r} {list(theirs.shape)} that is not the base model's: it was "
                    "trained on a base whose vocabulary was resized or changed. Load that base model, or merge the "
                    "adapter into it and serve the result."
                )

    def _check_rank(self, adapter: Adapter) -> None:
        where = f"adapter {adapter.name!r} ({adapter.path})"
        if adapter.rank > self._max_rank:
            raise UnsupportedAdapterError(
                f"{where} has rank {adapter.rank}; the kernels go up to {self._max_rank}. Train it with a smaller "
                "rank, or merge it into the base model."
            )
        if adapter.num_rows > self._num_rows:
            raise UnsupportedAdapterError(
                f"{where} takes {adapter.num_rows} rank rows; the device memory for adapters holds {self._num_rows}: "
                "raise EngineConfig.lora_cache_bytes."
            )

    @staticmethod
    def _made_for(adapter: Adapter) -> str:
        return f"; its configuration names {adapter.base_model!r}" if adapter.base_model else ""
