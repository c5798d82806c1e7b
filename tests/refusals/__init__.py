"""Every precondition of the public interface: the call, the error, and what its text must say.

The table runs on the CPU (tests/cpu) and on the GPU (tests/gpu); both prove that a refused call
reached nothing.
"""

from __future__ import annotations

from tests.refusals import between_domains, construction, expert_major, low_latency, normal
from tests.refusals.table import Refusal

GROUPS: dict[str, dict[str, Refusal]] = {
    "Buffer": construction.CONSTRUCTION,
    "Config": construction.CONFIG,
    "layout": normal.LAYOUT,
    "dispatch": normal.DISPATCH,
    "cached dispatch": normal.CACHED,
    "combine": normal.COMBINE,
    "expert dispatch": expert_major.EXPERT_DISPATCH,
    "cached expert dispatch": expert_major.EXPERT_CACHED,
    "expert combine": expert_major.EXPERT_COMBINE,
    "between domains": between_domains.BETWEEN_DOMAINS,
    "members": normal.MEMBERS,
    "low latency dispatch": low_latency.LOW_LATENCY_DISPATCH,
    "low latency combine": low_latency.LOW_LATENCY_COMBINE,
    "low latency members": low_latency.LOW_LATENCY_MEMBERS,
}
CASES = {
    f"{group}: {name}": refusal for group, rows in GROUPS.items() for name, refusal in rows.items()
}
