"""Which replica a request should run on: a decision over numbers, without Ray."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["ReplicaView", "rank_replicas"]

_SLACK = 0.15


class ReplicaView(NamedTuple):
    """What is known of a replica.

    Attributes:
        replica_id: Which.
        num_ongoing: Requests that it has.
        capacity: Requests that it runs at once; more wait.
        resident: Adapters that lie there, by content.
    """

    replica_id: str
    num_ongoing: int
    capacity: int
    resident: Collection[str]


def rank_replicas(
    wanted: Sequence[str], replicas: Sequence[ReplicaView], *, avoid: Collection[str] = (), slack: float = _SLACK
) -> list[str]:
    """Order replicas by how well they suit a request.

    First come those with room: no more requests than `1 + slack` times the average, rounded up, and than they run at
    once. So a replica that is idle is not left idle beside a full one, whatever lies where. Among these it is the one
    where most of the adapters lie; where all of them lie at several, the least busy; and where some are to be loaded,
    the one that rendezvous hashing gives the first of these, so that everybody loads it in the same place.

    Args:
        wanted: The request's adapters by content, the heaviest first.
        replicas: All there are.
        avoid: Replicas that come last, in any case.
        slack: How far above the average a replica may go for the sake of adapters.

    Returns:
        Ids, the best first.

    Source: Mirrokni et al., Consistent Hashing with Bounded Loads, arXiv:1608.01350; Thaler and Ravishankar, Using
    name-based mappings to increase hit rates, IEEE/ACM Transactions on Networking 6(1), 1998.
    """
    usable = [replica for replica in replicas if replica.replica_id not in avoid] or list(replicas)
    if not usable:
        return []
    limit = math.ceil((1 + slack) * (sum(replica.num_ongoing for replica in usable) + 1) / len(usable))
    has_room = [replica for replica in usable if replica.num_ongoing < min(limit, replica.capacity)]
    chosen = sorted(has_room, key=lambda replica: _order(wanted, replica))
    rest = [replica for replica in replicas if replica not in chosen]
    rest.sort(key=lambda replica: (replica.replica_id in avoid, replica.num_ongoing))
    return [replica.replica_id for replica in (*chosen, *rest)]


def _order(wanted: Sequence[str], replica: ReplicaView) -> tuple[int, int, int]:
    missing = [fingerprint for fingerprint in wanted if fingerprint not in replica.resident]
    if not missing:
        return 0, replica.num_ongoing, 0
    return len(missing), 0, -_affinity(missing[0], replica.replica_id)


def _affinity(fingerprint: str, replica_id: str) -> int:
    """Rendezvous hashing: the replica with the highest number for an adapter is its home."""
    digest = hashlib.blake2b(f"{fingerprint} {replica_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
