"""The log of a training shows the faults that it was broken with, and none of a healthy one."""

import json
import math

import pytest

from moeify.inspect import diagnose_log, read_log
from moeify.inspect.logged import LOG_FAULTS

EVEN, THREE_OF_EIGHT, ONE_DEAD = [500] * 8, [1200] * 3 + [80] * 5, [570] * 7 + [2]
OF_LOAD = ["capacity_drops", "blind_collapse", "collapse", "dead_experts"]


def layer(rows=EVEN, **figures):
    return {
        "rows": rows, "balance": 1.0, "drop_rate": 0.0, "effective_experts": 1.0, "dead_experts": 0.0,
        "bias_range": 0.1,
    } | figures  # fmt: skip


def log(count=30, **changes):
    """Entries of a healthy training, some figures replaced by functions of the step."""
    entries = []
    for step in range(1, count + 1):
        loss = 5 - step / 20
        entry = {"step": step, "loss": loss, "grad_norm": 1.0, "eval_loss": loss + 0.1, "router_grad_norm": 0.1}
        entry["layers"] = {"a": layer(), "b": layer()}
        entries.append(entry | {name: change(step) for name, change in changes.items()})
    return entries


def named(entries):
    return [(found.fault, found.layer) for found in diagnose_log(entries).findings]


def test_a_healthy_log_has_every_fault_of_a_log_ruled_out_and_no_other():
    found = diagnose_log(log())
    assert found.status == "healthy"
    assert set(found.healthy) == set(LOG_FAULTS)
    assert "identical_experts" in found.unchecked


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"loss": lambda s: math.nan if s > 20 else 1.0, "eval_loss": lambda s: None}, ("not_finite", "")),
        ({"grad_norm": lambda s: math.inf if s > 28 else 1.0}, ("not_finite", "")),
        ({"loss": lambda s: 4 * (5 - s / 20)}, ("scaled_loss", "")),
        ({"router_grad_norm": lambda s: 0.0}, ("detached_router", "")),
        ({"layers": lambda s: {"a": layer(), "b": layer(bias_range=0.0)}}, ("bias_unmoved", "b")),
        ({"layers": lambda s: {"a": layer(), "b": layer(drop_rate=0.02)}}, ("capacity_drops", "b")),
        ({"layers": lambda s: {"a": layer(THREE_OF_EIGHT) if s > 12 else layer()}}, ("blind_collapse", "a")),
        ({"layers": lambda s: {"a": layer(THREE_OF_EIGHT, balance=1.9)}}, ("collapse", "a")),
        ({"layers": lambda s: {"a": layer(), "b": layer(ONE_DEAD)}}, ("dead_experts", "b")),
    ],
)
def test_a_log_that_is_broken_is_named_first(changes, fault):
    assert named(log(**changes))[0] == fault


def test_a_collapse_says_when_it_began():
    entries = log(layers=lambda s: {"a": layer(THREE_OF_EIGHT if s > 12 or s == 3 else EVEN)})
    assert "3.7 of 8 experts in use, since step 13" in diagnose_log(entries).findings[0].evidence


def test_one_gradient_that_overflows_is_no_fault():
    assert diagnose_log(log(grad_norm=lambda s: math.inf if s in (1, 30) else 1.0)).status == "healthy"


def test_a_dense_log_and_too_few_rows_are_unknown():
    dense = diagnose_log(log(layers=lambda s: {}))
    assert list(dense.unknown) == OF_LOAD
    assert "no figures of experts" in dense.unknown["collapse"]
    few = diagnose_log(log(count=3, layers=lambda s: {"a": layer([30] * 8)}))
    assert "90 rows per expert of a" in few.unknown["dead_experts"]
    assert "no two validation losses" in diagnose_log(log(eval_loss=lambda s: None)).unchecked["scaled_loss"]
    assert "router_grad_norm" in diagnose_log(log(router_grad_norm=lambda s: None)).unchecked["detached_router"]


def test_the_state_of_a_trainer_has_means_over_layers():
    def state(**figures):
        even = {
            "effective_experts": 0.98,
            "balance": 1.0,
            "dead_experts": 0.0,
            "dead_experts_worst": 0.0,
            "drop_rate": 0,
        }
        return [{"step": s, "loss": 1.0, **even, **figures} for s in range(1, 9)]

    assert named(state()) == []
    assert named(state(effective_experts=0.4)) == [("blind_collapse", "")]
    assert named(state(effective_experts=0.4, balance=1.8, dead_experts_worst=3.0)) == [
        ("collapse", ""), ("dead_experts", ""),
    ]  # fmt: skip
    assert "fewer than three" in diagnose_log(state()[:2]).unknown["collapse"]


def test_a_log_is_found_in_a_run_in_a_checkpoint_and_by_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training log"):
        read_log(tmp_path)
    checkpoint = tmp_path / "checkpoint-30"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    assert len(read_log(tmp_path).entries) == 1
    lines = tmp_path / "sparse-7" / "metrics.jsonl"
    lines.parent.mkdir()
    lines.write_text("\n".join(map(json.dumps, log())) + '\n{"step": 31, "lo')
    assert len(read_log(tmp_path).entries) == len(read_log(lines).entries) == 30
    lines.write_text("")
    with pytest.raises(ValueError, match="no entry with a loss"):
        read_log(lines)
