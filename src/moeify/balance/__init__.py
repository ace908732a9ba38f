"""Controllers of expert load: they move selection biases after each step, or the weight of a balancing loss.

`control` moves the biases of a model by a `Rule` after every optimizer step; `SparsityTarget` moves the weight of a
loss.
"""

from moeify.balance.control import Bias, Control, control
from moeify.balance.cutoff import CutOff
from moeify.balance.pid import PID, Proportional
from moeify.balance.rules import SMEBU, Quantile, Rule, Sign
from moeify.balance.sparsity import SparsityTarget

__all__ = [
    "PID", "SMEBU", "Bias", "Control", "CutOff", "Proportional", "Quantile", "Rule", "Sign", "SparsityTarget",
    "control",
]  # fmt: skip
