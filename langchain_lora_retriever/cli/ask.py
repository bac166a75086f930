"""`lora-retriever chat` and `lora-retriever route`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from langchain_lora_retriever.cli.options import (
    AdapterOption,
    BaseModelOption,
    CompositionOption,
    EncoderOption,
    JsonOption,
    Mode,
    PoolOption,
    TopKOption,
    make_chat_model,
    warm_up,
)
from langchain_lora_retriever.cli.terminal import print_json, print_table, status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.types import Composition

__all__ = ["chat", "route"]


def chat(
    prompt: Annotated[str | None, typer.Argument(help="One prompt; without it a conversation begins.")] = None,
    *,
    base_model: BaseModelOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    composition: CompositionOption = Mode.mixture,
    top_k: TopKOption = 3,
    adapter: AdapterOption = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Maximum number of tokens of an answer.", min=1)
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token.", min=0.0)
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Talk to the model; every turn is routed by itself.

    Standard output gets the answer alone. In a conversation /help names the commands.
    """
    from langchain_lora_retriever.cli.conversation import Conversation, answer  # noqa: PLC0415 - seconds to import

    with status("Reading the pool"):
        llm = make_chat_model(
            base_model,
            pool,
            encoder,
            composition=str(composition),
            top_k=top_k,
            adapters=adapter or None,
            max_tokens=max_tokens,
            temperature=temperature,
        )
    if prompt is None:
        Conversation(llm, as_json=as_json).run()
        return
    warm_up(llm)
    answer(llm, [("user", prompt)], as_json=as_json)


def route(
    prompts: Annotated[list[str], typer.Argument(help="Prompts to route.")],
    *,
    base_model: BaseModelOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    composition: CompositionOption = Mode.mixture,
    top_k: TopKOption = 3,
    as_json: JsonOption = False,
) -> None:
    """Show which adapters prompts would run; nothing is generated and no base model is loaded."""
    with status("Reading the pool"):
        llm = make_chat_model(base_model, pool, encoder, composition=str(composition), top_k=top_k)
    routed = [(prompt, llm.route(prompt)) for prompt in prompts]
    if as_json:
        print_json([{"prompt": prompt, **decision.to_metadata()} for prompt, decision in routed])
        return
    print_table(("prompt", "adapter", "score", "weight"), [row for each in routed for row in _rows(*each)])


def _rows(prompt: str, decision: Composition) -> Sequence[Sequence[str]]:
    members = [
        (prompt, member.name, "" if member.score is None else f"{member.score:.3f}", f"{member.weight:.3f}")
        for member in decision.adapters
    ]
    return members or [(prompt, "(base model)", "", "")]
