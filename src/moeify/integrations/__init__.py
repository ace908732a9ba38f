"""moeify inside other training programs: Axolotl, LLaMA-Factory, TRL. Each module needs its program installed."""
