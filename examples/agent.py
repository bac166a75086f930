"""An agent with two tools, on a model of 135 million parameters.

    pip install "langchain-lora-retriever[demo,examples]"
    python examples/agent.py

The demo's function-calling adapter is found by the question; after a tool's result the question still decides, so the
whole loop runs on the same adapters.
"""

from __future__ import annotations

from langchain.agents import create_agent
from langchain_core.tools import tool

from langchain_lora_retriever.demo import demo_chat_model

QUESTIONS = ("What is the weather in Lisbon?", "What is 17 * 23? Use the tool.")


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    return f"sunny and 21 degrees in {city}"


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two integers."""
    return a * b


def main() -> None:
    """Ask the agent, and print every step it takes."""
    llm = demo_chat_model(max_tokens=80)
    agent = create_agent(llm, [get_weather, multiply])
    for question in QUESTIONS:
        result = agent.invoke({"messages": [("user", question)]}, {"recursion_limit": 8})
        print()
        for message in result["messages"]:
            calls = [f"{call['name']}({call['args']})" for call in getattr(message, "tool_calls", [])]
            adapters = [adapter["name"] for adapter in message.response_metadata.get("adapters", [])]
            print(f"{message.type:6} {message.text} {' '.join(calls)} {adapters or ''}".rstrip())


if __name__ == "__main__":
    main()
