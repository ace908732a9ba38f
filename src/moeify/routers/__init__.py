"""Routers: modules from tokens to a `Routing` decision, one file per family of papers."""

from moeify.routers.all_experts import AllExperts
from moeify.routers.arrow import Arrow
from moeify.routers.balanced_assignment import BalancedAssignment
from moeify.routers.base import Router, Tokens, begin_step, project, real_tokens
from moeify.routers.capped_score import CappedSigmoid
from moeify.routers.competition import Compete
from moeify.routers.cosine import Cosine
from moeify.routers.default_vector import DefaultVector
from moeify.routers.depth_averaged import DepthAveraged
from moeify.routers.expert_choice import ExpertChoice
from moeify.routers.expert_groups import ExpertGroups, GroupLimit, PerGroup
from moeify.routers.expert_scale import ExpertScale
from moeify.routers.expert_threshold import ExpertThreshold
from moeify.routers.extraction import Extraction
from moeify.routers.frozen import Frozen
from moeify.routers.gshard import GShard
from moeify.routers.input_weights import InputWeights
from moeify.routers.labelled import Labelled
from moeify.routers.limited import Capacity
from moeify.routers.lookup import Lookup
from moeify.routers.mocle import Cluster
from moeify.routers.mole import MoLE
from moeify.routers.multi_gate import MultiGate, SparseMultiGate
from moeify.routers.nllb import Conditional, FinalMask
from moeify.routers.noisy import NoisyTopK
from moeify.routers.normalized_input import NormalizedInput
from moeify.routers.phatgoose import Phatgoose
from moeify.routers.product_keys import ProductKeys
from moeify.routers.replay import Replay
from moeify.routers.residual import Residual
from moeify.routers.shared_routing import ReusedRouting, SharedRouting
from moeify.routers.similarity import Similarity
from moeify.routers.sinkhorn import Sinkhorn
from moeify.routers.soft import Soft
from moeify.routers.sparsemixer import SparseMixer
from moeify.routers.token_rounding import TokenRounding
from moeify.routers.top_any import TopAny
from moeify.routers.topk import TopK, sigmoid, softmax, sqrt_softplus
from moeify.routers.uniform import Uniform
from moeify.routers.variable import ReLU, Threshold, TopP
from moeify.routers.weighted_inputs import WeightedInputs

__all__ = [
    "AllExperts",
    "Arrow",
    "BalancedAssignment",
    "Capacity",
    "CappedSigmoid",
    "Cluster",
    "Compete",
    "Conditional",
    "Cosine",
    "DefaultVector",
    "DepthAveraged",
    "ExpertChoice",
    "ExpertGroups",
    "ExpertScale",
    "ExpertThreshold",
    "Extraction",
    "FinalMask",
    "Frozen",
    "GShard",
    "GroupLimit",
    "InputWeights",
    "Labelled",
    "Lookup",
    "MoLE",
    "MultiGate",
    "NoisyTopK",
    "NormalizedInput",
    "PerGroup",
    "Phatgoose",
    "ProductKeys",
    "ReLU",
    "Replay",
    "Residual",
    "ReusedRouting",
    "Router",
    "SharedRouting",
    "Similarity",
    "Sinkhorn",
    "Soft",
    "SparseMixer",
    "SparseMultiGate",
    "Threshold",
    "TokenRounding",
    "Tokens",
    "TopAny",
    "TopK",
    "TopP",
    "Uniform",
    "WeightedInputs",
    "begin_step",
    "project",
    "real_tokens",
    "sigmoid",
    "softmax",
    "sqrt_softplus",
]  # fmt: skip
