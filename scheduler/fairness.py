"""Who is next among tenants that wait: the one that has used the fewest step seconds.

Deficit counting as in VTC (Sheng et al., OSDI 2024), but charged in predicted seconds instead of tokens: a tenant with
long prompts moves few bytes and takes much time. A tenant that returns is lifted to the least of those who are active, so
that nobody saves up by being away.
"""

from __future__ import annotations

MOST_TENANTS = 4096


class Account:
    """Step seconds used, by tenant."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._active: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        """The tenant has one more request here, waiting or running."""
        if tenant not in self._active:
            least = min((self._seconds.get(name, 0.0) for name in self._active), default=0.0)
            self._seconds[tenant] = max(self._seconds.get(tenant, 0.0), least)
        self._active[tenant] = self._active.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            self._forget_the_absent()

    def charge(self, tenant: str, seconds: float) -> None:
        self._seconds[tenant] = self._seconds.get(tenant, 0.0) + seconds

    def used_seconds(self, tenant: str) -> float:
        return self._seconds.get(tenant, 0.0)

    def _forget_the_absent(self) -> None:
        if not self._active:
            self._seconds.clear()
        elif len(self._seconds) > MOST_TENANTS:
            self._seconds = {name: self._seconds[name] for name in self._active}
