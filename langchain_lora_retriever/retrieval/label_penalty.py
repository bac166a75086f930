"""Whether a prompt offers the answers that an adapter gives."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from langchain_lora_retriever.retrieval.encoder import cut_middle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.pool.samples import Sample

__all__ = ["LabelPenalty"]

_WORD = re.compile(r"\w+|[^\w\s]")
_MAX_CHARACTERS = 1 << 14
"""Of a longer prompt the middle is not looked at: all of an adapter's answers are looked for in all of its prompts."""


class LabelPenalty:
    """Tells how much a prompt lacks of what an adapter's prompts usually hold: the answers to choose from.

    An adapter for sentiment was trained on prompts that list "negative" and "positive", and answers with one of them
    whatever it is asked. It is of little use to a prompt that offers other answers, however alike the two look. For an
    adapter whose samples name no answers, or each its own, no prompt lacks anything.

    Semantics:
        usual  = mean over pairs i != j of [output_i stands in input_j]
        here   = mean over i of [output_i stands in the prompt]
        lack   = max(0, usual - here)

    Args:
        samples: Of the adapter; those without an output do not count.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        pairs = [
            (_words(s.input), _words(s.output))
            for s in samples
            if s.output is not None and _WORD.search(s.output[:_MAX_CHARACTERS])
        ]
        self._answers = Counter(answer for _, answer in pairs)
        self._num_answers = len(pairs)
        self._usual = 0.0
        if len(pairs) > 1:
            held = sum(
                count * (answer in prompt) for prompt, _ in pairs for answer, count in self._answers.items()
            ) - sum(answer in prompt for prompt, answer in pairs)
            self._usual = held / (len(pairs) * (len(pairs) - 1))

    def lack(self, text: str) -> float:
        """Return what a prompt lacks, from 0 to 1."""
        if self._usual == 0:
            return 0.0
        prompt = _words(text)
        here = sum(count for answer, count in self._answers.items() if answer in prompt) / self._num_answers
        return max(0.0, self._usual - here)


def _words(text: str) -> str:
    """Words and marks in lower case, a blank around each, so that only whole words are found in one another."""
    return f" {' '.join(_WORD.findall(cut_middle(text, _MAX_CHARACTERS).lower()))} "
