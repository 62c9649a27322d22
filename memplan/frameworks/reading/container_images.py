"""Images of containers: the program that one runs, and its version."""

from __future__ import annotations

import re

# Beginning of an image's name -> the program that its entry point runs.
_IMAGES = {
    "vllm/vllm-openai": ("vllm", "serve"),
    "ghcr.io/huggingface/text-generation-inference": ("text-generation-launcher",),
    "ghcr.io/ggml-org/llama.cpp:server": ("llama-server",),
    "ghcr.io/ggerganov/llama.cpp:server": ("llama-server",),
}
# A key of a container's variables that no shell has: the version in the tag of its image, `v0.9.1`.
IMAGE = "the image's version"
_TAG = re.compile(r":v?(\d{1,9}(?:\.\d{1,9}){1,3})")


def entry_point(image: str) -> tuple[str, ...]:
    """Return the program that an image runs, and its subcommand; empty if that is not known."""
    return next((program for start, program in _IMAGES.items() if image.startswith(start)), ())


def image_version(image: str) -> dict[str, str]:
    """Return the version in the tag of a known image, as a container's variable; none if it has none."""
    tag = _TAG.search(image) if entry_point(image) else None
    return {IMAGE: tag[1]} if tag is not None else {}
