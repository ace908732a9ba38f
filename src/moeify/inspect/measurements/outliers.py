"""Super-experts: the few whose outputs have outliers on which the whole model depends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.measurements.layer_inputs import LayerInputs, experts_of, unchanged

QUANTILE, PART, EARLY, MASSIVE = 0.995, 0.1, 0.75, 1000


@dataclass(frozen=True)
class Outputs:
    """Magnitudes of the outputs of a layer's experts, before the router's weights.

    Attributes:
        peak: the largest of each expert, NaN of one that computed no row.
        median: of all outputs of the layer that are not 0, as a ReLU makes them; of several passes the mean of medians.
    """

    peak: Float[Tensor, "E"]
    median: float


@torch.no_grad()
def expert_outputs(seen: Mapping[str, LayerInputs]) -> dict[str, Outputs]:
    """The outputs of the experts for the rows that were routed to them.

    Experts that return their tokens as they are do not count. Layers whose experts cannot be called one by one, or
    that received no tokens, are omitted.
    """
    found = {}
    for name, layer in seen.items():
        passes = [(x, routing) for x, routing in layer.passes if len(routing.source)]
        try:
            experts = experts_of(layer.layer)
        except ValueError:
            continue
        peak, medians = torch.full((layer.layer.num_experts,), -1.0), []
        for x, routing in passes:
            rows = routing.dispatch(x)
            outputs = experts(rows, routing.counts).flatten(1)
            computed = ~unchanged(rows, outputs)
            if computed.any():
                sizes = outputs[computed].abs().float()
                peak.scatter_reduce_(0, routing.expert[computed].cpu(), sizes.amax(1).cpu(), "amax")
                medians += [float(sizes[sizes > 0].median())] if sizes.any() else []
        if medians:
            found[name] = Outputs(peak.masked_fill(peak < 0, torch.nan), sum(medians) / len(medians))
    return found


def super_experts(outputs: Mapping[str, Outputs]) -> dict[str, list[int]]:
    """The super-experts of every layer that has some.

    Su et al. (arXiv 2507.23279, eq. 6, and the authors' code) look at the first three quarters of the layers, where
    massive activations arise, and call an expert a super-expert if its largest output is above the 99.5th percentile
    of all experts there and a tenth of the largest. Some expert always is, so its output must be massive as well:
    1,000 times the median magnitude of its layer (Sun et al., arXiv 2402.17762, section 2).

    Args:
        outputs: of the layers, in the order of the model.
    """
    early = list(outputs)[: round(EARLY * len(outputs))]
    peaks = torch.cat([outputs[name].peak for name in early] or [torch.zeros(0)])
    peaks = peaks[peaks.isfinite()]
    if not len(peaks):
        return {}
    limit = max(float(peaks.quantile(QUANTILE)), PART * float(peaks.max()))
    found = {name: outputs[name].peak >= max(limit, MASSIVE * outputs[name].median) for name in early}
    return {name: large.nonzero().flatten().tolist() for name, large in found.items() if large.any()}
