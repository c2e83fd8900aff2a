"""The element types of the contract, and the rules of what type a result has.

They are named here rather than with ``numpy.dtype`` because bfloat16 is none of NumPy's own:
a problem in bfloat16 can be planned without the package (ml_dtypes) that computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class DType:
    """One element type. There is one instance per type: compare with ``is`` or ``==``."""

    name: str
    kind: str  # "b" bool, "i" signed, "u" unsigned, "f" real floating, "c" complex
    itemsize: int
    eps: float = 0.0  # the distance from 1 to the next larger number; 0 for exact types

    @property
    def is_complex(self) -> bool:
        return self.kind == "c"

    @property
    def is_exact(self) -> bool:
        """Bool and integers: sums are exact (modulo 2^64)."""
        return self.kind in "biu"

    @property
    def is_half(self) -> bool:
        """A 16-bit float, summed in float32."""
        return self.kind == "f" and self.itemsize == 2

    @property
    def numpy(self) -> np.dtype[Any]:
        """NumPy's dtype; for bfloat16 that of ml_dtypes."""
        return _numpy_dtype(self.name)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"DType({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return of, (self.name,)  # the one instance, in any process


BOOL = DType("bool", "b", 1)
INT8, INT16, INT32, INT64 = (DType(f"int{8 * n}", "i", n) for n in (1, 2, 4, 8))
UINT8, UINT16, UINT32, UINT64 = (DType(f"uint{8 * n}", "u", n) for n in (1, 2, 4, 8))
FLOAT16 = DType("float16", "f", 2, 2.0**-10)
BFLOAT16 = DType("bfloat16", "f", 2, 2.0**-7)
FLOAT32 = DType("float32", "f", 4, 2.0**-23)
FLOAT64 = DType("float64", "f", 8, 2.0**-52)
COMPLEX64 = DType("complex64", "c", 8, 2.0**-23)
COMPLEX128 = DType("complex128", "c", 16, 2.0**-52)

ALL = (
    BOOL, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64,
    FLOAT16, BFLOAT16, FLOAT32, FLOAT64, COMPLEX64, COMPLEX128,
)  # fmt: skip
_BY_NAME = {dtype.name: dtype for dtype in ALL}


@cache
def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise TypeError(
            "bfloat16 on the CPU needs the package ml_dtypes: pip install ml_dtypes"
        ) from error
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


@cache
def of(spec: Any) -> DType:
    """The DType that `spec` names: a name, a NumPy dtype or scalar type, or another library's.

    Other libraries' dtypes are known by the last word of how they print
    (``torch.float32``, ``array_api_strict.float32``). Raises TypeError for any other type.
    """
    if isinstance(spec, DType):
        return spec
    name = spec if isinstance(spec, str) else None
    if name not in _BY_NAME:
        try:
            if spec is None:  # NumPy's float64
                raise TypeError
            name = np.dtype(spec).name
        except TypeError:
            name = str(spec).rsplit(".", 1)[-1].rstrip("'>")
    if name not in _BY_NAME:
        raise TypeError(
            f"dtype {spec!r} is not one that gpuconv computes; it knows {', '.join(_BY_NAME)}"
        )
    return _BY_NAME[name]


def promote(a: DType, b: DType) -> DType:
    """The type that holds both: NumPy's ``result_type`` within a kind, else the higher kind's.

    An integer beside a float takes the float's type, whatever its width (the rule of torch and
    JAX): an int32 image under a float32 filter does not become float64 behind one's back.
    """
    if a is b:
        return a
    order = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}
    if order[a.kind] > order[b.kind]:
        a, b = b, a
    if order[a.kind] == order[b.kind]:
        if a.is_half and b.is_half:
            return FLOAT32
        if BFLOAT16 in (a, b):  # NumPy's table knows it only once ml_dtypes is loaded
            return b if a is BFLOAT16 else a
        both = np.result_type(a.name, b.name)
        if both.kind == "f" and a.is_exact:
            raise TypeError(f"no integer type holds both {a} and {b}; convert one of them first")
        return of(both)
    if b.is_complex and a is FLOAT64:
        return COMPLEX128
    return b


def natural_result(x: DType, w: DType) -> DType:
    """The result's type where none is asked: the promoted type; 64 bits for bool and integers.

    The rule of the array API's ``sum``: signed and bool give int64, unsigned gives uint64.
    """
    both = promote(x, w)
    if both.is_exact:
        return UINT64 if both.kind == "u" else INT64
    return both


def accumulator(dtype: DType) -> DType:
    """The type that products of `dtype` are summed in."""
    if dtype.is_half:
        return FLOAT32
    if dtype.is_exact:
        return UINT64 if dtype.kind == "u" else INT64
    return dtype


def sum_type(x: DType, w: DType, result: DType) -> DType:
    """The type that products of x and w are summed in where the sum is stored as `result`."""
    natural = natural_result(x, w)
    # Integers add up modulo 2^64 alike, signed or not: only a float changes the sum's type.
    return accumulator(natural if result.is_exact else promote(natural, result))


def can_convert(source: DType, target: DType) -> bool:
    """Whether a sum of `source` may be stored as `target`, losing no fraction or imaginary part."""
    if source.is_exact:
        return True
    return target.kind == "c" or (target.kind == "f" and source.kind == "f")
