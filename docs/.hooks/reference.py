"""Writes the parts of the reference that the code itself knows: the commands' help, and every public name.

A page asks for one by a comment of its own line, `<!-- commands -->` or `<!-- public names -->`.
"""

from __future__ import annotations

from typing import Any

import click
import typer.main

import langchain_lora_retriever
from langchain_lora_retriever.cli import commands

_KINDS = {
    "Chat model and retrievers": ("ChatLoraRetriever", "AdapterRetriever", "AdapterDecisionModel"),
    "Pool and retrieval": ("AdapterPool", "LoraRetriever", "HybridEncoder", "train_encoder"),
    "Engine and runtime": ("EngineConfig", "EngineClient", "Runtime", "close_engines"),
    "Values": ("Adapter", "Composition", "RetrievedAdapter", "SamplingParams"),
}
_DOCUMENTED_ELSEWHERE = {"ChatLoraRetriever": ("langchain_lora_retriever.chat.settings.ChatSettings",)}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page asks for."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", "\n".join(_commands()))
    if "<!-- public names -->" in markdown:
        markdown = markdown.replace("<!-- public names -->", "\n".join(_public_names()))
    return markdown


def _commands() -> list[str]:
    """Every command's usage and options."""
    root = typer.main.get_command(commands)
    return _described(root, click.Context(root, info_name="lora-retriever"))


def _described(command: Any, context: click.Context) -> list[str]:
    children = getattr(command, "commands", {})
    lines: list[str] = []
    if not children:
        lines += [f"## `{context.command_path}`", "", command.help or "", "", "```", command.get_usage(context), "```"]
        lines += ["", "| | |", "|---|---|"]
        lines += [
            f"| `{record[0].replace('|', '&#124;')}` | {record[1].replace('|', '&#124;')} |"
            for parameter in command.get_params(context)
            if (record := parameter.get_help_record(context)) is not None
        ]
        lines.append("")
    for name, child in children.items():
        lines += _described(child, click.Context(child, info_name=name, parent=context))
    return lines


def _public_names() -> list[str]:
    names = set(langchain_lora_retriever.__all__)
    errors = {name for name in names if name.endswith("Error")}
    listed = {name for kind in _KINDS.values() for name in kind}
    assert listed | errors == names, f"the reference does not say where {names ^ (listed | errors)} belongs"
    lines = []
    for title, kind in _KINDS.items():
        lines += [f"## {title}", ""]
        for name in kind:
            lines += [f"::: langchain_lora_retriever.{name}", ""]
            lines += [line for path in _DOCUMENTED_ELSEWHERE.get(name, ()) for line in (f"::: {path}", "")]
    lines += ["## Errors", "", "::: langchain_lora_retriever.errors", "    options:", "      show_root_heading: false"]
    lines += ["      show_root_toc_entry: false", ""]
    return lines
