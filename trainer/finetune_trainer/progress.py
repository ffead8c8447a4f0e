"""Tells the operator how far training is: POSTs in Kubeflow Trainer's wire protocol, from a thread of its own.

Best effort: a post that fails is told once per outage and never stops training; the next one carries everything again.
"""

import http.client
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

from finetune_api.report import ProgressReport
from finetune_trainer.config import Runtime

INTERVAL_SECONDS = 5.0
TIMEOUT_SECONDS = 10.0


class Poster:
    """Sends the newest report; older ones that were not sent yet are dropped."""

    def __init__(self, runtime: Runtime, log: Callable[[str], None] = print) -> None:
        self.runtime = runtime
        self.log = log
        self._news: ProgressReport | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._urgent = False
        self._down = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        if runtime.progress_url:
            self._thread.start()

    def tell(self, report: ProgressReport, *, urgent: bool = False) -> None:
        """Takes the newest state; `urgent` sends it at once instead of within INTERVAL_SECONDS."""
        with self._wake:
            self._news = report
            self._urgent = self._urgent or urgent
            self._wake.notify()

    def close(self) -> None:
        """Sends what is left and ends the thread."""
        if self._thread.is_alive():
            with self._wake:
                self._closing = True
                self._wake.notify()
            self._thread.join(timeout=TIMEOUT_SECONDS + 1)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._urgent, timeout=INTERVAL_SECONDS)
                report, self._news, self._urgent = self._news, None, False
                closing = self._closing
            if report is not None:
                self._send(report)
            if closing:
                return

    def _send(self, report: ProgressReport) -> None:
        try:
            self._post(report.model_dump_json(by_alias=True, exclude_none=True).encode())
        except (OSError, urllib.error.URLError, http.client.HTTPException, ValueError) as error:
            if not self._down:
                self.log(f"progress cannot be reported ({error}); training goes on")
            self._down = True
        else:
            if self._down:
                self.log("progress is reported again")
            self._down = False

    def _post(self, body: bytes) -> None:
        runtime = self.runtime
        request = urllib.request.Request(str(runtime.progress_url), data=body, method="POST")  # noqa: S310  (the operator's own URL)
        request.add_header("Content-Type", "application/json")
        if runtime.progress_token:
            # Read each time: the kubelet renews the file.
            request.add_header("Authorization", f"Bearer {runtime.progress_token.read_text().strip()}")
        context = ssl.create_default_context(cafile=runtime.progress_ca) if runtime.progress_ca else None
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=context) as response:  # noqa: S310
            response.read()
