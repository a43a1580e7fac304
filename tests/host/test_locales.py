"""The English texts are the nodes' own, and a running server gives every language to its frontend."""

from __future__ import annotations

from typing import Any

import pytest
from pack.tools import locales
from pack.tools.server import Server


@pytest.fixture(scope="module")
def definitions(server: Server) -> dict[str, Any]:
    return locales.ours(server.object_info())


def test_english_is_what_the_nodes_say(definitions: dict[str, Any]) -> None:
    made = locales.written(locales.english(definitions))
    found = locales.path_of(locales.SOURCE).read_text(encoding="utf-8")
    assert found == made, "run tools/locales.py with the Python of .venv"


def test_every_node_and_input_has_its_texts(definitions: dict[str, Any]) -> None:
    """By another way than the one that writes them: combos and sockets, required and optional."""
    for language in locales.LANGUAGES:
        texts = locales.load(language)
        assert set(texts) == set(definitions)
        for key, node in definitions.items():
            names = [name for group in node["input_order"].values() for name in group]
            visible = [name for name in names if name not in node["input_order"].get("hidden", [])]
            assert list(texts[key]["inputs"]) == visible, (language, key)


def test_the_server_gives_them_to_the_frontend(server: Server) -> None:
    served = server.get("/i18n")
    for language in locales.LANGUAGES:
        for name in locales.FILES:
            texts = locales.load(language, name)
            found = served[language] if name == locales.MAIN_FILE else {name: served[language][name]}
            wanted = texts if name == locales.MAIN_FILE else {name: texts}
            assert {part: found[part] for part in wanted} == wanted, (language, name)
