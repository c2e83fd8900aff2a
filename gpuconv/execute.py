"""From the caller's arrays to a backend's, and the result back: the middle of every call.

Algorithms see one form only: x, w and out as channels-first views, (N, C, spatial...), of whatever
strides the caller's memory has. Layouts, missing batches, memory formats and foreign libraries end
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from gpuconv import arrays, backends, dtypes
from gpuconv.calls import Call, Calls, Signature
from gpuconv.plan import Plan, choose
from gpuconv.problem import ConvProblem

NOT_GIVEN = object()  # None is what a caller might pass by mistake


class Operands:
    """The arrays of one call, checked for library and device, and taken in by a backend.

    `x` and `w` are the first and the second array that the operation reads, whatever their roles.
    `function` and `names` are the call's and its operands' in errors; `backend` is the one that
    must serve (a plan's own), else the surrounding ``use_backend`` or the arrays decide.
    """

    def __init__(
        self,
        function: str,
        *,
        x: Any,
        w: Any = NOT_GIVEN,
        bias: Any = None,
        out: Any = None,
        backend: str | None = None,
        names: tuple[str, str, str] = ("x", "w", "out"),
    ) -> None:
        self.function = function
        self.names = names
        given = {names[0]: x, names[1]: w, "bias": bias, names[2]: out}
        optional = {"bias": None, names[1]: NOT_GIVEN, names[2]: None}
        present = {n: a for n, a in given.items() if n not in optional or a is not optional[n]}
        self.library, place = arrays.same_library(function, present)
        self.backend = backends.forced_backend() or self._own_backend(place)
        if backend is not None and backend != self.backend:
            raise TypeError(
                f"{function}: the plan is for the backend {backend!r}, but the arrays are of "
                f"{self.library.name} on {place}; plan with backend={self.backend!r}, or move them "
                f"with gpuconv.use_backend({backend!r})"
            )
        self.like, self.out_given = x, out
        self._given = x, w, bias
        if out is not None:
            self._check_writable(out)
        module = backends.backend(self.backend)
        self._module = module
        self.device = module.device(place)
        self.x = self._take(names[0], x)
        self.w: Any = None if w is NOT_GIVEN else self._take(names[1], w)
        self.bias = None if bias is None else self._take("bias", bias)

    def _own_backend(self, place: str) -> str:
        """The backend that computes where the arrays lie."""
        if place == "cpu":
            return "numpy"
        if place.startswith("cuda"):
            return "cuda"
        raise TypeError(
            f"{self.function}: {self.names[0]} is of {self.library.name} on {place}, which no "
            f"backend computes on; bring it to the CPU or a CUDA device"
        )

    def _check_writable(self, out: Any) -> None:
        name, library = self.names[2], self.library
        if not library.writable(out):
            raise ValueError(
                f"{self.function}: {name} is a read-only {library.name} array; it takes one "
                f"that can be written"
            )
        strides = library.strides(out)
        if any(s == 0 and n > 1 for s, n in zip(strides, library.shape(out), strict=True)):
            raise ValueError(
                f"{self.function}: {name} has strides {strides}, which make one place in memory "
                f"of several elements; it takes an array with a place for each"
            )

    def _take(self, name: str, array: Any) -> Any:
        try:
            return self._module.take(array, self.library, self.device)
        except TypeError as error:
            raise TypeError(f"{self.function}: {name}: {error}") from error

    def _take_out(self) -> Any:
        try:
            return self._module.take_out(self.out_given, self.library, self.device)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.function}: {self.names[2]}: {error}") from error

    def run(self, plan: Plan, calls: Calls | None = None, key: Signature | None = None) -> Any:
        """Check the arrays against `plan`, compute, and hand the result to the caller's library.

        Where there is a `key`, the call is kept under it in `calls` for others like it.
        """
        self._check(plan)
        if plan.backend == "cuda" and plan.device is not self.device:  # of another GPU's arrays
            plan = choose(self.function, plan.problem, plan.backend, self.device, plan.algorithm)
        with self._module.active(self.device):
            problem = plan.problem
            axes_last, batched = problem.layout.endswith("C"), problem.batched
            x, w = (
                array if role == "w" else channels_first(array, axes_last, batched)
                for array, role in zip((self.x, self.w), problem.roles, strict=False)
            )
            is_filter = problem.roles[2] == "w"
            out = self._take_out()
            if out is None:
                y = self.compute(plan, x, w, self.bias)
                result = self.give(y if is_filter else as_layout(y, axes_last, batched))
            else:
                y = out if is_filter else channels_first(out, axes_last, batched)
                # Memory of its own comes first where what is still to be read would be overwritten,
                # or where numbers lie in a byte order that algorithms do not compute in.
                native = out.dtype.isnative
                if not native or self._module.overlaps(out, (self.x, self.w, self.bias)):
                    y[...] = self.compute(plan, x, w, self.bias)
                else:
                    self.compute(plan, x, w, self.bias, y)
                self._module.give_out(out, self.library, self.out_given)
                result = self.out_given
            if calls is not None and key is not None and self._repeats(out, x, w, y):
                calls.remember(key, self._call(plan, x, w, y))
        return result

    def _repeats(self, out: Any, x: Any, w: Any, y: Any) -> bool:
        """Whether the backend took the caller's own arrays, and had something to compute."""
        taken = (self.x, self.w, self.bias, out)
        given = (*self._given, self.out_given)
        same = all(a is b for a, b in zip(taken, given, strict=True))
        return same and y.dtype.isnative and 0 not in (*x.shape, *w.shape, *y.shape)

    def _call(self, plan: Plan, x: Any, w: Any, y: Any) -> Call:
        """What is left of a call whose arrays are as these; it holds none of them."""
        function, names, module, device = self.function, self.names, self._module, self.device
        problem = plan.problem
        axes_last, batched = problem.layout.endswith("C"), problem.batched
        first, second, third = (
            role != "w" and (axes_last or not batched) for role in problem.roles
        )
        memory, order = allocation(problem, problem.roles[2], y.shape)
        run, dtype = plan.implementation.run, problem.result_dtype

        def again(x: Any, w: Any, bias: Any, out: Any) -> Any:
            operands = Operands(
                function, x=x, w=w, bias=bias, out=out, backend=plan.backend, names=names
            )
            return operands.run(plan)

        def call(x: Any, w: Any, bias: Any, out: Any) -> Any:
            if out is not None and module.overlaps(out, (x, w, bias)):
                return again(x, w, bias, out)
            with module.active(device):
                result = out
                if result is None:
                    result = module.empty(memory, dtype, device)
                    if order is not None:
                        result = result.transpose(order)
                if first:
                    x = channels_first(x, axes_last, batched)
                if second:
                    w = channels_first(w, axes_last, batched)
                y = channels_first(result, axes_last, batched) if third else result
                with np.errstate(all="ignore"):
                    run(plan, x, w, bias, y)
            return result

        bound = module.bind(plan, x, w, self.bias, y)
        if bound is None:
            return call
        return module.prepared(bound, device, memory, order, dtype, again)  # type: ignore[no-any-return]

    def compute(self, plan: Plan, x: Any, w: Any, bias: Any = None, y: Any = None) -> Any:
        """The plan's result for the backend's own arrays, channels first: written to y if given."""
        problem = plan.problem
        shape = problem.result_shape
        if problem.roles[2] != "w":
            shape = (x.shape[0], *shape[1:])
        if y is None:
            y = self._empty(plan, shape)
        if 0 in shape:
            return y
        if 0 in x.shape or 0 in w.shape:  # sums of nothing: no algorithm need know them
            y[...] = 0 if bias is None else bias.reshape(-1, *[1] * problem.ndim)
        else:
            # A sum that overflows is infinite, as in every library of this kind, without a warning.
            with np.errstate(all="ignore"):
                plan.implementation.run(plan, x, w, bias, y)
        return y

    def give(self, result: Any) -> Any:
        """A result of the backend as an array of the caller's library."""
        return self._module.give(result, self.library, self.like)

    def deliver(self, result: Any) -> Any:
        """The same, written to the caller's `out` where that was given."""
        out = self._take_out()
        if out is None:
            return self.give(result)
        out[...] = result
        self._module.give_out(out, self.library, self.out_given)
        return self.out_given

    def active(self) -> AbstractContextManager[Any]:
        """What the backend's own operations on its arrays run inside of."""
        return self._module.active(self.device)  # type: ignore[no-any-return]

    def check_result(self, dtype: dtypes.DType) -> None:
        """TypeError where the caller's library cannot hold `dtype`."""
        try:
            self.library.check_result(dtype)
        except TypeError as error:
            raise TypeError(f"{self.function}: {error}") from None

    def adopt(self, array: Any) -> Any:
        """A NumPy array of the function's own, as the backend's."""
        return self._module.take(array, arrays.NUMPY, self.device)

    def empty(self, shape: tuple[int, ...], dtype: dtypes.DType) -> Any:
        """An uninitialised C-contiguous array of the backend."""
        return self._module.empty(shape, dtype, self.device)

    def _empty(self, plan: Plan, shape: tuple[int, ...]) -> Any:
        """An uninitialised result, channels first, images in the memory order of x."""
        dtype = plan.problem.result_dtype
        if not plan.problem.channels_last or plan.problem.roles[2] == "w":
            return self.empty(shape, dtype)
        last = self.empty((shape[0], *shape[2:], shape[1]), dtype)
        return channels_first(last, True, True)

    def _check(self, plan: Plan) -> None:
        problem = plan.problem
        first, second, result = problem.roles
        self._check_operand(0, self.x, problem, first)
        self._check_operand(1, self.w, problem, second)
        batched = problem.operation == "wgrad" and problem.batched
        if batched and self.x.shape[0] != self.w.shape[0]:
            raise ValueError(
                f"{self.function}: {self.names[0]} has a batch of {self.x.shape[0]} but "
                f"{self.names[1]} one of {self.w.shape[0]}; they must be the same"
            )
        if (self.bias is None) != (problem.bias is None):
            was, now = ("without", "with") if problem.bias is None else ("with", "without")
            raise ValueError(f"{self.function}: planned {was} a bias, called {now} one")
        if self.bias is not None and problem.bias is not None:
            self._check_array("bias", self.bias, (problem.bias_channels,), problem.bias)
        if self.out_given is None:
            self.check_result(problem.result_dtype)
        else:
            shape = _written_shape(problem, result)
            if problem.batched and result != "w":
                shape = (self.x.shape[0], *shape[1:])
            self._check_array(self.names[2], self.out_given, shape, problem.result_dtype)

    def _check_operand(self, which: int, array: Any, problem: ConvProblem, role: str) -> None:
        free = 1 if problem.batched and role != "w" else 0  # the batch may differ from the planned
        self._check_array(
            self.names[which], array, _written_shape(problem, role), problem.dtype_of(role), free
        )

    def _check_array(
        self, name: str, array: Any, shape: tuple[int, ...], dtype: dtypes.DType, free: int = 0
    ) -> None:
        given = array is self.out_given
        came = self.library.shape(array) if given else tuple(array.shape)
        if len(came) != len(shape) or came[free:] != shape[free:]:
            raise ValueError(f"{self.function}: {name} has shape {came}; it takes {shape}")
        own = self.library.dtype(array) if given else array.dtype
        if dtypes.of(own) is not dtype:
            raise TypeError(f"{self.function}: {name} is {own}; it takes {dtype}")

    def memory_order(self, ndim: int, layout: Any) -> bool | None:
        """Whether x's memory runs channels last; None where that is what `layout` says anyway.

        The rule of torch: a view whose strides fall in the order N, H, W, C is channels last. Where
        one channel or one pixel leaves both orders open, the strides of extents of 1 decide.
        """
        x = self.x
        if x.ndim not in (ndim + 1, ndim + 2):
            return None
        axes_last = isinstance(layout, str) and layout.endswith("C")  # what else is refused later
        batched = x.ndim == ndim + 2
        shape = _written_first(x.shape, axes_last, batched)
        _, channels, *pixels = shape
        either = channels == 1 or all(n == 1 for n in pixels)
        if x.flags.c_contiguous and not either:
            return None
        strides, place = x.strides, x.itemsize
        if either:  # CuPy and DLPack forget the strides of extents of 1 that torch knows
            strides, place = self.library.strides(self.like), 1
        strides = _written_first(strides, axes_last, batched)
        orders = {False: range(1, ndim + 2), True: (*range(2, ndim + 2), 1)}
        fits = [last for last in orders if _falling(shape, strides, (0, *orders[last]), place)]
        if len(fits) == 2:
            fits = [
                last for last in fits if _falling(shape, strides, orders[last], place, ones=True)
            ]
        return fits[0] if len(fits) == 1 else None


def _written_first(values: tuple[int, ...], axes_last: bool, batched: bool) -> tuple[int, ...]:
    """The shape or strides of (N,) C, spatial... or (N,) spatial..., C as those of N, C, spatial...

    Without N, that is one image: its stride is of no account.
    """
    if not batched:
        values = (1, *values)
    return (values[0], values[-1], *values[1:-1]) if axes_last else values


def _falling(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    order: Sequence[int],
    place: int,
    *,
    ones: bool = False,
) -> bool:
    """Whether strides fall along `order`, each step clear of the whole extent inside it.

    The last step is at least `place`. What steps over an extent of 1 counts only with `ones`.
    """
    inner = place
    for axis in reversed(order):
        if shape[axis] > 1 or ones:
            if abs(strides[axis]) < inner:
                return False
            inner = abs(strides[axis]) * max(shape[axis], 1)
    return True


def channels_first(array: Any, axes_last: bool, batched: bool) -> Any:
    """The view (N, C, spatial...) of an array written (N,) C, spatial... or (N,) spatial..., C."""
    if not batched:
        array = array[None]
    if axes_last:
        array = array.transpose(0, array.ndim - 1, *range(1, array.ndim - 1))
    return array


def as_layout(array: Any, axes_last: bool, batched: bool) -> Any:
    """The inverse of ``channels_first``."""
    if axes_last:
        array = array.transpose(0, *range(2, array.ndim), 1)
    return array if batched else array[0]


def allocation(
    problem: ConvProblem, role: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """How "x", "w" or "y" of a channels-first shape is allocated, and then transposed.

    The extents of C-contiguous memory in the planned order, and the order in which the caller sees
    its axes: None where that is the same.
    """
    if role == "w":
        return shape, None
    last, axes_last, ndim = problem.channels_last, problem.layout.endswith("C"), problem.ndim
    memory = as_layout_shape(shape, last, problem.batched)
    if last == axes_last:
        return memory, None
    images = len(memory) - ndim - 1
    channels, spatial = (images + ndim, images) if last else (images, images + 1)
    order = [*range(images), *range(spatial, spatial + ndim)]
    order.insert(len(order) if axes_last else images, channels)
    return memory, tuple(order)


def _written_shape(problem: ConvProblem, role: str) -> tuple[int, ...]:
    """The shape of "x", "w" or "y" as the caller writes it."""
    if role == "w":
        return problem.w_shape
    return as_layout_shape(problem.shape_of(role), problem.layout.endswith("C"), problem.batched)


def as_layout_shape(shape: tuple[int, ...], axes_last: bool, batched: bool) -> tuple[int, ...]:
    """A channels-first shape as the caller writes it."""
    if axes_last:
        shape = (shape[0], *shape[2:], shape[1])
    return shape if batched else shape[1:]
