"""The rooms of the package: which imports which, and that CONTRIBUTING tells the truth about them."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tkfac_jax

ROOT = Path(__file__).parents[1]
PACKAGE = Path(tkfac_jax.__file__).parent
# Each may import those before it; what stands in no room, all.
ROOMS = ("linalg", "layers", "fisher", "curvature", "optimizers", "training")
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


def imports_of(path):
    """The modules of the package that a file imports, wherever in it, as `room.module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "tkfac_jax":
                known = [".".join(parts[1:n]) for n in (2, 3) if ".".join(parts[1:n]) in MODULES]
                assert known, f"{path} imports {name}, which is no module of the package"
                found.add(known[0])
    return found


def room_of(module):
    room, _, inner = module.partition(".")
    return room if inner else None


def place_of(module):
    room = room_of(module)
    return len(ROOMS) if room is None else ROOMS.index(room)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_itself_and_rooms_before_it(module):
    upwards = [other for other in imports_of(MODULES[module]) if place_of(other) > place_of(module)]
    assert not upwards


def test_the_imports_are_seen():
    imported = imports_of(MODULES["curvature.transitions"])
    assert {
        "curvature.damping",
        "fisher.layer_statistics",
        "layers.spec",
        "linalg.meshes",
    } <= imported
    assert imports_of(MODULES["layers.flax_linen"])


def test_no_modules_import_each_other():
    TopologicalSorter({name: imports_of(path) for name, path in MODULES.items()}).prepare()


def test_curvature_takes_from_fisher_the_types_of_statistics_alone():
    modules = [imports_of(path) for name, path in MODULES.items() if room_of(name) == "curvature"]
    of_fisher = {other for imported in modules for other in imported if room_of(other) == "fisher"}
    assert of_fisher == {"fisher.layer_statistics"}


def test_every_room_says_what_lives_there():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ROOMS)
    for room in ROOMS:
        init = PACKAGE / room / "__init__.py"
        tree = ast.parse(init.read_text())
        # Users import from the package; a room hands nothing on.
        assert len(tree.body) == 1
        text = ast.get_docstring(tree)
        assert text is not None
        assert "import" in text or "Imports" in text
        assert len(text.splitlines()) <= 5


def test_no_module_hides_behind_a_name_that_the_package_exports():
    names = {path.stem for path in MODULES.values()} - {"analysis"}
    assert not names & set(tkfac_jax.__all__)
    assert set(tkfac_jax.__all__) <= set(vars(tkfac_jax))


def test_contributing_names_every_module_in_its_room():
    rows = re.findall(r"^\| `(\w+)/` \| (.*?) \|", GUIDE, re.MULTILINE)
    assert [room for room, _ in rows] == list(ROOMS)
    listed = {
        f"{room}.{module}" for room, text in rows for module in re.findall(r"`(\w+)\.py`", text)
    }
    assert listed == {module for module in MODULES if room_of(module)}


def test_the_walks_of_contributing_lead_where_they_say():
    """Each step of a walk is `room/module.py` with the names in it that are to be read."""
    steps = re.findall(r"`(\w+/\w+)\.py`:\s((?:`[\w.]+`(?:, )?)+)", GUIDE)
    assert len(steps) > 20
    for place, names in steps:
        text = MODULES[place.replace("/", ".")].read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            *_, last = name.split(".")
            assert re.search(rf"^ *(?:def|class) {last}\b|^{last}\b.* = ", text, re.MULTILINE), (
                place,
                name,
            )


def test_no_document_imports_from_a_room():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for document in documents:
        assert not re.findall(rf"tkfac_jax\.(?:{'|'.join(ROOMS)})\b", document.read_text()), (
            document
        )


def test_every_file_of_tests_can_be_run_alone():
    """What several of them share stands beside the rooms, where each finds it."""
    for path in (ROOT / "tests").rglob("*.py"):
        for other in re.findall(r"^from (test_\w+) import", path.read_text(), re.MULTILINE):
            assert (path.parent / f"{other}.py").exists(), path


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))],
)
def test_documents_name_tests_that_there_are(document):
    path = ROOT / document if (ROOT / document).exists() else ROOT / "docs" / document
    named = set(re.findall(r"tests/[\w/]+\.py", path.read_text()))
    assert named or document != "README.md"
    assert not [name for name in named if not (ROOT / name).exists()]
