"""The programs themselves read the configurations that are written for them; skipped where they are not installed."""

import json
import sys
from itertools import islice

import pytest
import torch

from moeify.parallel import TARGETS, Layout
from moeify.parallel.emit import EMIT
from moeify.parallel.layout import layouts
from nights import nightly
from parallel.test_plan import SHAPE, cluster


def written(program, step):
    """Every `step`-th layout of two nodes with what is written for it."""
    found = layouts(SHAPE, cluster(2), TARGETS[program], 64)
    return [(layout, EMIT[program](layout, SHAPE, 2048)) for layout in islice(found, 0, None, step)]


def test_no_pipeline_is_planned_for_transformers_whose_pipeline_has_no_backward_pass():
    assert "forward passes only" in TARGETS["transformers"].refuse(Layout(pp=2), SHAPE)
    for layout, text in written("transformers", 7):
        assert json.loads(text)["distributed_config"]["pp_size"] == layout.pp == 1


@pytest.mark.parametrize("step", [97, nightly(1)])
def test_torchtitan_reads_its_configuration(tmp_path, step):
    pytest.importorskip("torchtitan.config.job_config", reason="later versions than 0.2 have no TOML")
    from torchtitan.config import ConfigManager
    from torchtitan.distributed import ParallelDims

    for layout, text in written("torchtitan", step):
        file = tmp_path / "job.toml"
        file.write_text(text)
        job = ConfigManager().parse_args(["--job.config_file", str(file)])
        assert (job.training.seq_len, job.training.global_batch_size) == (2048, layout.sequences)
        p = job.parallelism
        dims = ParallelDims(
            dp_shard=p.data_parallel_shard_degree, dp_replicate=p.data_parallel_replicate_degree,
            cp=p.context_parallel_degree, tp=p.tensor_parallel_degree, pp=p.pipeline_parallel_degree,
            ep=p.expert_parallel_degree, etp=p.expert_tensor_parallel_degree, world_size=layout.world,
        )  # fmt: skip
        assert (dims.ep, dims.tp, dims.pp) == (layout.ep, layout.tp, layout.pp)


def test_torchtitan_without_toml_takes_the_names_of_parallelism_as_flags():
    configs = pytest.importorskip("torchtitan.config.configs", reason="torchtitan 0.2 has TOML")
    names = configs.ParallelismConfig.__dataclass_fields__
    for _, text in written("torchtitan", 97):
        section = text.split("[parallelism]")[1].split("[")[0]
        fields = {line.split(" = ")[0] for line in section.splitlines() if " = " in line}
        assert fields - names.keys() == {"expert_tensor_parallel_degree"}


@pytest.mark.parametrize("step", [97, nightly(1)])
def test_megatron_reads_its_flags(monkeypatch, capsys, step):
    arguments = pytest.importorskip("megatron.training.arguments")
    h100 = type("H100", (), {"major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device: h100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    model = [
        "--num-layers",
        "16",
        "--hidden-size",
        "2048",
        "--num-attention-heads",
        "16",
        "--ffn-hidden-size",
        "1024",
        "--train-iters",
        "10",
        "--max-position-embeddings",
        "4096",
        "--position-embedding-type",
        "rope",
        "--lr",
        "1e-4",
        "--mock-data",
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        "50000",
    ]
    for layout, text in written("megatron", step):
        monkeypatch.setenv("WORLD_SIZE", str(layout.world))
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *text.replace("\\\n", " ").split(), *model])
        read = arguments.validate_args(arguments.parse_args())
        assert read.expert_model_parallel_size == layout.ep
        assert read.tensor_model_parallel_size == layout.tp
        assert read.pipeline_model_parallel_size == layout.pp
        assert read.data_parallel_size == layout.fsdp
        capsys.readouterr()
