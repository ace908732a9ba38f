"""Ways to run a whole layer. `compose` is the definition; every other backend must agree with it, gradient included."""

from moeify.backends.base import Backend
from moeify.backends.choose import BACKENDS, choose, run
from moeify.backends.plain import compose

__all__ = ["BACKENDS", "Backend", "choose", "compose", "run"]
