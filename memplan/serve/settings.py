"""Settings of a server's operator."""

from __future__ import annotations

from memplan.core.records import NamedTuple
from memplan.serve.page import Page


class ReviewPolicy(NamedTuple):
    """The policy of an admission webhook for pods.

    gpus          cards of the cluster, for pods that name none
    does_not_fit  `deny`, `warn` or `allow` a pod whose run does not fit, or does not start
    tight         the same for one that may run out of memory
    unreadable    the same for a run that cannot be read or answered; in time or at all
    memory        name of the resource or annotation that gets the run's memory per GPU; empty for none
    seconds       within which every review is answered
    """

    gpus: tuple[str, ...] = ()
    does_not_fit: str = "deny"
    tight: str = "warn"
    unreadable: str = "warn"
    memory: str = ""
    seconds: float = 5.0


class ServerSettings(NamedTuple):
    """A server's settings.

    workers      processes that compute answers
    body         most bytes of a request's body
    seconds      within which a request is answered
    waiting      most requests that wait for a worker
    connections  most open connections
    cache        bytes of answers that are kept, for requests that are asked again
    files        whether a request may name files on this machine
    online       whether models without a card are looked up on the Hugging Face Hub
    trace        whether models without a stack are traced
    warm         models whose answers are computed before the server is ready
    certificate  file of the TLS certificate's chain, and `key` of its key; None for HTTP
    quiet        log only errors and the server's own events
    review       what to do with pods; None for a server without a webhook
    page         the web page; None for a server without it
    """

    host: str = "127.0.0.1"
    port: int = 8808
    workers: int = 1
    body: int = 2**20
    seconds: float = 30.0
    waiting: int = 256
    connections: int = 1024
    cache: int = 2**26
    files: bool = False
    online: bool = False
    trace: bool = False
    warm: tuple[str, ...] = ()
    certificate: str | None = None
    key: str | None = None
    quiet: bool = False
    review: ReviewPolicy | None = None
    page: Page | None = None
