"""The checker of types that `--jaxtyping-packages` names: beartype, which writes the check of a signature once.

Functions inside functions are decorated at every call of the outer one. What jaxtyping gives to be checked then is
an empty function made of the signature alone, so that the check of the first serves for all.
"""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

_checked: dict[tuple[str, str, str], Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the types of its arguments and of its value checked."""
    key = function.__module__, function.__qualname__, str(inspect.signature(function))
    if key not in _checked:
        _checked[key] = beartype(function)
    return _checked[key]
