"""The server as clients see it: OpenAI's own client, LangChain's, and what is not polite. The engine has no model."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import weakref
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from langchain_lora_retriever.errors import EngineOverloadedError, InvalidRequestError
from langchain_lora_retriever.serving.app import _unless_gone
from langchain_lora_retriever.serving.config import ServeConfig, read_config
from makers import until
from servers import running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from langchain_lora_retriever import ChatLoraRetriever

SQL = "How many users are in the table?"
USER = [{"role": "user", "content": SQL}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>'
KEY, ADMIN = "key-0123456789abcdef", "admin-0123456789abcdef"


@pytest.fixture
def address(llm: ChatLoraRetriever) -> Iterator[str]:
    """A server around the chat model of these tests."""
    with running(llm) as address:
        yield address


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    """OpenAI's client of it."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_an_answer_says_what_it_ran(client: openai.OpenAI, engine: Any) -> None:
    """Routed by default; which adapters, with scores and weights, comes back in a field of its own."""
    answer = client.chat.completions.create(model="auto", messages=USER, max_tokens=9, stop="x", seed=4)
    ChatCompletion.model_validate(answer.model_dump(exclude={"lora_retriever"}))
    assert answer.choices[0].message.content == "The answer."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "fake/base"
    assert answer.lora_retriever["adapters"][0]["name"] == "sql"
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert answer.usage.completion_tokens == len("The answer.")
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.stop, sampling.seed) == (9, ("x",), 4)


def test_the_bytes_of_a_split_character_are_its_tokens_own(client: openai.OpenAI, engine: Any) -> None:
    """A token that is a part of one has no text of its own, and its bytes joined to the others' are the character."""
    engine.answers = ["é😀!"]
    (choice,) = client.chat.completions.create(model="auto", messages=USER, logprobs=True).choices
    assert bytes(value for token in choice.logprobs.content for value in token.bytes).decode() == "é😀!"


def test_a_body_of_a_million_faults_holds_nobody_up(address: str) -> None:
    """They are not told one by one, nor collected."""
    for wrong in ({"messages": [1] * 900_000}, {"messages": USER, "stop": [1] * 900_000}):
        answer = httpx.post(f"{address}/v1/chat/completions", json=wrong, timeout=60)
        assert answer.status_code == 400
        assert ".0: " in answer.text
        assert ".1: " not in answer.text
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": USER} | {f"k{i}": 1 for i in range(2000)})
    assert (answer.status_code, "the body has 2,000 faults" in answer.text) == (400, True)


@pytest.mark.parametrize("turns", range(5))
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_what_was_begun_for_a_client_that_went_is_undone(turns: int, is_cancelled: bool) -> None:
    """Whenever it ends beside the client's going, or the handler's: the result is had, or discarded."""
    gone, may_end = asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, str]:
        await gone.wait()
        return {"type": "http.disconnect"}

    begun, discarded = list[str](), list[str]()

    async def begin() -> str:
        await may_end.wait()
        begun.append("begun")
        return "begun"

    task = asyncio.ensure_future(_unless_gone(Mock(receive=receive), begin(), discard=discarded.append))
    for _ in range(5):
        await asyncio.sleep(0)
    (may_end if is_cancelled else gone).set()
    for _ in range(turns):
        await asyncio.sleep(0)
    may_end.set()
    if is_cancelled:
        task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    assert (result == "begun") or discarded == begun


def test_a_stream_adds_up(client: openai.OpenAI) -> None:
    """Its chunks are the protocol's; usage comes in a last one, if it is asked for."""
    chunks = list(
        client.chat.completions.create(
            model="auto", messages=USER, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
    )
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(exclude={"lora_retriever"}))
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == "The answer."
    assert len([text for text in texts if text]) > 2
    assert [choice.finish_reason for choice in chunks[-2].choices] == ["stop"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], len("The answer."))
    assert chunks[0].lora_retriever["adapters"][0]["name"] == "sql"
    tokens = [t.token for chunk in chunks for c in chunk.choices if c.logprobs for t in c.logprobs.content]
    assert tokens == list("The answer.")
    plain = list(client.chat.completions.create(model="auto", messages=USER, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(client: openai.OpenAI, engine: Any, *, stream: bool) -> None:
    """`n` of them, each with its index, whole or streamed side by side; the prompt is counted once."""
    engine.answers = ["one", "two", "three"]
    made = client.chat.completions.create(
        model="auto", messages=USER, n=3, stream=stream, stream_options={"include_usage": True} if stream else None
    )
    texts = dict.fromkeys(range(3), "")
    if stream:
        chunks = list(made)
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        usage = chunks[-1].usage
    else:
        texts = {choice.index: choice.message.content for choice in made.choices}
        usage = made.usage
    assert texts == {0: "one", 1: "two", 2: "three"}
    assert usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert usage.completion_tokens == len("onetwothree")


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(client: openai.OpenAI, engine: Any, *, stream: bool) -> None:
    """A call is one, whole or in parts, and the answer ends for it; its result goes back as a message."""
    engine.answers = ["Sure. " + CALL, "Three."]
    made = client.chat.completions.create(model="auto", messages=USER, tools=[ADD], stream=stream)
    if stream:
        parts = [call for chunk in made for c in chunk.choices for call in c.delta.tool_calls or ()]
        name = "".join(part.function.name or "" for part in parts)
        arguments = "".join(part.function.arguments or "" for part in parts)
        call_id = next(part.id for part in parts if part.id)
        assert {part.index for part in parts} == {0}
        assert [part.type for part in parts if part.id] == ["function"]
    else:
        (choice,) = made.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Sure."
        (call,) = choice.message.tool_calls
        name, arguments, call_id = call.function.name, call.function.arguments, call.id
    assert (name, json.loads(arguments)) == ("add", {"a": 3})
    function = {"name": name, "arguments": arguments}
    turns = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": "3"},
    ]
    assert (
        client.chat.completions.create(model="auto", messages=turns, tools=[ADD]).choices[0].message.content == "Three."
    )
    assert "<tool_response>" in engine.requests[-1].prompt or '"add"' in engine.requests[-1].prompt


def test_the_model_names_what_runs(client: openai.OpenAI, engine: Any) -> None:
    """The base model, one adapter, or routing, as the list of models says."""
    assert [model.id for model in client.models.list()] == ["auto", "fake/base", "dates", "french", "sql"]
    client.chat.completions.create(model="fake/base", messages=USER)
    client.chat.completions.create(model="dates", messages=USER)
    own = {"lora_retriever": {"exclude_adapters": ["sql"], "top_k": 1, "composition": "selection"}}
    client.chat.completions.create(model="auto", messages=USER, extra_body=own)
    assert [request.names for request in engine.requests[:2]] == [[], ["dates"]]
    assert len(engine.requests[2].names) == 1
    assert engine.requests[2].names != ["sql"]
    with pytest.raises(
        openai.NotFoundError, match=r"Near names.*A model is 'auto', .*, 'fake/base', the base model alone"
    ):
        client.chat.completions.create(model="sqll", messages=USER)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"messages": []}, "no messages|empty"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0 .*cannot be understood"),
        ({"messages": USER, "temperature": -1}, "temperature"),
        ({"messages": USER, "n": 9}, "at most 8"),
        ({"messages": USER, "tempratur": 1}, "tempratur"),
        ({"messages": USER, "logit_bias": {"5": 1}}, "logit_bias"),
        ({"messages": USER, "frequency_penalty": 0.5}, "frequency_penalty"),
        ({"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"messages": USER, "max_completion_tokens": 0}, "max_tokens"),
        ({"messages": USER, "lora_retriever": {"adapter": ["sql"]}}, "lora_retriever.adapter"),
        ({"messages": USER, "lora_retriever": {"top_k": 0}}, "top_k"),
        ({"messages": USER, "response_format": {"type": "json_schema", "json_schema": {}}}, "no schema"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, "tokens"),
        ([], "the body"),
    ],
)
def test_bad_requests_are_told_in_words(address: str, engine: Any, body: Any, told: str) -> None:
    """In the protocol's form, with status 400, and nothing is asked of the engine."""
    answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(told, error["message"]), error
    assert not engine.requests


def test_what_is_no_json_and_no_path_is_told_too(address: str) -> None:
    """In the same form."""
    assert httpx.post(f"{address}/v1/chat/completions", content=b"{").status_code == 400
    assert httpx.post(f"{address}/v1/chat/completions", content=b"\xff\xfe").status_code == 400
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("v1/chat/completions", "POST"), ("v1/adapters", "GET, HEAD, POST"), ("v1/adapters/sql", "DELETE")],
)
def test_a_method_that_a_path_does_not_take_is_told(
    llm: ChatLoraRetriever, tmp_path: Path, path: str, allowed: str
) -> None:
    """405, with all that it takes: in the header, and in words."""
    admin = tmp_path / "admin"
    admin.write_text(f"{ADMIN}\n")
    with running(llm, ServeConfig(admin_key_file=admin)) as address:
        answer = httpx.put(f"{address}/{path}", json={}, headers={"Authorization": f"Bearer {ADMIN}"})
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
    assert (error["type"], error["code"]) == ("invalid_request_error", "method_not_allowed")
    assert error["message"] == f"/{path} does not take PUT: send {allowed}."


def test_a_server_that_has_ended_is_freed(llm: ChatLoraRetriever) -> None:
    """With its chat model, whose pool keeps files open."""
    copy = llm.model_copy()
    with running(copy) as address:
        assert httpx.head(f"{address}/v1/models").status_code == 200
        assert httpx.post(f"{address}/v1/chat/completions", json={"model": "auto", "messages": USER}).is_success
    left = weakref.ref(copy)
    del copy
    gc.collect()
    assert left() is None


def test_an_overloaded_engine_says_when_to_come_again(address: str, engine: Any) -> None:
    """429, with Retry-After."""

    def overloaded(*_: Any, **__: Any) -> Any:
        raise EngineOverloadedError("as many as may wait do")

    engine.submit = overloaded
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": USER})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_an_engine_that_has_ended_is_told_to_clients_in_their_words(
    address: str, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody makes a new engine over HTTP: the server's operator does, whose log has the error."""
    engine.close()
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": USER})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "engine_dead")
    assert "has ended" in error["message"]
    assert "operator must restart the server" in error["message"]
    assert "Create a new" not in error["message"]
    assert "it was closed. Create a new one." in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_mid_answer(address: str, engine: Any, *, stream: bool) -> None:
    """A stream tells of it as its last event; what is not ours is told by its type alone."""

    def fail(prompt: str, names: list[str]) -> str:
        raise RuntimeError("secret/path")

    engine.answers = fail
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": USER, "stream": stream})
    if stream:
        events = [line for line in answer.text.split("\n\n") if line]
        error = json.loads(events[-1].removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 500
        error = answer.json()["error"]
    assert "RuntimeError" in error["message"]
    assert "secret" not in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_frees_its_request(address: str, engine: Any, *, stream: bool) -> None:
    """At once, though no token comes for a while."""
    engine.delay = 60.0
    async with httpx.AsyncClient() as client:
        body = {"messages": USER, "stream": stream}
        task = asyncio.create_task(client.post(f"{address}/v1/chat/completions", json=body))
        await until(lambda: engine.requests)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await until(lambda: engine.num_aborted, 5)
    assert engine.stats().num_running == 0


async def test_a_client_that_goes_while_it_sends_is_no_failure(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is counted as one that has gone, and nothing is logged."""
    host, port = address.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(0.2)
    writer.close()
    async with httpx.AsyncClient() as client:
        for _ in range(100):
            text = (await client.get(f"{address}/metrics")).text
            if 'path="/v1/chat/completions",status="499"} 1.0' in text:
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(text)
    assert not caplog.records


@pytest.mark.parametrize("arguments", ['{"a": "3', '{"a": 3}]', "", "[3]", '{"a": 3}'])
def test_calls_may_be_sent_back_as_they_came(address: str, engine: Any, arguments: str) -> None:
    """With arguments that a token limit cut off, too, and without content: an agent's next step shows them."""
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    answers = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "not JSON"}
    for answer in answers:
        body = {"messages": [*USER, answer, result], "tools": [ADD]}
        response = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        shown = engine.requests[-1].prompt
        assert shown.count('"name": "add", "arguments"') == 1
        assert arguments in shown


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user"}, "'content' keys"),
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "robot", "content": "x"}, "robot"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "'name'"),
        ({"role": "assistant", "content": "", "tool_calls": "x"}, "TypeError|AttributeError"),
    ],
    ids=["no content", "no call", "role", "empty call", "calls"],
)
def test_messages_that_cannot_be_understood_are_told(address: str, message: Any, told: str) -> None:
    """Which of them, what it is, and what a message has."""
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": [*USER, message]})
    assert answer.status_code == 400
    assert re.search(f"^messages.1 .*cannot be understood .*({told}).*pass a role", answer.json()["error"]["message"])


def test_the_decision_alone(address: str, engine: Any) -> None:
    """For a text or a chat; nothing is generated."""
    for body in ({"input": SQL}, {"messages": USER}, {"input": SQL, "lora_retriever": {"top_k": 1}}):
        assert httpx.post(f"{address}/v1/route", json=body).json()["adapters"][0]["name"] == "sql"
    assert httpx.post(f"{address}/v1/route", json={}).status_code == 400
    assert not engine.requests


def test_no_messages_are_refused_alike(address: str) -> None:
    """A chat of nothing is no prompt, and no empty text: for the decision alone as for an answer."""
    answers = [httpx.post(f"{address}/v1/{path}", json={"messages": []}) for path in ("route", "chat/completions")]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].json() == answers[1].json()


def test_keys(llm: ChatLoraRetriever, tmp_path: Path) -> None:
    """Without the key nothing but health is told; the admin's may do both."""
    keys, admin = tmp_path / "keys", tmp_path / "admin"
    keys.write_text(f"{KEY}\n")
    admin.write_text(f"{ADMIN}\n")
    config = ServeConfig(api_key_file=keys, admin_key_file=admin, adapter_root=tmp_path)
    with running(llm, config) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        for key, path, status in (
            (None, "/v1/models", 401), ("wrong", "/v1/models", 401), (KEY, "/v1/models", 200),
            (ADMIN, "/v1/models", 200), (None, "/metrics", 401), (KEY, "/v1/adapters", 401),
            (ADMIN, "/v1/adapters", 200),
        ):  # fmt: skip
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{address}{path}", headers=headers).status_code == status, (key, path)


def test_a_body_that_is_too_large_is_not_read(llm: ChatLoraRetriever) -> None:
    """Whether it says its length or comes in pieces."""
    with running(llm, ServeConfig(max_body_bytes=2048)) as address:
        url = f"{address}/v1/chat/completions"
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 4000}]}).encode()
        assert httpx.post(url, content=body).status_code == 413
        assert httpx.post(url, content=iter([body[:1000], body[1000:]])).status_code == 413


def test_adapters_come_and_go(llm: ChatLoraRetriever, write_adapter: Any, tmp_path: Path) -> None:
    """With the admin key, from below the allowed folder and from nowhere else."""
    admin = tmp_path / "admin"
    admin.write_text(ADMIN)
    write_adapter("units")
    write_adapter("wide", size=16)
    config = ServeConfig(admin_key_file=admin, adapter_root=tmp_path / "checkpoints")
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with running(llm, config) as address, httpx.Client(base_url=address, headers=headers) as client:
        added = client.post("/v1/adapters", json={"name": "units", "path": "units", "samples": ["How long is it?"]})
        assert (added.status_code, added.json()["rejected"]) == (201, None)
        assert "units" in [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert client.post("/v1/adapters", json={"name": "units", "path": "units"}).status_code == 409
        with pytest.warns(UserWarning, match="does not fit"):
            refused = client.post("/v1/adapters", json={"name": "wide", "path": "wide", "samples": ["x"]}).json()
        assert "does not fit" in refused["rejected"]
        assert "wide" in client.get("/v1/adapters").json()["rejected"]
        for path in ("../admin", "/etc", "nowhere", "..", "units/adapter_config.json"):
            assert client.post("/v1/adapters", json={"name": "x", "path": path}).status_code == 400, path
        assert client.delete("/v1/adapters/units").json() == {"name": "units", "deleted": True}
        assert client.delete("/v1/adapters/units").status_code == 404


def test_without_an_admin_key_the_pool_cannot_be_changed(address: str) -> None:
    """Nor looked at."""
    assert httpx.get(f"{address}/v1/adapters").status_code == 403


def test_what_is_counted(address: str, client: openai.OpenAI) -> None:
    """Requests, tokens, times, adapters, and what the engine is doing."""
    client.chat.completions.create(model="auto", messages=USER)
    list(client.chat.completions.create(model="sql", messages=USER, stream=True))
    text = httpx.get(f"{address}/metrics").text
    assert 'lora_retriever_requests_total{path="/v1/chat/completions",status="200"} 2.0' in text
    assert f'lora_retriever_tokens_total{{kind="output"}} {2 * len("The answer.")}.0' in text
    assert 'lora_retriever_adapter_requests_total{adapter="sql"} 2.0' in text
    assert "lora_retriever_time_to_first_token_seconds_count 2.0" in text
    assert "lora_retriever_running_requests 0.0" in text


def test_langchain_talks_to_it(address: str, engine: Any) -> None:
    """`ChatOpenAI`, whole, streamed, with tools and a schema."""
    llm = ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="auto", max_retries=0)
    assert llm.invoke(SQL).content == "The answer."
    assert "".join(chunk.content for chunk in llm.stream(SQL)) == "The answer."
    engine.answers = [CALL]
    assert llm.bind_tools([ADD]).invoke(SQL).tool_calls[0]["args"] == {"a": 3}
    engine.answers = ['{"a": 3}']
    schema = {"title": "Sum", "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert llm.with_structured_output(schema, method="json_schema").invoke(SQL) == {"a": 3}


@pytest.mark.parametrize(
    ("text", "told"),
    [("host: 0.0.0.0", "lets others reach"), ("prot: 1", "prot"), ("- 1", "name: value"), ("port: x", "port"),
     ("a: [", "cannot be read"), ("admin_key_file: x", "adapter_root"), ("1: 2", "name: value")],
)  # fmt: skip
def test_bad_configurations_are_told(tmp_path: Path, text: str, told: str) -> None:
    """Before anything is loaded."""
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=told):
        read_config(file)


def test_what_is_given_goes_before_the_file(tmp_path: Path) -> None:
    """None is not given."""
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nmax_n: 2\nchat: {temperature: 0.5}\n")
    config = read_config(file, port=3, host=None)
    assert (config.port, config.max_n, config.host, config.chat) == (3, 2, "127.0.0.1", {"temperature": 0.5})
