"""Adapters averaged into one: a recipe at first, and numbers where they are wanted.

Source: LoraRetriever, arXiv:2402.09997, section 3.3; Huang et al., LoraHub, arXiv:2307.13269.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import TypeAlias
from weakref import WeakValueDictionary

import torch

from langchain_lora_retriever.errors import InvalidRequestError, fresh
from langchain_lora_retriever.support.forking import begin_in_every_process
from langchain_lora_retriever.types import Adapter, LoraWeights

__all__ = ["FusedWeights", "FusionCache", "fuse"]

Members: TypeAlias = "tuple[tuple[Adapter, float], ...]"

_MAX_RECENT = 32
"""Fusions that are kept though nobody runs them: their members stay, and these files open, also after an update."""


class FusedWeights(Mapping[str, LoraWeights]):
    """The average of adapters' weights, made when a module is asked for. Any thread may ask.

    Args:
        key: Names the average: the same for the same members and weights.
        members: Adapters and weights, in the order in which they are summed.
        averages: Where the numbers are kept while there is room.
    """

    def __init__(self, key: str, members: Members, averages: FusionCache) -> None:
        self._key = key
        self._members = members
        self._averages = averages

    @property
    def members(self) -> Members:
        """Adapters and weights, in the order in which they are summed."""
        return self._members

    @cached_property
    def shapes(self) -> Mapping[str, LoraWeights]:
        """Shapes, dtypes and scalings, without averaging: the tensors are on the meta device."""
        return _average([(adapter, adapter.shapes, weight) for adapter, weight in self._members], device="meta")

    def __getitem__(self, module: str) -> LoraWeights:
        """The weights of a module: float32, scaling 1.

        Raises:
            KeyError: If no member adapts it.
            InvalidRequestError: If two members differ in a module's shape.
            InvalidAdapterError: If the file of one is not the one that was read any more.
        """
        return self._averages.average(self._key, self._members)[module]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(module for adapter, _ in self._members for module in adapter.shapes))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __deepcopy__(self, memo: object) -> FusedWeights:
        """These weights themselves: nobody changes them."""
        return self

    def __reduce__(self) -> tuple[Callable[[Members], Mapping[str, LoraWeights]], tuple[Members]]:
        """Another process averages for itself."""
        return _weights_of, (self._members,)


class FusionCache:
    """Fusions by content, the least recently used dropped. Any thread may call it; none waits for another's fusion.

    Args:
        max_bytes: Maximum number of bytes of averaged weights to keep; the last ones made are kept in any case.
    """

    def __init__(self, max_bytes: int = 32 << 20) -> None:
        self._max_bytes = max_bytes
        self._recipes: WeakValueDictionary[str, FusedWeights] = WeakValueDictionary()
        self._recent: OrderedDict[str, FusedWeights] = OrderedDict()
        begin_in_every_process(self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()  # held for a look into the dictionaries
        self._averages: OrderedDict[str, Future[dict[str, LoraWeights]]] = OrderedDict()
        self._num_bytes: dict[str, int] = {}  # of averages that are done

    def __len__(self) -> int:
        """How many averages are kept."""
        return len(self._averages)

    def fuse(self, adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
        """`fuse`, or what it returned for adapters of the same content and weights."""
        if not adapters:
            raise InvalidRequestError("adapters=[] is not allowed: pass at least one adapter to fuse.")
        if len(adapters) == 1 and adapters[0][0].is_dora and adapters[0][1] == 1:
            return adapters[0][0]
        invocation_tokens = _check_kinds([adapter for adapter, _ in adapters])
        members = tuple(
            sorted(adapters, key=lambda pair: (pair[0].fingerprint, pair[1]))
        )  # sums do not depend on order
        key = _key(members)
        with self._lock:
            weights = self._recipes.get(key)
            if weights is None or not _are_same(weights.members, members):
                weights = self._recipes[key] = FusedWeights(key, members, self)
            self._recent[key] = weights
            self._recent.move_to_end(key)
            while len(self._recent) > _MAX_RECENT:
                self._recent.popitem(last=False)
        return Adapter(
            name="+".join(adapter.name for adapter, _ in members),
            fingerprint=key,
            weights=weights,
            base_model=members[0][0].base_model,
            members=members,
            invocation_tokens=invocation_tokens,
        )

    def average(self, key: str, members: Members) -> dict[str, LoraWeights]:
        """Average the members' weights, once; whoever asks for the same meanwhile waits for it.

        Raises:
            InvalidRequestError: If two members differ in a module's shape.
            InvalidAdapterError: If the file of one is not the one that was read any more.
        """
        with self._lock:
            future = self._averages.get(key)
            is_mine = future is None
            if future is None:
                future = self._averages[key] = Future()
            self._averages.move_to_end(key)
        if is_mine:
            self._make(key, members, future)
        error = future.exception()
        if error is not None:
            raise fresh(error)
        return future.result()

    def _make(self, key: str, members: Members, future: Future[dict[str, LoraWeights]]) -> None:
        try:
            # Each file is read once.
            average = _average([(adapter, dict(adapter.weights), weight) for adapter, weight in members])
        except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it; nothing is kept
            with self._lock:
                self._averages.pop(key, None)
            future.set_exception(error)
            return
        with self._lock:
            self._num_bytes[key] = sum(w.lora_A.nbytes + w.lora_B.nbytes for w in average.values())
            while len(self._num_bytes) > 1 and sum(self._num_bytes.values()) > self._max_bytes:
                oldest = next(other for other in self._averages if other in self._num_bytes)
                del self._averages[oldest], self._num_bytes[oldest]
        future.set_result(average)


# One for the process: the keys are contents, so whoever fuses the same adapters may share the result.
_FUSIONS = FusionCache()


def fuse(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Average adapters' parameters into one new adapter.

    Semantics:
        lora_A = sum_j w_j A_j,  lora_B = sum_j w_j s_j B_j,  scaling = 1, in every module that any of them adapts.
        Where an adapter lacks a module it contributes zeros; smaller ranks are padded with zeros. Activated LoRAs can
        be averaged if the same tokens invoke them; DoRA cannot be, but for one alone with weight 1, which is itself.

    Nothing is computed yet: the numbers are made when `weights` are first asked for, by whoever asks, and kept while
    there is room. What is wrong with a member is told then.

    Args:
        adapters: Adapters of one base model, and weights; at least one.

    Returns:
        An adapter in float32 whose fingerprint follows from the members' fingerprints and weights.

    Raises:
        InvalidRequestError: If there is no adapter, one of several is DoRA, or they are invoked by different tokens.
    """
    return _FUSIONS.fuse(adapters)


def _check_kinds(adapters: Sequence[Adapter]) -> tuple[int, ...]:
    """The tokens that invoke adapters which can be averaged; none if they are active from the first token on."""
    dora = [adapter.name for adapter in adapters if adapter.is_dora]
    if dora:
        raise InvalidRequestError(
            f"{dora[0]!r} is DoRA and cannot be fused: its magnitudes belong to the direction that its own factors "
            'give the base weight, and an average has another. Use composition="mixture", which adds what each adapter '
            "changes, or leave it out (exclude_adapters)."
        )
    invocations = {adapter.invocation_tokens for adapter in adapters}
    if len(invocations) > 1:
        names = ", ".join(repr(adapter.name) for adapter in adapters)
        raise InvalidRequestError(
            f"The adapters {names} cannot be fused: they are invoked by different tokens "
            f"({', '.join(str(list(tokens)) for tokens in sorted(invocations))}; [] is active from the beginning), "
            'and an average is active everywhere or nowhere. Use composition="mixture".'
        )
    return invocations.pop()


def _are_same(known: Members, members: Members) -> bool:
    """Whether members of the same contents also come from the same files."""
    return all(one.weights is other.weights for (one, _), (other, _) in zip(known, members, strict=True))


def _weights_of(members: Members) -> Mapping[str, LoraWeights]:
    return fuse(members).weights


def _key(members: Members) -> str:
    lines = (f"{adapter.fingerprint} {weight!r}" for adapter, weight in members)
    return hashlib.sha256("\n".join(["fusion", *lines]).encode()).hexdigest()


def _average(
    members: Sequence[tuple[Adapter, Mapping[str, LoraWeights], float]], *, device: str = "cpu"
) -> dict[str, LoraWeights]:
    modules = dict.fromkeys(module for _, weights, _ in members for module in weights)
    return {module: _average_module(module, members, device) for module in modules}


def _average_module(
    module: str, adapters: Sequence[tuple[Adapter, Mapping[str, LoraWeights], float]], device: str
) -> LoraWeights:
    members = [(weights[module], weight) for _, weights, weight in adapters if module in weights]
    shapes = sorted({(lora.lora_A.shape[1], lora.lora_B.shape[0]) for lora, _ in members})
    if len(shapes) > 1:
        raise InvalidRequestError(
            f"the adapters {[adapter.name for adapter, _, _ in adapters]!r} cannot be fused: {module!r} has "
            f"(in_features, out_features) of {shapes!r} in them. Fuse adapters of one base model."
        )
    ((in_features, out_features),) = shapes
    r = max(lora.r for lora, _ in members)
    lora_A = torch.zeros(r, in_features, device=device)
    lora_B = torch.zeros(out_features, r, device=device)
    if device != "meta":
        for lora, weight in members:
            lora_A[: lora.r] += weight * lora.lora_A.float()
            lora_B[:, : lora.r] += weight * lora.scaling * lora.lora_B.float()
    return LoraWeights(lora_A, lora_B, 1.0)
