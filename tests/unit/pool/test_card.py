"""Model cards: what strangers write of their adapters, and what is made of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from peft import LoraConfig, get_peft_model

from langchain_lora_retriever.pool.card import MAX_CARD_BYTES, parse_card
from langchain_lora_retriever.pool.samples import Sample
from makers import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

CARD = b"""---
license: mit
library_name: peft
tags: [lora, text2sql, sql, "base_model:adapter:org/tiny"]
pipeline_tag: text-generation
datasets:
- b-mc2/sql-create-context
widget:
- text: "How many users signed up in May?"
  output: {text: "SELECT count(*) FROM users"}
- messages:
  - {role: system, content: You write SQL for a schema}
  - {role: user, content: Show all the open orders}
- example_title: empty
---
<!-- A comment that nobody reads -->
# SQL helper

This adapter writes **SQL** for a [schema](http://x) and a question. ![logo](a.png)
It was trained on questions of people.

## How to use

Load it with PEFT as any other adapter.

```python
from peft import PeftModel
prompt = "Translate this question into a query: how many orders are open?"
model = PeftModel.from_pretrained(base, "user/repository")
text = f"an answer of {model} to a prompt"
```

```
### Question: which cats are older than three?
```

```bash
pip install this and that package
```

### Framework versions

- PEFT 0.18.0
"""


def test_a_card_gives_data_sets_examples_and_prose() -> None:
    """Examples from the widget and from code; prose without code, links and what all cards have."""
    card = parse_card(CARD)
    assert card.datasets == ("b-mc2/sql-create-context",)
    assert card.examples == (
        Sample("How many users signed up in May?", "SELECT count(*) FROM users"),
        Sample("Show all the open orders"),
        Sample("Translate this question into a query: how many orders are open?"),
        Sample("### Question: which cats are older than three?"),
    )
    assert card.text == (
        "SQL helper, text2sql, sql, b-mc2/sql-create-context",
        "This adapter writes SQL for a schema and a question. It was trained on questions of people.",
    )
    assert card.problem is None


def test_a_card_as_peft_writes_it_says_nothing(tmp_path: Path) -> None:
    """An adapter with the template that nobody has filled in is not described by it."""
    get_peft_model(make_tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_file()
    assert parse_card((tmp_path / "README.md").read_bytes()) == ((), (), (), None)


def test_a_filled_in_template_says_what_was_filled_in(tmp_path: Path) -> None:
    """One line is enough."""
    get_peft_model(make_tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    content = (tmp_path / "README.md").read_text()
    content = content.replace("# Model Card for Model ID\n", "# Model Card for Model ID\n\nWrites dates in ISO form.\n")
    assert parse_card(content.encode()).text == ("Writes dates in ISO form.",)


@pytest.mark.parametrize(
    ("front", "problem"),
    [
        (b"tags: [a, b\nlicense: mit", "no YAML: .* in line 3"),
        (b"a: &a [1]\nb: *a", "alias"),
        (b"- a\n- b", "a list, not a mapping"),
        (b"just words", "a str, not a mapping"),
        (b"a: !!python/object/apply:os.system [touch /tmp/pwned]", "could not determine a constructor"),
        (b"a: !!timestamp x", "no YAML"),
        (b"[" * 20_000, "no YAML"),
        (b"# " + b"x" * 70_000, "70,002 characters; read are up to"),
    ],
)
def test_front_matter_that_is_no_yaml_is_told_and_the_rest_counts(front: bytes, problem: str) -> None:
    """Nothing in it is made or run; what is below it is read all the same."""
    card = parse_card(b"---\n" + front + b"\n---\n# Dates\n\nIt writes dates in ISO form.\n")
    assert card.problem is not None
    assert card.text == ("Dates", "It writes dates in ISO form.")
    assert re.search(problem, card.problem), card.problem


def test_bytes_that_are_no_text_say_nothing() -> None:
    """They are told as a problem."""
    card = parse_card(b"\xff\xfe\x00")
    assert card[:3] == ((), (), ())
    assert "no Unicode" in str(card.problem)


def test_escapes_that_are_no_unicode_are_left_out() -> None:
    """Half a surrogate pair, in YAML and in Python's strings, would stop the encoder."""
    card = parse_card(b'---\nwidget: ["\\ud800 one two three"]\n---\n```python\nx = "\\ud800 four five six"\n```\n')
    assert card.examples == ()


@pytest.mark.parametrize(
    "content",
    [
        b"```\n" * 50_000,
        b"[" * 200_000,
        b"<" * 200_000,
        b"<!--" * 50_000,
        b"```python\n" + b"(" * 200_000,
        b"- " * 100_000,
    ],
    ids=["fences", "brackets", "tags", "comments", "code", "lists"],
)
@pytest.mark.timeout(10)
def test_a_hostile_card_takes_no_time(content: bytes) -> None:
    """Whatever repeats in it; each takes far below a second."""
    assert len(content) <= MAX_CARD_BYTES
    assert parse_card(content).examples == ()
