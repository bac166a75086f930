"""An OpenAI-compatible HTTP server around a chat model (the extra `serve`).

It holds a `ChatLoraRetriever` for its settings and its `Runtime`, begins calls as the chat model does, and writes the
engine's deltas as the protocol has them. Who may ask, how much, and what is counted is decided here and nowhere else.
"""
