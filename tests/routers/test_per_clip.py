"""A video model routed once per clip: the tokens of all its frames have the same experts."""

from functools import partial

import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from moeify import Recipe, load, record, save, sparsify
from moeify.layers import moe_layers
from moeify.routers import TopK
from moeify.sparsify import fresh


def test_all_frames_of_a_clip_have_the_experts_that_its_mean_token_chooses(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = VideoMAEForVideoClassification(VideoMAEConfig(image_size=8, patch_size=4, num_frames=4, **sizes)).eval()
    router = partial(TopK, k=1, normalize=False, per="sequence", init_std=1.0)
    sparsify(model, Recipe(num_experts=4, router=router, experts=fresh), verbose=False)
    clips = 30 * (torch.randn(5, 4, 3, 8, 8) + torch.randn(5, 1, 3, 1, 1))
    read: list[torch.Tensor] = []
    first = next(iter(moe_layers(model).values()))
    first.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with record(model) as decisions:
        together = model(pixel_values=clips).logits
    decision = next(iter(decisions.values()))
    chosen = decision.choices.indices.view(5, -1)
    assert chosen.shape[1] == 4 // 2 * 4  # tubes of two frames, four patches each
    assert torch.equal(chosen, (read[0].mean(1) @ first.router.weight.t()).argmax(-1, keepdim=True).expand_as(chosen))
    assert len(chosen.unique()) > 1
    alone = torch.cat([model(pixel_values=clip).logits for clip in clips.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(pixel_values=clips).logits, together)
