"""Measurements that need the model itself, one function in a file each; panels show what they return."""
