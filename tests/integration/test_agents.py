"""LangChain's agents on the demo's model, which is done in words when it is done."""

from __future__ import annotations

from typing import Any

import pytest

from agent_tools import Weather, get_weather, multiply
from langchain_lora_retriever.demo import demo_chat_model

pytestmark = [pytest.mark.demo, pytest.mark.slow]

create_agent = pytest.importorskip("langchain.agents").create_agent


async def test_tools_and_a_schema_end() -> None:
    """The same calls as without the schema, then the schema, filled in from the tool's result."""
    llm, asked = demo_chat_model(max_tokens=80), {"messages": [("user", "What is the weather in Lisbon?")]}
    config: Any = {"recursion_limit": 8}
    plain = create_agent(llm, [get_weather, multiply]).invoke(asked, config)
    agent = create_agent(llm, [get_weather, multiply], response_format=Weather)
    for state in (agent.invoke(asked, config), await agent.ainvoke(asked, config)):
        assert state["structured_response"] == Weather(city="Lisbon", degrees=21)
        assert [message.type for message in state["messages"]] == [message.type for message in plain["messages"]]
        assert state["messages"][-1].additional_kwargs["reasoning_content"] == plain["messages"][-1].text
