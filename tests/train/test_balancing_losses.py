"""Further losses, adaptive weights, momenta and competitions in the trainer, and through a resumed run."""

from functools import partial

import pytest
import torch
from transformers import TrainingArguments

from moeify.balance import PID, SMEBU, SparsityTarget
from moeify.losses import distillation, diversity, l1, local_entropy
from moeify.routers import Compete, ReLU, TopK
from moeify.sparsify import Recipe, fresh, sparsify
from moeify.train import SparseArguments, SparseTrainer
from tiny_models import VOCABULARY, causal_lm


def llama(router, experts=fresh):
    torch.manual_seed(0)
    return sparsify(causal_lm("llama"), Recipe(num_experts=4, router=router, experts=experts), verbose=False)


def train(model, folder, sparse, *, resume=None, batch=4, **arguments):
    ids = torch.randint(3, VOCABULARY, (64, 12), generator=torch.Generator().manual_seed(0))
    settings = {
        "max_steps": 6, "per_device_train_batch_size": batch, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "max_grad_norm": 0.0,
    } | arguments  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = SparseTrainer(model, TrainingArguments(folder, **settings), train_dataset=data, sparse=sparse)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_further_loss_is_named_and_lowers_what_it_measures(tmp_path, capsys):
    entropy = []
    for weight in (0.0, 30.0):
        sparse = SparseArguments(balance=0, losses=[(weight, local_entropy)])
        entropy.append(train(llama(TopK), tmp_path, sparse, max_steps=20).state.log_history[-2]["router_entropy"])
    assert "local_entropy (weight 30)" in capsys.readouterr().out
    assert entropy[1] < entropy[0] - 0.05


def test_a_further_loss_does_not_depend_on_how_a_step_is_cut(tmp_path):
    sparse = SparseArguments(balance=0, losses=[(5.0, local_entropy)])
    ends = [
        weights(
            train(
                llama(TopK), tmp_path, sparse, batch=8 // parts, gradient_accumulation_steps=parts, max_steps=2,
                optim="sgd", learning_rate=1.0,
            ).model
        )
        for parts in (1, 4)
    ]  # fmt: skip
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_the_weight_of_a_sparsity_target_follows_the_routers_and_is_resumed(tmp_path):
    def arguments():
        return SparseArguments(balance=0, losses=[(SparsityTarget(k=1, value=1e-3), partial(l1, k=1))])

    whole = train(llama(ReLU), tmp_path / "whole", arguments())
    assert whole.sparse.targets[0].value == pytest.approx(1e-3 * 1.2**6)
    train(llama(ReLU), tmp_path / "parts", arguments(), save_strategy="steps", save_steps=3)
    again = train(llama(ReLU), tmp_path / "parts", arguments(), resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert again.sparse.targets[0].value == whole.sparse.targets[0].value
    assert torch.equal(weights(again.model), weights(whole.model))


def test_another_number_of_adaptive_weights_than_was_saved_is_refused(tmp_path):
    train(llama(ReLU), tmp_path, SparseArguments(balance=0), save_strategy="steps", save_steps=3)
    other = SparseArguments(balance=0, losses=[(SparsityTarget(k=1), partial(l1, k=1))])
    with pytest.raises(ValueError, match="holds 0 adaptive loss weights, and this run has 1"):
        train(llama(ReLU), tmp_path, other, resume=True)


@pytest.mark.parametrize(("rule", "kept"), [(SMEBU(rate=0.01), "momentum"), (PID(integral=0.1), "total")])
def test_the_memory_of_a_controller_is_resumed(rule, kept, tmp_path):
    router = partial(TopK, selection_bias=True)
    sparse = SparseArguments(controller=rule)
    whole = train(llama(router), tmp_path / "whole", sparse)
    train(llama(router), tmp_path / "parts", sparse, save_strategy="steps", save_steps=3)
    again = train(llama(router), tmp_path / "parts", sparse, resume=str(tmp_path / "parts" / "checkpoint-3"))
    for one, other in zip(whole.model.buffers(), again.model.buffers(), strict=True):
        assert torch.equal(one, other)
    memory = whole._control.memory["model.layers.0.mlp"][kept]
    assert memory.abs().max() > 0
    assert torch.equal(memory, again._control.memory["model.layers.0.mlp"][kept])


def test_layers_compete_in_training_and_the_router_learns_to_foresee_them(tmp_path):
    asked = []
    model = llama(partial(Compete, rate=0.5, most=1))
    for layer in model.modules():
        if isinstance(layer, Compete):
            layer.register_forward_hook(
                lambda module, args, routing: asked.append(routing.evidence.affinity is not None)
            )
    sparse = SparseArguments(balance=0, losses=[(1.0, distillation), (0.01, diversity)])
    train(model, tmp_path, sparse, max_steps=12, gradient_accumulation_steps=2)
    by_step = torch.tensor(asked).view(12, 2, 2)  # steps, micro-batches, layers
    assert torch.equal(by_step[:, 0], by_step[:, 1])
    assert by_step[:, 0].sum(-1).max() == 1
    assert 0 < by_step[:, 0].sum() < 12
