"""Events for people (`kubectl describe`): what was done to a resource, and why. Programs read conditions."""

import hashlib
import logging
from datetime import UTC, datetime

from finetune_api import names
from finetune_operator.domain.status import stamp
from finetune_operator.domain.types import Event, Object
from finetune_operator.kube import port
from finetune_operator.kube.port import EVENTS, Cluster
from finetune_operator.observe.metrics import Metrics

log = logging.getLogger(__name__)


async def tell(cluster: Cluster, metrics: Metrics, about: Object, event: Event) -> None:
    """Records the event, once: its name is made from what it says."""
    meta = about["metadata"]
    attempt = (about.get("status") or {}).get("attempt", 0)
    digest = hashlib.sha256(f"{meta['uid']}/{attempt}/{event.reason}/{event.message}".encode()).hexdigest()[:16]
    now = stamp(datetime.now(UTC))
    body = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{meta['name']}.{digest}", "namespace": meta["namespace"]},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": about["kind"],
            "name": meta["name"],
            "namespace": meta["namespace"],
            "uid": meta["uid"],
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:1024],
        "source": {"component": names.MANAGER},
        "reportingComponent": names.MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    try:
        await cluster.create(EVENTS, meta["namespace"], body)
    except port.AlreadyExists:
        pass  # told before
    except port.ApiError as error:
        # An event is for people's convenience; the condition says the same. It must not hold anything up.
        log.warning("%s/%s: event %s was not recorded: %s", meta["namespace"], meta["name"], event.reason, error)
        metrics.reconcile_errors.labels("EventNotRecorded").inc()
