"""`lora-retriever chat` and `lora-retriever route`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from langchain_lora_retriever.cli.options import (
    BaseModelOption,
    EncoderOption,
    JsonOption,
    PoolOption,
    TopKOption,
    make_chat_model,
    print_json,
)

if TYPE_CHECKING:
    from langchain_core.messages import AIMessageChunk, BaseMessage

    from langchain_lora_retriever.chat.model import ChatLoraRetriever

__all__ = ["chat", "route"]

CompositionOption = Annotated[str, typer.Option("--composition", help="selection, fusion or mixture.")]
AdapterOption = Annotated[
    list[str] | None, typer.Option("--adapter", help="Pin an adapter; may be repeated.", show_default=False)
]


def chat(
    prompt: Annotated[str | None, typer.Argument(help="One prompt; without it a conversation begins.")] = None,
    *,
    base_model: BaseModelOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    composition: CompositionOption = "mixture",
    top_k: TopKOption = 3,
    adapter: AdapterOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Talk to the model; every turn is routed by itself."""
    llm = make_chat_model(
        base_model,
        pool,
        encoder,
        composition=composition,
        top_k=top_k,
        adapters=adapter or None,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    if prompt is not None and as_json:
        message = llm.invoke(prompt)
        print_json({"content": message.content, **message.response_metadata, "usage": message.usage_metadata})
        return
    console = Console()
    if prompt is not None:
        _answer(llm, console, [("user", prompt)])
        return
    console.print("Type a message; an empty line or Ctrl-D ends.", style="dim")
    history: list[Any] = []
    while text := _read(console):
        history.append(("user", text))
        history.append(_answer(llm, console, history))


def route(
    prompts: Annotated[list[str], typer.Argument(help="Prompts to route.")],
    *,
    base_model: BaseModelOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    composition: CompositionOption = "mixture",
    top_k: TopKOption = 3,
    as_json: JsonOption = False,
) -> None:
    """Show which adapters prompts would run; nothing is generated and no base model is loaded."""
    llm = make_chat_model(base_model, pool, encoder, composition=composition, top_k=top_k)
    routed = [(prompt, llm.route(prompt)) for prompt in prompts]
    if as_json:
        print_json([{"prompt": prompt, **decision.to_metadata()} for prompt, decision in routed])
        return
    table = Table("prompt", "adapter", "score", "weight")
    for prompt, decision in routed:
        members = decision.adapters
        table.add_row(
            prompt,
            "\n".join(member.name for member in members) or "(base model)",
            "\n".join("" if member.score is None else f"{member.score:.3f}" for member in members),
            "\n".join(f"{member.weight:.3f}" for member in members),
        )
    Console().print(table)


def _answer(llm: ChatLoraRetriever, console: Console, messages: list[Any]) -> BaseMessage:
    full: AIMessageChunk | None = None
    for chunk in llm.stream(messages):
        console.print(str(chunk.text), end="", markup=False, highlight=False, soft_wrap=True)
        full = chunk if full is None else full + chunk
    assert full is not None
    adapters = ", ".join(f"{a['name']} {a['weight']:.0%}" for a in full.response_metadata["adapters"])
    console.print(f"\n({adapters or 'base model'})", style="dim", markup=False, highlight=False)
    return full


def _read(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
