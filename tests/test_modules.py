"""That CONTRIBUTING tells the truth about the modules."""

import re
from pathlib import Path

import tkfac_jax

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in Path(tkfac_jax.__file__).parent.glob("*.py")}
del MODULES["__init__"]


def test_the_table_of_modules_names_all_of_them_in_the_order_in_which_they_import_each_other():
    lines = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    rows = [re.findall(r"`(\w+)\.py`", line) for line in lines]
    place = {module: number for number, row in enumerate(rows) for module in row}
    assert sorted(place) == sorted(MODULES)
    imports = {
        (module, other)
        for module, path in MODULES.items()
        for other in re.findall(r"^from tkfac_jax\.(\w+) import", path.read_text(), re.MULTILINE)
    }
    assert ("curvature", "initial") in imports
    assert not {(module, other) for module, other in imports if place[other] > place[module]}
