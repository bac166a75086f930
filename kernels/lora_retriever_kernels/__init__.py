"""Triton kernels for LoRA per token, attention over a paged cache, and decoder layers; PyTorch references beside them.

They know torch and triton, and can be used without the rest of the project.
"""
