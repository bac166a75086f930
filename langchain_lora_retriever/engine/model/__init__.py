"""All that knows transformers, accelerate and the kernels: loading, probing, checking and running the model.

A new version of transformers, another architecture or a faster forward changes what is here, and nothing else. The
rest of the engine schedules requests, chooses tokens and counts memory.
"""
