"""Ray Serve's request router: asks `rank_replicas`, with what Serve and the replicas say."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from ray.serve.request_router import RequestRouter

from langchain_lora_retriever.remote.routing import ReplicaView, rank_replicas
from langchain_lora_retriever.remote.wire import Job, leaves, short

if TYPE_CHECKING:
    from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

__all__ = ["AdapterRouter"]

_FRESH_SECONDS = 3.0
"""For so long an adapter is taken to lie where it was sent, until the replica says so itself (once a second)."""
_MAX_SENT = 4096


class AdapterRouter(RequestRouter):
    """Sends requests where their adapters are. Serve makes one in each process that has a handle.

    Requests are matched to their own choices (no `FIFOMixin`): the next one's adapters lie elsewhere.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin."""
        super().initialize_state(**kwargs)  # type: ignore[no-untyped-call]
        self._sent: dict[str, OrderedDict[str, float]] = {}  # by replica: adapters, and when they were sent there
        self._chosen: dict[str, list[PendingRequest]] = {}  # by replica: requests that Serve has not sent there yet

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas; Serve takes the first that has room."""
        job = pending_request.args[0] if pending_request is not None and pending_request.args else None
        wanted = _wanted(job) if isinstance(job, Job) else []
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._sent = {name: sent for name, sent in self._sent.items() if name in by_id}
        self._chosen = {name: self._waiting(name, pending_request) for name in by_id}
        views = [self._view(name, replica) for name, replica in by_id.items()]
        ranked = rank_replicas(wanted, views, avoid=job.avoid if isinstance(job, Job) else ())
        if pending_request is not None:
            # All of them were named: if they are full, Serve is to wait before it asks each one again.
            pending_request.routing_context.should_backoff = True
            if ranked:
                self._chosen[ranked[0]].append(pending_request)
        return [[by_id[name]] for name in ranked]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Let Serve count a request from now on."""
        super().on_send_request(replica_id)
        waiting = self._chosen.get(replica_id.unique_id, [])
        sent = next((request for request in waiting if request.future.done()), None)
        self._chosen[replica_id.unique_id] = [request for request in waiting if request is not sent]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember what is about to lie where."""
        super().on_request_routed(pending_request, replica_id, result)
        for name in self._chosen:
            self._chosen[name] = self._waiting(name, pending_request)
        job = pending_request.args[0] if pending_request.args else None
        if not isinstance(job, Job):
            return
        sent = self._sent.setdefault(replica_id.unique_id, OrderedDict())
        now = time.monotonic()
        for fingerprint in _wanted(job):
            sent[fingerprint] = now
            sent.move_to_end(fingerprint)
        while len(sent) > _MAX_SENT:
            sent.popitem(last=False)

    def _waiting(self, name: str, pending_request: PendingRequest | None) -> list[PendingRequest]:
        """Requests that were to go to a replica, and that neither Serve counts nor anybody has cancelled.

        Serve chooses for a whole burst of requests before it sends the first of them.
        """
        waiting = self._chosen.get(name, [])
        return [other for other in waiting if other is not pending_request and not other.future.cancelled()]

    def _view(self, name: str, replica: RunningReplica) -> ReplicaView:
        stats = replica.routing_stats or {}
        sent, now = self._sent.get(name, OrderedDict()), time.monotonic()
        while sent and now - next(iter(sent.values())) > _FRESH_SECONDS:
            sent.popitem(last=False)
        num_ongoing = self.replica_queue_len_cache.get(replica.replica_id)
        if num_ongoing is None:
            num_ongoing = stats.get("num_unfinished", 0)
        return ReplicaView(
            name,
            num_ongoing + len(self._chosen[name]),
            min(replica.max_ongoing_requests, stats.get("max_num_seqs", replica.max_ongoing_requests)),
            sent.keys() | set(stats.get("adapters", ())),
        )


def _wanted(job: Job) -> list[str]:
    heaviest_first = sorted(job.adapters, key=lambda pair: -abs(pair[1]))
    return [short(leaf.fingerprint) for ref, _ in heaviest_first for leaf in leaves(ref)]
