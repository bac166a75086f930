"""What an answer may look like, and how it is read while it is generated.

Formats and tools become grammars, as text; deltas become text, reasoning and tool calls. It knows the engine's seam and
LangChain's messages, and neither retrieval nor the chat model.
"""
