"""LangChain's face: the chat model, its settings, and what becomes of a call.

All that a new version of LangChain may change is here and in `output`. It holds a `Runtime`, and knows no engine.
"""
