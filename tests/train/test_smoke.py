"""Every router and every named recipe learns real text: what the sparse layers learn alone lowers the loss."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moeify import MoE, Recipe, sparsify
from moeify.data.blocks import blocks
from moeify.data.corpus import build_corpus
from moeify.data.tokenizer import ByteTokenizer
from moeify.routers import Replay, Router, TopK, begin_step
from moeify.sparsify import fresh, recipes
from nights import layouts, nightly
from plain_models import told
from test_matrix import ROUTERS, D, E

LENGTH, BATCH, STEPS = 32, 8, 24
MASK = ByteTokenizer.pad_token_id
RECIPES = [f"recipe {name}" for name in recipes]
LAYOUTS = [f"recipe {name}" for name in layouts()]
CASES = [f"router {name}" for name in ROUTERS] + RECIPES


class OneAnswer(Router):
    """A router whose gates are averaged, for models that read one answer per token."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        self.causal = router.causal

    def forward(self, x, context):
        routing = self.router(x, context)
        return replace(routing, weight=routing.weight.mean(-1), choices=None)


class Again(Router):
    """A `TopK` whose decisions are recorded and replayed at once, with their weights computed anew."""

    def __init__(self) -> None:
        super().__init__()
        self.router = TopK(D, E)

    def forward(self, x, context):
        with torch.no_grad():
            decision = self.router(x, context)
        return Replay(self.router, [decision], weights="recomputed")(x, context)


def router_of(name: str) -> Router:
    if name == "replay":
        return Again()
    router = ROUTERS[name]()
    return OneAnswer(router) if name in ("mmoe", "cgc", "ple", "bounded union") else router


def model_for(router: Router, width: int, layers: int) -> PreTrainedModel:
    """A tiny decoder, or an encoder where the router may look ahead."""
    sizes = {"vocab_size": 258, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": LENGTH, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes)) if router.causal else BertForMaskedLM(BertConfig(**sizes))


def build(case: str, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, _, name = case.partition(" ")
    if kind == "router":
        recipe, width = Recipe(num_experts=E, router=lambda *_: router_of(name), experts=fresh), D
    else:
        recipe, width = recipes[name], 2 * D
    model = model_for(recipe.router(width, recipe.num_experts), width, layers)
    return sparsify(model, recipe, verbose=False)


@pytest.fixture(scope="session")
def text() -> tuple[Tensor, Tensor]:
    """Blocks of bytes: to learn (STEPS, BATCH, LENGTH), and from files that are held out (4 * BATCH, LENGTH)."""
    parts = blocks(build_corpus(20_000), ByteTokenizer(), LENGTH)
    order = [torch.randperm(len(part), generator=torch.Generator().manual_seed(0)) for part in parts]
    learnt, unseen = (part.input_ids[i].long() for part, i in zip(parts, order, strict=True))
    return learnt[: STEPS * BATCH].view(STEPS, BATCH, LENGTH), unseen[: 4 * BATCH]


def loss(model: PreTrainedModel, ids: Tensor, step: int = 0) -> Tensor:
    """Next bytes of a decoder; of an encoder the half that is masked, another one in every step."""
    if isinstance(model, LlamaForCausalLM):
        with told(model, len(ids)):
            return model(input_ids=ids, labels=ids).loss
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(step)) < 0.5
    return model(input_ids=ids.masked_fill(hidden, MASK), labels=ids.masked_fill(~hidden, -100)).loss


def learn(model: PreTrainedModel, text: Tensor) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    seen = []
    model.train()
    for step, ids in enumerate(text):
        begin_step(model, step)
        value = loss(model, ids, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(value.item())
    model.eval()
    return seen


@torch.no_grad()
def gain(case: str, text: Tensor, unseen: Tensor, layers: int) -> float:
    """How much lower the loss of unseen text is once the sparse layers, and nothing else, have learnt some text."""
    model = build(case, layers).requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.requires_grad_(True)
    before = loss(model, unseen)
    with torch.enable_grad():
        learn(model, text)
    return (before - loss(model, unseen)).item()


@pytest.mark.parametrize("case", [nightly(case) if case in LAYOUTS else case for case in RECIPES])
def test_the_loss_falls_on_real_text(case, text):
    seen = learn(build(case), text[0][:16])
    assert fmean(seen[-4:]) < fmean(seen[:4]) - 0.5


@pytest.mark.parametrize("case", [nightly(case) if case in RECIPES else case for case in CASES])
def test_sparse_layers_that_learn_alone_lower_the_loss_of_unseen_text(case, text):
    layers = 1 if case not in RECIPES else 2  # some recipes make every second layer sparse
    assert gain(case, *text, layers) > 0.05


@pytest.mark.parametrize("case", ["router softmax", "router soft", "router hash"])
def test_what_they_learn_is_the_text_and_not_only_to_be_less_sure(case, text):
    learnt, unseen = text
    noise = torch.randint(256, learnt.shape)
    assert gain(case, learnt, unseen, layers=2) > gain(case, noise, unseen, layers=2) + 0.1
