"""`balance_hook` and `BalanceCallback` give any loop and any trainer the gradients of `SparseTrainer`."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from moeify.balance import Sign
from moeify.routers import TopK
from moeify.sparsify import Recipe, sparsify
from moeify.train import (
    BalanceCallback,
    SparseArguments,
    SparseTrainer,
    SparseTrainerMixin,
    balance_hook,
)
from tiny_models import VOCABULARY, causal_lm, deepseek_v3, mixtral

SPARSE = SparseArguments(balance=1.0, z=0.1)


def llama(**router):
    torch.manual_seed(0)
    recipe = Recipe(num_experts=4, router=lambda *sizes: TopK(*sizes, **router))
    return sparsify(causal_lm("llama"), recipe, verbose=False)


def texts():
    generator, rows = torch.Generator().manual_seed(0), []
    for length in (12, 7, 3, 9, 12, 5, 5, 8) * 2:
        ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
        mask = (torch.arange(12) < length).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    return rows


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def train(model, folder, *callbacks, kind=transformers.Trainer, cut=1, **options):
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 8 // cut, "gradient_accumulation_steps": cut, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.0, "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    arguments = {name: options.pop(name) for name in ("sparse",) if name in options}
    run = kind(
        model, TrainingArguments(folder, **settings | options), train_dataset=texts(), callbacks=list(callbacks),
        **arguments,
    )  # fmt: skip
    run.train()
    return run


def gradients(model, folder, *callbacks, **options):
    seen = Gradients()
    train(model, folder, *callbacks, seen, **options)
    return seen.steps[1]


def same(one, other, tolerance=2e-5):
    assert one.keys() == other.keys()
    return all((one[name] - other[name]).norm() <= tolerance * one[name].norm() + 1e-8 for name in one)


@pytest.mark.parametrize(("build", "scope", "cuts"), [(llama, "global", (1, 8)), (mixtral, "sequence", (8,))])
def test_a_plain_trainer_gets_the_gradients_of_the_sparse_trainer(tmp_path, build, scope, cuts):
    sparse = SparseArguments(balance=1.0, z=0.1, scope=scope)
    expected = gradients(build(), tmp_path, kind=SparseTrainer, sparse=sparse)
    assert not same(expected, gradients(build(), tmp_path), 1e-2)
    for cut in cuts:
        assert same(expected, gradients(build(), tmp_path, BalanceCallback(sparse), cut=cut)), cut


class Odd(transformers.Trainer):
    """Takes the loss from the logits, scales it in place, and says that it is a mean per micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = outputs.logits.logsumexp(-1)[inputs["attention_mask"].bool()].mean()
        loss *= 3e-3
        return (loss, outputs) if return_outputs else loss


class SparseOdd(SparseTrainerMixin, Odd):
    pass


def test_however_a_trainer_scales_its_loss_the_gradient_of_the_balance_is_the_same(tmp_path):
    expected = gradients(llama(), tmp_path, kind=SparseOdd, sparse=SPARSE, cut=4)
    assert same(expected, gradients(llama(), tmp_path, BalanceCallback(SPARSE), kind=Odd, cut=4))


def test_activation_checkpointing_that_hides_decisions_is_replaced(tmp_path):
    expected = gradients(mixtral(), tmp_path, BalanceCallback(SPARSE))
    model = mixtral()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert same(expected, gradients(model, tmp_path, BalanceCallback(SPARSE)))


def test_a_controller_moves_as_in_the_sparse_trainer(tmp_path):
    sparse = SparseArguments(balance=0.0, controller=Sign(0.01))
    for build in (lambda: llama(selection_bias=True), deepseek_v3):
        one, other = build(), build()
        train(one, tmp_path, kind=SparseTrainer, sparse=sparse, cut=2, learning_rate=1e-3)
        train(other, tmp_path, BalanceCallback(sparse), cut=2, learning_rate=1e-3)
        biases = [dict(model.named_buffers()) for model in (one, other)]
        moved = [name for name in biases[0] if name.endswith("bias")]
        assert moved
        for name in moved:
            assert biases[0][name].abs().max() > 0
            assert torch.equal(biases[0][name], biases[1][name])


def loop(model, hook, *, cut=1, scale=1.0):
    """The gradients of the second step of a loop that minimises something of its own."""
    for _ in range(2):
        model.zero_grad()
        rows = [{name: torch.stack([row[name] for row in texts()[:8]]) for name in texts()[0]}]
        batches = [{name: part[i::cut] for name, part in rows[0].items()} for i in range(cut)]
        hook.begin(batches)
        for batch in batches:
            (model(**batch).logits[batch["attention_mask"].bool()].square().sum() * 1e-4 * scale).backward()
        hook.end()
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


def test_a_loop_of_ones_own_gets_the_same_gradient_in_one_micro_batch_and_in_eight():
    model = mixtral().train()
    expected = loop(model, balance_hook(model, SPARSE))
    for cut, scale in [(8, 1.0), (4, 128.0)]:
        model = mixtral().train()
        assert same(
            expected, loop(model, balance_hook(model, SPARSE, scale=lambda scale=scale: scale), cut=cut, scale=scale)
        )


def test_a_removed_hook_leaves_the_outputs_and_evaluation_sees_none():
    model = llama().eval()
    batch = {"input_ids": torch.arange(3, 11).view(1, 8)}
    before = model(**batch).logits
    hook = balance_hook(model, SPARSE)
    assert torch.equal(before, model(**batch).logits)
    assert "WithGradient" not in str(model(**batch).logits.grad_fn)
    hook.begin([batch])
    assert "WithGradient" in str(model.train()(**batch).logits.grad_fn)
    hook.remove()
    assert "WithGradient" not in str(model(**batch).logits.grad_fn)


def test_a_balance_that_is_not_wired_is_an_error(tmp_path):
    model = llama().train()
    hook, batch = balance_hook(model, SPARSE), {"input_ids": torch.arange(3, 11).view(1, 8)}
    hook.begin([batch])
    with pytest.raises(ValueError, match="no forward pass in training mode of this step"):
        hook.end()
    model(**batch)
    with pytest.raises(ValueError, match="no backward pass of this step went through"):
        hook.end()
    with pytest.raises(TypeError, match="a batch is a list and no inputs of the model"):
        hook.begin([["a prompt"]])
    hook.begin([batch])
    with pytest.raises(ValueError, match=r"called with attention_mask, which the micro-batches .* lack"):
        model(**batch, attention_mask=torch.tensor([[1] * 7 + [0]]))


def test_what_cannot_be_balanced_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM is dense, there is nothing to balance"):
        train(causal_lm("llama"), tmp_path, BalanceCallback())
    with pytest.raises(ValueError, match="SparseTrainer balances by itself"):
        train(llama(), tmp_path, BalanceCallback(), kind=SparseTrainer)
    with pytest.raises(ValueError, match="pass the callback ExpertDropout"):
        BalanceCallback(SparseArguments(dropout=0.1))
    with pytest.raises(ValueError, match="not called by a trainer of transformers"):
        BalanceCallback().on_train_begin(None, None, None, model=llama())


def test_the_trainer_is_left_as_it_was_and_says_what_balances(tmp_path, capsys):
    run = train(mixtral(output_router_logits=True), tmp_path, BalanceCallback())
    assert "get_batch_samples" not in vars(run)
    assert not run.model.config.output_router_logits
    said = "balance loss (weight 0.01, global scope); the model's own balance loss is turned off"
    assert f"moeify: balance: {said}" in capsys.readouterr().out
    assert not any("WithGradient" in repr(hook) for hook in run.model._forward_hooks.values())
