"""How a call reaches the engine (understood, routed, encoded, submitted) and leaves it, for chat models and servers."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from langchain_lora_retriever.chat.messages import (
    check_length,
    encode_chat,
    encode_text,
    is_encoding,
    routing_text,
    to_chat,
)
from langchain_lora_retriever.engine.grammar import compiler_of
from langchain_lora_retriever.errors import InvalidRequestError, RequestAbortedError
from langchain_lora_retriever.output.draft import DraftedGeneration, DraftReader
from langchain_lora_retriever.output.format import AnswerFormat, answer_format
from langchain_lora_retriever.output.stream import Answer, answer_readers, reads_special_tokens
from langchain_lora_retriever.output.tools import to_tools
from langchain_lora_retriever.support.threads import run_in_thread

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from langchain_core.messages import BaseMessage
    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.chat.call import CallOptions
    from langchain_lora_retriever.engine.api import Completion, EngineClient, Generation
    from langchain_lora_retriever.engine.grammar import CompiledGrammar
    from langchain_lora_retriever.output.dialects import ChatTurn
    from langchain_lora_retriever.output.readers import Reader
    from langchain_lora_retriever.retrieval.routing import Plan
    from langchain_lora_retriever.runtime import Runtime
    from langchain_lora_retriever.support.threads import Deadline
    from langchain_lora_retriever.types import Composition

__all__ = ["LONG_CHAT", "Begun", "Run", "abegin", "begin", "num_prompt_tokens", "owned", "text_to_route"]

_logger = logging.getLogger(__name__)

_LONG_PROMPT = 16_384
"""Characters from which a prompt is rendered and encoded off the event loop: that takes some ten milliseconds."""
LONG_CHAT = 64
"""Messages from which the same is done, and they are read off it."""
_MAX_COUNTED = 4 << 20
"""Characters of a chat whose tokens are counted, which takes some seconds."""


class Run(NamedTuple):
    """A request in the engine, or two that make one answer, and what reads it."""

    generation: Generation | DraftedGeneration
    answer: Answer


class Begun(NamedTuple):
    """A call whose requests are in the engine.

    Attributes:
        runs: One for each answer.
        composition: What they run.
        engine: Where.
    """

    runs: list[Run]
    composition: Composition
    engine: EngineClient

    def abort(self) -> None:
        """End all of them."""
        for run in self.runs:
            run.generation.abort()


class _Call(NamedTuple):
    """A call, understood: what is asked, of which engine, in which conversation, routed on which text.

    `then` is the grammar of an answer that is drafted first (`AnswerFormat.then`), compiled.
    """

    options: CallOptions
    format: AnswerFormat
    then: CompiledGrammar | None
    engine: EngineClient
    chat: list[ChatTurn]
    text: str

    def encode(self) -> list[int]:
        """Return the prompt's token ids."""
        return encode_chat(
            self.engine.tokenizer,
            self.chat,
            tools=self.format.tools,
            dialect=self.format.dialect,
            template_kwargs=self.options.chat_template_kwargs,
        )


def begin(
    runtime: Runtime,
    engine: EngineClient,
    messages: Sequence[BaseMessage],
    options: CallOptions,
    *,
    plan: Callable[[str, CallOptions], Plan] | None = None,
) -> Begun:
    """Understand a call, route it, and give it to the engine.

    Args:
        runtime: Routes it.
        engine: The runtime's, ready.
        messages: The prompt, as `check_messages` has let it pass.
        options: The call's.
        plan: What routes it in place of the runtime, and tells a trace.

    Raises:
        LoraRetrieverError: If the call cannot be served; nothing of it is in the engine then.
    """
    call = _understand(messages, options, engine)
    return _start(call, (plan or runtime.plan)(call.text, options))


async def abegin(
    runtime: Runtime,
    engine: EngineClient,
    messages: Sequence[BaseMessage],
    options: CallOptions,
    *,
    plan: Callable[[str, CallOptions], Awaitable[Plan]] | None = None,
) -> Begun:
    """Do what `begin` does without holding up the event loop: what may take longer is done in a thread."""
    understand = partial(_understand, messages, options, engine)
    is_long = options.has_format or _is_long(messages)
    call = await run_in_thread(understand) if is_long else understand()
    start = partial(_start, call, await (plan or runtime.aplan)(call.text, options))
    # Nor wait for another's long prompt: a tokenizer encodes one at a time.
    is_long = _is_long(messages) or is_encoding(engine.tokenizer)
    return await run_in_thread(start, discard=Begun.abort) if is_long else start()


@contextmanager
def owned(
    begun: Begun, deadline: Deadline, loop: asyncio.AbstractEventLoop | None = None
) -> Iterator[list[Generation | DraftedGeneration]]:
    """Abort what its caller leaves before it ends: by an error, a cancellation, a close, a timeout. Yields generations.

    Args:
        begun: A call just begun.
        deadline: When the call must be over.
        loop: The caller's event loop, which aborts them at the deadline; a caller without one limits its own waiting.

    Raises:
        TimeoutError: If the deadline was the reason.
    """
    is_late = False

    def expire() -> None:
        nonlocal is_late
        is_late = True
        begun.abort()

    remaining = deadline.remaining()
    timer = None if loop is None or remaining is None else loop.call_later(remaining, expire)
    try:
        yield [run.generation for run in begun.runs]
    except TimeoutError as error:
        raise deadline.error() from error
    except RequestAbortedError as error:
        if is_late:
            raise deadline.error() from error
        raise
    finally:
        if timer is not None:
            timer.cancel()
        begun.abort()


def num_prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[BaseMessage], options: CallOptions) -> int:
    """Count the tokens of the prompt that a call makes, template and all, however many there are.

    What `trim_messages` asks about is part of a chat, or a chat backwards: where the template refuses it for beginning
    with an answer, it is counted with an empty question before that.

    Raises:
        InvalidRequestError: If the messages, or the tools, cannot be understood, or are longer than what is counted.
    """
    chat = to_chat(messages)
    num_characters = sum(len(turn["content"]) for turn in chat)
    if num_characters > _MAX_COUNTED:
        raise InvalidRequestError(
            f"The messages have {num_characters:,} characters, but of at most {_MAX_COUNTED:,} the tokens are counted: "
            "drop some before."
        )
    tools = to_tools(options.tools or (), strict=None)
    encode = partial(encode_chat, tokenizer, tools=tools, template_kwargs=options.chat_template_kwargs)
    try:
        return len(encode(chat))
    except InvalidRequestError:
        num_systems = sum(1 for _ in takewhile(lambda turn: turn["role"] == "system", chat))
        if chat[num_systems : num_systems + 1] and chat[num_systems]["role"] == "user":
            raise
        return len(encode([*chat[:num_systems], {"role": "user", "content": ""}, *chat[num_systems:]]))


def text_to_route(messages: Sequence[BaseMessage], options: CallOptions) -> str:
    """Return what a call is routed on."""
    return routing_text(messages) if options.route_text is None else options.route_text


def _understand(messages: Sequence[BaseMessage], options: CallOptions, engine: EngineClient) -> _Call:
    chat = to_chat(messages)
    check_length(engine.tokenizer, chat, max_num_tokens=engine.info.max_model_len)
    form = answer_format(options, engine.tokenizer)
    then = None if form.then is None else compiler_of(engine.tokenizer).compile(form.then)
    return _Call(options, form, then, engine, chat, text_to_route(messages, options))


def _start(call: _Call, plan: Plan) -> Begun:
    # Encoded only now: while the first texts of many are embedded no other call holds them up by its tokens.
    prompt_token_ids = call.encode()
    _logger.debug("%d prompt tokens run %s", len(prompt_token_ids), plan.composition)
    tokenizer = call.engine.tokenizer
    begun = Begun([], plan.composition, call.engine)
    try:
        for index in range(call.options.n):
            readers = answer_readers(tokenizer, prompt_token_ids, call.format)
            skips_special = not reads_special_tokens(tokenizer, readers)
            sampling = call.options.sampling(index, skip_special_tokens=skips_special)
            generation = call.engine.submit(prompt_token_ids, sampling, plan.adapters, grammar=call.format.grammar)
            if call.then is None:
                begun.runs.append(Run(generation, Answer(readers)))
            else:
                drafted = _drafted(call, call.then, plan, index, prompt_token_ids, generation)
                begun.runs.append(Run(drafted, Answer([DraftReader(readers)])))
    except BaseException:
        begun.abort()
        raise
    return begun


def _drafted(
    call: _Call, then: CompiledGrammar, plan: Plan, index: int, prompt_token_ids: list[int], draft: Generation
) -> DraftedGeneration:
    """Let a second request write answer `index` in the schema that the call asks for, unless the first calls tools."""
    engine = call.engine

    def readers() -> list[Reader]:
        return answer_readers(engine.tokenizer, prompt_token_ids, call.format)

    def restate(words: Completion) -> Generation:
        sampling = call.options.sampling(index)
        said = [*words.token_ids]
        while said and said[-1] in engine.tokenizer.all_special_ids:
            said.pop()
        # The model goes on where it stopped: the engine has all of this in its cache.
        token_ids = [*prompt_token_ids, *said, *encode_text(engine.tokenizer, "\n")]
        if len(token_ids) + sampling.max_tokens > engine.info.max_model_len:
            token_ids = prompt_token_ids
        return engine.submit(token_ids, sampling, plan.adapters, grammar=call.format.then)

    return DraftedGeneration(draft, readers=readers, compiled=then, restate=restate)


def _is_long(messages: Sequence[BaseMessage]) -> bool:
    return len(messages) > LONG_CHAT or sum(map(_num_characters, messages)) > _LONG_PROMPT


def _num_characters(message: BaseMessage) -> int:
    """Estimate, in no time, how much text a message holds."""
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(block if isinstance(block, str) else str(block.get("text", ""))) for block in message.content)
