"""The house as docs/architecture.md draws it: every room named, dependencies pointing down, no circles."""

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nnunet_ssl"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
MAY_USE = {
    "architectures": set(),
    "imaging": set(),
    "phantom": set(),
    "weights": {"architectures"},
    "corpus": {"imaging"},
    "conversion": {"imaging", "corpus"},
    "audit": {"imaging", "corpus", "weights"},
    "pretraining": {"architectures", "weights", "corpus"},
    "trainers": {"architectures", "weights", "pretraining", "imaging"},
    "interface": {"architectures", "weights", "corpus"},
    "evaluation": {"architectures", "weights", "corpus", "interface", "imaging", "pretraining", "trainers"},
    "studies": {"evaluation", "weights", "pretraining", "trainers"},
    "demo": {"evaluation", "trainers"},
    "deployment": {"evaluation", "interface", "weights", "conversion", "corpus", "imaging"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    names = {name_of(module) for module in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & names


def test_no_module_imports_in_a_circle():
    TopologicalSorter({name_of(path): imports_of(path) for path in MODULES}).prepare()


def test_dependencies_point_down():
    for path in MODULES:
        room = path.relative_to(PACKAGE).parts[0]
        used = {name.split(".")[1] for name in imports_of(path)} & MAY_USE.keys()
        assert used - {room} <= MAY_USE.get(room, set()), name_of(path)


def test_nothing_imports_a_command():
    for path in MODULES:
        commands = {name for name in imports_of(path) if name.rsplit(".", 1)[-1] in ("cli", "__main__")}
        assert not commands, name_of(path)


def test_the_map_names_every_module_and_no_other():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    named = {
        word for line in text.splitlines() if line.startswith("| `") for word in line.split("|")[1].split("`")[1::2]
    }
    existing = {str(path.relative_to(PACKAGE)) for path in MODULES}
    existing |= {path.name for path in (PACKAGE.parent / "dataset_conversion").glob("*.py")}
    assert existing - named == set(), "not in docs/architecture.md"
    assert named - existing == set(), "no longer there"


def test_the_drawing_of_dependencies_names_every_room():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    drawing = text.split("## Which way dependencies point")[1].split("```")[1]
    assert MAY_USE.keys() <= set(re.findall(r"\w+", drawing))


def test_no_two_classes_have_one_name():
    """Nobody who searches for a class is to read two."""
    names = Counter(
        node.name for path in MODULES for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    )
    assert len(names) > 50
    assert [name for name, count in names.items() if count > 1] == []
