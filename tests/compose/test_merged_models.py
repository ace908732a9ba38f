"""What a merged model learns: routers from examples, experts and routers from training."""

import copy

import torch
from transformers import TrainingArguments

from branches import branches, merge
from moeify import MoE, merge_models, record
from moeify.compose import route_all_to
from moeify.train import SparseTrainer
from moeify.train.freeze import freeze
from plain_models import sparse_layers
from tiny_models import DENSE, inputs, tokens


def domains(number=3):
    """Domains of few tokens each, none in two."""
    return {str(d): [torch.randint(10 + 8 * d, 14 + 8 * d, (2, 16)) for _ in range(3)] for d in range(number)}


def test_examples_point_routers_to_their_domains():
    examples = domains()
    merged = merge(branches("llama"), router_init=examples)
    for e, (name, seen) in enumerate(examples.items()):
        fresh_text = torch.cat(seen).flatten()[torch.randperm(96)].view(6, 16)
        with record(merged) as decisions:
            merged(fresh_text)
        first = next(iter(decisions.values()))
        assert (first.logits.argmax(-1) == e).float().mean() > 0.75, name


def test_rows_have_length_one_and_the_mean_token_leans_to_no_expert():
    examples, models = domains(), branches("llama")
    merged = merge(models, router_init=examples)
    layer = next(iter(sparse_layers(merged).values()))
    read = []
    layer.router.register_forward_pre_hook(lambda router, given: read.append(given[0].flatten(0, 1)))
    for e, seen in enumerate(examples.values()):
        with route_all_to(merged, e):
            merged(torch.cat(seen))
    common = torch.stack([x.mean(0) for x in read]).mean(0)
    assert torch.allclose(layer.router.weight.norm(dim=-1), torch.ones(3))
    assert torch.allclose(layer.router.weight @ common, torch.zeros(3), atol=1e-5)


def test_only_routers_learn_where_everything_else_is_frozen(tmp_path):
    merged = merge(branches("llama"))
    freeze(merged, "base", "experts", verbose=False)
    before = copy.deepcopy(merged.state_dict())
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(16)]
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": [], "use_cpu": True}
    SparseTrainer(merged, TrainingArguments(tmp_path, disable_tqdm=True, **small), train_dataset=data).train()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "router" in name}


def test_experts_learn_where_all_may():
    merged = merge(branches("llama")).train()
    merged(**inputs(merged)).loss.backward()
    for layer in merged.modules():
        if isinstance(layer, MoE):
            assert all(p.grad.count_nonzero() for p in layer.parameters())


def test_the_table_says_how_far_the_merged_model_is_from_its_base(capsys):
    model = DENSE["llama"]()
    merge_models([model] * 3)
    told = capsys.readouterr().out
    assert "3 of 64 hidden units" in told
    assert float(told.split("function difference on a probe: ")[1].split()[0]) < 1e-4
    models = branches("llama")
    merge_models(models, base=models[0])
    assert float(capsys.readouterr().out.split("function difference on a probe: ")[1].split()[0]) > 1e-3
