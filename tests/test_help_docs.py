"""docs/ knows all that the pack has: every node, input and choice, every setting, every error, every source.

The lists come from the code; nothing here is kept by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from error_texts import HOLE, ErrorText, error_texts, warnings
from layers import sources
from pack.loaders.gguf import errors
from pack.offload.costs import SOURCES
from pack.offload.stages import HOW, MODES, WHAT
from pack.tools import locales

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SETTING = re.compile(r'\bid: "(sluice\.\w+)"')
CODE = re.compile(r"`([^`]+)`")
ENOUGH = 10  # letters of a quotation that tell one text from the others


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def all_pages() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))


# --- errors


ERRORS = [text for source in sources(ROOT) for text in error_texts(source)]
# One file of each kind that people mistake for GGUF, and what is said of it.
MISTAKEN = [
    ErrorText("loaders/gguf/errors.py", "GGUFError", errors.not_gguf("file.gguf", head).problem)
    for head in errors._SIGNATURES
]
WARNINGS = [text for source in sources(ROOT) for text in warnings(source)]


def quotations(section: str) -> Iterator[str]:
    """What the first column of a section's tables quotes."""
    for line in section.splitlines():
        if line.startswith("| "):
            yield from CODE.findall(line.split(" | ")[0])


def quotes(quotation: str, text: str) -> bool:
    """Whether a text of the code has these words in this order. Few words must be all that it has."""
    if len(quotation.replace(HOLE, "")) < ENOUGH:
        return quotation == text
    place = 0
    for piece in quotation.split(HOLE):
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


BODY, LOGGED = page("troubleshooting").split("## Warnings in the log")


@pytest.mark.parametrize("error", [*ERRORS, *MISTAKEN], ids=lambda error: f"{error.place}-{error.text[:40]}")
def test_every_error_is_in_troubleshooting(error: ErrorText) -> None:
    if not error.text.replace(HOLE, "").strip(" :;,."):
        return  # only another error's text
    assert any(quotes(quotation, error.text) for quotation in quotations(BODY)), error


def test_troubleshooting_quotes_no_error_that_is_gone() -> None:
    known = [error.text for error in [*ERRORS, *MISTAKEN]]
    assert [words for words in quotations(BODY) if not any(quotes(words, text) for text in known)] == []


def test_every_warning_is_in_troubleshooting() -> None:
    section = LOGGED.split("\n## ")[0]
    known = [warning.text for warning in WARNINGS]
    assert [text for text in known if not any(quotes(words, text) for words in quotations(section))] == []
    assert [words for words in quotations(section) if not any(quotes(words, text) for text in known)] == []


def test_few_words_quote_nothing_else() -> None:
    assert quotes("it is …", "it is …")
    assert not quotes("it is …", "it is neither GGUF nor safetensors")
    assert quotes("part … of the model", "part … of … of the model, …, is missing from …")
    assert not quotes("of the model … part of it", "part … of … of the model, …, is missing from …")


def test_the_texts_are_found_in_the_code() -> None:
    """The search itself: through variables, tables, conditions, functions and both kinds of strings."""
    texts = {error.text for error in ERRORS}
    for known in (
        "it may not be read",  # a table of this file
        "the file is empty (0 bytes)",
        "it changes a text encoder only",  # a function that returns one or the other
        "not a GGUF file: it is a safetensors file",
        "appears twice",  # a cursor's, which knows the place
        f"part {HOLE} of {HOLE} of the model, {HOLE}, is missing from {HOLE}",
    ):
        assert known in texts
    assert len(texts) > 100


# --- nodes, inputs, choices, settings


def test_choosing_names_every_node_that_has_a_choice_to_make_and_its_inputs() -> None:
    text = page("choosing")
    nodes = locales.load(locales.SOURCE)
    for key in ("SluiceBlockSwapConfig", "SluiceOffloadMode"):
        assert f"({'../web/docs/' + key}.md)" in text
        dials = {name for name in nodes[key]["inputs"] if name not in {"model", "clip", "vae"}}
        assert {name for name in dials if f"`{name}`" not in text} == set()


def test_every_node_is_in_docs() -> None:
    text, nodes = all_pages(), locales.load(locales.SOURCE)
    assert [node["display_name"] for node in nodes.values() if node["display_name"] not in text] == []


def test_every_choice_is_in_docs() -> None:
    text = all_pages() + "".join(path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").glob("*.md"))
    assert [word for word in (*SOURCES, *MODES, *WHAT, *HOW) if not re.search(rf"\b{word}\b", text)] == []


def test_every_setting_is_in_docs() -> None:
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "web").rglob("*.js")]
    settings = {found for script in scripts for found in SETTING.findall(script)}
    variables = {found for source in sources(ROOT) for found in re.findall(r'"(SLUICE_[A-Z_]+)"', source.text)}
    variables.discard("SLUICE_BLOCK_SWAP")  # a type of links
    assert settings
    assert [name for name in sorted(settings | variables) if f"`{name}`" not in page("choosing")] == []


def test_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS.glob("*.md") if f"(docs/{path.name}" not in readme] == []


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_anchors_lead_somewhere(path: Path) -> None:
    for name, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", path.read_text(encoding="utf-8")):
        target = (path.parent / name) if name else path
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in anchors, f"{path.name}: {name}#{anchor}"
