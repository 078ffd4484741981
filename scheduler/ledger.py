"""The account of KV cache bytes that are promised to sequences. `reserved <= capacity` always."""

from __future__ import annotations


class Ledger:
    """Exactly one per worker, owned by its gate. Asking (`can_…`) has no effect; acting asserts what was asked.

    `pinned_bytes` are of blocks that are in use, and that no sequence pays for: whoever computed them has ended.
    `used_bytes` are what blocks with tokens take, those included that nobody uses and that count as free here.
    """

    def __init__(self, capacity_bytes: float) -> None:
        self.capacity_bytes = capacity_bytes
        self.pinned_bytes = 0.0
        self.used_bytes = 0.0
        self._own_bytes = 0.0  # of all sequences
        self._held: dict[int, float] = {}

    @property
    def reserved_bytes(self) -> float:
        return self._own_bytes + self.pinned_bytes

    @property
    def free_bytes(self) -> float:
        return self.capacity_bytes - self.reserved_bytes

    def held_bytes(self, key: int) -> float:
        return self._held[key]

    def can_reserve(self, amount_bytes: float) -> bool:
        return self.reserved_bytes + amount_bytes <= self.capacity_bytes

    def reserve(self, key: int, amount_bytes: float) -> None:
        assert key not in self._held and amount_bytes >= 0
        assert self.can_reserve(amount_bytes)
        self._held[key] = amount_bytes
        self._own_bytes += amount_bytes

    def can_grow(self, key: int, amount_bytes: float) -> bool:
        return self.can_reserve(amount_bytes - self._held[key])

    def grow(self, key: int, amount_bytes: float) -> None:
        """Raises the reservation of `key` to `amount_bytes`."""
        assert self.can_grow(key, amount_bytes) and amount_bytes >= self._held[key]
        self._own_bytes += amount_bytes - self._held[key]
        self._held[key] = amount_bytes

    def give_back(self, key: int, amount_bytes: float) -> None:
        """`key` needs so much less: others have computed it."""
        self._held[key] -= amount_bytes
        self._own_bytes -= amount_bytes

    def release(self, key: int) -> None:
        self._own_bytes -= self._held.pop(key)
        if not self._held:
            self._own_bytes = 0.0  # no drift from adding and taking away fractions

    def pin(self, amount_bytes: float) -> None:
        assert self.can_reserve(amount_bytes)
        self.pinned_bytes += amount_bytes

    def unpin(self, amount_bytes: float) -> None:
        self.pinned_bytes -= amount_bytes
