"""Everything known about transformers' own MoE blocks."""
