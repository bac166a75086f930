"""Train LoRA adapters for a pool of one's own: rows in, checkpoints and the samples they are found by out.

It trains with PyTorch and PEFT alone, and knows no engine. `lora-retriever train-adapters` is its face.
"""
