"""The ground floor: small pieces that any room may use, and that know nothing of adapters, engines or LangChain.

Threads and forks, callers' nested values and how errors show them, patterns matched in bounded time.
"""
