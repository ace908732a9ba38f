import pytest
import torch
from hypothesis import given

from moeify import assign
from moeify.backends import compose
from moeify.experts import LoRA, LoRAFFN
from moeify.kernels.stacked import SWIGLU
from strategies import choices, seeds


def _filled(experts: torch.nn.Module) -> torch.nn.Module:
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


@given(choices(), seeds)
def test_lora_experts_add_low_rank_products(choice, seed):
    torch.manual_seed(seed)
    index, gates, num_experts = choice
    experts = _filled(LoRA(num_experts, 6, 5, rank=2, scale=0.5))
    x = torch.randn(len(index), 6)
    y = compose(x, assign(*choice), experts)
    for token, (chosen, weights) in enumerate(zip(index, gates, strict=True)):
        expected = torch.zeros(5)
        for e, g in zip(chosen, weights, strict=True):
            expected += g * 0.5 * experts.lora_B[e] @ (experts.lora_A[e] @ x[token])
        torch.testing.assert_close(y[token], expected, atol=1e-5, rtol=1e-4)


def test_a_delta_is_what_an_expert_adds_to_the_weight():
    experts = _filled(LoRA(3, 6, 5, rank=2, scale=2.0))
    x = torch.randn(4, 6)
    torch.testing.assert_close(experts(x, torch.tensor([0, 4, 0])), x @ experts.delta(1).T)


def test_smaller_adapters_are_filled_up_with_zeros():
    small, large = _filled(LoRA(1, 6, rank=2)), LoRA(1, 6, rank=4)
    with torch.no_grad():
        large.lora_A.zero_()[:, :2] = small.lora_A
        large.lora_B.zero_()[:, :, :2] = small.lora_B
    x, counts = torch.randn(3, 6), torch.tensor([3])
    torch.testing.assert_close(large(x, counts), small(x, counts))


def test_the_scales_are_kept_in_a_checkpoint_and_not_rounded():
    experts = LoRA(2, 4, scale=1 / 3).bfloat16()
    restored = LoRA(2, 4)
    restored.load_state_dict(experts.state_dict())
    assert restored.scale.tolist() == pytest.approx([1 / 3, 1 / 3], abs=2e-3)


def test_an_adapted_network_is_the_network_with_changed_weights():
    up, down = torch.nn.Linear(6, 8), torch.nn.Linear(4, 6)
    experts = LoRAFFN(up, down, SWIGLU, _filled(LoRA(2, 6, 8, rank=2)), _filled(LoRA(2, 4, 6, rank=2)))
    x = torch.randn(5, 6)
    hidden = SWIGLU(x @ (up.weight + experts.up_lora.delta(1)).T + up.bias)
    expected = hidden @ (down.weight + experts.down_lora.delta(1)).T + down.bias
    torch.testing.assert_close(experts(x, torch.tensor([0, 5])), expected)


def test_bad_sizes_and_names_are_refused():
    with pytest.raises(ValueError, match="rank=0 must be a whole number"):
        LoRA(2, 4, rank=0)
    with pytest.raises(ValueError, match="1 names for 2 experts"):
        LoRA(2, 4, names=("law",))
