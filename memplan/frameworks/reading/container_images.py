"""Programs of containers' images and packages that pip installs, and their versions."""

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
_KEY = "version of {}"  # of a command's variables: no shell has one with spaces
_TAG = re.compile(r":v?(\d{1,9}(?:\.\d{1,9}){1,3})")
_PINNED = re.compile(r"([\w-]{1,60})(?:\[[\w,-]*\])?==(\d{1,9}(?:\.\d{1,9}){1,3})")


def entry_point(image: str) -> tuple[str, ...]:
    """Return the program that an image runs, and its subcommand; empty if that is not known."""
    return next((program for start, program in _IMAGES.items() if image.startswith(start)), ())


def image_version(image: str) -> dict[str, str]:
    """Return the version in the tag of a known image, `v0.9.1`, as a container's variable; none if it has none."""
    entry, tag = entry_point(image), _TAG.search(image)
    return {_KEY.format(entry[0]): tag[1]} if entry and tag is not None else {}


def installed_versions(words: Iterable[str]) -> dict[str, str]:
    """Return the versions that `pip install trl==0.24.0` pins, as variables; none for another command."""
    before, _, packages = " ".join(words).partition("pip install ")
    pinned = _PINNED.findall(packages) if before in ("", "uv ", "!", "python -m ", "python3 -m ") else ()
    return {_KEY.format(name.lower().replace("_", "-")): version for name, version in pinned}


def version_of(names: Iterable[str], variables: Mapping[str, str]) -> str | None:
    """Return the first version known of these programs and packages: of the container's image, or installed."""
    return next((version for name in names if (version := variables.get(_KEY.format(name)))), None)
