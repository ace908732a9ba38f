"""Faults: a balance loss computed over all layers together, or over padding."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.auxiliary import Definition, explain
from moeify.inspect.faults.finding import Finding, Inapplicable, Unknown
from moeify.inspect.faults.observed import Observed


def balance_pooled(seen: Observed) -> Iterator[Finding]:
    """The balance loss is computed over all layers together, so that collapsed layers compensate each other.

    The measured gradient at the logits is compared with that of E · Σ f_j · P_j per layer and over all layers; the
    right definition has a cosine of 1. Four layers that are each collapsed read as perfect, 1.0 in the place of 4.0,
    in transformers' `load_balancing_loss_func`. Switch (eq. 4) has a loss per layer.
    """
    if len(seen.layers) < 2:
        raise Inapplicable("there is one sparse layer")
    best, cosines = _explained(seen)
    if best.pooled:
        apart = max(cosine for definition, cosine in cosines.items() if not definition.pooled)
        yield Finding(
            cause="the balance loss pools the layers",
            evidence=f"its gradient has a cosine of {cosines[best]:.4f} with the loss over all {len(seen.layers)} "
            f"layers together, and of {apart:.4f} with the mean of the losses of each",
            fix="turn it off and train with moeify.train.SparseTrainer, whose balance loss is per layer",
        )


def balance_padded(seen: Observed) -> Iterator[Finding]:
    """Padding counts as tokens: the batches do not mask it, or the balance loss includes it.

    Padding without an attention mask is seen in the batches, at the end or the beginning of a sequence. A loss that
    counts masked tokens is recognised by its gradient: the definition with cosine 1 is the one in use.
    """
    if (shares := _unmasked(seen)) > 0:
        yield Finding(
            cause="padding is routed and balanced like text: the batches have no attention mask",
            evidence=f"{shares:.1%} of the tokens are padding (id {seen.pad_token_id}) at an end of a sequence",
            fix="pass attention_mask: see that the tokenizer returns it and that the collator keeps it",
        )
        return
    best, cosines = _explained(seen)
    if best.padded:
        apart = max(cosine for definition, cosine in cosines.items() if not definition.padded)
        yield Finding(
            cause="the balance loss counts padding",
            evidence=f"its gradient has a cosine of {cosines[best]:.4f} with the loss over all tokens, and of "
            f"{apart:.4f} with that over the real ones",
            fix="pass the attention mask to the balance loss, or train with moeify.train.SparseTrainer, which leaves "
            "padding out of routing, losses and statistics",
        )


def _explained(seen: Observed) -> tuple[Definition, dict[Definition, float]]:
    step = seen.single_step
    if not all(step.values()):
        raise Unknown("some layers were not called in the step")
    layers = [decided[0] for decided in step.values()]
    if not any(one.gradient.any() for one in layers):
        raise Inapplicable("no balance loss reaches the routers")
    return explain(layers)


def _unmasked(seen: Observed) -> float:
    """The share of tokens that are padding without a mask: runs of two or more at an end of a sequence."""
    pad, found, tokens = seen.pad_token_id, 0, 0
    for batch in seen.batches:
        ids = batch.get("input_ids")
        if pad is None or ids is None or ids.dim() != 2 or "attention_mask" in batch:
            continue
        tokens += ids.numel()
        for rows in (ids, ids.flip(-1)):
            run = (rows == pad).long().cumprod(-1).sum(-1)
            found += int(run[run > 1].sum())
    return found / tokens if tokens else 0.0
