"""An answer in a schema that may call tools instead: free at first, and then, if it called nothing, as JSON.

Constrained from its first token on to "a call or JSON", a model that is done with its tools and would say so in words
has two ways left, of which the call is the likelier: it calls for ever. So it answers freely, as it would without the
schema. What it says is a draft; a second request goes on from there, the draft before it, constrained to the schema.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from langchain_lora_retriever.output.readers import Reasoning, read
from langchain_lora_retriever.support.threads import Deadline, run_in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

    from langchain_lora_retriever.engine.api import Completion, Delta, Generation, Usage
    from langchain_lora_retriever.engine.grammar import CompiledGrammar
    from langchain_lora_retriever.output.readers import Piece, Reader

__all__ = ["DraftReader", "DraftedGeneration"]

_BORDER = "\udfff"
"""Between a draft and the answer. Half of a surrogate pair: no text that was decoded holds one."""
_JSON_OPENINGS = ("{", "[")


class DraftReader:
    """Reads what a `DraftedGeneration` gives: a draft is reasoning, and what follows its end is the answer.

    Args:
        readers: What finds reasoning and tool calls in a draft; there are none in the answer.
    """

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = readers
        self._held = ""  # a draft that begins as JSON may be the answer itself
        self._has_words = False
        self._is_over = False

    def push(self, text: str) -> Iterator[Piece]:
        """Read more text; yield what is certain of it."""
        draft, border, answer = ("", "", text) if self._is_over else text.partition(_BORDER)
        yield from self._draft(read(self._readers, draft, is_last=bool(border), is_cut_off=False))
        if border:
            self._is_over, self._held = True, ""
        if answer:
            yield answer

    def finish(self, *, is_cut_off: bool) -> Iterator[Piece]:
        """Yield what was held back: there was no answer but calls, or it is whole."""
        if not self._is_over:
            yield from self._draft(read(self._readers, "", is_last=True, is_cut_off=is_cut_off))
            if self._held:
                yield Reasoning(self._held)

    def _draft(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if not isinstance(piece, str):
                yield piece
                continue
            self._held += piece
            start = self._held.lstrip()
            self._has_words |= bool(start) and not start.startswith(_JSON_OPENINGS)
            if self._has_words:
                yield Reasoning(self._held)
                self._held = ""


class DraftedGeneration:
    """A draft and, if it calls nothing, the answer made of it, as if they were one `Generation`.

    Args:
        draft: The first request.
        readers: Makes what reads a draft.
        compiled: The answer's grammar.
        restate: Submits the second request, which writes the answer, given the draft.
    """

    def __init__(
        self,
        draft: Generation,
        *,
        readers: Callable[[], Sequence[Reader]],
        compiled: CompiledGrammar,
        restate: Callable[[Completion], Generation],
    ) -> None:
        self._draft = draft
        self._readers = readers
        self._compiled = compiled
        self._restate = restate
        self._second: Generation | None = None
        self._is_aborted = False

    def deltas(self, timeout: float | None = None) -> Iterator[Delta]:
        """Yield deltas as they come; see `Generation.deltas`."""
        deadline = Deadline(timeout)
        try:
            for delta in self._draft.deltas(timeout):
                if delta.finish_reason is None:
                    yield delta
                    continue
                following = self._following()
                yield _ended(delta, following)
                if not isinstance(following, str | None):
                    for more in following.deltas(deadline.remaining()):
                        yield _continued(delta, more)
        finally:
            self.abort()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield deltas as they come, without blocking the event loop."""
        try:
            async for delta in self._draft:
                if delta.finish_reason is None:
                    yield delta
                    continue
                following = await run_in_thread(self._following)
                yield _ended(delta, following)
                if not isinstance(following, str | None):
                    async for more in following:
                        yield _continued(delta, more)
        finally:
            self.abort()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end; see `Generation.result`."""
        deadline = Deadline(timeout)
        draft = self._draft.result(timeout)
        following = self._following()
        if isinstance(following, str | None):
            return _joined(draft, following)
        return _joined(draft, following.result(deadline.remaining()))

    async def aresult(self) -> Completion:
        """Wait for the end without blocking the event loop; see `Generation.aresult`."""
        draft = await self._draft.aresult()
        following = await run_in_thread(self._following)
        if isinstance(following, str | None):
            return _joined(draft, following)
        return _joined(draft, await following.aresult())

    def abort(self) -> None:
        """End whichever request runs."""
        self._is_aborted = True
        self._draft.abort()
        if self._second is not None:
            self._second.abort()

    def _following(self) -> Generation | str | None:
        """Say what follows the draft: nothing if it calls tools, itself if it is an answer already, or the answer."""
        draft = self._draft.result()
        pieces = list(read(self._readers(), draft.text, is_last=True, is_cut_off=draft.finish_reason == "length"))
        if any(isinstance(piece, dict) for piece in pieces):
            return None
        answer = _as_json("".join(piece for piece in pieces if isinstance(piece, str)))
        if answer is not None and self._compiled.allows(answer):
            return answer
        self._second = self._restate(draft)
        if self._is_aborted:
            self._second.abort()
        return self._second


def _as_json(text: str) -> str | None:
    """Write JSON as grammars have it; None if the text is none."""
    if not text.lstrip().startswith(_JSON_OPENINGS):
        return None
    try:
        written = json.dumps(json.loads(text), ensure_ascii=False)
        written.encode()  # half a surrogate pair, which an escape may stand for, is in no text
    except (ValueError, RecursionError):
        return None
    return written


def _ended(last: Delta, following: Generation | str | None) -> Delta:
    """Write a draft's last delta, given what follows it."""
    if following is None:
        return last
    if isinstance(following, str):
        return last._replace(text=last.text + _BORDER + following, finish_reason="stop")
    return last._replace(text=last.text + _BORDER, finish_reason=None, usage=None, is_shortened=False)


def _continued(draft: Delta, delta: Delta) -> Delta:
    """Write a delta of the answer: its usage is that of both requests, and the prompt is counted once."""
    if delta.usage is None:
        return delta
    assert draft.usage is not None
    return delta._replace(usage=_sum(draft.usage, delta.usage))


def _joined(draft: Completion, following: Completion | str | None) -> Completion:
    if following is None:
        return draft
    if isinstance(following, str):
        return draft._replace(text=draft.text + _BORDER + following, finish_reason="stop")
    return draft._replace(
        text=draft.text + _BORDER + following.text,
        token_ids=draft.token_ids + following.token_ids,
        logprobs=None if draft.logprobs is None else draft.logprobs + (following.logprobs or ()),
        finish_reason=following.finish_reason,
        usage=_sum(draft.usage, following.usage),
        is_shortened=following.is_shortened,
    )


def _sum(draft: Usage, answer: Usage) -> Usage:
    return draft._replace(num_output_tokens=draft.num_output_tokens + answer.num_output_tokens)
