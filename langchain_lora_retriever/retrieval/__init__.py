"""From a text to the adapters that are to run for it: embedding, search, composition, fusion, routing.

It reads pools and knows no engine and no LangChain. A better way to find or to weigh adapters goes here.
"""
