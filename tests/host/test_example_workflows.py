"""Each file in example_workflows/ is what the frontend of a running server expects to open, and the server to run.

The server has an empty file for each model that a workflow names: it checks everything before it reads one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.tools import demo, example_workflows, host, workflow
from pack.tools.host import ROOT
from pack.tools.server import PromptFailed, Server

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
# No two hosts' nodes are quite alike; what the frontend of the newest one saves, it and older ones open.
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a combo, each of whose options is described
NUMBERS: dict[str, tuple[type, ...]] = {"INT": (int,), "FLOAT": (int, float)}
WIDGETS = {"COMBO", DYNAMIC, "STRING", "BOOLEAN", *NUMBERS}


@pytest.fixture(scope="module")
def stocked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the demo's models and a placeholder for every other."""
    base = tmp_path_factory.mktemp("stocked")
    found = host.find()
    demo.prepare_models(found)
    demo.copy_models(base / "models")
    example_workflows.place_files(base / "models")
    with Server(found, base, "--cpu") as running:
        yield running


@pytest.fixture(scope="module")
def known_nodes(stocked_server: Server) -> dict[str, Any]:
    return stocked_server.object_info()


def inputs_of(definition: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """A node type's inputs in the frontend's order: name -> (type, options).  A list for a type is a combo."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in definition["input"].get(group, {}).items():
            described = dict(options[0]) if options else {}
            if isinstance(kind, list):
                kind, described["options"] = "COMBO", kind
            found[name] = (kind, described)
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_and_widgets_match_the_server(path: Path, known_nodes: dict[str, Any]) -> None:
    for node in workflow.load(path)["nodes"]:
        if node["type"] in workflow.NOTES:
            assert [type(value) for value in node["widgets_values"]] == [str]
            assert not node["inputs"] and not node["outputs"]
            continue
        assert node["type"] in known_nodes
        definition = known_nodes[node["type"]]
        inputs = inputs_of(definition)
        widgets = [
            name for name, (kind, options) in inputs.items() if kind in WIDGETS and not options.get("forceInput")
        ]
        values = workflow.widget_values(node)
        assert list(values) == widgets, node["type"]
        for name, value in values.items():
            check_value(value, *inputs[name])
        sockets = {slot["name"]: slot["type"] for slot in node["inputs"] if "widget" not in slot}
        assert sockets == {name: kind for name, (kind, _) in inputs.items() if name not in widgets}
        assert [slot["type"] for slot in node["outputs"]] == definition["output"]
        linked = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
        required = set(definition["input"].get("required", {}))
        assert required <= linked | set(widgets), f"{node['type']}: a required input is neither linked nor a widget"


def check_value(value: Any, kind: str, options: dict[str, Any]) -> None:
    if kind == "COMBO":
        assert value in options["options"]
    elif kind == DYNAMIC:
        (chosen,) = [option for option in options["options"] if option["key"] == value]
        assert not any(chosen["inputs"].values()), "its further inputs would be widgets, too"
    elif kind in NUMBERS:
        assert isinstance(value, NUMBERS[kind])
        assert options["min"] <= value <= options["max"]
    else:
        assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_join_what_they_say(path: Path) -> None:
    saved = workflow.load(path)
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert saved["last_node_id"] == max(nodes)
    assert saved["last_link_id"] == max(link[0] for link in saved["links"])
    for number, source, source_slot, target, target_slot, kind in saved["links"]:
        output = nodes[source]["outputs"][source_slot]
        socket = nodes[target]["inputs"][target_slot]
        assert output["type"] == socket["type"] == kind
        assert number in output["links"]
        assert socket["link"] == number
    ends = [slot["link"] for node in saved["nodes"] for slot in node["inputs"] if slot["link"] is not None]
    starts = [link for node in saved["nodes"] for slot in node["outputs"] for link in slot["links"] or []]
    assert sorted(ends) == sorted(starts) == sorted(link[0] for link in saved["links"])


RECIPES = example_workflows.RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=example_workflows.name_of)
def test_the_file_is_what_its_recipe_makes(recipe: Callable, known_nodes: dict[str, Any]) -> None:
    path = example_workflows.FOLDER / f"{example_workflows.name_of(recipe)}.json"
    made = example_workflows.written(recipe, known_nodes)
    assert path.read_text(encoding="utf-8") == made, "run tools/example_workflows.py with the Python of .venv"


@pytest.mark.parametrize("recipe", RECIPES, ids=example_workflows.name_of)
def test_the_server_takes_it_and_stops_only_at_the_empty_files(recipe: Callable, stocked_server: Server) -> None:
    path = example_workflows.FOLDER / f"{example_workflows.name_of(recipe)}.json"
    prompt = workflow.to_api(workflow.load(path))
    with pytest.raises(PromptFailed) as failed:
        stocked_server.queue(prompt)
    assert re.match(
        r"the workflow failed in (SluiceDiffusionModelLoader|SluiceCLIPLoader|VAELoader|CheckpointLoaderSimple)",
        str(failed.value),
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=example_workflows.name_of)
def test_the_note_says_where_each_model_is_published(recipe: Callable) -> None:
    saved = workflow.load(example_workflows.FOLDER / f"{example_workflows.name_of(recipe)}.json")
    (note,) = [node["widgets_values"][0] for node in saved["nodes"] if node["type"] in workflow.NOTES]
    named = {value for node in saved["nodes"] for value in node["widgets_values"] if value in example_workflows.FILES}
    assert len(named) >= 3
    assert {name for name in named if f"- [{name}](https://" not in note} == set()


@pytest.mark.parametrize("recipe", RECIPES, ids=example_workflows.name_of)
def test_block_swap_loras_and_stages_are_in_place(recipe: Callable) -> None:
    """Every model goes from its loader, which has a budget, through its LoRAs to its Offload Mode."""
    graph = workflow.to_api(workflow.load(example_workflows.FOLDER / f"{example_workflows.name_of(recipe)}.json"))
    stages = [node for node in graph.values() if node["class_type"] == "SluiceOffloadMode"]
    models = sum(node["class_type"] == "SluiceDiffusionModelLoader" for node in graph.values())
    stacks = []
    for stage in stages:
        node, loras = graph[stage["inputs"]["model"][0]], 0
        while node["class_type"] == "SluiceLoraLoader":
            node, loras = graph[node["inputs"]["model"][0]], loras + 1
        assert node["class_type"] == "SluiceDiffusionModelLoader"
        assert graph[node["inputs"]["block_swap"][0]]["class_type"] == "SluiceBlockSwapConfig"
        stacks.append(loras)
    assert len(stages) == models == (2 if recipe is example_workflows.wan22 else 1)
    assert min(stacks) >= (2 if recipe in (example_workflows.flux1, example_workflows.sdxl) else 1)


def test_every_placeholder_is_used() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    assert [name for name in example_workflows.FILES if name not in text] == []
