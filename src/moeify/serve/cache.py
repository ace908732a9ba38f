"""A preallocated KV cache: the C++ kernel writes the keys and values of a new token in place."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moeify.kernels.cpu.cpp.steps import LayerCache

_LEAST = 256  # positions allocated at least


class PreallocatedLayer(DynamicLayer):
    """The KV cache of one layer, allocated for twice as many positions as are in use at the time, at least 256.

    `keys` and `values` (B, heads, positions, width), which transformers reads, are views of the first positions. If
    they are replaced, as in a beam search, memory is allocated again.
    """

    _store: tuple[Tensor, Tensor] | None = None

    def update(
        self,
        key_states: Float[Tensor, "B H N D"],
        value_states: Float[Tensor, "B H N D"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return those of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        length = self.get_seq_length()
        keys, values = self._grown(key_states.shape[-2])
        keys[:, :, length:] = key_states
        values[:, :, length:] = value_states
        return keys, values

    def append(self) -> LayerCache:
        """Extend the cache by one position, which the kernel writes, and return its pointers and strides."""
        keys, values = self._grown(1)
        return LayerCache(keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1))

    def _grown(self, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values extended by `new` positions, which are not written."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        length = keys.shape[2] + new
        if self._store is None or not (
            _begins(keys, self._store[0], length) and _begins(values, self._store[1], length)
        ):
            self._store = _larger(keys, length), _larger(values, length)
        self.keys, self.values = (whole.narrow(2, 0, length) for whole in self._store)
        return self.keys, self.values


def _begins(part: Tensor, whole: Tensor, length: int) -> bool:
    """Whether `part` is a view of the first positions of `whole`, which has space for `length` positions."""
    return whole.shape[2] >= length and part.data_ptr() == whole.data_ptr() and part.shape[:2] == whole.shape[:2]


def _larger(part: Tensor, length: int) -> Tensor:
    whole = part.new_empty(*part.shape[:2], max(_LEAST, 2 * length), part.shape[3])
    whole[:, :, : part.shape[2]] = part
    return whole


def preallocate(cache: Cache, layers: int) -> bool:
    """Whether the kernel can append to a cache; an empty `DynamicCache` is first converted to `PreallocatedLayer`s."""
    if type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length():
        cache.layer_class_to_replicate = None
        cache.layers = [PreallocatedLayer() for _ in range(layers)]
    return len(cache.layers) == layers and all(type(layer) is PreallocatedLayer for layer in cache.layers)
