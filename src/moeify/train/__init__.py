"""Train sparse models: losses, controllers and checkpoints for the Transformers trainer."""

from moeify.experts.slices import join_experts
from moeify.train.activation_checkpointing import keep_decisions
from moeify.train.adapt_experts import AdaptExperts
from moeify.train.adapter_gates import train_gates
from moeify.train.arguments import SparseArguments
from moeify.train.balance_callback import BalanceCallback
from moeify.train.balance_hook import BalanceHook, balance_hook
from moeify.train.calibrate import ExpertTokens, calibrate_all_experts, tokens_per_expert
from moeify.train.callbacks import ExpertDropout, KSchedule, ProgressLine, SaveOnSignal
from moeify.train.checkpoint.sharded import load_sharded, newest_checkpoint, save_sharded
from moeify.train.dense_gradient import dense_router_gradient
from moeify.train.esft import lora_experts, train_experts
from moeify.train.finetune import FineTuning, finetune
from moeify.train.freeze import Trainable, freeze, trainable, unfreeze
from moeify.train.loss import StepLoss
from moeify.train.rebalance_callback import Rebalance
from moeify.train.relevance import Relevance, average_gate, expert_relevance, selection_ratio
from moeify.train.routing_callback import RoutingCallback
from moeify.train.super_classes import confusion, super_classes
from moeify.train.trainer import SparseTrainer, SparseTrainerMixin

__all__ = [
    "AdaptExperts", "BalanceCallback", "BalanceHook", "ExpertDropout", "ExpertTokens", "FineTuning", "KSchedule",
    "ProgressLine", "Rebalance", "Relevance", "RoutingCallback", "SaveOnSignal", "SparseArguments", "SparseTrainer",
    "SparseTrainerMixin", "StepLoss", "Trainable", "average_gate", "balance_hook", "calibrate_all_experts",
    "confusion", "dense_router_gradient", "expert_relevance", "finetune", "freeze", "join_experts", "keep_decisions",
    "load_sharded", "lora_experts", "newest_checkpoint", "save_sharded", "selection_ratio", "super_classes",
    "tokens_per_expert", "train_experts", "train_gates", "trainable", "unfreeze",
]  # fmt: skip
