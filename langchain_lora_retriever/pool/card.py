"""What a model card says an adapter is for: the data sets it names, the examples it shows, its prose and its tags.

A card is a stranger's text. Its front matter is read as plain YAML: no tags that make objects, no aliases that
multiply. Code in it is cut into tokens, of which string literals are kept; nothing of it is run or compiled.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import yaml

from langchain_lora_retriever.pool.regular_files import said
from langchain_lora_retriever.pool.samples import MAX_CHARACTERS, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_lora_retriever.pool.regular_files import AdapterFolder

__all__ = ["CARD_FILE", "MAX_CARD_BYTES", "Card", "parse_card", "read_card"]

CARD_FILE = "README.md"
MAX_CARD_BYTES = 1 << 18
_MAX_FRONT_CHARACTERS = 1 << 16
_MAX_EXAMPLES = 20
_MAX_TEXTS = 20
_MAX_TEXT_CHARACTERS = 2_000
_MAX_LINE = 4_000  # characters of a line of prose that are read
_MIN_WORDS = 3

_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([\w+-]*)")
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.*?)[ \t#]*$")
_IMAGE = re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)")
_LINK = re.compile(r"\[([^\]\n]*)\]\([^)\n]*\)")
_TAG = re.compile(r"<[^<>\n]{1,200}>")
_MARKS = re.compile(r"[*_`>|#]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_PLACEHOLDER = re.compile(r"more information needed", re.IGNORECASE)

# Languages of code blocks: of those that hold a prompt as it is, and of Python, whose string literals are looked at.
_PLAIN = frozenset({"", "text", "txt", "plaintext", "plain", "prompt", "example", "md", "markdown"})
_PYTHON = frozenset({"python", "py", "python3", "pycon"})
_NO_PROMPT = re.compile(
    r"\b(?:import|pip install|from_pretrained|git clone|docker|curl|wget|@\w+\{|@(?:article|misc|inproceedings))\b|\$ ",
    re.IGNORECASE,
)
# Sections of a card that say nothing of what it is for, by the beginning of their headings.
_SECTIONS = (
    "acknowledg", "bias", "bibtex", "citation", "citing", "compute", "contact", "environment", "evaluation",
    "framework", "glossary", "hardware", "how to get started", "how to use", "hyperparameter", "installation",
    "license", "limitation", "loading", "metrics", "model architecture", "model card", "model examination",
    "model sources", "more information", "preprocessing", "quick start", "quickstart", "recommendation", "reference",
    "results", "risks", "software", "speeds", "technical", "testing data", "training hyperparameter",
    "training procedure", "training result", "usage", "uploaded",
)  # fmt: skip
# Lines that every generated card has.
_BOILERPLATE = re.compile(
    r"use the code below|users \(both direct and downstream\)|carbon emissions can be estimated|model id$"
    r"|this model card aims to be|has been (?:automatically )?generated|should probably proofread"
    r"|^-? ?(?:\w+ ){0,3}(?:\[optional\])?: ?$|^(?:peft|transformers|datasets|tokenizers|pytorch) \d",
    re.IGNORECASE,
)
_GENERIC_TAGS = frozenset(
    {
        "adapter", "adapters", "autotrain", "axolotl", "conversational", "dpo", "endpoints_compatible", "fine-tuned",
        "finetuned", "generated_from_trainer", "gguf", "grpo", "huggingface", "instruction-tuning", "instruct", "llama",
        "llama-factory", "llm", "lora", "mistral", "model-index", "peft", "pytorch", "qlora", "qwen", "qwen2",
        "safetensors", "sft", "tensorboard", "text-generation", "text-generation-inference", "text2text-generation",
        "transformers", "trl", "unsloth",
    }
)  # fmt: skip


class Card(NamedTuple):
    """A model card.

    Attributes:
        datasets: Names of the data sets it was trained on, as the front matter gives them.
        examples: Prompts that it shows, in the front matter's `widget` and in code blocks.
        text: What it is for, piece by piece: title, tags and tasks first, then its prose.
        problem: What is wrong with the front matter, which then counts as empty; None if nothing is.
    """

    datasets: tuple[str, ...] = ()
    examples: tuple[Sample, ...] = ()
    text: tuple[str, ...] = ()
    problem: str | None = None


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, with which a few hundred bytes can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which is not read here")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def read_card(folder: AdapterFolder) -> Card:
    """The model card in an adapter's folder; one that is empty if there is none."""
    try:
        data = folder.read(CARD_FILE, MAX_CARD_BYTES)
    except OSError as error:
        return Card(problem=f"it cannot be read: {said(error)}")
    return Card() if data is None else parse_card(data)


def parse_card(data: bytes) -> Card:
    """Read a card. Whatever is wrong with it is told in `problem`; nothing is raised.

    Args:
        data: `README.md`, utf-8.
    """
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Card(problem=f"it is no Unicode text: {said(error)}")
    front, body = _split(content)
    facts, problem = _parse_front(front)
    prose, blocks = _cut_blocks(_COMMENT.sub("", body).splitlines())
    examples = _unique([*_widget_examples(facts), *_code_examples(blocks)])[:_MAX_EXAMPLES]
    return Card(tuple(_texts_of(facts.get("datasets"))), tuple(examples), tuple(_text(facts, prose)), problem)


def _split(content: str) -> tuple[str, str]:
    """The front matter, without its dashes, and what is below it."""
    found = _FRONT.match(content)
    return (found[1], content[found.end() :]) if found is not None else ("", content)


def _cut_blocks(lines: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The lines outside code blocks, and each block's language and code; one without an end goes to the last line."""
    prose: list[str] = []
    blocks: list[tuple[str, str]] = []
    fence, language, code = "", "", list[str]()
    for line in lines:
        found = _FENCE.match(line)
        if not fence and found is not None:
            fence, language, code = found[1], found[2].lower(), []
            prose.append("")
        elif fence and line.strip().startswith(fence):
            blocks.append((language, "\n".join(code)))
            fence = ""
        else:
            (code if fence else prose).append(line)
    if fence:
        blocks.append((language, "\n".join(code)))
    return prose, blocks


def _parse_front(front: str) -> tuple[dict[str, Any], str | None]:
    if len(front) > _MAX_FRONT_CHARACTERS:
        return {}, f"its front matter has {len(front):,} characters; read are up to {_MAX_FRONT_CHARACTERS:,}"
    try:
        facts = yaml.load(front, _PlainLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 2}" if error.problem_mark else ""
        return {}, f"its front matter is no YAML: {error.problem}{place}"
    except Exception as error:  # noqa: BLE001 - whatever a stranger's text makes of the parser
        return {}, f"its front matter is no YAML: {said(error)}"
    if facts is None:
        return {}, None
    if not isinstance(facts, dict):
        return {}, f"its front matter is a {type(facts).__name__}, not a mapping"
    return facts, None


def _texts_of(value: object) -> list[str]:
    """The texts in a list, or the one text that stands in its place."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if _is_text(text) and text.strip()]


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is text of Unicode; an escape may stand for half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _widget_examples(facts: dict[str, Any]) -> Iterator[Sample]:
    widget = facts.get("widget")
    for item in widget if isinstance(widget, list) else [widget]:
        if isinstance(item, str):
            yield from _sample(item)
        elif isinstance(item, dict):
            messages, output = item.get("messages"), item.get("output")
            turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
            asked = [turn.get("content") for turn in turns if turn.get("role") == "user"]
            text = asked[-1] if asked else item.get("text")
            yield from _sample(text, output.get("text") if isinstance(output, dict) else output)


def _code_examples(blocks: list[tuple[str, str]]) -> Iterator[Sample]:
    for language, code in blocks:
        texts = _literals(code) if language in _PYTHON else [code] if language in _PLAIN else ()
        for text in texts:
            if " " in text.strip() and not _NO_PROMPT.search(text):
                yield from _sample(text)


def _literals(code: str) -> Iterator[str]:
    """The string literals of Python code, as far as it can be cut into tokens."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.STRING and "f" not in token.string[:2].lower():
                value = ast.literal_eval(token.string)
                if isinstance(value, str):
                    yield value
    except (tokenize.TokenError, SyntaxError, ValueError, MemoryError, RecursionError):
        return  # a fragment, or no Python: what was found before counts


def _sample(text: object, output: object = None) -> Iterator[Sample]:
    if _is_text(text) and len(text) <= MAX_CHARACTERS and len(_WORD.findall(text)) >= _MIN_WORDS:
        yield Sample(text.strip(), output if _is_text(output) and len(output) <= MAX_CHARACTERS else None)


def _unique(samples: list[Sample]) -> list[Sample]:
    return list({sample.input: sample for sample in reversed(samples)}.values())[::-1]


def _text(facts: dict[str, Any], lines: list[str]) -> list[str]:
    """What the card says in words; nothing if all of it is what every card has."""
    headings, paragraphs = _prose(lines)
    tags = [tag for tag in _texts_of(facts.get("tags")) if tag.lower() not in _GENERIC_TAGS and ":" not in tag]
    tasks = [task for task in _texts_of(facts.get("pipeline_tag")) if task.lower() not in _GENERIC_TAGS]
    head = ", ".join([*headings[:1], *tasks, *tags, *_texts_of(facts.get("datasets"))])
    pieces = [" ".join(piece.split())[:_MAX_TEXT_CHARACTERS] for piece in (head, *paragraphs)]
    return [piece for piece in pieces if _WORD.search(piece)][:_MAX_TEXTS] if tags or tasks or paragraphs else []


def _prose(lines: list[str]) -> tuple[list[str], list[str]]:
    """Headings, and the paragraphs that are the card's own words, without links and what generated cards have."""
    headings: list[str] = []
    paragraphs: list[str] = []
    pieces: list[str] = []
    is_skipped = False

    def end_paragraph() -> None:
        text = " ".join(pieces)
        if len(_WORD.findall(text)) >= _MIN_WORDS:
            paragraphs.append(text)
        pieces.clear()

    for whole in lines:
        line = whole[:_MAX_LINE]
        heading = _HEADING.match(line)
        if heading is not None:
            end_paragraph()
            title = _plain(heading[1])
            is_skipped = bool(headings) and title.lower().startswith(_SECTIONS)
            is_template = title.lower().startswith("model card for model id")
            headings.append("" if is_template else title)
        elif not line.strip():
            end_paragraph()
        elif not (is_skipped or line.startswith("    ") or _PLACEHOLDER.search(line)):
            text = _plain(line)
            if not _BOILERPLATE.search(text):
                pieces.append(text)
    end_paragraph()
    return headings, paragraphs


def _plain(line: str) -> str:
    """A line of Markdown without its marks."""
    return _MARKS.sub("", _TAG.sub("", _LINK.sub(r"\1", _IMAGE.sub("", line)))).strip()
