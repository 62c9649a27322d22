"""Images of containers: the program that one runs, and its version."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Beginning of an image's name -> the program that its entry point runs.
_IMAGES = {
    "vllm/vllm-openai": ("vllm", "serve"),
    "ghcr.io/huggingface/text-generation-inference": ("text-generation-launcher",),
    "ghcr.io/ggml-org/llama.cpp:server": ("llama-server",),
    "ghcr.io/ggerganov/llama.cpp:server": ("llama-server",),
}
_KEY = "version of {} in the image"  # of a container's variables: no shell has one with spaces
_TAG = re.compile(r":v?(\d{1,9}(?:\.\d{1,9}){1,3})")


def entry_point(image: str) -> tuple[str, ...]:
    """Return the program that an image runs, and its subcommand; empty if that is not known."""
    return next((program for start, program in _IMAGES.items() if image.startswith(start)), ())


def image_version(image: str) -> dict[str, str]:
    """Return the version in the tag of a known image, `v0.9.1`, as a container's variable; none if it has none."""
    entry, tag = entry_point(image), _TAG.search(image)
    return {_KEY.format(entry[0]): tag[1]} if entry and tag is not None else {}


def version_in_image(programs: Iterable[str], variables: Mapping[str, str]) -> str | None:
    """Return the version of the first program that the container's image is known to run."""
    return next((version for name in programs if (version := variables.get(_KEY.format(name)))), None)
