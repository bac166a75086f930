"""Random schemas, patterns and grammars, deep and wide: each is followed or refused in words, and no process dies.

They are tried in a child process, which native code could end. `LORA_RETRIEVER_PROPERTY_MINUTES` makes it a long run.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest

NUM_CASES = 1500
MAX_SECONDS = 15  # of one case, on a busy machine
MAX_STEP_SECONDS = 3  # of one token on the engine's thread, likewise
MINUTES = float(os.environ.get("LORA_RETRIEVER_PROPERTY_MINUTES", "0"))

ATOMS: tuple[Any, ...] = (
    {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {}, True, False,
    {"enum": ["a", 1, None, {"x": []}]}, {"const": "c"}, {"type": ["string", "null"]}, {"type": "nonsense"},
    {"type": "string", "format": "date-time"}, {"type": "string", "format": "nonsense"},
    {"type": "string", "pattern": "("}, {"type": "string", "pattern": "^(a|b)*a(a|b){12}$"},
    {"type": "string", "minLength": 5, "maxLength": 3}, {"type": "string", "maxLength": 10**9},
    {"type": "integer", "minimum": 5, "maximum": 4}, {"type": "array", "uniqueItems": True},
    {"type": "integer", "multipleOf": 7}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-9},
    {"type": "integer", "minimum": -(10**30)}, {"$ref": "#/$defs/d0"}, {"$ref": "#/$defs/d1"}, {"$ref": "#"},
    {"$ref": "#/$defs/missing"}, {"$ref": "http://example.com/schema"}, {"type": "string", "minLength": 2**70},
)  # fmt: skip


PATTERNS = (
    "a", "b", ".", "[a-z]", "[^x]", "\\d", "\\w", "é", "(", ")", "\\", "{", "\\p{Lu}", "", "(?=a)", "\\1"
)  # fmt: skip


def make_schema(rng: random.Random, depth: int) -> Any:
    """A random schema, some of whose parts mean nothing."""
    kind = rng.choice(["atom", "object", "array", "anyOf", "allOf", "oneOf", "not", "wide"]) if depth else "atom"
    if kind == "atom":
        return rng.choice(ATOMS)
    if kind == "object":
        properties = {f"p{i}": make_schema(rng, depth - 1) for i in range(rng.randrange(4))}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if rng.random() < 0.7:
            schema["required"] = rng.sample(["p0", "p1", "p2", "other"], rng.randrange(4))
        if rng.random() < 0.3:
            schema["additionalProperties"] = make_schema(rng, depth - 1)
        return schema
    if kind == "array":
        bounds = {"minItems": rng.randrange(4)} if rng.random() < 0.5 else {}
        return {"type": "array", "items": make_schema(rng, depth - 1), **bounds}
    if kind == "not":
        return {"not": make_schema(rng, depth - 1)}
    if kind == "wide":
        return {"type": "object", "properties": {f"w{i}": rng.choice(ATOMS) for i in range(rng.choice([30, 300]))}}
    return {kind: [make_schema(rng, depth - 1) for _ in range(rng.randrange(4))]}


def make_json(rng: random.Random) -> Any:
    """A schema with definitions that may refer to each other in circles, a long chain of them, or a very deep one."""
    kind = rng.random()
    if kind < 0.1:
        length = rng.choice([10, 400, 3000])
        wrap = rng.choice(
            [
                lambda ref: ref,
                lambda ref: {"type": "array", "items": ref},
                lambda ref: {"anyOf": [{"type": "null"}, ref]},
            ]
        )
        links = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
        return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": rng.choice(ATOMS)}}
    schema = make_schema(rng, rng.choice([1, 2, 4]))
    if kind < 0.2:
        for _ in range(rng.choice([50, 99, 200, 50_000])):
            schema = rng.choice([{"type": "array", "items": schema}, {"anyOf": [schema]}])
    if not isinstance(schema, dict):
        return schema
    return {**schema, "$defs": {f"d{i}": make_schema(rng, 2) for i in range(2)}}


def make_pattern(rng: random.Random, depth: int = 4) -> str:
    """A random regular expression."""
    if not depth or rng.random() < 0.2:
        return rng.choice(PATTERNS)
    part, other = (make_pattern(rng, depth - 1) for _ in range(2))
    return rng.choice(
        [
            f"({part})*", f"({part})+", f"({part}){{1,{rng.choice([3, 1000, 10**9])}}}", f"({part}|{other})",
            part + other, f"(?:{part})?", "(" * rng.choice([5, 5000]) + part, f"[{part}]", part * 50,
        ]
    )  # fmt: skip


def make_lark(rng: random.Random) -> str:
    """A random grammar in Lark's form, with rules that refer to others, to themselves, or to nobody."""
    num = rng.choice([2, 5, 2000])
    names = [f"r{i}" for i in range(num)] + ["missing", "start"]
    parts = [*names, '"a"', '"b"', "/[0-9]+/", "T", "(", ")", "*", "|", '""', "%json {}", "~ 3"]
    if rng.random() < 0.3:  # one after the other
        bodies = [f"r{i + 1}" for i in range(num - 1)] + ['"a"']
    else:
        bodies = [" ".join(rng.choice(parts) for _ in range(rng.randrange(1, 6))) for _ in range(num)]
    rules = [f"r{i}: {body}" for i, body in enumerate(bodies)]
    return "\n".join(["start: r0", *rules, "T: /[a-z]+/"])


def make_case(rng: random.Random) -> dict[str, Any]:
    """Options of a call."""
    kind = rng.choice(["sound", "sound", "json", "json", "tools", "regex", "grammar", "choice"])
    if kind == "sound":
        defs = {f"s{i}": make_sound_schema(rng, rng.randrange(3)) for i in range(2)}
        return {"response_format": {"title": "S", **make_sound_schema(rng, rng.randrange(4)), "$defs": defs}}
    if kind == "tools":
        schema = make_json(rng)
        function = {"name": rng.choice(["f", "größer", 'a"b', "x y"]), "description": "", "parameters": schema}
        return {"tools": [{"type": "function", "function": function}], "tool_choice": rng.choice(["any", "auto"])}
    if kind == "json":
        return {rng.choice(["response_format", "guided"]): make_json(rng)}
    made = {
        "regex": lambda: make_pattern(rng),
        "grammar": lambda: make_lark(rng),
        "choice": lambda: [make_pattern(rng, 1) for _ in range(rng.choice([0, 1, 40, 3000]))],
    }[kind]()
    return {"guided": {kind: made}}


def make_sound_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A random schema that means something, of keywords that llguidance honours."""
    kind = rng.choice(["object", "array", "anyOf", "allOf", "ref"] if depth else ["atom"])
    low = rng.randrange(-1000, 1000)
    if kind == "atom":
        return rng.choice(
            [
                {"type": "string", "minLength": rng.randrange(4), "maxLength": rng.randrange(4, 9)},
                {"type": "string", "pattern": rng.choice(["^[a-z]{2,4}$", "^x|y$", "[0-9]"])},
                {"type": "string", "format": rng.choice(["date", "time", "email", "ipv4", "uuid"])},
                {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 7, 10**6])},
                {"type": "integer", "exclusiveMinimum": low, "multipleOf": rng.choice([2, 3, 7, 100])},
                {"type": "number", "minimum": low / 8, "maximum": low / 8 + 3},
                {"enum": rng.sample(["a", "b", 1, 2.5, None, True, [1, "x"], {"k": 0}], 3)},
                {"const": rng.choice(["c", 0, None, {"a": [1]}])},
                {"type": rng.sample(["string", "integer", "null", "boolean"], 2)},
                {},
            ]
        )
    if kind == "array":
        least = rng.randrange(3)
        schema: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + rng.randrange(3)}
        if rng.random() < 0.5:
            return {**schema, "items": make_sound_schema(rng, depth - 1)}
        first = [make_sound_schema(rng, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": first, "items": rng.choice([False, {"type": "null"}]), "minItems": 2}
    if kind in {"anyOf", "allOf"}:
        if kind == "allOf":
            return {"allOf": [make_sound_object(rng, depth, names) for names in ("ab", "cd")]}
        return {"anyOf": [make_sound_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
    if kind == "ref":
        return {"$ref": f"#/$defs/s{rng.randrange(2)}"}
    return make_sound_object(rng, depth, rng.choice(["a", "abc", "title"]))


def make_sound_object(rng: random.Random, depth: int, names: str) -> dict[str, Any]:
    """A random schema of an object."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: make_sound_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.5],
    }
    if rng.random() < 0.2:
        schema["additionalProperties"] = make_sound_schema(rng, 0)
    return schema


def allowed_tokens(row: Any) -> list[int]:
    """The tokens whose bits are 1."""
    return [32 * at + bit for at, word in enumerate(row.tolist()) for bit in range(32) if word >> bit & 1]


def try_case(options: dict[str, Any], rng: random.Random, tokenizer: Any) -> str:
    """What becomes of a case: "refused", "failed" while it is followed, "cut", "ended"."""
    import torch

    from langchain_lora_retriever.chat.call import CallOptions
    from langchain_lora_retriever.engine.grammar import compiler_of
    from langchain_lora_retriever.errors import EngineError, InvalidRequestError
    from langchain_lora_retriever.output.format import answer_format
    from langchain_lora_retriever.output.json_check import violation
    from langchain_lora_retriever.output.tools import to_json_schema

    if isinstance(options.get("guided"), dict) and options["guided"].keys().isdisjoint({"regex", "grammar", "choice"}):
        options = {"guided": {"json": options["guided"]}}
    try:
        answer = answer_format(CallOptions(**options), tokenizer)
        compiled = None if answer.grammar is None else compiler_of(tokenizer).compile(answer.grammar)
    except InvalidRequestError:
        return "refused"
    if compiled is None:
        return "free"
    limit = rng.choice([64, 200])
    constraint = compiled.constraint(fit=limit)
    row = torch.zeros(-(-len(tokenizer) // 32), dtype=torch.int32)
    ids: list[int] = []
    try:
        while not constraint.is_finished and len(ids) < limit:
            begun = time.monotonic()
            constraint.fill_bitmask(row)
            allowed = allowed_tokens(row)
            assert allowed, "nothing may follow, and the answer does not end"
            ids.append(rng.choice(allowed))
            if ids[-1] == tokenizer.eos_token_id:
                break
            constraint.accept(ids[-1])
            for forced in constraint.forced_tokens():
                ids.append(forced)
                constraint.accept(forced)
            assert time.monotonic() - begun < MAX_STEP_SECONDS, "a step holds up the engine"
    except EngineError:
        return "failed"
    if not constraint.is_finished and ids[-1] != tokenizer.eos_token_id:
        return "cut"
    if answer.grammar is not None and answer.grammar.is_json and not answer.tools:
        value = json.loads(tokenizer.decode(ids, skip_special_tokens=True), strict=False)
        given = options["guided"]["json"] if "guided" in options else options["response_format"]
        wrong = violation(to_json_schema(given), value)
        assert wrong is None or has_long_number(value), wrong
    return "ended"


def has_long_number(value: Any) -> bool:
    """Whether a number was rounded when it was read: beside an exclusive bound it may then be the bound."""
    return any(len(digits) > 15 for digits in re.findall(r"[0-9.]+", json.dumps(value)))


def run_child(seed: int, num_cases: int, minutes: float) -> None:
    """Try cases; print what became of them."""
    from makers import make_tokenizer

    tokenizer, tally, slowest = make_tokenizer(), Counter[str](), 0.0
    end = time.monotonic() + 60 * minutes
    index = 0
    while index < num_cases or time.monotonic() < end:
        rng = random.Random(f"{seed}-{index}")
        start = time.monotonic()
        try:
            tally[try_case(make_case(rng), rng, tokenizer)] += 1
        except BaseException as error:  # noqa: BLE001 - which case it was is what matters
            sys.stdout.write(json.dumps({"seed": seed, "index": index, "error": repr(error)[:500]}))
            sys.exit(1)
        slowest = max(slowest, time.monotonic() - start)
        index += 1
    sys.stdout.write(json.dumps({"num": index, "slowest": round(slowest, 2), **tally}))


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_whatever_a_caller_asks_for_no_process_dies() -> None:
    """Every case is refused in words, fails alone, or is followed to its end; JSON that ended can be read."""
    command = [sys.executable, __file__, "7", str(NUM_CASES), str(MINUTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.splitlines()[-1] if done.stdout else done.stderr[-2000:]
    assert done.returncode == 0, last
    tally = json.loads(last)
    assert tally["num"] >= NUM_CASES
    assert tally["slowest"] < MAX_SECONDS
    assert min(tally[kind] for kind in ("refused", "cut", "ended")) > NUM_CASES // 50


if __name__ == "__main__":
    run_child(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
