"""How long answers become: the history of finished output lengths, and the reservation that follows from it."""

from __future__ import annotations

from collections import OrderedDict, deque

from scheduler.messages import Request

ENOUGH = 32  # finished answers before a history is believed
RECENT = 512  # answers remembered per history
GROUPS = 256  # histories of (tenant, prompt size); the least recently used is forgotten
QUANTILE = 0.98
HEADROOM = 1.25  # on the quantile, since tomorrow's tail is longer than today's
GROWTH_TOKENS = 64  # by which a reservation grows at least


class Lengths:
    """Recent output lengths, and the bound that nearly all of them stay under."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._since_ranked = 0
        self._bound = 0
        self._sum = 0

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, output_tokens: int) -> None:
        self._sum += output_tokens - (self._recent[0] if len(self._recent) == RECENT else 0)
        self._recent.append(output_tokens)
        self._since_ranked += 1

    def mean(self) -> int:
        return self._sum // len(self._recent)

    def bound(self) -> int:
        """Ranked anew once in a while only, which keeps arrivals cheap."""
        if not self._bound or self._since_ranked >= ENOUGH:
            ranked = sorted(self._recent)
            self._bound = int(ranked[int(QUANTILE * (len(ranked) - 1))] * HEADROOM) + GROWTH_TOKENS
            self._since_ranked = 0
        return self._bound


class LengthHistory:
    """Output lengths by (tenant, prompt size), falling back to all answers, falling back to what the client asked for."""

    def __init__(self) -> None:
        self._all = Lengths()
        self._groups: OrderedDict[tuple[str, int], Lengths] = OrderedDict()

    def record(self, request: Request, output_tokens: int) -> None:
        """An answer that ended by itself or by its limit; a cancelled one says nothing about lengths."""
        group = _group(request)
        self._groups.setdefault(group, Lengths()).add(output_tokens)
        self._groups.move_to_end(group)
        if len(self._groups) > GROUPS:
            self._groups.popitem(last=False)
        self._all.add(output_tokens)

    def reserve_tokens(self, request: Request) -> int:
        """Output tokens to reserve for: `max_tokens`, or fewer where history says that answers are shorter."""
        lengths = self._lengths(request)
        return min(request.max_tokens, lengths.bound()) if lengths else request.max_tokens

    def expected_tokens(self, request: Request) -> int:
        """Output tokens to expect."""
        lengths = self._lengths(request)
        return min(request.max_tokens, lengths.mean()) if lengths else request.max_tokens

    def _lengths(self, request: Request) -> Lengths | None:
        for lengths in (self._groups.get(_group(request)), self._all):
            if lengths is not None and len(lengths) >= ENOUGH:
                return lengths
        return None


def grown(reserved_tokens: int, max_tokens: int) -> int:
    """The next reservation of an answer that outgrew `reserved_tokens`."""
    return min(max_tokens, reserved_tokens + max(GROWTH_TOKENS, reserved_tokens // 2))


def _group(request: Request) -> tuple[str, int]:
    return request.tenant, len(request.prompt).bit_length()
