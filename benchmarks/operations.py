"""How many floating-point operations a program makes in matrix products, convolutions and factorisations."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax


def count_operations(fun: Callable[..., Any], *args: Any) -> float:
    """The operations of a function's matrix products, convolutions, factorisations and triangular solves.

    Counted in the traced program, without what leads to no result: the steps of `lax.scan` each, the body of
    `lax.while_loop` once, of the branches of `lax.cond` the longest, and of those of `lax.platform_dependent` the
    default backend's, if it has no `while_loop` in it. An addition and a multiplication are two.
    """
    program = jax.make_jaxpr(fun)(*args).jaxpr
    return _of_program(program, [True] * len(program.outvars))


def _of_program(program: Any, wanted: Sequence[bool]) -> float:
    """The operations that the wanted results of a program take."""
    needed = {id(var) for var, want in zip(program.outvars, wanted, strict=True) if want}
    total = 0.0
    for equation in reversed(program.eqns):
        used = [id(var) in needed for var in equation.outvars]
        if any(used) or equation.effects:
            needed |= {id(var) for var in equation.invars}
            total += _of_equation(equation, used)
    return total


def _of_equation(equation: Any, used: Sequence[bool]) -> float:
    name, params = equation.primitive.name, equation.params
    if name in _COUNTED:
        return _COUNTED[name](equation)
    programs = [program for value in params.values() for program in _programs(value)]
    inner = [
        # The results of a loop's body are more than those of the loop.
        _of_program(
            program,
            used
            if name not in ("scan", "while") and len(program.outvars) == len(used)
            else [True] * len(program.outvars),
        )
        for program in programs
    ]
    if name == "cond":
        platforms = params.get("branches_platforms")
        own = None if platforms is None else _own_branch(platforms)
        return max(inner) if own is None or _has_while(programs[own]) else inner[own]
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _own_branch(platforms: Sequence[Sequence[str] | None]) -> int:
    """Which branch the default backend takes, by the platforms of each; None: all others."""
    backend = jax.default_backend()
    names = ("cuda", "rocm") if backend == "gpu" else (backend,)
    return next(i for i, own in enumerate(platforms) if own is None or {*own} & {*names})


def _has_while(program: Any) -> bool:
    return any(
        equation.primitive.name == "while"
        or any(
            _has_while(inner) for value in equation.params.values() for inner in _programs(value)
        )
        for equation in program.eqns
    )


def _programs(value: Any) -> Iterator[Any]:
    """The programs that a parameter of an equation holds."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _programs(item)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr


def _product(equation: Any) -> float:
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * out.size * math.prod(left.shape[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    """Each output takes a product with each tap and channel of its kernel, those that meet padding included."""
    kernel, out = equation.invars[1].aval, equation.outvars[0].aval
    outputs = equation.params["dimension_numbers"].rhs_spec[0]
    taps = kernel.size // kernel.shape[outputs]
    # Of a dilated input, as in the derivative of a strided convolution, only one tap in so many meets a number.
    return 2 * out.size * taps / math.prod(equation.params["lhs_dilation"])


def _factorisation(equation: Any) -> float:
    matrices = equation.invars[0].aval
    return matrices.size * matrices.shape[-1] / 3


def _solve(equation: Any) -> float:
    triangle, right = (variable.aval for variable in equation.invars[:2])
    return right.size * triangle.shape[-1]


_COUNTED = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "cholesky": _factorisation,
    "triangular_solve": _solve,
}
