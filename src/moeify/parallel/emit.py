"""A layout in the words of the program that runs it.

Names are those of transformers 5.24 (`DistributedConfig`, `TrainingArguments`), torchtitan 0.2.2 (`JobConfig`; 0.3
takes those of `[parallelism]` as flags) and Megatron-LM of August 2026 (`d98e8a6`).
"""

from __future__ import annotations

import json

from moeify.parallel.layout import Layout
from moeify.parallel.shape import ModelShape


def transformers(layout: Layout, shape: ModelShape, length: int) -> str:
    """JSON with the arguments of `DistributedConfig` and of `TrainingArguments`."""
    distributed = {
        "tp_size": layout.tp, "fsdp_size": layout.fsdp, "dp_replicate_size": layout.dp, "pp_size": layout.pp,
        "ep_size": layout.ep,
    }  # fmt: skip
    arguments = {
        "per_device_train_batch_size": layout.micro_batch, "gradient_accumulation_steps": layout.accumulation,
        "gradient_checkpointing": layout.recompute, "bf16": True,
    }  # fmt: skip
    return json.dumps({"distributed_config": distributed, "training_arguments": arguments}, indent=2) + "\n"


def torchtitan(layout: Layout, shape: ModelShape, length: int) -> str:
    """TOML of a `JobConfig`; with a pipeline, torchtitan cuts the local batch into micro-batches itself."""
    whole = layout.accumulation if layout.pp > 1 else 1
    sections = {
        "training": {
            "local_batch_size": layout.micro_batch * whole, "global_batch_size": layout.sequences, "seq_len": length,
        },
        "parallelism": {
            "data_parallel_replicate_degree": layout.dp, "data_parallel_shard_degree": layout.fsdp,
            "tensor_parallel_degree": layout.tp, "pipeline_parallel_degree": layout.pp,
            "pipeline_parallel_microbatch_size": layout.micro_batch, "expert_parallel_degree": layout.ep,
            "expert_tensor_parallel_degree": layout.etp,
        },
        "activation_checkpoint": {"mode": "full" if layout.recompute else "none"},
    }  # fmt: skip
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for name, values in sections.items()
    )


def megatron(layout: Layout, shape: ModelShape, length: int) -> str:
    """Command-line flags, one a line."""
    flags = {
        "tensor-model-parallel-size": layout.tp, "pipeline-model-parallel-size": layout.pp,
        "expert-model-parallel-size": layout.ep, "expert-tensor-parallel-size": layout.etp,
        "num-experts": shape.num_experts, "moe-router-topk": round(shape.k), "moe-token-dispatcher-type": "alltoall",
        "seq-length": length, "micro-batch-size": layout.micro_batch, "global-batch-size": layout.sequences,
    }  # fmt: skip
    switches = ["bf16", "moe-grouped-gemm", "use-distributed-optimizer"]
    switches += ["sequence-parallel"] if layout.tp > 1 else []
    lines = [f"--{name} {value}" for name, value in flags.items()] + [f"--{name}" for name in switches]
    if layout.recompute:
        lines += ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    return " \\\n".join(lines) + "\n"


EMIT = {"transformers": transformers, "torchtitan": torchtitan, "megatron": megatron}
