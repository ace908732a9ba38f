"""A preallocated KV cache: the C++ kernel writes the keys and values of a new token in place."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moeify.kernels.cpu.cpp.steps import LayerCache

_LEAST = 256  # positions


class PreallocatedLayer(DynamicLayer):
    """The keys and values of one layer, in memory for twice as many positions as were needed when it was taken.

    `keys` and `values` (B, heads, positions, width) are what transformers sees: views of the first positions. Where
    they are replaced, as in a beam search, memory is taken anew.
    """

    _store: tuple[Tensor, Tensor] | None = None

    def update(
        self,
        key_states: Float[Tensor, "B H N D"],
        value_states: Float[Tensor, "B H N D"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        length = self.get_seq_length()
        keys, values = self._grown(key_states.shape[-2])
        keys[:, :, length:] = key_states
        values[:, :, length:] = value_states
        return keys, values

    def append(self) -> LayerCache:
        """Make space for one position, which the kernel fills, and return the memory."""
        keys, values = self._grown(1)
        return LayerCache(keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1))

    def _grown(self, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values with so many positions more."""
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
    """Whether a tensor is the beginning of another that has space for `length` positions."""
    return whole.shape[2] >= length and part.data_ptr() == whole.data_ptr() and part.shape[:2] == whole.shape[:2]


def _larger(part: Tensor, length: int) -> Tensor:
    whole = part.new_empty(*part.shape[:2], max(_LEAST, 2 * length), part.shape[3])
    whole[:, :, : part.shape[2]] = part
    return whole


def preallocate(cache: Cache, layers: int) -> bool:
    """Whether the kernel can append to a cache; an empty dynamic cache of transformers is made one that it can."""
    if type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length():
        cache.layer_class_to_replicate = None
        cache.layers = [PreallocatedLayer() for _ in range(layers)]
    return len(cache.layers) == layers and all(type(layer) is PreallocatedLayer for layer in cache.layers)
