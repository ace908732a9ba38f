"""Small models of moeify's own, for kinds of data that transformers has no class for; `load` builds them by name."""

from moeify.models.multi_task import MultiTask
from moeify.models.one_tower import OneTower

__all__ = ["MultiTask", "OneTower"]
