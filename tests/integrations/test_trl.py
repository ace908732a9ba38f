"""TRL's trainers with the mixin in front: the balance gradient does not depend on a step's layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from moeify.sparsify import Recipe, sparsify
from moeify.train import BalanceCallback, SparseArguments
from tiny_models import VOCABULARY, causal_lm, mixtral

trl = pytest.importorskip("trl", reason="it comes with the extra moeify[trl]")
datasets = pytest.importorskip("datasets", reason="it comes with the extra moeify[data]")
made = pytest.importorskip("moeify.integrations.trl")

SPARSE = SparseArguments(balance=1.0)
LENGTHS = (12, 7, 3, 9, 12, 5, 5, 8)


def llama(**config):
    torch.manual_seed(0)
    return sparsify(causal_lm("llama", **config), Recipe(num_experts=4), verbose=False)


MODELS = {"sparse llama": llama, "hf mixtral": mixtral}


def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="1"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")


def numbers(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def texts():
    return datasets.Dataset.from_list([{"input_ids": numbers(n, i)} for i, n in enumerate(LENGTHS)])


def pairs():
    def words(length, seed):
        return " ".join(map(str, numbers(length, seed)))

    rows = [
        {"prompt": words(4, i), "chosen": " " + words(n, 50 + i), "rejected": " " + words(3 + i % 4, 90 + i)}
        for i, n in enumerate(LENGTHS)
    ]
    return datasets.Dataset.from_list(rows)


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = [(name, p) for name, p in model.named_parameters() if "router" in name or "gate.weight" in name]
        self.steps.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named})


class Logs(TrainerCallback):
    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


def same(one, other, tolerance=2e-5):
    assert one.keys() == other.keys()
    return all((one[name] - other[name]).norm() <= tolerance * one[name].norm() for name in one)


def config(kind, folder, cut, **options):
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 8 // cut, "gradient_accumulation_steps": cut, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "learning_rate": 0.0,
        "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "gradient_checkpointing": False,
        "logging_steps": 1,
    } | options  # fmt: skip
    return kind(str(folder), **settings)


def sft(folder, build, *callbacks, kind=made.SparseSFTTrainer, cut=1, sparse=SPARSE, **options):
    """The routers' gradients of the second step, whose balance loss knows the loads of the first."""
    seen = Gradients()
    extra = {"sparse": sparse} if kind is made.SparseSFTTrainer else {}
    run = kind(
        build(), config(trl.SFTConfig, folder, cut, **options), train_dataset=texts(), processing_class=tokenizer(),
        callbacks=[seen, *callbacks], **extra,
    )  # fmt: skip
    run.train()
    return seen.steps[1]


def minus(one, other):
    return {name: one[name] - other[name] for name in one}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_sft_balances_alike_cut_packed_and_padding_free(tmp_path, build):
    def balance(**layout):
        return minus(sft(tmp_path, build, **layout), sft(tmp_path, build, sparse=SparseArguments(balance=0), **layout))

    whole = balance()
    assert all(gradient.norm() > 1e-4 for gradient in whole.values())
    packed = {"packing": True, "max_length": 12, "per_device_train_batch_size": 6}
    for layout in ({"cut": 8}, {"padding_free": True, "max_length": None}, packed):
        assert same(whole, balance(**layout)), layout


def dpo(folder, build, *callbacks, kind=made.SparseDPOTrainer, cut=1, sparse=SPARSE, **options):
    seen = Gradients()
    extra = {"sparse": sparse} if kind is made.SparseDPOTrainer else {}
    run = kind(
        build(), ref_model=build(), args=config(trl.DPOConfig, folder, cut, **options), train_dataset=pairs(),
        processing_class=tokenizer(), callbacks=[seen, *callbacks], **extra,
    )  # fmt: skip
    run.train()
    return seen.steps[1]


def test_dpo_balances_the_policy_alike_however_a_step_is_cut(tmp_path):
    def balance(**layout):
        return minus(dpo(tmp_path, llama, **layout), dpo(tmp_path, llama, sparse=SparseArguments(balance=0), **layout))

    whole = balance()
    assert all(gradient.norm() > 1e-4 for gradient in whole.values())
    assert same(whole, balance(cut=8))


def grpo(folder, build, *, cut=1, **options):
    """With rewards that are all alike there is nothing to learn but the balance."""
    settings = {"num_generations": 4, "max_completion_length": 6, "beta": 0.0} | options
    seen = Gradients()
    run = made.SparseGRPOTrainer(
        build(), reward_funcs=lambda completions, **kwargs: [1.0] * len(completions), train_dataset=pairs(),
        args=config(trl.GRPOConfig, folder, cut, **settings), processing_class=tokenizer(), callbacks=[seen],
        sparse=SPARSE,
    )  # fmt: skip
    run.train()
    return seen.steps[1]


def test_grpo_balances_prompts_and_completions_alike_however_a_step_is_cut(tmp_path):
    whole = grpo(tmp_path, llama)
    assert all(gradient.norm() > 1e-4 for gradient in whole.values())
    assert same(whole, grpo(tmp_path, llama, cut=8))


def test_grpo_that_generates_within_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass steps_per_generation=4"):
        grpo(tmp_path, llama, cut=4, steps_per_generation=2)


def relative(one, other):
    return sum((one[name] - other[name]).norm() for name in one) / sum(part.norm() for part in one.values())


def test_a_callback_balances_a_trainer_of_trl_as_the_mixin_does(tmp_path):
    callback, packed = BalanceCallback(SPARSE), {"packing": True, "max_length": 12, "per_device_train_batch_size": 1}
    expected = sft(tmp_path, mixtral)
    for layout in ({"cut": 2}, packed | {"gradient_accumulation_steps": 6}):
        assert same(expected, sft(tmp_path, mixtral, callback, kind=trl.SFTTrainer, **layout)), layout
    expected = dpo(tmp_path, mixtral)
    assert same(expected, dpo(tmp_path, mixtral, callback, kind=trl.DPOTrainer, cut=4))
    with pytest.raises(TypeError, match="those of TRL are in"):
        trl.GRPOTrainer(
            mixtral(), reward_funcs=lambda completions, **kwargs: [1.0] * len(completions), train_dataset=pairs(),
            args=config(trl.GRPOConfig, tmp_path, 1, num_generations=4), processing_class=tokenizer(),
            callbacks=[callback],
        ).train()  # fmt: skip


def test_trls_own_balance_loss_depends_on_the_cut_and_is_lost_to_label_smoothing(tmp_path):
    def own(*callbacks, **options):
        with_and_without = (
            sft(tmp_path, mixtral, *callbacks, kind=trl.SFTTrainer, router_aux_loss_coef=weight, **options)
            for weight in (1.0, 0.0)
        )
        return minus(*with_and_without)

    def ours(**options):
        return minus(
            *(sft(tmp_path, mixtral, sparse=SparseArguments(balance=weight), **options) for weight in (1.0, 0.0))
        )

    whole = own()
    assert relative(whole, own(cut=2)) > 0.2
    assert relative(whole, own(cut=8)) > 0.8
    logs = Logs()
    assert sum(part.norm() for part in own(logs, label_smoothing_factor=0.1).values()) == 0
    assert any(entry.get("aux_loss", 0) > 1 for entry in logs.entries)
    assert same(ours(), ours(label_smoothing_factor=0.1))


def test_the_block_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "guide" / "trainers.md"
    blocks = re.findall(r"^```py\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "import SparseSFTTrainer" in block]
    exec(block, {"model": mixtral(), "data": texts(), "tokenizer": tokenizer()})
    assert list((tmp_path / "runs" / "sft").glob("checkpoint-*"))
