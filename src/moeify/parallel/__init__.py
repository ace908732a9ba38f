"""Sparse training on many devices: what a step costs there, which layout is fastest, and where experts should lie.

`distribute` puts a model on the processes of a run as a layout says, by the engine of transformers; `shard` does so for
loops of one's own.
"""

from moeify.experts.parallel import Parallel, spread
from moeify.parallel.cluster import DEVICES, Cluster, Device, Link
from moeify.parallel.cost import Cost, Step
from moeify.parallel.distribute import CannotBeParallel, distribute, expert_plan
from moeify.parallel.fixed import Fixed
from moeify.parallel.grouped import ExpertWork, GroupedCost
from moeify.parallel.layout import TARGETS, Layout, Target
from moeify.parallel.measure import measure
from moeify.parallel.moving import move_experts
from moeify.parallel.place import Placement, permuted, replicated, shadowed
from moeify.parallel.plan import Choice, Plan, plan
from moeify.parallel.rebalance import Move, Placed, Rebalancer
from moeify.parallel.rebalancing import Rebalancing
from moeify.parallel.shape import ModelShape
from moeify.parallel.shard import clip_grad_norm_, names_in_one_process, shard
from moeify.parallel.simulate import Simulation, simulate
from moeify.parallel.workload import Workload

__all__ = [
    "DEVICES", "TARGETS", "CannotBeParallel", "Choice", "Cluster", "Cost", "Device", "ExpertWork", "Fixed",
    "GroupedCost", "Layout", "Link", "ModelShape", "Move", "Parallel", "Placed", "Placement", "Plan", "Rebalancer",
    "Rebalancing", "Simulation", "Step", "Target", "Workload", "clip_grad_norm_", "distribute", "expert_plan",
    "measure", "move_experts", "names_in_one_process", "permuted", "plan", "replicated", "shadowed", "shard",
    "simulate", "spread",
]  # fmt: skip
