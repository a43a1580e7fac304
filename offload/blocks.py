"""Find the blocks of a diffusion network: the modules whose weights come and go as one while the network runs.

A block is called as a module (`block(...)`), so that hooks on its forward run, and nobody uses its weights outside of
that call. No network says which modules of it are like that, but nearly all of them keep them in lists. So the blocks
are the members of the outermost lists, as far as these are known by name, or are evidently stacks of alike layers, with
three refinements:

- A member that does nothing itself (Stable Cascade's lists of lists, or the UNet's `TimestepEmbedSequential`, whose
  layers ComfyUI calls one by one) stands for its own members.
- A member that is a large part of the network and little else than a stack of its own (SDXL's transformers of ten
  layers) stands for that stack.
- A member that shares weights with something else cannot come and go by itself; its parts that share none can.

A bare layer is never a block: some networks read a layer's weight instead of calling the layer.

The tables below hold what a network's structure cannot tell. A network that they do not know gets its blocks all the
same, only perhaps in another order than they run in, which costs the streamer time and nothing else.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

# Lists of blocks, by the names of the attributes that hold them in ComfyUI's networks.
KNOWN_LISTS = frozenset(
    (
        *("blocks", "layers", "transformer_blocks", "joint_blocks", "encoders"),
        *("double_blocks", "single_blocks", "double_layers", "single_layers"),
        *("double_stream_blocks", "single_stream_blocks", "double_stream_layers", "single_stream_layers"),
        *("noise_refiner", "context_refiner", "siglip_refiner", "ref_image_refiner"),
        *("refiner_blocks", "layerwise_blocks", "caption_projection"),
        *("input_blocks", "middle_block", "output_blocks", "down_blocks", "up_blocks"),
        *("vace_blocks", "fuser_blocks", "injector", "injector_adain_layers"),
        *("patch_blocks", "pixel_blocks", "text_transformer_blocks", "visual_transformer_blocks"),
        *("transformer_1d_blocks", "time_stack"),
    )
)
# Lists that run once for each tile of the picture: streamed, they would be copied as often.
RUN_IN_TILES = frozenset({"nerf_blocks"})
# Classes whose own forward is not called, although they have one; something else calls their children.
NEVER_CALLED = frozenset({"TimestepEmbedSequential"})

# Parts that prepare the text once a prompt, or that run for some inputs only (reference images).
NOT_EVERY_STEP = frozenset(
    (
        *("llm_adapter", "token_refiner", "video_embeddings_connector", "audio_embeddings_connector"),
        *("siglip_refiner", "ref_image_refiner", "visual"),
    )
)
# Parts that run before others that were made earlier, in the order in which they run.
FIRST = (
    *("llm_adapter", "token_refiner", "video_embeddings_connector", "audio_embeddings_connector"),
    *("distilled_guidance_layer", "caption_projection", "txtfusion", "context_refiner", "siglip_refiner"),
    *("lyric_encoder", "encoder", "tokenizer", "detokenizer"),
)
# Lists whose members run between the blocks of MAIN_LIST, and after which of them: a mapping by that block's number,
# which the list's owner has under this name, or else every so many blocks.
MAIN_LIST = "blocks"
SIDE_LISTS: dict[str, str | int] = {
    "vace_blocks": "vace_layers_mapping",
    "injector_adain_layers": "injected_block_id",
    "injector": "injected_block_id",
    "fuser_blocks": 5,
}

LEAST_SHARE = 0.05  # of the network's weights that a list without a known name must hold
STACK_SHARE = 0.05  # of the network's weights; a block that holds more is taken apart if it is a stack itself
MOSTLY = 0.9  # of a stack's weights are in its members


@dataclass(frozen=True)
class Block:
    """A module that is called as one, and no other module or parameter of the network shares its weights."""

    name: str  # in the network: `double_blocks.3`
    module: nn.Module
    every_step: bool = True  # else once a prompt, or for some inputs only


@dataclass(frozen=True)
class _List:
    path: tuple[str, ...]
    owner: nn.Module
    blocks: list[Block]


def find_blocks(network: nn.Module) -> list[Block]:
    """The blocks of `network` in the order in which they run, as far as that can be known; [] if there are none.

    None is inside another, and no two share a parameter. A block may be called more than once in a step.
    """
    found: dict[int, Block] = {}
    for block in _in_order(_Search(network).below(network, ())):
        found.setdefault(id(block.module), block)  # a module may be in two lists
    return list(found.values())


class _Search:
    def __init__(self, network: nn.Module) -> None:
        self._total = _weights(network)
        self._paths: defaultdict[int, list[str]] = defaultdict(list)  # of each module: all its names
        self._holders: defaultdict[int, list[str]] = defaultdict(list)  # of each parameter: the names of its modules
        for path, module in network.named_modules(remove_duplicate=False):
            self._paths[id(module)].append(path)
            for parameter in module.parameters(recurse=False):
                self._holders[id(parameter)].append(path)

    def below(self, module: nn.Module, path: tuple[str, ...]) -> list[_List]:
        """The outermost lists of blocks below `module`, as they were made."""
        lists: list[_List] = []
        for name, child in module.named_children():
            if name in RUN_IN_TILES:
                continue
            inner = (*path, name)
            if _is_list(child) and (name in KNOWN_LISTS or self._is_stack(child)):
                lists.append(_List(inner, module, self._of_members(child, inner)))
            else:
                lists += self.below(child, inner)
        return lists

    def _is_stack(self, container: nn.Module) -> bool:
        """Whether a list of unknown name is one of blocks: several members of one class, with many weights."""
        members = [child for child in container.children() if _weights(child)]
        alike = len({type(member) for member in members}) == 1
        return alike and len(members) > 1 and _weights(container) >= LEAST_SHARE * self._total

    def _of_members(self, module: nn.Module, path: tuple[str, ...]) -> list[Block]:
        return [block for name, child in module.named_children() for block in self._of(child, (*path, name))]

    def _of(self, member: nn.Module, path: tuple[str, ...]) -> list[Block]:
        """What a member of a list contributes: itself, or some of its parts."""
        if not member._modules or not _weights(member):
            return []
        if _does_nothing(member):
            return self._of_members(member, path)
        if _weights(member) > STACK_SHARE * self._total:
            inner = _in_order(self.below(member, path))
            if len(inner) > 1 and sum(_weights(block.module) for block in inner) >= MOSTLY * _weights(member):
                return inner
        if not self._is_exclusive(member):
            return self._of_members(member, path)
        return [Block(".".join(path), member, NOT_EVERY_STEP.isdisjoint(path))]

    def _is_exclusive(self, module: nn.Module) -> bool:
        """Whether its parameters are held by itself and by modules in it, and by nothing else."""
        own = self._paths[id(module)]
        within = tuple(f"{path}." for path in own)
        holders = (path for parameter in module.parameters() for path in self._holders[id(parameter)])
        return all(path in own or path.startswith(within) for path in holders)


def _in_order(lists: Iterable[_List]) -> list[Block]:
    """The blocks of all lists, as they run."""
    lists = sorted(lists, key=lambda found: min(map(_rank, found.path)))
    after: defaultdict[str, list[Block]] = defaultdict(list)
    for name, where in SIDE_LISTS.items():
        for found in lists:
            if found.path[-1] == name:
                places = itertools.count(0, where) if isinstance(where, int) else getattr(found.owner, where, ())
                for block, place in zip(found.blocks, places, strict=False):
                    after[f"{MAIN_LIST}.{place}"].append(block)
    beside = {id(block) for blocks in after.values() for block in blocks}
    ordered: list[Block] = []
    for found in lists:
        for block in found.blocks:
            if id(block) not in beside:
                ordered += [block, *after.pop(block.name, ())]
    return ordered + [block for blocks in after.values() for block in blocks]


def _rank(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST)


def _weights(module: nn.Module) -> int:
    """Counted by number and not by bytes, so that a quantised network has the blocks of the original."""
    return sum(parameter.numel() for parameter in module.parameters())


def _does_nothing(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward or type(module).__name__ in NEVER_CALLED


def _is_list(module: nn.Module) -> bool:
    return _does_nothing(module) or type(module) is nn.Sequential
