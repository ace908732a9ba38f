"""The version of moeify."""

__version__ = "0.1.0"
