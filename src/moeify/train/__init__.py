"""Train sparse models: data, losses and the bridge to the Transformers trainer."""

from moeify.train.arguments import SparseArguments
from moeify.train.calibrate import ExpertTokens, calibrate_all_experts, tokens_per_expert
from moeify.train.callbacks import ExpertDropout, KSchedule, ProgressLine, SaveOnSignal
from moeify.train.checkpointing import keep_decisions
from moeify.train.clusters import Clusters, Pooled, cluster
from moeify.train.data import Blocks, ByteTokenizer, Texts, blocks, read_texts
from moeify.train.finetune import FineTuning, finetune
from moeify.train.freeze import Trainable, freeze, trainable, unfreeze
from moeify.train.gates import train_gates
from moeify.train.loss import StepLoss
from moeify.train.trainer import SparseTrainer, SparseTrainerMixin

__all__ = [
    "Blocks", "ByteTokenizer", "Clusters", "ExpertDropout", "ExpertTokens", "FineTuning", "KSchedule", "Pooled",
    "ProgressLine", "SaveOnSignal", "SparseArguments", "SparseTrainer", "SparseTrainerMixin", "StepLoss", "Texts",
    "Trainable", "blocks", "calibrate_all_experts", "cluster", "finetune", "freeze", "keep_decisions", "read_texts",
    "tokens_per_expert", "train_gates", "trainable", "unfreeze",
]  # fmt: skip
