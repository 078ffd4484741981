"""Who is next among tenants that wait: the one that has used the fewest step seconds.

Deficit counting as in VTC (Sheng et al., OSDI 2024), but charged in predicted seconds instead of tokens: a tenant with
long prompts moves few bytes and takes much time. A tenant that returns is lifted to the least of those who are active, so
that nobody saves up by being away.
"""

from __future__ import annotations

MOST_TENANTS = 4096  # remembered without a request here


class Account:
    """Step seconds used, by tenant."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._charged: dict[str, float] = {}
        self._active: dict[str, int] = {}
        self._least: float | None = None  # of the active, while it is known: a crowd that comes at once asks often

    def enter(self, tenant: str) -> None:
        """The tenant has one more request here, waiting or running."""
        if tenant not in self._active:
            if self._least is None or not self._active:
                self._least = min((self._seconds[name] for name in self._active), default=self.used_seconds(tenant))
            self._seconds[tenant] = max(self.used_seconds(tenant), self._least)
        self._active[tenant] = self._active.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            self._least = None
            self._forget_the_absent()

    def charge(self, tenant: str, seconds: float) -> None:
        self._seconds[tenant] = self._seconds.get(tenant, 0.0) + seconds
        self._charged[tenant] = self._charged.get(tenant, 0.0) + seconds
        self._least = None

    def used_seconds(self, tenant: str) -> float:
        return self._seconds.get(tenant, 0.0)

    def take_charged(self) -> dict[str, float]:
        """By tenant, since this was last asked. Unlike what counts as used, nobody is lifted here."""
        charged, self._charged = self._charged, {}
        return charged

    def _forget_the_absent(self) -> None:
        if not self._active:
            self._seconds.clear()
        elif len(self._seconds) > MOST_TENANTS + 2 * len(self._active):
            self._seconds = {name: self._seconds[name] for name in self._active}
