"""locales/: every text in every language, nothing left over, and translations that still say what the original says.

English equals the node definitions (tests/host/test_locales.py), so what is compared here with English is compared
with the nodes.
"""

from __future__ import annotations

import json
import re

import pytest
from pack.tools import locales

SOURCES = {name: locales.load(locales.SOURCE, name) for name in locales.FILES}
SOURCE = SOURCES[locales.NODES_FILE]
WORDS = SOURCES[locales.MAIN_FILE][locales.OURS]
TRANSLATIONS = [language for language in locales.LANGUAGES if language != locales.SOURCE]

# What must stay as it is, because it is what the user sees or types: values of combos, folders, numbers, names.
VALUES = (
    *("auto", "page_cache", "pinned", "disk", "runtime", "merge", "cond_only", "cond_diffusion", "layer_streaming"),
    *("aggressive", "dryrun", "formula", "caches", "offload(?=:)", "dispose(?=:)", "default", "cpu", "flux"),
)
KEPT = re.compile(
    r"\b(?:models|output)/\w+|\.gguf|\.safetensors|(?<![\w.])-?\d+(?:\^\d+)?(?!\w)"
    r"|\b(?:GGUF|LoRAs?|CLIP|MODEL|LATENT|IMAGE|VAE|VRAM|ComfyUI|NVIDIA|AMD|img_mod=Q8_0|Q\d_\w+)\b"
    rf"|\b(?:{'|'.join(VALUES)})(?!\w)"
)
# Words of the live view that are the same in some other language.
SAME_WORDS = {"ram_comfyui", "caches", "loras", "cache_loras", "cache_kernels", "copies", "status_sample"}
# A language's own word for something that is kept otherwise.
OWN_WORDS = {"zh": {"VRAM": "显存"}}
SCRIPTS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7af]"}
# vue-i18n, which shows the texts but for those of the live view, reads these as its own syntax.
SYNTAX = re.compile(r"[{}@|]")
PLACEHOLDER = re.compile(r"\{\w+\}")
PLURALS = ("_one", "_other")


def kept(text: str) -> set[str]:
    return {"LoRA" if found == "LoRAs" else found for found in KEPT.findall(text)}


@pytest.mark.parametrize("name", locales.FILES)
@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_nothing_is_missing_or_left_over(language: str, name: str) -> None:
    assert locales.complaints(SOURCES[name], locales.load(language, name)) == []


@pytest.mark.parametrize("name", locales.FILES)
@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_files_are_tidy(language: str, name: str) -> None:
    """Keys in the order of the English file, which is the order of the nodes' inputs, and one way to write JSON."""
    text = locales.path_of(language, name).read_text(encoding="utf-8")
    found = list(locales.leaves(json.loads(text)))
    assert text == locales.written(json.loads(text))
    assert [place for place, _ in found] == [place for place, _ in locales.leaves(SOURCES[name])]
    assert [place for place, text in found if text != text.strip() or "  " in text] == []


@pytest.mark.parametrize(("name", "made"), locales.english_of_scripts().items())
def test_english_is_that_of_the_scripts(name: str, made: dict) -> None:
    found = locales.path_of(locales.SOURCE, name).read_text(encoding="utf-8")
    assert found == locales.written(made), "run tools/locales.py"


def test_no_text_of_the_scripts_is_overlooked() -> None:
    settings, words = (script.read_text(encoding="utf-8") for script in (locales.SETTINGS, locales.WORDS))
    assert len(SOURCES[locales.SETTINGS_FILE]) == settings.count("defaultValue:")
    assert len(WORDS) == len(re.findall(r"^  \w+:", words, re.MULTILINE))
    assert SOURCES[locales.MAIN_FILE][locales.HEADINGS].keys() == {"Streaming", "Diagnostics"}


def test_keys_can_be_looked_up() -> None:
    """The frontend joins them to a path, in which these letters have a meaning: such an option is not translated."""
    keys = {key for source in SOURCES.values() for place, _ in locales.leaves(source) for key in place}
    assert [key for key in keys if re.search(r"""[.'"\[\]]""", key)] == []


def test_there_is_no_other_language_and_no_other_file() -> None:
    files = {path.relative_to(locales.FOLDER).as_posix() for path in locales.FOLDER.rglob("*") if path.is_file()}
    assert {file.split("/")[0] for file in files} == set(locales.LANGUAGES)
    assert {file.split("/")[1] for file in files} == {f"{name}.json" for name in locales.FILES}


@pytest.mark.parametrize("name", locales.FILES)
@pytest.mark.parametrize("language", TRANSLATIONS)
def test_sentences_are_translated(language: str, name: str) -> None:
    given = dict(locales.leaves(locales.load(language, name)))
    sentences = {p: text for p, text in locales.leaves(SOURCES[name]) if p[-1] in {"tooltip", "description"}}
    assert [place for place, text in sentences.items() if given[place] == text] == []
    script = re.compile(SCRIPTS.get(language, ""))
    assert [place for place in sentences if not script.search(given[place])] == []


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_what_the_user_sees_or_types_is_not_translated(language: str) -> None:
    own = OWN_WORDS.get(language, {})
    given = dict(locales.leaves(locales.load(language)))
    lost = []
    for place, text in locales.leaves(SOURCE):
        if place[-1] in {"tooltip", "description"}:
            words = {own.get(word, word) for word in kept(text)}
            lost += [(place, word) for word in words if word not in given[place]]
    assert lost == []


def test_what_is_kept_is_found() -> None:
    text = "0: LoRAs in models/loras, auto, -1, 10^9, pinned, Q5_K_M and .gguf; offload: no. 1, not x1."
    assert kept(text) == {
        "0",
        "LoRA",
        "models/loras",
        "auto",
        "-1",
        "10^9",
        "pinned",
        "Q5_K_M",
        ".gguf",
        "offload",
        "1",
    }


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_nodes_are_called_by_their_translated_names(language: str) -> None:
    translated = locales.load(language)
    names = {node["display_name"]: translated[key]["display_name"] for key, node in SOURCE.items()}
    given = dict(locales.leaves(translated))
    wrong = [
        (place, name)
        for place, text in locales.leaves(SOURCE)
        for name, own in names.items()
        if place[-1] == "tooltip" and name in text and own not in given[place]
    ]
    assert wrong == []


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_no_text_is_read_as_syntax(language: str) -> None:
    texts = [
        (name, place, text)
        for name in locales.FILES
        for place, text in locales.leaves(locales.load(language, name))
        if place[0] != locales.OURS
    ]
    assert [found for found in texts if SYNTAX.search(found[-1])] == []


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_words_have_the_placeholders_of_the_english_ones(language: str) -> None:
    given = locales.load(language, locales.MAIN_FILE)[locales.OURS]
    filled = {word: sorted(PLACEHOLDER.findall(text)) for word, text in WORDS.items()}
    assert {word: sorted(PLACEHOLDER.findall(given[word])) for word in given} == filled
    assert [text for text in given.values() if re.search(r"[{}]", PLACEHOLDER.sub("", text))] == []


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_words_are_translated(language: str) -> None:
    """But for names and for what is made of placeholders and units only."""
    given = locales.load(language, locales.MAIN_FILE)[locales.OURS]
    same = {word for word, text in WORDS.items() if given[word] == text}
    assert same <= {word for word, text in WORDS.items() if "{" in text or text.isupper()} | SAME_WORDS


def test_every_word_is_said_and_every_word_that_is_said_is_there() -> None:
    """`t("...")` and `counted("...")` name a word in full, `named("...")` how several begin."""
    folder = locales.WORDS.parents[1]
    scripts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.js") if path != locales.WORDS]
    names = {name for script in scripts for name in re.findall(r'"([a-z_]+)"', script)}
    begun = {name for script in scripts for name in re.findall(r'\bnamed\("([a-z_]+)"', script)}
    counted = {name for script in scripts for name in re.findall(r'\bcounted\("([a-z_]+)"', script)}
    said = {name for script in scripts for name in re.findall(r'\bt\("([a-z_]+)"', script)}
    assert said <= WORDS.keys() and {f"{name}{end}" for name in counted for end in PLURALS} <= WORDS.keys()
    unsaid = {
        word
        for word in WORDS
        if word not in names
        and not any(word == f"{name}{end}" for name in counted for end in PLURALS)
        and not any(word.startswith(f"{name}_") for name in begun)
    }
    assert unsaid == set()


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_inputs_of_a_node_can_be_told_apart(language: str) -> None:
    for key, node in locales.load(language).items():
        names = [slot["name"] for slot in node["inputs"].values()]
        assert len(set(names)) == len(names), key


def test_complaints_tell_both_ways() -> None:
    source = {"A": {"display_name": "a", "inputs": {"x": {"name": "x"}}}}
    given = {"A": {"display_name": "", "inputs": {"y": {"name": "y"}}}}
    assert locales.complaints(source, given) == [
        "lacks A.display_name: a",
        "lacks A.inputs.x.name: x",
        "has A.inputs.y.name, which is gone",
    ]
