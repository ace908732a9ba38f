"""MoE blocks of transformers: find them, read their routing decisions, and compute their experts by moeify."""
