"""A chat model without a model: an engine that gives scripted answers, for tests of chains, agents and servers.

>>> from langchain_lora_retriever import ChatLoraRetriever
>>> from langchain_lora_retriever.testing import FakeEngine
>>> llm = ChatLoraRetriever(engine=FakeEngine(["first", "second"]))
>>> llm.invoke("Hello.").content
'first'
>>> "".join(chunk.content for chunk in llm.stream("Hello again."))
'second'
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from langchain_lora_retriever.engine.adapter_fit import AdapterFit
from langchain_lora_retriever.engine.admission import Admission
from langchain_lora_retriever.engine.api import Delta, EngineInfo, Grammar, Registration, TokenLogprob, Usage
from langchain_lora_retriever.engine.generation import Generation
from langchain_lora_retriever.engine.grammar import compiler_of
from langchain_lora_retriever.engine.stats import EngineStats
from langchain_lora_retriever.errors import EngineDeadError, InvalidRequestError
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = ["FakeEngine", "FakeRequest", "byte_tokenizer"]

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MAX_RANK = 256
_MANY = 1 << 30


class FakeRequest(NamedTuple):
    """What a `FakeEngine` was asked.

    Attributes:
        prompt: The prompt's text, template and all.
        prompt_token_ids: Its tokens.
        sampling: How the tokens were to be chosen. It is only recorded: an answer is given whole.
        adapters: The adapters that were to run, with weights.
        grammar: What the answer was to be constrained to. It is compiled, and not followed.
    """

    prompt: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[tuple[Adapter, float], ...]
    grammar: Grammar | None

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return [adapter.name for adapter, _ in self.adapters]


class FakeEngine:
    """An `EngineClient` without a model. Any thread or event loop may call it.

    It refuses what an engine refuses: a prompt that is too long, an adapter that does not fit, a grammar that cannot be
    compiled, everything once it is closed.

    Args:
        answers: Texts, given one after the other and then from the first again; or a function that makes one of
            `(prompt, adapter names)`. Each is called in a thread of its own, and what it raises ends its request.
        tokenizer: By default a byte-level one with a ChatML template.
        name: The base model's name.
        max_model_len: Maximum number of tokens of prompt and answer together.
        max_num_seqs: What it says that it runs at once; it runs as many as it is given.
        module_shapes: `(in_features, out_features)` of the modules that adapters may target; None lets every adapter
            fit.
        delay: Seconds before each delta.
        delta_length: Characters of a delta.
        prompt_logprob: The log-probability of every prompt token that is asked for, of `(prompt, adapter names)`; by
            default 0.

    Attributes:
        answers: May be assigned; counts for requests from then on.
        delay: May be assigned, too.
        tokenizer: The tokenizer.
        info: What does not change while it runs.
        admission: What it asks of requests before it takes them.
        requests: What it was asked, in order.
        most_running: Maximum number of requests that ran at once.
        num_aborted: Requests that their caller left.
    """

    def __init__(
        self,
        answers: Sequence[str] | Callable[[str, list[str]], str] = ("The answer.",),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "fake",
        max_model_len: int = 2048,
        max_num_seqs: int = 8,
        module_shapes: Mapping[str, tuple[int, int]] | None = None,
        delay: float = 0.0,
        delta_length: int = 3,
        prompt_logprob: Callable[[str, list[str]], float] = lambda _, __: 0.0,
    ) -> None:
        self.answers = answers
        self.delay = delay
        self.requests: list[FakeRequest] = []
        self.most_running = self.num_aborted = 0
        self.tokenizer: PreTrainedTokenizerBase = tokenizer or byte_tokenizer()
        self.info = EngineInfo(
            name=name,
            base_names=frozenset({name}),
            device="none",
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
        )
        self.admission = Admission(
            max_model_len=max_model_len,
            vocab_size=len(self.tokenizer),
            max_adapters_per_request=_MANY,
            fit=AdapterFit(
                name,
                module_shapes,
                max_rank=_MAX_RANK,
                num_rows=_MANY,
                max_loras=_MANY,
                vocab_size=len(self.tokenizer),
            )
            if module_shapes
            else None,
        )
        self._delta_length = delta_length
        self._prompt_logprob = prompt_logprob
        self._places = itertools.count()
        self._lock = threading.Lock()
        self._running: set[Generation] = set()
        self._num_finished = self._num_prompt_tokens = self._num_output_tokens = 0
        self._is_closed = False

    @property
    def answers(self) -> Sequence[str] | Callable[[str, list[str]], str]:
        """What it answers."""
        return self._answers

    @answers.setter
    def answers(self, answers: Sequence[str] | Callable[[str, list[str]], str]) -> None:
        is_list = isinstance(answers, Sequence) and not isinstance(answers, str)
        if not (callable(answers) or (is_list and answers and all(isinstance(text, str) for text in answers))):
            raise InvalidRequestError(
                f"answers={shown(answers)} is not allowed: pass a list of texts, at least one, or a function of "
                "(prompt, adapter names)."
            )
        self._answers = answers
        self._places = itertools.count()

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests: it was not closed."""
        return not self._is_closed

    def register(self, adapters: Sequence[Adapter]) -> list[Registration]:
        """Say of each adapter whether it fits `module_shapes`."""
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
        """Answer in a thread; see `EngineClient.submit`."""
        self.admission.check(prompt_token_ids, sampling, adapters, output_token_ids)
        prompt = str(self.tokenizer.decode(list(prompt_token_ids)))
        request = FakeRequest(prompt, tuple(prompt_token_ids), sampling, tuple(adapters), grammar)
        generation = Generation(on_abort=lambda: self._on_abort(generation))
        with self._lock:
            if self._is_closed:
                raise EngineDeadError("The engine has stopped: it was closed. Create a new one.")
            self._running.add(generation)
            self._num_prompt_tokens += len(prompt_token_ids)
            self.most_running = max(self.most_running, len(self._running))
        answer = self._accept(request) if grammar is None else None
        arguments = (request, generation, answer, len(output_token_ids))
        threading.Thread(target=self._run, args=arguments, daemon=True).start()
        return generation

    def stats(self) -> EngineStats:
        """A snapshot: requests and tokens are counted, the rest is 0."""
        with self._lock:
            return EngineStats(
                num_running=len(self._running),
                num_finished=self._num_finished,
                num_prompt_tokens=self._num_prompt_tokens,
                num_output_tokens=self._num_output_tokens,
            )

    def close(self) -> None:
        """End: running requests get `EngineDeadError`. Idempotent."""
        with self._lock:
            self._is_closed = True
            running, self._running = self._running, set()
            self._num_finished += len(running)
        for generation in running:
            generation.fail(EngineDeadError("The engine was closed while this request was running."))

    def _accept(self, request: FakeRequest) -> Callable[[str, list[str]], str]:
        """Note a request that nothing is wrong with, and choose its answer."""
        with self._lock:
            self.requests.append(request)
            answers, place = self._answers, next(self._places)
        return answers if callable(answers) else lambda _, __: answers[place % len(answers)]

    def _run(
        self,
        request: FakeRequest,
        generation: Generation,
        answer: Callable[[str, list[str]], str] | None,
        num_given: int,
    ) -> None:
        try:
            if request.grammar is not None:
                compiler_of(self.tokenizer).compile(request.grammar)
            answer = answer or self._accept(request)
            text = answer(request.prompt, request.names)
            for delta in self._deltas(request, text):
                num_given -= len(delta.token_ids)
                if num_given >= 0 and delta.finish_reason is None:
                    continue  # an engine that was lost gave it
                time.sleep(self.delay)
                with self._lock:
                    if generation not in self._running:
                        return
                    self._num_output_tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        self._finish(generation)
                generation.put(delta)
        except Exception as error:  # noqa: BLE001 - a scripted failure reaches the caller, as a step's would
            with self._lock:
                self._finish(generation)
            generation.fail(error)

    def _deltas(self, request: FakeRequest, text: str) -> list[Delta]:
        pieces = [text[start : start + self._delta_length] for start in range(0, len(text), self._delta_length)]
        deltas, num_tokens = [], 0
        for piece in pieces:
            token_ids = tuple(self.tokenizer.encode(piece, add_special_tokens=False))
            num_tokens += len(token_ids)
            logprobs = None
            if request.sampling.logprobs is not None:
                top = request.sampling.logprobs
                logprobs = tuple(TokenLogprob(i, 0.0, ((i, 0.0),)[:top]) for i in token_ids)
            deltas.append(Delta(piece, token_ids, logprobs, None, None))
        usage = Usage(len(request.prompt_token_ids), 0, num_tokens)
        deltas.append(Delta("", (), None if request.sampling.logprobs is None else (), "stop", usage))
        start = request.sampling.prompt_logprobs_from
        if start is not None:
            logprob = self._prompt_logprob(request.prompt, request.names)
            num_scored = len(request.prompt_token_ids) - max(start, 1)
            deltas[0] = deltas[0]._replace(prompt_logprobs=(logprob,) * num_scored)
        return deltas

    def _finish(self, generation: Generation) -> None:
        if generation in self._running:
            self._running.remove(generation)
            self._num_finished += 1

    def _on_abort(self, generation: Generation) -> None:
        with self._lock:
            self.num_aborted += 1
            self._finish(generation)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer, a token for each byte, with control tokens and a ChatML template."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")  # noqa: S106
    tokenizer.chat_template = _CHATML
    return tokenizer
