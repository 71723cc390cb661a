"""Results as JSON that every reader accepts, and curves as columns of numbers, which stay small."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def columns(curve: Sequence[Mapping[str, float]], digits: int = 5) -> dict[str, list[float | None]]:
    """The points of a curve as columns, without the seconds: None where a point lacks a figure or it is not finite."""
    names = dict.fromkeys(name for point in curve for name in point if name != "seconds")
    return {name: [rounded(point.get(name), digits) for point in curve] for name in names}


def rounded(value: float | None, digits: int = 5) -> float | None:
    """A number with so many significant digits; None where it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def write_results(results: Any, path: Path) -> None:
    """Writes results as indented JSON, with null for numbers that are not finite: all of it, or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(_finite(results), indent=1, allow_nan=False))
    part.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """Writes results with one line for each entry of the two outer levels."""
    outer = []
    for name, value in results.items():
        if isinstance(value, Mapping):
            inner = [f"  {json.dumps(key)}: {_line(entry)}" for key, entry in value.items()]
            outer.append(f" {json.dumps(name)}: {{\n" + ",\n".join(inner) + "\n }")
        else:
            outer.append(f" {json.dumps(name)}: {_line(value)}")
    path.write_text("{\n" + ",\n".join(outer) + "\n}\n")


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
