"""One conversation whose turns need different adapters: each is routed by itself.

python examples/multi_turn.py
"""

from __future__ import annotations

from langchain_core.messages import AIMessage, HumanMessage

from langchain_lora_retriever.demo import demo_chat_model, demo_test_set

TASKS_SHOWN = 4


def main() -> None:
    """Ask a held-out prompt of several clusters in turn, remembering what was said."""
    rows = {row["cluster"]: row for row in demo_test_set(1) if len(row["messages"]) == 1}
    llm = demo_chat_model(max_tokens=64)
    history: list[HumanMessage | AIMessage] = []
    for row in list(rows.values())[:TASKS_SHOWN]:
        history.append(HumanMessage(row["input"]))
        answer = llm.invoke(history)
        history.append(answer)
        adapters = ", ".join(f"{a['name']} {a['weight']:.0%}" for a in answer.response_metadata["adapters"])
        print(f"user       {row['input']}\nassistant  {answer.text}\n           ({adapters})\n")


if __name__ == "__main__":
    main()
