"""Tenants as labels of metrics: the operator's names, but not without bound."""

from __future__ import annotations

from collections.abc import Iterable

MOST_NAMES = 100
OTHERS = "other"


class TenantLabels:
    """A label per tenant, which it keeps: those named at the start come first, then whoever is seen first."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._labels: dict[str, None] = dict.fromkeys(sorted(names)[:MOST_NAMES])

    def of(self, tenant: str) -> str:
        if tenant not in self._labels:
            if len(self._labels) >= MOST_NAMES:
                return OTHERS
            self._labels[tenant] = None
        return tenant
