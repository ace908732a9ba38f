"""Labels reach the losses: of tokens and of samples, through models and trainers."""

import pytest
import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from moeify import Context, record, sparsify
from moeify.context import extra_inputs
from moeify.losses import global_entropy, local_entropy, supervision
from moeify.routers import Labelled, TopK
from moeify.sparsify import recipes
from moeify.train import SparseArguments, SparseTrainer
from strategies import route
from tiny_models import DENSE, inputs

D, E, B, N = 8, 4, 3, 5


def decision(label, mask=None, **options):
    context = Context()
    context.mask(mask)
    context.call.inputs["label"] = label
    return Labelled(TopK(D, E, **options))(torch.randn(B, N, D), context)


def test_tokens_and_their_sequences_have_labels():
    of_tokens = torch.randint(9, (B, N))
    assert decision(of_tokens).evidence.label.tolist() == of_tokens.flatten().tolist()
    mask = torch.rand(B, N) < 0.5
    mask[:, 0] = True
    assert decision(of_tokens, mask).evidence.label.tolist() == of_tokens[mask].tolist()
    of_samples = torch.tensor([3, 1, 2])
    assert decision(of_samples).evidence.label.tolist() == of_samples.repeat_interleave(N).tolist()
    assert decision(of_samples, per="sequence").evidence.label.tolist() == [3, 1, 2]


def test_a_model_that_was_not_told_has_no_labels_and_losses_say_what_to_do():
    routing = route(Labelled(TopK(D, E)), torch.randn(B, N, D))
    for loss in (local_entropy, global_entropy):
        with pytest.raises(ValueError, match="put Labelled around its router"):
            loss(routing, label=0)
    with pytest.raises(ValueError, match="put Labelled around its router, or pass a target"):
        supervision(routing)


def test_losses_of_a_label_are_of_its_decisions():
    label = torch.randint(2, (B, N))
    routing = decision(label)
    for loss in (local_entropy, global_entropy):
        assert torch.equal(loss(routing, label=1), loss(routing, label.flatten() == 1))
    per_sample = decision(torch.tensor([3, 1, 2]), per="sequence")
    assert torch.equal(supervision(per_sample), supervision(per_sample, torch.tensor([3, 1, 2])))


def test_one_tower_of_two_modalities_has_the_labels_of_limoe():
    model = sparsify(DENSE["bert"](), recipes["limoe"], verbose=False)
    batch = inputs(model)
    modality = torch.randint(2, batch["input_ids"].shape)
    with extra_inputs(model, modality=modality), record(model) as decisions:
        model(**batch)
    for routing in decisions.values():
        assert routing.evidence.label.tolist() == modality.flatten().tolist()


def test_a_trainer_teaches_the_router_of_mobile_v_moe_the_column_of_super_classes(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=4, initializer_range=0.2)
    model = sparsify(ViTForImageClassification(config), recipes["mobile_vmoe"], verbose=False)
    classes = torch.arange(32) % 4
    pixels = torch.randn(4, 1, 8, 8)[classes] + 0.1 * torch.randn(32, 1, 8, 8)
    rows = [
        {"pixel_values": image, "labels": int(c), "super_class": int(c) // 2}
        for image, c in zip(pixels, classes, strict=True)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=32, learning_rate=1e-2, report_to="none",
        disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    sparse = SparseArguments(balance=0.0, losses=[(0.3, supervision)], progress=False)
    SparseTrainer(model, arguments, train_dataset=rows, sparse=sparse).train()
    with record(model.eval()) as decisions:
        model(pixel_values=pixels)
    assert len(decisions) == 2
    for routing in decisions.values():
        assert torch.equal(routing.logits.argmax(-1), classes // 2)
