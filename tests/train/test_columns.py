"""What routers look up comes from the columns of the data, in training, in evaluation and in generation."""

from __future__ import annotations

from functools import partial

import datasets
import pytest
import torch
from torch import nn
from transformers import DataCollatorWithPadding, TrainingArguments

from moeify import MoE, Recipe, record, sparsify
from moeify.context import extra_inputs
from moeify.experts import FFN
from moeify.multihead import MultiHead
from moeify.record import observe
from moeify.routers import Lookup
from moeify.routers.lookup import columns
from moeify.sparsify import fresh
from moeify.train import SparseArguments, SparseTrainer
from tiny_models import causal_lm, tokens

LAYER = "model.layers.0.mlp"


def model_that_asks(key="task", family="llama", **options):
    torch.manual_seed(0)
    router = partial(Lookup, key=key, size=4, **options)
    return sparsify(causal_lm(family), Recipe(num_experts=4, router=router, experts=fresh), verbose=False)


def rows(count=16, tasks=2, **columns_):
    ids = tokens(count).tolist()
    return [{"input_ids": row, "labels": row, "task": i % tasks} | columns_ for i, row in enumerate(ids)]


def trainer(model, folder, data, **options):
    small = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": [], "use_cpu": True}
    small |= {"disable_tqdm": True, "learning_rate": 1e-2, "weight_decay": 0.0}
    more = {name: options.pop(name) for name in ("data_collator",) if name in options}
    arguments = TrainingArguments(folder, **small | options)
    sparse = SparseArguments(balance=0)
    return SparseTrainer(model, arguments, train_dataset=data, eval_dataset=data, sparse=sparse, **more)


def table(model):
    return model.get_submodule(LAYER).router.table[:, 0]


DATASETS = {"dicts": list, "datasets.Dataset": datasets.Dataset.from_list}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", DATASETS)
def test_only_the_experts_of_the_tasks_in_the_data_learn(kind, family, tmp_path):
    model = model_that_asks(family=family)
    layer = next(part for part in model.modules() if isinstance(part, MoE))
    before = [p.detach().clone() for p in layer.experts.parameters()]
    trainer(model, tmp_path, DATASETS[kind](rows(tasks=2))).train()
    of_tasks = layer.router.table[:2, 0].tolist()
    for old, new in zip(before, layer.experts.parameters(), strict=True):
        assert {e for e in range(4) if not torch.equal(old[e], new[e])} == set(of_tasks)


@pytest.mark.parametrize("kind", DATASETS)
def test_evaluation_and_prediction_follow_the_data_as_training_does(kind, tmp_path):
    model = model_that_asks()
    run = trainer(model, tmp_path, DATASETS[kind](rows(tasks=4, unheard_of=1)))
    with record(model) as decisions:
        run.evaluate()
        assert decisions[LAYER].counts.gt(0).all()
        run.predict(DATASETS[kind]([{k: v for k, v in row.items() if k != "labels"} for row in rows(4, tasks=1)]))
        assert decisions[LAYER].counts.nonzero().tolist() == [[table(model)[0]]]


def test_a_repeated_forward_looks_up_what_the_first_one_did(tmp_path):
    ends = []
    for checkpointing in (False, True):
        model = model_that_asks(k=2, learned=True)
        trainer(model, tmp_path, rows(tasks=4), gradient_checkpointing=checkpointing).train()
        ends.append(model.get_submodule(LAYER).experts.down_proj.detach())
    torch.testing.assert_close(ends[0], ends[1])


def test_every_token_may_have_a_key_of_its_own(tmp_path):
    model = model_that_asks(key="modality")
    kinds = [0] * 6 + [1] * 6
    with record(model) as decisions:
        trainer(model, tmp_path, rows(modality=kinds), max_steps=1).train()
    expected = torch.zeros(4, dtype=torch.int64).index_add(0, table(model)[:2], torch.tensor([4 * 6, 4 * 6]))
    assert torch.equal(decisions[LAYER].counts, expected)


def test_columns_survive_a_collator_that_pads(tmp_path):
    class Tokenizer:
        def pad(self, rows, **_):
            length = max(len(row["input_ids"]) for row in rows)
            padded = [row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows]
            mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
            batch = {"input_ids": padded, "attention_mask": mask, "task": [row["task"] for row in rows]}
            return {name: torch.tensor(value) for name, value in batch.items()}

    model = model_that_asks()
    data = [{"input_ids": row["input_ids"][: 5 + i], "task": row["task"]} for i, row in enumerate(rows(4, tasks=4))]
    run = trainer(model, tmp_path, data, data_collator=DataCollatorWithPadding(Tokenizer()))
    with record(model) as decisions:
        run.predict(data)
    assert torch.equal(decisions[LAYER].counts[table(model)], torch.tensor([5, 6, 7, 8]))


def test_data_without_the_column_is_an_error_that_names_it(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    with pytest.raises(ValueError, match="looks up 'task', but the model was called without it"):
        trainer(model_that_asks(), tmp_path, data).train()


def test_a_column_that_nobody_looks_up_is_removed_as_ever(tmp_path):
    trainer(model_that_asks("input_ids"), tmp_path, rows(cluster=3, language="de")).train()
    trainer(model_that_asks("input_ids"), tmp_path, datasets.Dataset.from_list(rows(cluster=3, language="de"))).train()


def test_a_run_that_halts_can_look_for_the_fault(tmp_path):
    model = model_that_asks()
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(FloatingPointError, match="lm_head"):
        trainer(model, tmp_path, rows()).train()


def test_a_forward_that_takes_the_key_is_given_it_as_an_argument():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = MoE(Lookup(8, 4, key="task"), FFN(4, 8, 8))

        def forward(self, x, task):
            return self.ffn(x)

    assert columns(Model()) == set()
    assert columns(model_that_asks("task")) == {"task"}
    assert columns(model_that_asks("input_ids")) == set()


def generated(model, prompts, tasks, **options):
    with extra_inputs(model, task=tasks):
        return model.generate(prompts, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)[:, 6:]


def test_generation_follows_the_task_that_is_given():
    model, prompt = model_that_asks().eval(), tokens(1, 6)
    seen = []
    handles = observe(model, lambda name, routing: seen.append((name, routing.counts)))
    generated(model, prompt, [2])
    for handle in handles:
        handle.remove()
    counts = torch.stack([counts for name, counts in seen if name == LAYER])
    assert counts.sum(1).tolist() == [6, 1, 1, 1, 1, 1]
    assert torch.equal(counts.sum(0).nonzero().flatten(), table(model)[2:3])
    answers = {task: generated(model, prompt, [task]).tolist() for task in range(4)}
    assert len({str(answer) for answer in answers.values()}) > 1
    together = generated(model, prompt.expand(4, -1), torch.arange(4))
    assert together.tolist() == [answers[task][0] for task in range(4)]


def test_what_is_given_is_given_inside_alone_and_the_innermost_counts():
    model, ids = model_that_asks().eval(), tokens(2, 6)
    with record(model) as decisions:
        with extra_inputs(model, task=[0, 0]):
            with extra_inputs(model, task=[1, 1]):
                model(ids)
                assert decisions[LAYER].counts.nonzero().tolist() == [[table(model)[1]]]
            model(ids)
            assert decisions[LAYER].counts.nonzero().tolist() == [[table(model)[0]]]
        with pytest.raises(ValueError, match="looks up 'task'"):
            model(ids)


def test_sub_tokens_have_the_task_of_their_sequence():
    outer = MultiHead(MoE(Lookup(4, 4, key="task", size=4), FFN(4, 4, 8)), 8, heads=2)
    model = nn.Sequential(outer)
    outer.moe.context.watch([model])
    with record(model) as decisions, extra_inputs(model, task=[3, 3]):
        model(torch.randn(2, 5, 8))
    (routing,) = decisions.values()
    assert routing.counts[outer.moe.router.table[3, 0]] == 2 * 5 * 2


def test_a_plain_model_is_made_sparse_by_a_key_that_its_forward_does_not_take():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    router = partial(Lookup, key="task", size=4)
    sparsify(model, Recipe(num_experts=4, router=router), verbose=False)
    x = torch.randn(3, 8)
    with record(model) as decisions, extra_inputs(model, task=[0, 1, 1]):
        model(x)
    (routing,) = decisions.values()
    assert routing.counts.tolist().count(0) == 2


def test_a_model_that_cannot_look_up_refuses_to_be_given_anything():
    with pytest.raises(ValueError, match="no sparse layer of moeify, so nothing in it can look up task"):
        extra_inputs(causal_lm("llama"), task=[0]).__enter__()


def test_too_few_tasks_are_an_error():
    model = model_that_asks()
    with extra_inputs(model, task=[0]), pytest.raises(ValueError, match="fits neither the tokens"):
        model(tokens(2, 6))
