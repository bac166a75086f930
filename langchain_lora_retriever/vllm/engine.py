"""vLLM as an `EngineClient`: it runs the model, we route, compose and read the answers."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from langchain_lora_retriever.engine import load_tokenizer
from langchain_lora_retriever.engine.adapter_fit import AdapterFit
from langchain_lora_retriever.engine.admission import Admission
from langchain_lora_retriever.engine.api import EngineInfo, Registration
from langchain_lora_retriever.engine.detokenizer import Vocabulary
from langchain_lora_retriever.engine.generation import Generation
from langchain_lora_retriever.engine.grammar import compiler_of
from langchain_lora_retriever.engine.request import failure
from langchain_lora_retriever.engine.stats import EngineStats, RequestCounts
from langchain_lora_retriever.errors import (
    AdapterError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    fresh,
)
from langchain_lora_retriever.support.forking import after_fork
from langchain_lora_retriever.vllm.adapter_folders import AdapterFolders
from langchain_lora_retriever.vllm.compositions import Compositions
from langchain_lora_retriever.vllm.limits import PLUGIN_NAME, check_plugin, check_version, why_not
from langchain_lora_retriever.vllm.modules import module_shapes
from langchain_lora_retriever.vllm.request import VllmRequest, vllm_sampling
from langchain_lora_retriever.vllm.versions import client_errors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.api import Delta, Grammar
    from langchain_lora_retriever.types import Adapter, SamplingParams
    from langchain_lora_retriever.vllm.compositions import Member

__all__ = ["VllmEngine"]

_DEAD = "vLLM's engine has died; its log says why. Create a new VllmEngine."


class VllmEngine:
    """An `EngineClient` over vLLM's `AsyncLLM`. Any thread or event loop may call it. Experimental.

    The model runs in vLLM's processes, on a GPU or a CPU, or tensor-parallel over several (two were tried, by vLLM's
    `LLM`); plain adapters and mixtures run on our kernels there. What vLLM cannot do of what our engine does is refused
    in words: DoRA, activated LoRA, adapters of the embedding or the output layer, and going on after the beginning of
    an answer that was sampled or constrained. A grammar does not shorten an answer to fit the token limit: JSON may be
    cut off there.

    Args:
        model: A hub name or a folder.
        max_loras: Adapters that may run at once, those of compositions counted one by one.
        max_lora_rank: Largest rank: 1, 8, 16, 32, 64, 128 or 256.
        max_adapters_per_request: Longest composition, 1 to 8.
        max_folder_bytes: Of adapters on the disk (in the folder for temporary files) that no request runs.
        engine_args: Further fields of vLLM's `AsyncEngineArgs`: `tensor_parallel_size`, `dtype`, `max_model_len`, ...

    Raises:
        MissingDependencyError: If vLLM is not installed.
        EngineError: If this vLLM, or this set-up of it, cannot run compositions, or does not start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_loras: int = 8,
        max_lora_rank: int = 16,
        max_adapters_per_request: int = 4,
        max_folder_bytes: int = 8 << 30,
        **engine_args: Any,
    ) -> None:
        check_version()
        from vllm import envs  # noqa: PLC0415 - vLLM may be absent
        from vllm.config import StructuredOutputsConfig  # noqa: PLC0415
        from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415

        check_plugin(envs.VLLM_PLUGINS)
        additional = dict(engine_args.pop("additional_config", {}))
        ours = additional.get(PLUGIN_NAME, {})
        additional[PLUGIN_NAME] = {**ours, "max_adapters_per_request": max_adapters_per_request}
        arguments = AsyncEngineArgs(
            model=str(model),
            enable_lora=True,
            max_loras=max_loras,
            max_lora_rank=max_lora_rank,
            additional_config=additional,
            **{
                "disable_log_stats": True,
                "structured_outputs_config": StructuredOutputsConfig(backend="guidance"),  # reads what we write
                **engine_args,
            },
        )
        self._lock = threading.Lock()
        self._requests: set[VllmRequest] = set()
        self._ids = itertools.count()
        self._compositions = Compositions()
        self._counts = RequestCounts()
        self._death: EngineDeadError | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-engine", daemon=True)
        self._thread.start()
        self._llm: Any = None
        self._folders: AdapterFolders | None = None
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm-adapters")
        try:
            self._llm = asyncio.run_coroutine_threadsafe(_start(arguments), self._loop).result()
            self._folders = AdapterFolders(max_folder_bytes)
            self._describe(str(model), max_adapters_per_request)
        except BaseException:
            self.close()
            raise
        _engines.add(self)

    def _describe(self, name: str, max_adapters_per_request: int) -> None:
        """Find out what does not change."""
        config = self._llm.vllm_config
        refusal = why_not(config)
        if refusal is not None:
            raise EngineError(refusal)
        model, lora = config.model_config, config.lora_config
        # One of our own: vLLM's is a pool of copies, which a chat template set on it does not reach.
        where = {"revision": model.tokenizer_revision, "trust_remote_code": model.trust_remote_code}
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            model.tokenizer, **{key: value for key, value in where.items() if value}
        )
        self._vocabulary = Vocabulary(self.tokenizer)
        self._default_penalty = float(model.get_diff_sampling_param().get("repetition_penalty", 1.0))
        served = model.served_model_name
        self.info = EngineInfo(
            name=name,
            base_names=frozenset({name, *([served] if isinstance(served, str) else served or ())}),
            device=config.device_config.device_type,
            max_model_len=model.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
        )
        self.admission = Admission(
            max_model_len=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            max_adapters_per_request=max_adapters_per_request,
            fit=AdapterFit(
                name,
                module_shapes(model.hf_text_config),
                max_rank=lora.max_lora_rank,
                num_rows=lora.max_loras * lora.max_lora_rank,
                max_loras=lora.max_loras,
                plain_alone="vLLM",
            ),
        )

    @property
    def is_alive(self) -> bool:
        """Whether it still takes requests: it was not closed, and vLLM's processes are there."""
        llm = self._llm
        return self._death is None and llm is not None and not llm.errored

    def register(self, adapters: Sequence[Adapter]) -> list[Registration]:
        """Say of each adapter whether it can run here; see `EngineClient.register`."""
        return self.admission.register(adapters)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapters: Sequence[tuple[Adapter, float]] = (),
        *,
        grammar: Grammar | None = None,
        output_token_ids: Sequence[int] = (),
    ) -> Generation:
        """Queue a request; see `EngineClient.submit`.

        Raises:
            InvalidRequestError: Also if an answer that was sampled or constrained is to go on after its beginning.
        """
        self._check_alive()
        token_ids = self.admission.check(prompt_token_ids, sampling, adapters, output_token_ids)
        if output_token_ids and (sampling.temperature > 0 or grammar is not None):
            what = "a grammar" if grammar is not None else f"temperature={sampling.temperature}"
            raise InvalidRequestError(
                f"An answer with {what} cannot go on after its beginning in vLLM, whose grammars and random numbers "
                "start with the request: ask for all of it, or for a greedy one without a grammar."
            )
        request = VllmRequest(
            token_ids,
            sampling,
            adapters,
            grammar,
            output_token_ids,
            tokenizer=self.tokenizer,
            vocabulary=self._vocabulary,
            max_model_len=self.info.max_model_len,
        )
        request.generation = Generation(on_abort=lambda: self._leave(request))
        with self._lock:
            self._check_alive()
            self._requests.add(request)
            self._counts.num_prompt_tokens += len(token_ids)
        self._loop.call_soon_threadsafe(self._begin, request)
        return request.generation

    def stats(self) -> EngineStats:
        """A snapshot of what is counted here: requests, tokens, latencies; the rest is 0. vLLM has its own metrics."""
        with self._lock:
            num_running = sum(request.has_begun for request in self._requests)
            return EngineStats(
                num_running=num_running, num_waiting=len(self._requests) - num_running, **self._counts.told()
            )

    def close(self) -> None:
        """Stop vLLM's processes: running requests end with `EngineDeadError`. Idempotent."""
        told = EngineDeadError("The engine has stopped: it was closed. Create a new one.")
        is_first = self._die(EngineDeadError("The engine was closed while this request was running."), told)
        if not is_first or self._loop.is_closed():
            return
        _engines.discard(self)
        llm, self._llm = self._llm, None  # it ends here, not with the interpreter
        if llm is not None:
            asyncio.run_coroutine_threadsafe(_stop(llm), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._disk.shutdown()
        if self._folders is not None:
            self._folders.close()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(str(self._death))
        if not self.is_alive:
            raise EngineDeadError(_DEAD)

    def _die(self, death: EngineDeadError, told_later: EngineDeadError) -> bool:
        """End the requests that run with `death`, refuse later ones with `told_later`; False if it has died before."""
        with self._lock:
            if self._death is not None:
                return False
            self._death = told_later
            requests, self._requests = self._requests, set()
            self._counts.num_finished += len(requests)
        for request in requests:
            request.generation.fail(EngineDeadError(str(death)))
        return True

    def _end_in_child(self) -> None:
        """Say in a forked process that vLLM's processes are its parent's."""
        self._lock = threading.Lock()
        self._death = EngineDeadError(
            "This process was forked from one that runs vLLM, which cannot be shared. Make the engine after the fork."
        )
        for request in list(self._requests):
            request.generation.orphan(self._death)

    # On the event loop's thread

    def _begin(self, request: VllmRequest) -> None:
        if not request.generation.is_done:
            request.task = self._loop.create_task(self._serve(request))

    def _leave(self, request: VllmRequest) -> None:
        """Let go of a request that was aborted; any thread calls this."""
        if self._forget(request) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: request.task and request.task.cancel())

    def _forget(self, request: VllmRequest) -> bool:
        with self._lock:
            if request not in self._requests:
                return False
            self._requests.discard(request)
            self._counts.num_finished += 1
            return True

    async def _serve(self, request: VllmRequest) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError  # noqa: PLC0415 - vLLM may be absent

        held: list[Adapter] = []
        error: BaseException
        at_fault: tuple[type[Exception], ...] = (*client_errors(), ValueError)
        try:
            await self._answer(request, held)
        except asyncio.CancelledError:
            if not request.generation.is_done:
                raise
        except VllmDeadError:
            self._die(EngineDeadError(_DEAD), EngineDeadError(_DEAD))
        except at_fault as cause:
            error = cause if isinstance(cause, InvalidRequestError | AdapterError) else InvalidRequestError(str(cause))
            self._fail(request, error)
        except BaseException as cause:  # noqa: BLE001 - panics of native code too; it ends the request it came from
            self._fail(request, failure("The request failed", cause.__cause__ or cause))
        finally:
            if request.adapters and self._folders is not None:
                self._disk.submit(self._folders.release, held)  # behind what holds them, if that has begun

    def _fail(self, request: VllmRequest, error: Exception) -> None:
        if self._forget(request):
            request.generation.fail(error)

    async def _answer(self, request: VllmRequest, held: list[Adapter]) -> None:
        """Prepare a request, and deliver what vLLM answers."""
        from vllm.inputs.engine import tokens_input  # noqa: PLC0415 - vLLM may be absent

        if request.grammar is not None:
            compiled = compiler_of(self.tokenizer).start(request.grammar)  # refused as our engine would
            try:
                await asyncio.shield(asyncio.wrap_future(compiled))
            except InvalidRequestError as error:
                raise fresh(error) from None
        outputs = self._llm.generate(
            tokens_input(request.token_ids),
            vllm_sampling(request, self._default_penalty),
            f"lora-retriever-{next(self._ids)}",
            lora_request=await self._lora_request(request, held),
        )
        last = time.monotonic()
        async with aclosing(outputs):  # a stop string ends it here; vLLM hears of that
            async for output in outputs:
                is_first = not request.has_begun
                delta = request.take(output)
                now = time.monotonic()
                with self._lock:
                    counted = self._counts.first_token if is_first else self._counts.inter_token
                    counted.append(now - last)
                last = now
                if delta is not None and self._deliver(request, delta):
                    return

    async def _lora_request(self, request: VllmRequest, held: list[Adapter]) -> Any:
        """What vLLM calls the request's adapters, whose folders are held then; None if there are none."""
        if not request.adapters:
            return None
        folders = self._folders
        assert folders is not None

        def hold() -> list[Member]:
            members = folders.hold(request.adapters)
            held.extend(adapter for adapter, _ in request.adapters)
            return members

        members = await asyncio.wrap_future(self._disk.submit(hold))
        return self._compositions.request("+".join(member.name[:12] for member in members), members)

    def _deliver(self, request: VllmRequest, delta: Delta) -> bool:
        """Hand out a delta; True if it was the last."""
        with self._lock:
            self._counts.num_output_tokens += len(delta.token_ids)
            if delta.usage is not None:
                self._counts.num_cached_tokens += delta.usage.num_cached_tokens
        if delta.finish_reason is not None:
            self._forget(request)
        request.generation.put(delta)
        return delta.finish_reason is not None


async def _start(arguments: Any) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415 - vLLM may be absent

    try:
        return AsyncLLM.from_engine_args(arguments)
    except Exception as error:
        raise EngineError(f"vLLM did not start: {error}") from error


async def _stop(llm: Any) -> None:
    """Shut it down where its tasks run, and see these end."""
    llm.shutdown()
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


_engines: WeakSet[VllmEngine] = WeakSet()


@atexit.register
def _end_all() -> None:
    for engine in list(_engines):
        engine.close()


def _end_all_in_child() -> None:
    for engine in list(_engines):
        engine._end_in_child()  # noqa: SLF001 - its other half


after_fork(_end_all_in_child)
