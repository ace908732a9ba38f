"""Keys and values with room to grow: a token more is written in place, where the kernel can write it too."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moeify.kernels.native.steps import Room


class RoomyLayer(DynamicLayer):
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
            self.keys, self.values = (states[:, :, :0] for states in (key_states, value_states))
        length, new = self.get_seq_length(), key_states.shape[-2]
        self._grow(new)
        self.keys[:, :, length:] = key_states
        self.values[:, :, length:] = value_states
        return self.keys, self.values

    def append(self) -> Room:
        """Make place for one position, and tell where it is; the kernel fills it."""
        self._grow(1)
        assert self.keys is not None
        return Room(self.keys.data_ptr(), self.values.data_ptr(), self.keys.stride(0), self.keys.stride(1))

    def _grow(self, new: int) -> None:
        length = self.keys.shape[-2]
        if not self._has_room(length + new):
            shape = (*self.keys.shape[:2], max(256, 2 * (length + new)), self.keys.shape[-1])
            store = self.keys.new_empty(shape), self.values.new_empty(shape)
            for whole, part in zip(store, (self.keys, self.values), strict=True):
                whole[:, :, :length] = part
            self._store = store
        self.keys, self.values = (whole.narrow(2, 0, length + new) for whole in self._store)

    def _has_room(self, length: int) -> bool:
        if self._store is None or self._store[0].shape[2] < length:
            return False
        return all(
            whole.data_ptr() == part.data_ptr() and whole.shape[:2] == part.shape[:2]
            for whole, part in zip(self._store, (self.keys, self.values), strict=True)
        )


def with_room(cache: Cache, layers: int) -> bool:
    """Whether the kernel can append to a cache; one of transformers' dynamic caches is given room while it is empty."""
    if type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length():
        cache.layer_class_to_replicate = None
        cache.layers = [RoomyLayer() for _ in range(layers)]
    return len(cache.layers) == layers and all(type(layer) is RoomyLayer for layer in cache.layers)
