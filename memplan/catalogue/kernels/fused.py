"""Fused kernels that replace several operations with one: what they keep, and what they overwrite.

A unit of operations (`Op.unit`) becomes one operation. Unsloth's, fms-acceleration's and Liger's kernels keep the same
tensors; docstrings note the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite_lists
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, outside
from memplan.core.records import NamedTuple

_LIGER, _AUTOMODEL = "liger-kernel 0.5.2 ops", "nemo_automodel 0.7.0 components/models"
_ROPE = f"{_AUTOMODEL}/llama/rope_utils.py apply_rotary_pos_emb"
MULTIPROCESSORS = (
    108  # of an A100: Liger sums the weight's gradient in one row per multiprocessor, mamba-ssm splits by them
)


def _rms_norm(unit: tuple[Op, ...]) -> Op:
    """Keeps its input and one number per row. The input's gradient overwrites the output's gradient.

    Unsloth's kernel computes no gradient of the weight.
    """
    first, weigh = unit[0], unit[-2]
    (x,), y, w = first.reads, weigh.writes[0], weigh.weights[0]
    rstd = Tensor(f"{y.name}.rstd", y.shape.rpartition(" ")[0], "fp32")
    return Op(
        weigh.name.removesuffix(".weight"),
        (x,),
        (y._replace(dtype=f"={x}"), rstd),
        (w,),
        (*(Keep(what, target) for target in (x, w.name) for what in (x, rstd.name)), Keep(w.name, x)),
        scratch_back=(Scratch(Tensor("partial sums", f"{MULTIPROCESSORS} {w.shape}", "fp32"), w.name),),
        gradient="same",
        source=f"{_LIGER}/rms_norm.py",
    )


def _rope(unit: tuple[Op, ...]) -> Op:
    """Overwrites its input, and its gradient in backward."""
    first, last = unit[0], unit[-1]
    x, y = first.reads[0], last.writes[0]
    keeps = (Keep("cos", x), Keep("sin", x))
    return ops.view(last.name.removesuffix(".add"), x, y.name, y.shape)._replace(
        reads=(x, *(k.what for k in keeps)), keeps=keeps, source=f"{_LIGER}/rope.py"
    )


def _swiglu(unit: tuple[Op, ...]) -> Op:
    """Keeps the gate before its activation and the factor it multiplies. Their gradients overwrite them."""
    activation, product = unit
    gate, y = activation.reads[0], product.writes[0]
    up = next(r for r in product.reads if r != activation.writes[0].name)
    return Op(
        product.name,
        (gate, up),
        (y,),
        (),
        (Keep(gate, gate, True), Keep(up, gate), Keep(up, up, True), Keep(gate, up)),
        source=f"{_LIGER}/swiglu.py",
    )


def _rms_norm_in_fp32(unit: tuple[Op, ...]) -> tuple[Op, ...]:
    """NeMo Automodel's function keeps its input, and computes in fp32 in both passes."""
    first, weigh = unit[0], unit[-2]
    (x,), y, w = first.reads, weigh.writes[0], weigh.weights[0]
    name, source = weigh.name.removesuffix(".weight"), f"{_AUTOMODEL}/common/utils.py Float32RMSNorm"
    names = (f"{y.name}.normalised", "input", "gradient", "product", "scaled", "difference")
    wide = tuple(Tensor(name, y.shape, "fp32") for name in names)
    return (
        Op(f"{name}.normalise", (x,), wide[:1], scratch=wide[1:2], gradient="none", source=source),
        Op(
            name,
            (x, wide[0].name),
            (y._replace(dtype=f"={x}"),),
            (w,),
            (*(Keep(x, target) for target in (x, w.name)), Keep(w.name, x)),
            scratch_back=(*map(Scratch, wide[:-1]), Scratch(wide[-1], early=True)),
            source=source,
        ),
    )


def _rotated_in_fp32(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """The operations with NeMo Automodel's rotation: q and k are cast to fp32, rotated one by one, and cast back.

    Its tables are fp32, and their rows for the positions are copies of a cache that stays.
    """
    kernel = {"rope": KERNELS["rope"]}
    units = [*_complete_units(operations, kernel).values()]
    cache, both = ("rotary.cos", "rotary.sin"), [op for unit in units for op in unit]
    out: list[Op] = []
    for op in operations:
        if op.name in cache:
            out.append(op._replace(holds="step"))
        elif op.name in ("rotary.cast_cos", "rotary.cast_sin"):
            out.append(op._replace(cast=False, writes=(op.writes[0]._replace(dtype="fp32"),)))
        elif both and op is both[0]:
            out += _rotation(units)
        elif op not in both:
            out.append(op)
    return tuple(out)


def _rotation(units: Sequence[tuple[Op, ...]]) -> Iterator[Op]:
    ends = [(unit[0].reads[0], unit[-1].writes[0], unit[-1].name.removesuffix(".add")) for unit in units]
    yield from (ops.cast(f"{name}.float", x, f"{y.name}.wide", y.shape, "fp32") for x, y, name in ends)
    for unit, (_, y, name) in zip(units, ends, strict=True):
        rotated = ops.rotate(name, f"{y.name}.wide", f"{y.name}.rotated", y.shape, unit[1].scratch[0].shape)
        yield from (op._replace(unit="", source=_ROPE) for op in rotated)
    yield from (ops.cast(f"{name}.cast", f"{y.name}.rotated", y.name, y.shape, f"={x}") for x, y, name in ends)
    yield ops.release_names(*(f"{y.name}.{part}" for _, y, _ in ends for part in ("wide", "rotated")))


class FusedKernel(NamedTuple):
    """A function that fuses a unit of `size` operations into one. Units of another size are left as they are."""

    size: int
    make: Callable[[tuple[Op, ...]], Op | tuple[Op, ...]]


KERNELS = {"rms_norm": FusedKernel(9, _rms_norm), "rope": FusedKernel(4, _rope), "swiglu": FusedKernel(2, _swiglu)}
_IN_FP32 = {"rms_norm in fp32": FusedKernel(9, _rms_norm_in_fp32)}


def fuse(stack: Stack, kernels: Iterable[str]) -> Stack:
    """Return the stack with these kernels fused wherever a unit is written as they expect."""
    if "rope in fp32" in kernels:
        stack = rewrite_lists(stack, _rotated_in_fp32)
    known = {**_IN_FP32, **KERNELS}
    wanted = {_kernel(name): known[name] for name in kernels if name in known}
    return rewrite_lists(stack, lambda operations: _fused(operations, wanted)) if wanted else stack


def fusible(stack: Stack) -> set[str]:
    """Return the kernels that can fuse at least one unit of the stack."""
    lists = (*outside(stack), *(block.ops for run in stack.runs for block in run.blocks))
    return {_kernel(unit) for operations in lists for unit in _complete_units(operations, KERNELS)}


def _kernel(unit: str) -> str:
    return unit.partition(" ")[0]


def _complete_units(operations: Iterable[Op], wanted: Mapping[str, FusedKernel]) -> dict[str, tuple[Op, ...]]:
    """Return the units, by name, that the `wanted` kernels can replace."""
    units_by_name: dict[str, tuple[Op, ...]] = {}
    for op in operations:
        if _kernel(op.unit) in wanted:
            units_by_name[op.unit] = (*units_by_name.get(op.unit, ()), op)
    return {name: unit for name, unit in units_by_name.items() if len(unit) == wanted[_kernel(name)].size}


def _fused(operations: tuple[Op, ...], wanted: Mapping[str, FusedKernel]) -> tuple[Op, ...]:
    """Return the operations with each unit replaced by one operation at the place of the unit's last."""
    units = _complete_units(operations, wanted)
    out: list[Op] = []
    for op in operations:
        unit = units.get(op.unit)
        if unit is None:
            out.append(op)
        elif op is unit[-1]:
            fused = wanted[_kernel(op.unit)].make(unit)
            out += (made._replace(unit=op.unit) for made in ((fused,) if isinstance(fused, Op) else fused))
    return tuple(out)
