"""Numbers that torch, transformers and peft give for small models, and a file of those that were asked before.

    python tests/golden/ask_libraries.py

runs the tests that ask and writes every answer to asked.jsonl, in about two minutes on one core. An answer depends on
nothing but its question, the libraries' versions and the code that asks, so a row stands for it while these are the
ones that the file was written with. With others, and for a question without a row, the library is asked. Questions with
`live` are always asked, and their rows must equal the answers.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cache, wraps
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cases import Lazy

Answer = TypeVar("Answer")
Config = dict[str, Any]
FILE = Path(__file__).parent / "asked.jsonl"
LIBRARIES = ("torch", "transformers", "peft")
TESTS = (  # that ask
    "tests/models/test_cards.py",
    "tests/program/test_ranks_against_torch.py",
    *(
        f"tests/catalogue/test_{name}.py"
        for name in ("autograd", "experts", "kimi_k3", "methods", "peft_methods", "peft_selection")
    ),
)
ROOT = Path(__file__).parents[2]
RANKS = ROOT / "tests/sharded_child.py"
ASKING = (Path(__file__), Path(__file__).with_name("count_parameters.py"), ROOT / "tests/kimi_k3.py", RANKS)
torch: Any = Lazy("torch")


def code() -> str:
    """Return a digest of the code that asks."""
    from memplan.probe.fake.fake_tensor_patches import cluster_evenly
    from memplan.probe.script.model import load_no_adapters

    files = [path.read_text("utf-8") for path in ASKING]
    return _digest([*files, *map(inspect.getsource, (cluster_evenly, load_no_adapters))])


def lines() -> list[Config]:
    """Return the file: the versions and the code that it was written with, then a row for each question."""
    return [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]


@cache
def _known() -> dict[str, Any]:
    """Return the answers by key; none if other libraries are installed, or other code asks."""
    first, *rows = lines()
    is_current = (first["versions"], first["code"]) == (_versions(), code())
    return {row["key"]: row["answer"] for row in rows} if is_current else {}


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name).partition("+")[0]  # a build for the CPU gives the same numbers
        except PackageNotFoundError:
            continue
    return found


def _digest(value: object) -> str:
    def plain(part: Any) -> Any:
        return sorted(part) if isinstance(part, (set, frozenset)) else vars(part)

    return sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()[:16]


_new: dict[str, Any] | None = None  # rows by key, while the file is written


def remembered(ask: Callable[..., Answer]) -> Callable[..., Answer]:
    """Decorate a function whose question and answer are JSON, or peft's configs: read its answers in the file.

    With `live` the library is asked in any case, and a row has to equal its answer.
    """

    @wraps(ask)
    def answer(*question: Any, live: bool = False) -> Answer:
        key = _digest([ask.__name__, question])
        if _new is None and not live and key in _known():
            return _known()[key]
        found = ask(*deepcopy(question))
        if _new is None:
            assert _known().get(key, found) == found, f"asked.jsonl has another answer to {ask.__name__}{question}"
        else:
            _new[key] = {"key": key, "ask": ask.__name__, "of": question[0]["model_type"], "answer": found}
        return found

    return answer


@remembered
def built(config: Config) -> Config | None:
    """Return the model that transformers builds of a config, on the meta device; None if it refuses the config.

    kinds     parameters by kind
    layers    runs of equal layers as [number of layers, parameters per layer]
    sliding   whether each layer has a window, if the family's layers have types; `window` its width
    rotated   share of a head's dimensions that are rotated, if the config has one
    """
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from huggingface_hub.errors import StrictDataclassError

    from tests.golden import count_parameters

    refusals = (StrictDataclassError, AttributeError, TypeError, ValueError, ZeroDivisionError)
    try:
        model: Any = count_parameters.build(config)
    except refusals:
        return None
    kinds: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    for kind, path, number in count_parameters.parameters(model):
        kinds[kind] += number
        if path is not None:
            layers[path] += number
    settings = model.config
    facts: Config = {"kinds": +kinds, "layers": [[len([*same]), size] for size, same in groupby(layers.values())]}
    if hasattr(type(settings), "layer_types"):
        facts["sliding"] = [kind in ("sliding_attention", "chunked_attention") for kind in settings.layer_types]
        if any(facts["sliding"]) and getattr(settings, "use_sliding_window", True):
            width = "attention_chunk_size" if hasattr(settings, "attention_chunk_size") else "sliding_window"
            facts["window"] = getattr(settings, width, None)
    if "partial_rotary_factor" in (rotary := getattr(settings, "rope_parameters", None) or {}):
        facts["rotated"] = rotary["partial_rotary_factor"]
    return facts


@remembered
def trained(config: Config, adapters: Any, auto: str = "AutoModelForCausalLM") -> list[int] | str:
    """Return the parameters that peft trains of a bf16 model, and all that it has, or the builtin error of a refusal.

    adapters   peft's config
    auto       transformers' class that builds the model
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from memplan.probe.fake.fake_tensor_patches import cluster_evenly
    from memplan.probe.script.model import load_no_adapters

    cluster_evenly()
    model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16)
    if adapters.peft_type == "XLORA":
        load_no_adapters(model, adapters)
    try:
        return [*peft.get_peft_model(model, adapters).get_nb_trainable_parameters()]
    except (ValueError, TypeError, NotImplementedError) as error:
        return next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")


@remembered
def saves(config: Config, auto: str, dtype: str, batch: int, sequence: int, adapters: Any = None) -> int:
    """Return the bytes that autograd saves in a forward pass and the loss; `dtype` by torch's name."""
    transformers = pytest.importorskip("transformers")
    described = transformers.AutoConfig.for_model(**config)
    kernel = {"attn_implementation": "eager", "dtype": getattr(torch, dtype)}
    model = getattr(transformers, auto).from_config(described, **kernel)
    if adapters is not None:
        model = pytest.importorskip("peft").get_peft_model(model, adapters)
    model.train()
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    labels = ids.clone()
    with torch.library._scoped_library("aten", "IMPL") as kernels:  # CUDA's; on the CPU torch normalises by several
        kernels.impl("_fused_rms_norm", lambda x, *_: (torch.ones_like(x), torch.ones(*x.shape[:-1], 1)), "CPU")
        return saved_bytes(
            lambda: model(input_ids=ids, labels=labels, use_cache=False).loss,
            held=(ids, labels),
            own=(*model.parameters(), *model.buffers()),
            still=True,
        )


@remembered
def kimi_k3_saves(config: Config, dtype: str, batch: int, sequence: int) -> int:
    """Return the bytes that autograd saves in a pass of tests/kimi_k3.py; `dtype` by torch's name."""
    from tests.kimi_k3 import Model

    model = Model(**{key: value for key, value in config.items() if key not in ("model_type", "hidden_act")})
    model = model.to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if name.endswith((".gate.weight", ".dt_bias")):
            parameter.data = parameter.data.float()
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    labels = ids.clone()
    return saved_bytes(
        lambda: model(ids, labels), held=(ids, labels), own=(*model.parameters(), *model.buffers()), still=True
    )


@remembered
def rank_peaks(config: Config, runs: list[Config]) -> list[dict[str, int]]:
    """Return torch's peak of each phase of the runs that tests/sharded_child.py trains, from one process.

    Each of `runs` is what that file reads, and its `config` what differs from the given one.
    """
    lines = "".join(json.dumps({**run, "config": {**config, **run["config"]}}) + "\n" for run in runs)
    child = [sys.executable, "-W", "ignore", str(RANKS)]
    done = subprocess.run(child, input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def saved_bytes(
    compute: Callable[[], Any], held: Iterable[Any] = (), own: Iterable[Any] = (), still: bool = False
) -> int:
    """Return the bytes of storages that autograd saves in `compute`, plus those of `held`, minus those of `own`.

    With `still` only storages alive at the end count: a router saves tensors for a choice without gradients.
    """
    ours = {t.untyped_storage()._cdata for t in own}
    packed: list[Callable[[], Any]] = []

    def pack(tensor: Any) -> Any:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            packed.append(weakref.ref(part) if still and part is tensor else lambda part=part: part)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = compute()
    found = (reference() for reference in packed)
    storages = [tensor.untyped_storage() for tensor in found if tensor is not None]
    saved: dict[int, Any] = {storage._cdata: storage for storage in storages if storage._cdata not in ours}
    for tensor in (*held, result):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
    return sum(storage.nbytes() for storage in saved.values())


def main() -> None:
    from tests.golden import ask_libraries as shared  # the module that the tests import

    shared._new = {}  # pyright: ignore[reportPrivateUsage]
    if pytest.main(["-n0", "-q", "-m", "torch", *TESTS]) != 0:
        raise SystemExit("no answer is written: a test fails")
    about = "Answers of libraries to questions of tests, asked by ask_libraries.py next to this file."
    first = {"about": about, "versions": _versions(), "code": code()}
    rows = sorted(shared._new.values(), key=lambda row: (row["ask"], row["of"], row["key"]))  # pyright: ignore
    FILE.write_text("".join(json.dumps(row) + "\n" for row in (first, *rows)), "utf-8")


if __name__ == "__main__":
    main()
