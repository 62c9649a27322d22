"""`memplan serve` and `memplan webhook`: answers over HTTP, and reviews of a cluster's pods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from memplan.cli.commands import Options, Subcommand, Switch, own
from memplan.core.errors import SpecError, UnknownNameError

if TYPE_CHECKING:
    from memplan.serve.settings import ReviewPolicy, ServerSettings

_ACTIONS = ("deny", "warn", "allow")
_SERVER: Options = {
    "Server": {
        "host": own("Address to listen on. Default 127.0.0.1, which only this machine reaches."),
        "port": own("Port; 0 for a free one, which the log names. Default 8808, of a webhook 8443.", int),
        "workers": own("Processes that compute answers. Default one per core.", int),
        "warm": own("Models whose answers are computed before the server is ready, as in qwen3-8b,qwen2-7b."),
        "certificate": own("File of the TLS certificate and its chain. Default none: HTTP.", completes="files"),
        "key": own("File of the certificate's key.", completes="files"),
        "web": own("Also serve the page, at /. Default off.", Switch),
        "quiet": own("Log only errors and the server's own events. Default off.", Switch),
    },
    "Limits": {
        "body": own("Most bytes of a request, as in 1MiB. Default 1MiB, of a webhook 4MiB."),
        "seconds": own("Time within which a request is answered. Default 30.", float),
        "waiting": own("Most requests that wait for a process. Default 256.", int),
        "connections": own("Most open connections. Default 1024.", int),
        "cache": own("Memory for answers that are asked again, as in 64MiB. Default 64MiB."),
    },
    "What a request may do": {
        "files": own("Name files on this machine. Default off.", Switch),
        "online": own("Have a model looked up on the Hugging Face Hub. Default off.", Switch),
        "trace": own("Have a model traced that memplan has no stack for. Default off.", Switch),
    },
}
_REVIEWS: Options = {
    "Reviews": {
        "gpu": own("A card of the cluster, for pods that name none; repeatable.", list[str], completes="gpu"),
        "does_not_fit": own("deny, warn or allow a pod whose run does not fit. Default deny.", choices=_ACTIONS),
        "tight": own("The same for a run that may run out of memory. Default warn.", choices=_ACTIONS),
        "unreadable": own(
            "The same for a run that cannot be read, or answered in time. Default warn; deny fails closed.",
            choices=_ACTIONS,
        ),
        "fill": own(
            "Resource or annotation that gets the run's memory per GPU: nvidia.com/gpumem (HAMi, MiB), "
            "volcano.sh/vgpu-memory (MB) or gpu-memory (KAI and Run:ai, MiB). Default none.",
            choices=("nvidia.com/gpumem", "volcano.sh/vgpu-memory", "gpu-memory"),
        ),
    }
}
_HELP = {
    "serve": "Answer over HTTP: estimates, plans, checks, and lists of models and GPUs, as JSON.\n\n"
    "Needs pip install 'memplan[serve]'. Ends at SIGTERM, once what was asked is answered.",
    "webhook": "Review a Kubernetes cluster's pods before they are admitted, at /review; and answer as serve does.\n\n"
    "Reads a pod's run from its annotation memplan.dev/run or its container's command. Needs pip install "
    "'memplan[serve]'. Ends at SIGTERM, once what was asked is answered.",
}


def command(name: str) -> Subcommand:
    options = _SERVER if name == "serve" else {**_REVIEWS, **_SERVER}
    return Subcommand(name, {"serve": serve, "webhook": webhook}[name], options, _HELP[name], serves=True)


def serve(given: Mapping[str, Any]) -> int:
    """Serve until a signal ends it."""
    return _serve(given, None)


def webhook(given: Mapping[str, Any]) -> int:
    """Serve reviews until a signal ends it."""
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.serve.settings import ReviewPolicy

    for name in ("does_not_fit", "tight", "unreadable", "fill"):
        choices = _REVIEWS["Reviews"][name].choices
        if name in given and given[name] not in choices:
            raise UnknownNameError(name, given[name], choices)
    said = {name: given[name] for name in ("does_not_fit", "tight", "unreadable") if name in given}
    gpus = tuple(find_gpu(name).name for name in given.get("gpu", ()))
    seconds = {"seconds": given["seconds"]} if "seconds" in given else {}
    return _serve(given, ReviewPolicy(gpus, memory=given.get("fill", ""), **said, **seconds))


def _serve(given: Mapping[str, Any], review: ReviewPolicy | None) -> int:
    import os

    from memplan.core.units import size_of
    from memplan.serve.server import serve
    from memplan.serve.settings import ServerSettings

    defaults = ServerSettings(review=review)
    if review is not None:
        defaults = defaults._replace(port=8443, body=2**22)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values: dict[str, Any] = {"workers": cores}
    values |= {name: value for name, value in given.items() if name in ServerSettings._fields}
    values |= {name: size_of(given[name], name) for name in ("body", "cache") if name in given}
    values["warm"] = tuple(name.strip() for name in given.get("warm", "").split(",") if name.strip())
    if "web" in given:
        from memplan.cli.page import answer, form
        from memplan.serve.page import Page, page_files

        values["page"] = Page(page_files(), cache(form), answer)
    settings = defaults._replace(**values)
    _check(settings)
    return serve(settings)


def _check(settings: ServerSettings) -> None:
    """Raise SpecError for a setting that cannot be."""
    for name, most in (("workers", 1024), ("waiting", 10**6), ("connections", 10**6)):
        if not 1 <= getattr(settings, name) <= most:
            raise SpecError(f"{name}: must be at least 1 and at most {most:,}, not {getattr(settings, name):,}", name)
    if not 0 < settings.seconds <= _LONGEST:
        raise SpecError(f"seconds: must be more than 0 and at most {_LONGEST:,}, not {settings.seconds:g}", "seconds")
    if not 0 <= settings.port < 2**16:
        raise SpecError(f"port: must be at least 0 and at most 65,535, not {settings.port:,}", "port")
    if (settings.certificate is None) != (settings.key is None):
        raise SpecError("certificate: --certificate and --key need each other", "certificate")


_LONGEST = 3600  # seconds
