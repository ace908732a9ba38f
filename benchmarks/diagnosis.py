"""Break trained models of six families in every way that `moeify.inspect.diagnose` knows, and see what it names.

Small models of Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, GPT-OSS and moeify learn the text that came with Python and
torch, with three seeds each. As they are, nothing is to be found in them; broken on purpose (`broken_models.py`), the
first finding is to be the fault that was put in, in the layer that it was put into. moewatch, where it is installed,
audits the same models on the same batches. It names dead experts and uneven loads only, so it is asked for less: to
call what is healthy HEALTHY, what has too little data UNKNOWN, and to give a broken model another verdict than its
healthy twin, or to call another expert of the broken layer dead.

    python benchmarks/diagnosis.py
    python benchmarks/diagnosis.py --seeds 4 5 6 --families OLMoE

Thresholds come from papers and arithmetic, see the docstrings of `moeify.inspect.faults`; while they were written only
models of other seeds were looked at. About 6 minutes on one core.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
import torch
import transformers
from broken_models import INJECTORS, Case, NotBroken
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moeify.balance import Sign
from moeify.data.blocks import blocks
from moeify.data.corpus import build_corpus
from moeify.data.tokenizer import ByteTokenizer
from moeify.inspect import FAULTS, diagnose
from moeify.layers import sparse_layers
from moeify.routers import TopK
from moeify.routers.topk import sigmoid
from moeify.sparsify import Recipe, fresh, sparsify
from moeify.train import SparseArguments, SparseTrainer

LENGTH, BATCH, EXPERTS = 64, 16, 8
COLUMNS = [*measure.HEAD, "family", "seed", "fault", "found", "also", "right", "moewatch", "moewatch_right"]
DECODER = {
    "vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 16, "max_position_embeddings": LENGTH, "pad_token_id": 259, "bos_token_id": 256, "eos_token_id": 257,
    "tie_word_embeddings": False, "initializer_range": 0.05,
}  # fmt: skip
EIGHT = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("mixtral", EIGHT | {"num_local_experts": 8, "intermediate_size": 64}),
    "Qwen3-MoE": ("qwen3_moe", EIGHT | {"num_experts": 8, "moe_intermediate_size": 64, "norm_topk_prob": True}),
    "OLMoE": ("olmoe", EIGHT | {"num_experts": 8, "intermediate_size": 64}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
            "moe_intermediate_size": 64, "intermediate_size": 128, "first_k_dense_replace": 1, "num_hidden_layers": 3,
            "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
        },
    ),
    "GPT-OSS": (
        "gpt_oss",
        EIGHT
        | {
            "num_local_experts": 8, "intermediate_size": 64, "sliding_window": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "moeify": ("llama", {"intermediate_size": 128}),
}  # fmt: skip


def build(family: str) -> Any:
    """A model with random weights."""
    model_type, sizes = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **DECODER | sizes))
    if family == "moeify":
        router = partial(TopK, k=2, score=sigmoid, selection_bias=True)
        sparsify(model, Recipe(num_experts=8, router=router, experts=partial(fresh, hidden=64)), verbose=False)
    return model


def balancing(model: Any) -> SparseArguments:
    """A balance loss, and a controller where there is a selection bias to move."""
    has_bias = any(list(layer.selection_biases()) for layer in sparse_layers(model).values())
    return SparseArguments(balance=1e-2, controller=Sign(1e-2) if has_bias else None, progress=False)


def train(family: str, seed: int, data: Any, steps: int) -> Any:
    """A model that has learned."""
    transformers.set_seed(seed)
    model = build(family)
    args = transformers.TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-3, warmup_steps=10,
        lr_scheduler_type="cosine", use_cpu=True, report_to=[], save_strategy="no", logging_steps=steps, seed=seed,
        disable_tqdm=True,
    )  # fmt: skip
    SparseTrainer(model=model, args=args, sparse=balancing(model), train_dataset=data).train()
    return model.eval()


def batches_of(data: Any, count: int) -> list[dict[str, Tensor]]:
    """Batches of held-out text from all domains."""
    places = torch.linspace(0, len(data) - 1, count * BATCH).long().view(BATCH, count).T.tolist()
    return [{"input_ids": torch.stack([data[i]["input_ids"] for i in chosen])} for chosen in places]


@dataclass(frozen=True)
class Audit:
    """What moewatch says of a model: its verdict, empty if it is missing, and the experts it calls dead or cold."""

    verdict: str = ""
    experts: frozenset[tuple[str, int, str]] = frozenset()

    def tells(self, twin: Audit, layer: str) -> bool:
        """Whether a broken model gets another verdict than its healthy twin, or more dead experts in a layer."""
        new = {(name, expert) for name, expert, state in self.experts - twin.experts if state == "DEAD"}
        return self.verdict != twin.verdict or any(name.startswith(layer) and expert < EXPERTS for name, expert in new)


def audit(case: Case) -> Audit:
    """Have a model audited by moewatch."""
    try:
        import moewatch
    except ImportError:
        return Audit()
    quiet = moewatch.WatchConfig(sample_every=1, output="silent")
    try:
        report = moewatch.audit(case.model, case.batches, steps=len(case.batches), config=quiet, verbose=False)
    except Exception as error:
        return Audit(type(error).__name__)
    experts = {(entry.layer_name, entry.expert_idx, entry.state.value) for entry in report.dead_experts()}
    return Audit(report.overall_health.value, frozenset(experts))


def row_of(fault: str, case: Case, layer: str, twin: Audit | None) -> tuple[dict[str, str], Audit]:
    """Diagnose a case, and have it audited beside its healthy twin."""
    diagnosis = diagnose(case.model, case.batches, trainer=case.trainer())
    first = diagnosis.findings[0] if diagnosis.findings else None
    named = diagnosis.status if first is None else first.fault
    others = sorted({found.fault for found in diagnosis.findings} - {named})
    right = named == fault and (first is None or not first.layer or first.layer.startswith(layer))
    said = audit(case)
    told = said.verdict == fault.upper() if twin is None else said.tells(twin, layer)
    row = {
        "fault": fault, "found": named, "also": " ".join(others), "right": str(right), "moewatch": said.verdict,
        "moewatch_right": str(told) if said.verdict else "",
    }  # fmt: skip
    return row, said


def rows_of(model: Any, batches: list[dict[str, Tensor]], broken: bool) -> list[dict[str, str]]:
    """The rows of one trained model: as it is, with too little data, and broken in every way."""
    whole = Case(model, batches, balancing(model))
    layer = whole.layer.name
    healthy, twin = row_of("healthy", whole, layer, None)
    few = [{"input_ids": batches[0]["input_ids"][:1, :64]}] * 2
    rows = [healthy, row_of("unknown", Case(model, few, balancing(model)), layer, None)[0]]
    for fault in FAULTS if broken else ():
        case = Case(copy.deepcopy(model), [{n: t.clone() for n, t in b.items()} for b in batches], balancing(model))
        try:
            INJECTORS[fault](case)
        except NotBroken:
            continue
        torch.manual_seed(0)
        rows.append(row_of(fault, case, layer, twin)[0])
    return rows


def main() -> None:
    options = measure.parser(__doc__, rounds=1, file="diagnosis.csv")
    options.add_argument("--steps", type=int, default=120, help="optimizer steps of each model (120)")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the models; the first is broken")
    options.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    chosen = options.parse_args()
    head = measure.start(chosen)
    training, heldout = blocks(build_corpus(), ByteTokenizer(), LENGTH)
    batches = batches_of(heldout, 10)
    rows = []
    for family in chosen.families:
        for seed in chosen.seeds:
            model = train(family, seed, training, chosen.steps)
            found = rows_of(model, batches, broken=seed == chosen.seeds[0])
            measure.report(chosen.out, COLUMNS, [head | {"family": family, "seed": str(seed)} | row for row in found])
            rows += found
    for title, kind in (("broken", FAULTS), ("healthy", ("healthy",)), ("too little data", ("unknown",))):
        of = [row for row in rows if row["fault"] in kind]
        right = {name: sum(row[name] == "True" for row in of) for name in ("right", "moewatch_right")}
        print(f"{title}: {len(of)} models, moeify right on {right['right']}, moewatch on {right['moewatch_right']}")


if __name__ == "__main__":
    main()
