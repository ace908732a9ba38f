"""Clusters of instructions: found, kept on disk, and predicted for new ones."""

import sys
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moeify import Recipe, sparsify
from moeify.compose import Clusters, MeanPooling, cluster
from moeify.context import extra_inputs
from moeify.data import ByteTokenizer
from moeify.find import linears
from moeify.routers import Cluster
from moeify.sparsify import frozen, lora
from moeify.store import load, save
from tiny_models import causal_lm

WORDS = {"animals": ["a cat", "a dog", "an ox"], "numbers": ["11 + 12", "10 + 21", "22 + 20"]}
TEXTS = [text for texts in WORDS.values() for text in texts]


def letters(texts):
    """The share of letters in a text, and its length."""
    return torch.tensor([[sum(map(str.isalpha, text)) / len(text), len(text) / 100] for text in texts])


def found() -> Clusters:
    pytest.importorskip("sklearn")
    return cluster(TEXTS, letters, 2)


def test_like_instructions_are_in_one_cluster():
    ids = found().column(TEXTS, letters)
    assert len(set(ids[:3])) == len(set(ids[3:])) == 1
    assert ids[0] != ids[3]


def test_a_new_instruction_is_in_the_cluster_whose_centre_is_nearest():
    groups = found()
    points = torch.rand(20, 2)
    nearest = [min(range(2), key=lambda c: (point - groups.centres[c]).norm()) for point in points]
    assert groups.predict(points).tolist() == groups.predict(points.double().numpy()).tolist() == nearest


def test_the_seed_decides():
    pytest.importorskip("sklearn")
    points = torch.rand(40, 3)
    one, again = (cluster(["x"] * 40, lambda texts: points, 8, seed=1) for _ in range(2))
    assert torch.equal(one.centres, again.centres)


def test_clusters_lie_beside_the_model_that_they_were_made_for(tmp_path):
    recipe = Recipe(
        where=linears("q_proj"), num_experts=3, router=partial(Cluster, clusters=2), experts=lora, shared=frozen
    )
    model, groups = sparsify(causal_lm("llama"), recipe, verbose=False), found()
    save(model, tmp_path)
    groups.save(tmp_path)
    save(model, tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"clusters.safetensors", "model.safetensors"}
    assert torch.equal(Clusters.load(tmp_path).centres, groups.centres)
    router = load(tmp_path).get_submodule("model.layers.0.self_attn.q_proj.router")
    assert router.clusters == len(Clusters.load(tmp_path)) == 2


def test_what_is_no_file_of_clusters_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no clusters.safetensors; write one with Clusters.save"):
        Clusters.load(tmp_path)
    (tmp_path / "clusters.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        Clusters.load(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "clusters.safetensors")
    with pytest.raises(ValueError, match="holds weight, and no centres"):
        Clusters.load(tmp_path)


def test_a_flipped_bit_of_the_centres_is_found(tmp_path):
    groups, file = found(), tmp_path / "clusters.safetensors"
    groups.save(tmp_path)
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its centres are not what was saved"):
        Clusters.load(tmp_path)
    save_file({"centres": groups.centres}, file)  # of an earlier version, without a hash
    assert torch.equal(Clusters.load(tmp_path).centres, groups.centres)


def test_embeddings_of_another_encoder_are_refused():
    with pytest.raises(ValueError, match=r"embeddings have shape \(3, 5\), the centres width 2"):
        Clusters(torch.zeros(4, 2)).predict(torch.zeros(3, 5))


def test_more_clusters_than_instructions_are_refused():
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="6 instructions cannot be put into 7 clusters"):
        cluster(TEXTS, letters, 7)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"pip install 'moeify\[adapters\]'"):
        cluster(TEXTS, letters, 2)


def model() -> nn.Module:
    return causal_lm("llama", vocab_size=ByteTokenizer.vocab_size)


def test_a_models_own_embedding_is_the_mean_of_its_last_states_whatever_stands_beside_it_in_the_batch():
    dense, texts = model().train(), ["to be", "or not to be that is", "a"]
    embeddings = MeanPooling(dense, ByteTokenizer(), batch=2)(texts)
    assert dense.training
    dense.eval()
    for text, embedding in zip(texts, embeddings, strict=True):
        ids = torch.tensor([ByteTokenizer().encode(text)])
        mean = dense(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        torch.testing.assert_close(embedding, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_it_reads_no_more_than_it_is_told_to():
    embed = MeanPooling(model(), ByteTokenizer(), length=5)
    assert torch.equal(embed(["to be or not"]), embed(["to be"]))
    with pytest.raises(ValueError, match="text 1 has no token"):
        embed(["to be", ""])


def test_what_adapters_learn_does_not_move_the_embeddings():
    embed, ids = MeanPooling(model(), ByteTokenizer()), torch.tensor([[65, 66]])
    before, dense = embed(TEXTS), embed.model(ids).logits
    recipe = Recipe(where=linears(), num_experts=3, router=Cluster, experts=lora, shared=frozen)
    sparsify(embed.model, recipe, verbose=False)
    for name, parameter in embed.model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    torch.testing.assert_close(embed(TEXTS), before)
    with extra_inputs(embed.model, cluster=[0]):
        assert (embed.model(ids).logits - dense).abs().max() > 0.1
