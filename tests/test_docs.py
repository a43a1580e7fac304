"""README and the other pages say what is true: the matrix is current, links lead somewhere, commands exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pack.tools import support_matrix

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "demo/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "web" / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python dev\.py (\w+)")
README_SECTIONS = (
    *("Install", "A one-minute example", "Two commands", "Nodes", "What is supported", "Measurements", "Limits"),
    "Licence",
)


def dev_commands() -> set[str]:
    tree = ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"))
    (table,) = (n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "COMMANDS")
    assert isinstance(table, ast.Dict)
    return {str(key.value) for key in table.keys if isinstance(key, ast.Constant)}


def readme() -> str:
    return support_matrix.README.read_text(encoding="utf-8")


def test_support_matrix_is_current() -> None:
    assert readme() == support_matrix.updated(readme()), "run tools/support_matrix.py with the Python of .venv"


def test_support_matrix_is_put_between_its_markers() -> None:
    text = f"before\n{support_matrix.BEGIN}\nold\n{support_matrix.END}\nafter\n"
    assert support_matrix.updated(text) == f"before\n{support_matrix.matrix()}\nafter\n"
    with pytest.raises(ValueError, match="lacks the line"):
        support_matrix.updated("no markers")


def test_support_matrix_names_every_type_and_architecture() -> None:
    from host.tiny_models import ARCHITECTURES
    from pack.loaders.gguf.types import GGMLType

    text = support_matrix.matrix()
    assert [kind.name for kind in GGMLType if not re.search(rf"\b{kind.name} \(", text)] == []
    assert [tiny.family for tiny in ARCHITECTURES.values() if not re.search(rf"\b{tiny.family}\b", text)] == []


def test_kernels_of_the_matrix_are_those_of_the_table() -> None:
    launch = pytest.importorskip("pack.loaders.quant.kernels.launch", reason="needs Triton", exc_type=ImportError)
    assert support_matrix.kernel_types() == {kind.name for kind in launch.KERNELS}


def test_readme_keeps_its_order() -> None:
    assert tuple(re.findall(r"^## (.+)$", readme(), re.MULTILINE)) == README_SECTIONS
    assert readme().index("](docs/") < readme().index("## Install")  # the picture comes first


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link.split("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    assert set(COMMAND.findall(page.read_text(encoding="utf-8"))) <= dev_commands()


def test_readme_shows_the_two_commands() -> None:
    assert {"demo", "test"} <= set(COMMAND.findall(readme()))
