"""Recipes that have a name: those of the literature, at sizes for a small dense model."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moeify import registry
from moeify.capacity import double, per_choice_by_4, per_token
from moeify.files import read_json
from moeify.find.where import every, last, last_half, linears, odd
from moeify.routers.all_experts import AllExperts
from moeify.routers.arrow import Arrow
from moeify.routers.competition import Compete
from moeify.routers.cosine import Cosine
from moeify.routers.default_vector import DefaultVector
from moeify.routers.expert_choice import ExpertChoice
from moeify.routers.expert_threshold import ExpertThreshold
from moeify.routers.frozen import Frozen
from moeify.routers.gshard import GShard
from moeify.routers.limited import capacity
from moeify.routers.lookup import Lookup
from moeify.routers.mocle import Cluster
from moeify.routers.mole import MoLE
from moeify.routers.noisy import NoisyTopK
from moeify.routers.phatgoose import Phatgoose
from moeify.routers.residual import Residual
from moeify.routers.shared_routing import shared_routing
from moeify.routers.sinkhorn import Sinkhorn
from moeify.routers.soft import Soft
from moeify.routers.sparsemixer import SparseMixer
from moeify.routers.topk import ExpertGroups, TopK, sigmoid
from moeify.routers.variable import ReLU, TopP
from moeify.sparsify.after import sandwich
from moeify.sparsify.lora import lora, lora_ffn
from moeify.sparsify.make import fresh, masked, with_free
from moeify.sparsify.recipe import Recipe
from moeify.sparsify.shared import dense, frozen


@dataclass(frozen=True)
class Entry:
    """A named recipe and what a list says of it.

    Attributes:
        line: what it makes, in a line.
        source: the paper, or `-`.
        family: the models of transformers whose layout its sparse layers have, None if no family has it.
        recipe: the recipe.
    """

    line: str
    source: str
    family: str | None
    recipe: Recipe

    @property
    def causal(self) -> bool:
        """Whether its router looks at no later token, and so may stand in a decoder."""
        return self.recipe.router(8, self.recipe.num_experts).causal


FFN_MAPS = r"(mlp|ffn|feed_forward|DenseReluDense)\.|(fc|linear|lin)_?[12]$|(intermediate|\d\.output)\.dense$"
"""What the linear maps of feed-forward networks are called in models of transformers and of torch."""
QUERIES_AND_VALUES = r"\b(q|v|q_proj|v_proj|query|value|q_lin|v_lin)$"
"""What the linear maps to queries and values are called."""

catalogue: dict[str, Entry] = {
    "matched": Entry(
        "8 experts half as wide, top-2: as many FLOPs per token as the dense twin",
        "-",
        "Mixtral",
        Recipe(router=partial(TopK, k=2, scale=2.0), experts=partial(fresh, granularity=2)),
    ),
    "mixtral": Entry(
        "every FFN copied into 8 experts, top-2, weights that sum to 1",
        "arXiv 2401.04088, 2212.05055",
        "Mixtral",
        Recipe(router=partial(TopK, k=2)),
    ),
    "switch": Entry(
        "top-1 with capacity in every other layer",
        "arXiv 2101.03961",
        None,
        Recipe(
            where=odd,
            router=partial(
                capacity,
                router=partial(TopK, k=1, normalize=False, jitter=0.01),
                factor=1.25,
                eval_factor=2.0,
                capacity=per_token,
            ),
            experts=partial(fresh, variance=0.1),
        ),
    ),
    "deepseek": Entry(
        "fine experts beside a shared one, sigmoid scores, groups, a bias",
        "arXiv 2412.19437",
        "DeepSeek-V3",
        Recipe(
            num_experts=32,
            router=partial(
                TopK,
                k=4,
                score=sigmoid,
                selection_bias=True,
                expert_groups=ExpertGroups(4, 2, reduce="top2"),
                scale=2.5,
            ),
            experts=partial(fresh, granularity=4),
            shared=dense,
        ),
    ),
    "deepseek_v2": Entry(
        "fine experts beside a shared one, softmax weights as they are times a scale, groups by their best expert",
        "arXiv 2405.04434",
        "DeepSeek-V2",
        Recipe(
            num_experts=32,
            router=partial(TopK, k=4, expert_groups=ExpertGroups(4, 2), normalize=False, scale=4.0),
            experts=partial(fresh, granularity=4),
            shared=dense,
        ),
    ),
    "longcat": Entry(
        "experts that answer the token itself, a bias; steer it with Proportional(real=8)",
        "arXiv 2509.01322",
        None,
        Recipe(
            num_experts=12,
            router=partial(TopK, k=3, selection_bias=True, normalize=False, scale=2.0),
            experts=partial(with_free, zero=0, copy=4, constant=0),
        ),
    ),
    "olmoe": Entry(
        "fine experts, top-4, softmax weights as they are",
        "arXiv 2409.02060",
        "OLMoE",
        Recipe(num_experts=16, router=partial(TopK, k=4, normalize=False), experts=partial(fresh, granularity=4)),
    ),
    "phi": Entry(
        "sampled top-2 with SparseMixer gradients",
        "arXiv 2409.12136",
        "PhiMoE",
        Recipe(num_experts=16, router=partial(SparseMixer, k=2), experts=fresh),
    ),
    "qwen3": Entry(
        "fine experts, top-4, weights that sum to 1",
        "arXiv 2505.09388",
        "Qwen3-MoE",
        Recipe(num_experts=32, router=partial(TopK, k=4), experts=partial(fresh, granularity=4)),
    ),
    "noisy": Entry(
        "noisy top-4 with learned noise; train with the losses importance and load_loss",
        "arXiv 1701.06538",
        None,
        Recipe(num_experts=16, router=partial(NoisyTopK, k=4), experts=partial(fresh, granularity=2)),
    ),
    "default_moe": Entry(
        "top-2, and a mean answer in place of each expert that is not asked, for the router's gradient",
        "arXiv 2504.12463",
        None,
        Recipe(router=DefaultVector, experts=fresh),
    ),
    "gshard": Entry(
        "a random second expert, capacity in every other layer",
        "arXiv 2006.16668",
        None,
        Recipe(
            where=odd,
            router=partial(
                capacity, router=GShard, factor=1.25, eval_factor=2.0, capacity=per_token, priority="choice"
            ),
            experts=fresh,
        ),
    ),
    "xmoe": Entry(
        "cosine routing on a small sphere, top-1",
        "arXiv 2204.09179",
        None,
        Recipe(
            where=odd,
            num_experts=16,
            router=partial(capacity, router=Cosine, factor=1.0, eval_factor=1.0, capacity=double),
            experts=fresh,
        ),
    ),
    "vmoe": Entry(
        "noisy top-2 with capacity in the last two layers",
        "arXiv 2106.05974",
        None,
        Recipe(
            where=last(2),
            router=partial(
                capacity,
                router=partial(NoisyTopK, k=2, noise=1 / 8, order="softmax"),
                factor=1.05,
                eval_factor=4.0,
                capacity=per_choice_by_4,
                priority="choice",
            ),
            experts=fresh,
        ),
    ),
    "soft": Entry(
        "slots that mix all tokens, in the last half of the layers",
        "arXiv 2308.00951",
        None,
        Recipe(where=last_half, num_experts=16, router=Soft, experts=fresh),
    ),
    "expert_choice": Entry(
        "experts take their tokens, in every other layer",
        "arXiv 2202.09368",
        None,
        Recipe(where=odd, router=partial(ExpertChoice, factor=2.0), experts=fresh),
    ),
    "expert_threshold": Entry(
        "experts take tokens above a cut-off of their own; move it with CutOff",
        "arXiv 2603.11535",
        None,
        Recipe(router=ExpertThreshold, experts=fresh),
    ),
    "limoe": Entry(
        "top-1, the surest tokens first, in every other layer; train with the entropies of each modality",
        "arXiv 2206.02770",
        None,
        Recipe(
            where=odd,
            router=partial(
                capacity,
                router=partial(TopK, k=1, normalize=False),
                factor=1.0,
                eval_factor=1.0,
                capacity=per_token,
                priority="score",
            ),
            experts=fresh,
        ),
    ),
    "topp": Entry(
        "as many experts as reach a probability of 0.4",
        "arXiv 2403.07652",
        None,
        Recipe(num_experts=16, router=partial(TopP, p=0.4), experts=partial(fresh, granularity=2)),
    ),
    "remoe": Entry(
        "ReLU gates; steer their number with l1 and SparsityTarget",
        "arXiv 2412.14711",
        None,
        Recipe(router=ReLU, experts=fresh),
    ),
    "hash": Entry(
        "experts looked up by token id; no router to train",
        "arXiv 2106.04426",
        None,
        Recipe(router=Lookup, experts=fresh),
    ),
    "stmoe": Entry(
        "GShard routing in every fourth layer, a dense FFN behind it, small init; train with a z-loss of 1e-3",
        "arXiv 2202.08906",
        None,
        Recipe(
            where=every(4),
            router=partial(
                capacity, router=GShard, factor=1.25, eval_factor=2.0, capacity=per_token, priority="choice"
            ),
            experts=partial(fresh, variance=0.1),
            after=partial(sandwich, variance=0.1),
        ),
    ),
    "nllb": Entry(
        "top-2 in every fourth layer, a fifth of the answers masked",
        "arXiv 2207.04672",
        None,
        Recipe(
            where=every(4),
            router=partial(
                capacity, router=partial(TopK, k=2), factor=1.0, eval_factor=4.0, capacity=double, priority="choice"
            ),
            experts=partial(masked, experts=fresh, p=0.2),
        ),
    ),
    "base": Entry(
        "even assignment by Sinkhorn iterations, top-1",
        "arXiv 2103.16716",
        None,
        Recipe(router=Sinkhorn, experts=fresh),
    ),
    "smoe_dropout": Entry(
        "a frozen random router; let k grow with KSchedule",
        "arXiv 2303.01610",
        None,
        Recipe(num_experts=16, router=partial(Frozen, k=8), experts=fresh),
    ),
    "competesmoe": Entry(
        "all experts compete now and then, the router learns who wins",
        "arXiv 2505.13380",
        None,
        Recipe(num_experts=32, router=partial(Compete, k=4), experts=partial(fresh, granularity=4)),
    ),
    "moepp": Entry(
        "FFN, constant, copy and zero experts; gating residuals",
        "arXiv 2410.07348",
        None,
        Recipe(num_experts=12, router=partial(Residual, k=2, zero_experts=1, hidden=96), experts=with_free),
    ),
    "mobile_vmoe": Entry(
        "one decision per image for the last two layers",
        "arXiv 2309.04354",
        None,
        Recipe(
            where=last(2),
            num_experts=10,
            router=partial(shared_routing, router=partial(TopK, k=1, normalize=False, per="group")),
            experts=fresh,
        ),
    ),
    "phatgoose": Entry(
        "adapters beside every linear map, top-2 by gates that are trained after them",
        "arXiv 2402.05859",
        None,
        Recipe(where=linears(), router=Phatgoose, experts=partial(lora, rank=16, scale=1 / 16), shared=frozen),
    ),
    "arrow": Entry(
        "adapters beside every linear map, top-3 by the directions of their weights; no router to train",
        "arXiv 2405.11157",
        None,
        Recipe(where=linears(), router=Arrow, experts=partial(lora, rank=16, scale=1 / 16), shared=frozen),
    ),
    "mixlora": Entry(
        "every FFN is 8 of itself with adapters inside, top-2; the attention's adapters are a recipe of their own",
        "arXiv 2404.15159",
        None,
        Recipe(router=partial(TopK, k=2), experts=partial(lora_ffn, rank=16, scale=2.0, dropout=0.05)),
    ),
    "loramoe": Entry(
        "8 adapters beside every linear map of the FFNs, all weighed by a softmax; balance them by losses.localized",
        "arXiv 2312.09979",
        None,
        Recipe(
            where=linears(FFN_MAPS),
            router=AllExperts,
            experts=partial(lora, rank=4, scale=8.0, dropout=0.05),
            shared=frozen,
        ),
    ),
    "mocle": Entry(
        "4 adapters by cluster of the instruction and a universal one, beside the maps to queries and values",
        "arXiv 2312.12379",
        None,
        Recipe(
            where=linears(QUERIES_AND_VALUES),
            num_experts=5,
            router=Cluster,
            experts=partial(lora, rank=8, scale=4.0, dropout=0.1),
            shared=frozen,
        ),
    ),
    "mole": Entry(
        "trained adapters beside queries and values, weighed by what all of them answer; train with log_product",
        "arXiv 2404.13628",
        None,
        Recipe(where=linears(QUERIES_AND_VALUES), num_experts=4, router=MoLE, experts=lora, shared=frozen),
    ),
}
"""Named recipes.

`matched` follows no paper: it is the fair comparison with a dense twin. Two halves of a dense FFN are added up there,
so the two experts' answers count twice under weights that sum to 1; without that scale the sparse layers start, and
stay, too quiet.
"""

recipes: dict[str, Recipe] = {name: entry.recipe for name, entry in catalogue.items()}
"""The recipes alone, by name."""


def read_recipe(source: str | Path) -> Recipe:
    """A named recipe, or one from a .json or .toml file.

    Raises:
        ValueError: neither a known name nor a readable recipe file.
        FileNotFoundError: the file is not there.
    """
    path = Path(source)
    if path.suffix not in (".json", ".toml"):
        if str(source) not in recipes:
            near = registry.suggest(str(source), list(recipes))
            raise ValueError(f"no recipe, .json or .toml file is called {str(source)!r}; {near}")
        return recipes[str(source)]
    if not path.is_file():
        raise FileNotFoundError(f"the recipe file {path} does not exist")
    try:
        values = read_json(path) if path.suffix == ".json" else tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a table of recipe fields, not a {type(values).__name__}")
    return Recipe.from_dict(values)
