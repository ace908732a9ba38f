"""Train sparse models: data, losses and the bridge to the Transformers trainer."""
