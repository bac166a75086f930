"""The elementwise parts of a decoder layer, each in one launch: norms with their residual additions, activations."""

from lora_retriever_kernels.decoder.activation import ACTIVATIONS, gated_activation
from lora_retriever_kernels.decoder.norm import RmsNorm, add_rms_norm, rms_norm

__all__ = ["ACTIVATIONS", "RmsNorm", "add_rms_norm", "gated_activation", "rms_norm"]
