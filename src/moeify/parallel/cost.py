"""What a training step costs: seconds of compute and traffic, and bytes on the fullest device, under a routing.

A step of m micro-batches over p stages takes

    sum of all stages + (m - 1) · slowest stage + shards gathered and reduced + optimizer + fixed costs

and in every sparse layer all processes wait for the fullest one, forward and backward. Backward is twice forward.

The first two terms are a pipeline of one forward and one backward pass by turns (arXiv 2104.04473, section 2.2), whose
bubble grows with its slowest stage; collectives are latency plus bytes over bandwidth (`network`), experts follow
their rows (`grouped`), and fixed costs are measured (`fixed`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from moeify.parallel.cluster import Cluster
from moeify.parallel.grouped import ExpertWork
from moeify.parallel.layout import Layout, Target
from moeify.parallel.network import exchange, gather, reduce
from moeify.parallel.shape import ModelShape
from moeify.parallel.workload import Workload

STREAMED = 14
"""Vectors of width D that element-wise work of a block reads and writes per token, forward."""

KEPT = 34
"""Bytes per token and width that a block keeps for backward with flash attention (arXiv 2205.05198, equation 1)."""

LOGITS = 12
"""Bytes per token and word that the loss keeps: 16-bit logits, their fp32 copy and gradient, and a part of a second."""

OPTIMIZER, STATE, GRADIENT = 30, 12, 4
"""Bytes per parameter: moved by AdamW; of its fp32 copy and two moments; of an fp32 gradient."""


OF_SPARSE = ("experts", "skew", "exchange")
"""Kinds of time that only sparse blocks spend."""

COMPUTE = ("dense", "attention", "elementwise", "experts", "head")
"""Kinds of time in which a device computes, and may gather the next parameters."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A step.

    Attributes:
        seconds: by what they are spent on. `skew` is the wait for the fullest process of each layer.
        bytes: on the fullest device, by what lies there.
        tokens: of the step.
        devices: their number.
    """

    seconds: dict[str, float]
    bytes: dict[str, float]
    tokens: int
    devices: int

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def memory(self) -> float:
        """Bytes on the fullest device."""
        return sum(self.bytes.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.step


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step of a model on a cluster, whose layouts can be priced.

    Attributes:
        shape: of the model.
        cluster: what it runs on.
        workload: how rows are spread over experts.
        length: tokens of a sequence.
        target: the program that runs it.
    """

    shape: ModelShape
    cluster: Cluster
    workload: Workload
    length: int
    target: Target
    _layers: dict[tuple, dict[str, float]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.workload.num_experts != self.shape.num_experts:
            raise ValueError(
                f"the routing has {self.workload.num_experts} experts and {self.shape.name} has "
                f"{self.shape.num_experts}; see Workload.stretched"
            )

    def price(self, layout: Layout) -> Cost:
        """The cost of a layout."""
        stages, passes = self._stages(layout), 3 + layout.recompute
        spent: dict[str, float] = {}
        waiting = 0.0
        for kind, forward in self._block(layout).items():
            blocks = [sparse if kind in OF_SPARSE else every for every, sparse in stages]
            spent[kind] = forward * passes * max(blocks) * layout.accumulation
            waiting += forward * passes * (sum(blocks) - max(blocks))
        spent["head"] = self._head(layout) * layout.accumulation
        spent["bubble"] = waiting
        spent["messages"] = self._messages(layout)
        spent["weights"] = self._weights(layout, sum(spent[kind] for kind in COMPUTE))
        spent["optimizer"] = self._optimizer(layout)
        spent["fixed"] = self._fixed(layout)
        tokens = layout.sequences * self.length
        return Cost(seconds=spent, bytes=self._bytes(layout), tokens=tokens, devices=layout.world)

    def rank_rows(self, layout: Layout) -> Float[Tensor, "S L ranks slots"]:
        """Rows of a micro-batch that each expert gets, by the process that holds it."""
        return self.rows(layout, self.workload.shares).unflatten(-1, (layout.ep, -1))

    def rows(self, layout: Layout, shares: Float[Tensor, "S L E"]) -> Float[Tensor, "S L E"]:
        """Rows of a micro-batch of all processes that share experts."""
        return shares * (self._tokens(layout) * self.shape.k * max(layout.ep // layout.tp, 1))

    def _tokens(self, layout: Layout) -> int:
        return layout.micro_batch * self.length

    def _block(self, layout: Layout) -> dict[str, float]:
        """Seconds of a micro-batch in one block, forward; `skew` is what the fullest process takes beyond balance."""
        shape, device, tokens = self.shape, self.cluster.device, self._tokens(layout)
        key = layout.tp, layout.ep, tokens  # all that it depends on; many layouts share it
        if key in self._layers:
            return self._layers[key]
        experts, exchanged = self.layer_seconds(layout, self.rank_rows(layout))
        calm = replace(self, workload=Workload.balanced(shape.num_experts))
        calm_experts, calm_exchanged = calm.layer_seconds(layout, calm.rank_rows(layout))
        skew = experts.mean() + exchanged.mean() - calm_experts.mean() - calm_exchanged.mean()
        seen = self.length / 2  # a causal token attends to half of its sequence
        products, attention = device.flops * device.products, device.flops * device.attention
        self._layers[key] = {
            "dense": tokens * shape.dense_flops / shape.blocks / layout.tp / products,
            "attention": tokens * seen * shape.attention_flops / shape.blocks / layout.tp / attention,
            "elementwise": tokens * shape.width * 2 * STREAMED / layout.tp / (device.bandwidth * device.streaming),
            "experts": float(calm_experts.mean()),
            "exchange": float(calm_exchanged.mean()),
            "skew": max(float(skew), 0.0),
            "tensor": 4 / 3 * reduce(self.cluster, tokens * shape.width * 2, layout.tp),
        }
        return self._layers[key]

    def layer_seconds(
        self, layout: Layout, rows: Float[Tensor, "S L ranks slots"]
    ) -> tuple[Float[Tensor, "S L"], Float[Tensor, "S L"]]:
        """Seconds of the experts and of both exchanges of a layer, forward, on the fullest process."""
        device, width = self.cluster.device, self.shape.width
        work = ExpertWork.of(
            rows.ceil(), width=width, hidden=max(round(self.shape.hidden / layout.etp), 1), experts=rows.shape[-1]
        )
        experts = device.experts.seconds(work, device.flops, device.bandwidth).amax(-1)
        received = rows.sum(-1).amax(-1) * width * 2
        return experts, 2 * exchange(self.cluster, received, layout.ep)

    def _head(self, layout: Layout) -> float:
        """Seconds of the head and the loss of a micro-batch, forward and backward."""
        device, tokens = self.cluster.device, self._tokens(layout)
        products = 3 * tokens * self.shape.head_flops / (device.flops * device.products)
        streamed = tokens * self.shape.vocabulary * 2 * LOGITS / (device.bandwidth * device.streaming)
        return (products + streamed) / layout.tp

    def _stages(self, layout: Layout) -> list[tuple[int, int]]:
        """Blocks of each stage, and how many of them are sparse; dense blocks come first."""
        each, dense = self.shape.blocks // layout.pp, self.shape.blocks - self.shape.sparse_layers
        return [(each, each - min(max(dense - stage * each, 0), each)) for stage in range(layout.pp)]

    def _messages(self, layout: Layout) -> float:
        """Seconds of messages between stages: one per stage and one per micro-batch, in both directions."""
        if layout.pp == 1:
            return 0.0
        stride = layout.world // layout.pp
        link = self.cluster.intra if stride < self.cluster.devices_per_node else self.cluster.inter
        message = self._tokens(layout) * self.shape.width * 2 / layout.tp / link.bandwidth + link.latency
        return 2 * message * (layout.pp - 1 + layout.accumulation)

    def _held(self, layout: Layout) -> tuple[float, float]:
        """Parameters of one process before fsdp shards them: outside experts, and of experts."""
        shape = self.shape
        dense = (shape.dense_parameters / layout.pp + shape.embedding / min(layout.pp, 2)) / layout.tp
        sparse = max(sparse for _, sparse in self._stages(layout))
        return dense, sparse * shape.num_experts * shape.expert_parameters / (layout.ep * layout.etp)

    def _owned(self, layout: Layout) -> float:
        """Parameters of one process whose optimizer state it keeps."""
        dense, experts = self._held(layout)
        return dense / layout.fsdp + experts / layout.efsdp

    def _weights(self, layout: Layout, compute: float) -> float:
        """Seconds of gathering parameters and reducing gradients that compute does not hide."""
        dense, experts = self._held(layout)
        shards = (dense, layout.fsdp, layout.tp), (experts, layout.efsdp, layout.ep * layout.etp)
        gathers, reduces = (
            sum(gather(self.cluster, size * held, group, stride) for held, group, stride in shards)
            for size in (2, GRADIENT)
        )
        replicas = reduce(self.cluster, GRADIENT * self._owned(layout), layout.dp, layout.tp * layout.fsdp)
        if not self.target.shards_parameters:
            return gathers + reduces + replicas
        hidden = layout.accumulation * (2 * gathers + reduces)
        return max(hidden - self.cluster.device.overlap * compute, 0.0) + replicas

    def _optimizer(self, layout: Layout) -> float:
        """Seconds of the optimizer, and of adding micro-batches to the shards of gradients.

        Unsharded gradients are added to by the products that compute them, as Megatron's are.
        """
        owned = self._owned(layout)
        added = layout.accumulation * owned * 2 * GRADIENT if self.target.shards_parameters else 0.0
        moved = owned * OPTIMIZER + added
        return moved / (self.cluster.device.bandwidth * self.cluster.device.streaming)

    def _fixed(self, layout: Layout) -> float:
        """Seconds of what a processor does for every micro-batch, unit and exchange, whatever their tokens."""
        fixed, again = self.cluster.device.fixed, layout.recompute
        blocks, sparse = max(self._stages(layout))
        each = fixed.micro_batch + (3 + again) * blocks * fixed.block
        gathers = 0.0
        if layout.ep > 1:
            each += 2 * (2 + again) * sparse * fixed.exchange
        if layout.fsdp > 1 and self.target.shards_parameters:
            each += 3 * (blocks + 1) * fixed.gather
        elif layout.fsdp > 1:
            gathers = 2 * (blocks + 1) * fixed.gather
        if layout.dp > 1:
            gathers += (blocks + 1) * fixed.gather
        return layout.accumulation * each + gathers

    def _bytes(self, layout: Layout) -> dict[str, float]:
        shape, tokens = self.shape, self._tokens(layout)
        (dense, experts), owned = self._held(layout), self._owned(layout)
        stages, width = self._stages(layout), shape.width
        fullest = float(self.rank_rows(layout).sum(-1).amax())
        per_row = 2 * (2 * width + 3 * shape.hidden) + 4 * shape.hidden
        block = tokens * width * KEPT / layout.tp
        flight = min(layout.pp, layout.accumulation)
        blocks, sparse = max(stages)
        kept = blocks * block + sparse * fullest * per_row
        if layout.recompute:
            kept = blocks * tokens * width * 2 / layout.tp + (block + fullest * per_row) / flight
        gathered = (
            2 * 2 * (dense + experts) / max(blocks, 1) if self.target.shards_parameters and layout.fsdp > 1 else 0.0
        )
        whole = owned if self.target.shards_parameters else dense + experts
        return {
            "parameters": 2 * whole, "gradients": GRADIENT * whole, "optimizer": STATE * owned, "gathered": gathered,
            "activations": kept * flight, "logits": tokens * shape.vocabulary * LOGITS / layout.tp,
        }  # fmt: skip
