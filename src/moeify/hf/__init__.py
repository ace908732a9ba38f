"""All that is known of transformers' MoE blocks: finding them, reading their decisions, and the experts interface."""
