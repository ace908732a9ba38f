"""Small models of moeify's own, for kinds of data that transformers has no class for; `load` builds them by name."""

from moeify.models.multi_task import MultiTask

__all__ = ["MultiTask"]
