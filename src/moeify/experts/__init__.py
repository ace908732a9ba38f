"""Experts: modules from rows sorted by expert to rows of expert outputs."""

from moeify.experts.base import Experts, cut
from moeify.experts.blocks import Blocks, Each, Identity, Zero
from moeify.experts.constant import Constant
from moeify.experts.ffn import FFN
from moeify.experts.latent import Latent
from moeify.experts.lora import LoRA, LoRAFFN
from moeify.experts.masked import Masked
from moeify.experts.multiplicative_bias import MultiplicativeBias
from moeify.experts.of_inputs import OfInputs
from moeify.experts.quantized import Quantized, quantize
from moeify.experts.scaled import Scaled
from moeify.experts.sequences import Sequences
from moeify.kernels.stacked import ClampedGlu, ClampedSwiGlu, Glu, Plain

__all__ = [
    "FFN", "Blocks", "ClampedGlu", "ClampedSwiGlu", "Constant", "Each", "Experts", "Glu", "Identity", "Latent", "LoRA",
    "LoRAFFN", "Masked", "MultiplicativeBias", "OfInputs", "Plain", "Quantized", "Scaled", "Sequences", "Zero", "cut",
    "quantize",
]  # fmt: skip
