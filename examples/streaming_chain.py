"""A chain that streams: prompt, model and parser, and the metadata of the answer at its end.

python examples/streaming_chain.py
"""

from __future__ import annotations

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from langchain_lora_retriever.demo import demo_chat_model


def main() -> None:
    """Stream text through a chain, then messages from the model itself."""
    llm = demo_chat_model(max_tokens=48)
    prompt = ChatPromptTemplate.from_template("Give me {keys} from the purchase order as a JSON object: {order}")
    chain = prompt | llm | StrOutputParser()
    order = "Hi, could you send us 12 oak tables? Our shop is in Porto. Regards, Ana Costa"
    for piece in chain.stream({"keys": "buyer, place", "order": order}):
        print(piece, end="", flush=True)
    print()

    first, *rest = (prompt | llm).stream({"keys": "item, pieces", "order": order})
    for chunk in rest:
        first += chunk
    print(first.text, first.response_metadata["adapters"], first.usage_metadata)


if __name__ == "__main__":
    main()
