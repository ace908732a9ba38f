"""The parts of `moeify.integrations.torchft`: what replicas of a training read, sum and give to one that joins."""
