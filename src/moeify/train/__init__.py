"""Train sparse models: losses, controllers and checkpoints for the Transformers trainer."""

from moeify.train.activation_checkpointing import keep_decisions
from moeify.train.adapt_experts import AdaptExperts
from moeify.train.adapter_gates import train_gates
from moeify.train.arguments import SparseArguments
from moeify.train.calibrate import ExpertTokens, calibrate_all_experts, tokens_per_expert
from moeify.train.callbacks import ExpertDropout, KSchedule, ProgressLine, SaveOnSignal
from moeify.train.finetune import FineTuning, finetune
from moeify.train.freeze import Trainable, freeze, trainable, unfreeze
from moeify.train.loss import StepLoss
from moeify.train.routing_callback import RoutingCallback
from moeify.train.super_classes import confusion, super_classes
from moeify.train.trainer import SparseTrainer, SparseTrainerMixin

__all__ = [
    "AdaptExperts", "ExpertDropout", "ExpertTokens", "FineTuning", "KSchedule", "ProgressLine", "RoutingCallback",
    "SaveOnSignal", "SparseArguments", "SparseTrainer", "SparseTrainerMixin", "StepLoss", "Trainable",
    "calibrate_all_experts", "confusion", "finetune", "freeze", "keep_decisions", "super_classes", "tokens_per_expert",
    "train_gates", "trainable", "unfreeze",
]  # fmt: skip
