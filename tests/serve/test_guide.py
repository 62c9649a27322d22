"""The guide: its requests are answered as it says, and its pod is reviewed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import httpx
import pytest
import yaml

from benchmarks.examples import examples_of
from tests.serve.test_webhook import answered

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "service.md"
BLOCKS = examples_of(PAGE)
ASKED = [n for n, block in enumerate(BLOCKS) if block.text.startswith("curl ")]


@pytest.mark.parametrize("number", ASKED)
def test_a_request_of_the_guide_is_answered_as_it_says(client: httpx.Client, number: int) -> None:
    words = shlex.split(BLOCKS[number].text.replace("\\\n", " "))
    address = next(word for word in words if word.startswith("localhost:8808"))
    content = words[words.index("-d") + 1]
    found = client.post(address.removeprefix("localhost:8808"), content=content, headers=_type(words))
    assert found.status_code == 200, found.text
    following = BLOCKS[number + 1]
    if following.language == "json":
        assert found.json() == json.loads(following.text)
    else:
        assert [row["status"] for row in found.json()["runs"]] == ["fits"]


def _type(words: list[str]) -> dict[str, str]:
    name, _, value = words[words.index("-H") + 1].partition(": ")
    return {name: value}


def test_the_pod_of_the_guide_is_reviewed(client: httpx.Client) -> None:
    pod = next(yaml.safe_load(block.text) for block in BLOCKS if "kind: Pod" in block.text)
    response = answered(client, pod)
    assert ("patch" in response) == response["allowed"]
    assert not any("cannot answer" in warning for warning in response.get("warnings", ()))
