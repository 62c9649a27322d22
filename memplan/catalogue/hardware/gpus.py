"""Look up GPUs by name.

The cards are in `gpus.toml`, which `gpu_table.py` reads. `find_gpu` accepts what people type and what `nvidia-smi` and
torch print. Bytes are integers; `memory_gb` is the marketed size.

>>> find_gpu("RTX 3090").driver_total
25769803776
>>> [gpu.name for gpu in ambiguous_with("v100 sxm")]
['v100-sxm2-32gb']
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from functools import cache, lru_cache

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpu_table import CardNames, gpu_table
from memplan.core.errors import UnknownNameError, most_similar, refused
from memplan.core.records import NamedTuple
from memplan.core.units import MIB


@cache
def all_gpus() -> tuple[GPU, ...]:
    """All cards, in table order."""
    return tuple(gpu_table().gpu(names.name) for names in gpu_table().names)


def find_gpu(text: str) -> GPU:
    """Return the card that `text` names: an id, an alias, what people type, or what nvidia-smi or torch print.

    Case, spaces, dashes and words of vendor and product line ("NVIDIA", "GeForce", "Tesla", "RTX") do not matter, and a
    memory size may follow: "RTX 3090", "a100 80g", "NVIDIA A100-SXM4-80GB", "m3 max 64gb".

    If several cards match, returns the one with that name as an alias (`a100` is the 80 GB SXM4 card, `v100` the 16 GB
    SXM2 card, `a800` the 80 GB SXM4 card, `h100` the SXM5 card), else the first in the table, which lists smaller
    memory first. A size alone, as in "24gb", means the NVIDIA card of that size with the least usable memory: what fits
    there fits on the others. `ambiguous_with` returns the others. A MIG profile may follow the card: "a100:3g.40gb",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb".

    Raises UnknownNameError, with the nearest ids, if no card matches.
    """
    exact = gpu_table().owners.get(text.strip().lower())
    if exact is not None:
        return gpu_table().gpu(exact)
    instance = re.fullmatch(_MIG, text.strip().lower())
    if instance is not None:
        return _instance(text, *instance.groups())
    first = next(_matches(text, gpu_table().names), None)
    if first is None:
        raise UnknownNameError("gpu", text, _nearest(text), ranked=True)
    return first


def ambiguous_with(text: str) -> tuple[GPU, ...]:
    """Return the cards other than `find_gpu(text)` that `text` may mean, in table order.

    For a chip sold with several memory sizes these are the other sizes. Raises UnknownNameError like `find_gpu`.
    """
    chosen = find_gpu(text)
    if chosen.mig:
        return ()
    cards = gpu_table().names
    if text.strip().lower() in gpu_table().owners:  # an exact name: other candidates must contain all of its words
        words = _parse(text).words
        cards = tuple(c for c in cards if any(all(w in name for w in words) for name in (c.name, *c.aliases)))
    others = [gpu for gpu in _matches(text, cards) if gpu.name != chosen.name]
    typed = text.strip().lower().replace(" ", "-").removeprefix("nvidia-")
    others += [gpu_table().gpu(name) for name in _ALSO_MEANT.get(typed, ())]
    return tuple(others)


def mig_instances(card: GPU) -> tuple[GPU, ...]:
    """Return the MIG instances that a card can be divided into, one of each profile."""
    return tuple(gpu_table().mig_instance(card.name, profile) for profile in gpu_table().mig_profiles(card.name))


def _instance(text: str, card: str, profile: str) -> GPU:
    """Return a MIG instance; if several cards match, that of the first with the profile."""
    cards = [find_gpu(card), *ambiguous_with(card)]
    for gpu in cards:
        if profile in gpu_table().mig_profiles(gpu.name):
            return gpu_table().mig_instance(gpu.name, profile)
    near = [instance.name for gpu in cards for instance in mig_instances(gpu)]
    if not near:
        raise refused("gpu", f"{cards[0].name} has no MIG profiles in the table")
    raise UnknownNameError("gpu", text, near)


def total_by_rule(gpu: GPU) -> int:
    """Return the bytes to assume for one device of `gpu` without a driver reading: never more than on similar cards.

    Unified memory is shared with the operating system, and the driver's limit is well below the marketed size:

    - Apple: Metal's default working set, 2/3 of the memory up to 36 GB and 3/4 above. Recent systems allow
      more on small machines (19 069 MB was reported on 24 GB), so this is a low estimate.
    - AMD: 49/100. Linux lets the GPU map half of the memory that the firmware leaves (62.82 of a nominal 128 GiB
      in amd-ttm's documentation); a larger share must be set by hand.

    For other cards, readings of cards in the table with the same vendor and ECC setting decide: those of the same
    generation and market, else of the generation, else of the vendor. If any of them has the same marketed size, the
    smallest such reading. Else the smallest reading per marketed byte, times the marketed size, rounded down to a MiB:

    - GeForce RTX 30: 24 564 MiB of 24 GB (RTX 3090 Ti) is the least, so 8 GB give 8 188 MiB
    - GeForce RTX 50: 8 151 MiB of 8 GB (RTX 5060), so 24 GB give 24 453 MiB
    - RTX A: 16 376 MiB of 16 GB (RTX A4000), so 20 GB give 20 470 MiB
    - Blackwell, data centre: 275 040 MiB of 288 GB (B300), so 192 GB give 183 360 MiB
    - RX 7000: 16 368 MiB of 16 GB (RX 7800 XT); Radeon PRO, with ECC: 46 064 MiB of 48 GB (W7900)
    - Instinct before the MI200, from AMD's smallest: 16 304 MiB of 16 GB (RX 9070 XT)
    - Intel Arc A series: 15 473 MiB of 16 GB (A770); B series: 11 605 MiB of 12 GB (B580)
    - Gaudi: 94.62 GiB of 96 GB (Gaudi 2); Ascend 910B: 29.50 GiB of 32 GB; TPU: 30.75 GiB of 32 GB (v4)
    """
    marketed = _marketed(gpu)
    if gpu.unified:
        numerator, denominator = _unified_share(gpu)
        return marketed * numerator // denominator // MIB * MIB
    for siblings in _sibling_pools(gpu):
        same_size = [other.driver_total for other in siblings if _marketed(other) == marketed]
        if same_size:
            return min(same_size)
        if siblings:
            # Shares are compared in parts of 2**40 so that no byte count passes through a float.
            least = min(siblings, key=lambda other: (other.driver_total << 40) // _marketed(other))
            return marketed * least.driver_total // _marketed(least) // MIB * MIB
    raise LookupError(f"no reading to derive {gpu.name} from")


def _marketed(gpu: GPU) -> int:
    """Marketed bytes of one device, counting a GB as a GiB. Every marketed size in the table is an integer."""
    return int(gpu.memory_gb) * 1024 * MIB // gpu.devices


def _unified_share(gpu: GPU) -> tuple[int, int]:
    if gpu.vendor == "Apple":
        return (2, 3) if gpu.memory_gb <= 36 else (3, 4)
    return (49, 100)


def _sibling_pools(gpu: GPU) -> Iterator[list[GPU]]:
    vendor = [
        other
        for other in all_gpus()
        if other.driver_basis == "driver"
        and other.name != gpu.name
        and not other.unified
        and (other.vendor, other.ecc) == (gpu.vendor, gpu.ecc)
    ]
    # "Blackwell Ultra" and "Blackwell" are one generation, as are "CDNA3 gfx942" and "CDNA3 gfx940".
    generation = [other for other in vendor if _generation(other) == _generation(gpu)]
    yield [other for other in generation if _board_kind(other) == _board_kind(gpu)]
    yield generation
    yield vendor


def _generation(gpu: GPU) -> str:
    return gpu.architecture.split()[0]


def _board_kind(gpu: GPU) -> str:
    # A laptop chip reserves as much as the desktop card of its generation (8 151 MiB for both RTX 5060).
    return "consumer" if gpu.market == "laptop" else gpu.market


# A name is parsed into a set of words, with numbers split from letters ("rtx3090" as "RTX 3090"), and a size.
_Words = frozenset[str]

# Words that give away the vendor. They do not distinguish cards of one vendor, so they are not compared.
_BRANDS = {
    **dict.fromkeys(("nvidia", "geforce", "tesla", "quadro", "rtx", "gtx"), "NVIDIA"),
    **dict.fromkeys(("amd", "radeon", "rx", "instinct"), "AMD"),
    **dict.fromkeys(("intel", "arc"), "Intel"),
    **dict.fromkeys(("huawei", "ascend"), "Huawei"),
    **dict.fromkeys(("google", "tpu"), "Google"),
    **dict.fromkeys(("apple", "mac", "macbook"), "Apple"),
}
# Other words that do not distinguish cards.
_NOISE = {"r", "tm", "graphics", "gpu", "gpus", "accelerator", "data", "center", "centre"} | {
    *("generation", "edition", "blackwell", "workstation", "active", "oam")
}
# Words that distinguish cards but that people omit: "h100" for "h100-sxm".
_OPTIONAL_WORDS = frozenset({"sxm", "pcie", "nvl", "server", "maxq"})

# Aliases that people also use for other cards.
_ALSO_MEANT = {
    "rtx-6000": ("rtx-6000-ada", "rtx-pro-6000"),
    "rtx6000": ("rtx-6000-ada", "rtx-pro-6000"),
    "mi300": ("mi300a",),
    "910b": ("ascend-910b2", "ascend-910b4"),
    "ascend-910b": ("ascend-910b2", "ascend-910b4"),
}

# nvidia-smi names this board only by its memory; the SXM5 card is the only 80 GB one with HBM3.
_BY_MEMORY = (r"h100[ -]80gb[ -]hbm3", "h100 sxm 80gb")

# Kept as strings: compiling them takes longer than the rest of this file's import, and `re` caches them.
_REMARK = r"\([^)]*\)|\d+[- ]cores?\b"
_SIZE = r"(?<![a-z\d])(\d{1,4})[ -]?g(?:i?b)?(?![a-z\d])"
_PART = r"[a-z]+|\d+"
_MIG = r"(.+?)(?::|[ -]mig[ -])(\d+g\.\d+gb)"


class _Name(NamedTuple):
    words: _Words
    size: int | None
    """GB, if the name has it."""
    vendors: frozenset[str]
    """Vendors that the name mentions."""


class _Index(NamedTuple):
    """Ids of cards, by parts of their names.

    owners    the card with that id or alias, by the words and size of the name
    loose     all matching cards, by the words of a name without its size, and also without optional words
    squeezed  the card by letters and digits only, for names typed without spaces: "teslat4"
    """

    owners: dict[tuple[_Words, int | None], str]
    loose: dict[_Words, list[str]]
    squeezed: dict[str, str]


@lru_cache(maxsize=64)
def _index(cards: tuple[CardNames, ...]) -> _Index:
    index = _Index({}, {}, {})
    for card in cards:
        names = (card.name, *card.aliases)
        for name in names:
            parsed = _parse(name)
            index.owners.setdefault((parsed.words, parsed.size), card.name)
        for name in (*names, *card.title.split("/")):
            index.squeezed.setdefault(_squeeze(name), card.name)
            words = _parse(name).words
            for key in (words, words - _OPTIONAL_WORDS):
                candidates = index.loose.setdefault(key, [])
                if card.name not in candidates:
                    candidates.append(card.name)
    return index


def _parse(text: str) -> _Name:
    plain = re.sub(_REMARK, " ", text.lower())
    plain = plain.replace("max-q", "maxq").replace("mobile", "laptop")
    plain = re.sub(*_BY_MEMORY, plain)
    sizes: list[str] = re.findall(_SIZE, plain)
    # The SXM generation and the kind of memory follow from the card.
    plain = re.sub(r"(?<=\bsxm)\d|\bhbm\w*", " ", re.sub(_SIZE, " ", plain))
    parts: list[str] = re.findall(_PART, plain)
    words = {part for part in parts if part not in _BRANDS and part not in _NOISE}
    if "titan" in words and "rtx" in parts:
        words.add("rtx")  # for the Titan RTX, "RTX" is the name
    vendors = frozenset(_BRANDS[part] for part in parts if part in _BRANDS)
    return _Name(frozenset(words), int(sizes[-1]) if sizes else None, vendors)


def _squeeze(text: str) -> str:
    return "".join(re.findall(_PART, text.lower()))


def _matches(text: str, cards: tuple[CardNames, ...]) -> Iterator[GPU]:
    """Yield the cards that match `text`, the most likely first."""
    index = _index(cards)
    words, size, vendors = _parse(text)
    if not words:
        yield from sorted(_of_size(size, vendors or {"NVIDIA"}), key=lambda gpu: gpu.driver_total)
        return
    matches = list(_sized(index.loose.get(words, ()), size))
    if not matches and size is None:
        # "a100 80": a bare number may be the size.
        for number in sorted(word for word in words if word.isdigit() and len(word) <= 4):
            matches = list(_sized(index.loose.get(words - {number}, ()), int(number)))
            if matches:
                words, size = words - {number}, int(number)
                break
    owner = index.owners.get((words, size)) or (None if matches else index.squeezed.get(_squeeze(text)))
    ranked = [gpu_table().gpu(owner), *(gpu for gpu in matches if gpu.name != owner)] if owner else matches
    for gpu in ranked:
        if not vendors or gpu.vendor in vendors:
            yield gpu


def _of_size(size: int | None, vendors: Container[str]) -> Iterator[GPU]:
    """Yield the vendors' cards of a memory size, if there is one."""
    return (gpu for gpu in all_gpus() if gpu.vendor in vendors and gpu.memory_gb == size and gpu.devices == 1)


def _sized(cards: Iterable[str], size: int | None) -> Iterator[GPU]:
    """Yield the cards of a memory size; without a size, all of them in every size they are sold with."""
    for gpu in map(gpu_table().gpu, cards):
        if size is None:
            yield gpu
            yield from (_with_memory(gpu, other) for other in gpu.memory_options_gb if other != gpu.memory_gb)
        elif size in (gpu.memory_options_gb or (gpu.memory_gb,)):
            yield _with_memory(gpu, size)


def _with_memory(gpu: GPU, memory_gb: float) -> GPU:
    """Return the chip with another memory size that it is sold with, under a name with that size."""
    if memory_gb == gpu.memory_gb:
        return gpu
    size = f"{memory_gb:g}"
    other = gpu._replace(name=f"{gpu.name}-{size}gb", title=f"{gpu.title} {size}GB", memory_gb=memory_gb)
    return other._replace(driver_total=total_by_rule(other), aliases=())


def _nearest(text: str) -> list[str]:
    """The ids most similar to `text`, best first, of the vendors that it mentions."""
    table, vendors = gpu_table(), _parse(text).vendors
    owners = {n: card for n, card in table.owners.items() if not vendors or table.gpu(card).vendor in vendors}
    known = {_squeeze(name): card for name, card in (owners or table.owners).items()}
    return list(dict.fromkeys(known[name] for name in most_similar(_squeeze(text), known, 8)))
