"""Which type each tensor of a saved model gets.

A *recipe* is what the name of a quantised file promises (Q4_K_M, IQ3_S, ...): the type of most matrices, and a better
one for those whose error the picture shows most. The rest follows from the tensor itself, the same in every recipe:

- Vectors, norms, biases and tables that are no `.weight` keep their values: they are small, and are added to or
  multiplied with every activation. So do tensors of fewer than 1024 elements, where blocks would save nothing worth a
  rounding. Bfloat16 becomes F32 there, as converters have it: ComfyUI-GGUF reads BF16 in few kinds of layers only.
- Routers of experts and tables of relative positions keep theirs: a rounding there is another choice, no small error.
- Outside of the repeated blocks (embedders of picture, text and time, the last layer) tensors keep theirs: every
  block's input, or the picture itself, depends on them. Those of more than 2^25 elements (vocabularies, shared
  modulations) become Q8_0. What is quantised already stays as it is.
- A block must not cross a row. Where rows are not whole blocks, FALLBACKS has a type with smaller ones. The kernels of
  a convolution are used whole, so it is stored in rows of 256, whatever its shape. What still does not fit keeps its
  own bits.

The delicate matrices are attention's values (or query, key and value in one) and the second matrix of a feed-forward
layer, in half of the blocks: the first and last eighth and every third between. So llama.cpp's mixes have it
(llama-quant.cpp, `use_more_bits`); the names here are those of diffusion models and text encoders.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from .gguf.types import BLOCKS, GGMLType
from .gguf.writer import MAX_DIMS

T = GGMLType

SMALLEST_QUANTISED = 1024  # elements
LARGEST_WIDENED = 1 << 22  # elements; a larger table stays BF16
LARGEST_KEPT = 1 << 25  # elements; of a matrix outside the blocks
ROW_OF_A_CONVOLUTION = 256  # elements, a whole number of blocks of every type


@dataclass(frozen=True)
class Recipe:
    """`file_type` is llama.cpp's number for such a file (enum llama_ftype in llama.h)."""

    bulk: GGMLType
    file_type: int
    delicate: GGMLType | None = None
    everywhere: bool = False  # the delicate ones in every block, not in half of them


RECIPES: dict[str, Recipe] = {
    "F32": Recipe(T.F32, 0),
    "F16": Recipe(T.F16, 1),
    "BF16": Recipe(T.BF16, 32),
    "Q8_0": Recipe(T.Q8_0, 7),
    "Q6_K": Recipe(T.Q6_K, 18),
    "Q5_K_M": Recipe(T.Q5_K, 17, T.Q6_K),
    "Q5_K_S": Recipe(T.Q5_K, 16),
    "Q5_1": Recipe(T.Q5_1, 9),
    "Q5_0": Recipe(T.Q5_0, 8),
    "Q4_K_M": Recipe(T.Q4_K, 15, T.Q6_K),
    "Q4_K_S": Recipe(T.Q4_K, 14),
    "Q4_1": Recipe(T.Q4_1, 3),
    "Q4_0": Recipe(T.Q4_0, 2),
    "IQ4_NL": Recipe(T.IQ4_NL, 25),
    "IQ4_XS": Recipe(T.IQ4_XS, 30),
    "MXFP4": Recipe(T.MXFP4, 38),
    "NVFP4": Recipe(T.NVFP4, 39),
    "Q3_K_L": Recipe(T.Q3_K, 13, T.Q5_K, everywhere=True),
    "Q3_K_M": Recipe(T.Q3_K, 12, T.Q4_K, everywhere=True),
    "Q3_K_S": Recipe(T.Q3_K, 11),
    "IQ3_M": Recipe(T.IQ3_S, 27, T.Q4_K, everywhere=True),
    "IQ3_S": Recipe(T.IQ3_S, 26),
    "IQ3_XXS": Recipe(T.IQ3_XXS, 23, T.IQ3_S),
    "Q2_K": Recipe(T.Q2_K, 10, T.Q3_K, everywhere=True),
    "Q2_K_S": Recipe(T.Q2_K, 21, T.Q3_K),
    "IQ2_M": Recipe(T.IQ2_S, 29, T.IQ3_S, everywhere=True),
    "IQ2_S": Recipe(T.IQ2_S, 28, T.IQ3_S),
    "IQ2_XS": Recipe(T.IQ2_XS, 20, T.IQ3_XXS),
    "IQ2_XXS": Recipe(T.IQ2_XXS, 19, T.Q2_K),
    "TQ2_0": Recipe(T.TQ2_0, 37),
    "IQ1_M": Recipe(T.IQ1_M, 31, T.IQ2_XXS),
    "TQ1_0": Recipe(T.TQ1_0, 36),
    "IQ1_S": Recipe(T.IQ1_S, 24, T.IQ2_XXS),
}

# Type -> what is taken where a row is not a whole number of its blocks. Mostly llama.cpp's choices: the nearest type
# with blocks of 32 that is not worse.
FALLBACKS: dict[GGMLType, GGMLType] = {
    **dict.fromkeys((T.Q2_K, T.Q3_K, T.TQ1_0, T.TQ2_0), T.Q4_0),
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL),
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
    T.NVFP4: T.MXFP4,
}

# Names of delicate matrices, as models in the wild have them.
_VALUES = r"(to_v|add_v_proj|v_proj|attn_v|v_img|\.v|\.wv|SelfAttention\.v|qkv|to_qkv|attn\.in_proj)"
_SECOND = r"(fc2|ffn\.2|ff\.net\.2|mlp\.2|mlp\.net\.2|down_proj|ffn_down|\.w2|\.wo|layer2|linear2|\.linear_2)"
DELICATE = re.compile(rf"({_VALUES}|{_SECOND})(\.linear)?\.weight$")

KEPT = re.compile(r"(\.gate|\.router|relative_attention_bias|rel_pos\w*)\.weight$")

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Wanted:
    """A tensor of the model to be saved.

    Args:
        own: the plain type that holds its values.
        blocks: the type that it is quantised in already, if it is and nothing was added to it.
    """

    name: str
    shape: tuple[int, ...]
    own: GGMLType
    blocks: GGMLType | None = None

    @property
    def kept(self) -> GGMLType:
        """What it is stored as when it keeps its precision."""
        return self.own if self.blocks is None else self.blocks


@dataclass(frozen=True)
class Chosen:
    """How a tensor is stored; `shape` is that in the file, of at most four dimensions."""

    ggml_type: GGMLType
    shape: tuple[int, ...]
    reason: str


def choose(
    tensors: Sequence[Wanted], recipe: Recipe, overrides: Iterable[tuple[re.Pattern[str], GGMLType]] = ()
) -> dict[str, Chosen]:
    """The type and shape of every tensor.

    Args:
        overrides: a tensor whose name the pattern is found in gets the type whatever the recipe says, as far as its
            rows allow; the first pattern counts.
    """
    places = _places(tensors)
    overrides = tuple(overrides)
    chosen = {}
    for tensor in tensors:
        asked = next((kind for pattern, kind in overrides if pattern.search(tensor.name)), None)
        if asked is not None and tensor.own in FLOATS:
            wanted, reason = asked, "asked for"
        else:
            wanted, reason = _by_recipe(tensor, recipe, places.get(tensor.name))
        chosen[tensor.name] = _fitted(tensor, wanted, reason)
    return chosen


def _by_recipe(tensor: Wanted, recipe: Recipe, place: tuple[int, int] | None) -> tuple[GGMLType, str]:
    size = prod(tensor.shape)
    if not is_matrix(tensor) or size < SMALLEST_QUANTISED or KEPT.search(tensor.name):
        widened = tensor.kept is T.BF16 and size <= LARGEST_WIDENED
        return T.F32 if widened else tensor.kept, "small, a norm, a bias or a router"
    if recipe.bulk in (T.F32, T.F16, T.BF16):
        return recipe.bulk, "the recipe's"
    if place is None:
        if size <= LARGEST_KEPT or tensor.kept is not tensor.own:
            return tensor.kept, "outside of the repeated blocks"
        return max(T.Q8_0, recipe.bulk, key=_bits), "large and outside of the repeated blocks"
    if recipe.delicate is not None and DELICATE.search(tensor.name) and (recipe.everywhere or _more_bits(*place)):
        return recipe.delicate, "delicate"
    return recipe.bulk, "the recipe's"


def _fitted(tensor: Wanted, wanted: GGMLType, reason: str) -> Chosen:
    """`wanted`, or what comes nearest to it for this shape."""
    kinds = [wanted, *([FALLBACKS[wanted]] if wanted in FALLBACKS else [])]
    shape = tensor.shape or (1,)  # gguf-py reads no tensor without dimensions
    if len(shape) > MAX_DIMS:
        shape = (shape[0], prod(shape[1:]))
    rows = prod(tensor.shape) // ROW_OF_A_CONVOLUTION
    if len(tensor.shape) > 2 and shape[-1] % BLOCKS[wanted].elements and prod(shape) == rows * ROW_OF_A_CONVOLUTION:
        shape = (rows, ROW_OF_A_CONVOLUTION)
    for kind in kinds:
        if shape[-1] % BLOCKS[kind].elements == 0:
            because = reason if kind is wanted else f"rows of {shape[-1]} are no whole blocks of {wanted.name}"
            return Chosen(kind, shape, because)
    return Chosen(tensor.own, shape, f"rows of {shape[-1]} are no whole blocks of {' or '.join(k.name for k in kinds)}")


def is_matrix(tensor: Wanted) -> bool:
    """Whether the tensor is multiplied with: then its values may be rounded."""
    name = tensor.name.lower()
    return len(tensor.shape) > 1 and name.endswith("weight") and "norm" not in name and tensor.own in FLOATS


FLOATS = frozenset({T.F64, T.F32, T.F16, T.BF16})


def _bits(kind: GGMLType) -> float:
    return BLOCKS[kind].nbytes / BLOCKS[kind].elements


def _more_bits(index: int, count: int) -> bool:
    """The first and last eighth of the blocks and every third between, as llama.cpp has it."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def _places(tensors: Sequence[Wanted]) -> dict[str, tuple[int, int]]:
    """For each tensor in a repeated block: which block of how many.

    Blocks are the numbered parts of a container (`double_blocks.3.`, `layers.7.`) that have at least three matrices. A
    time embedder's `mlp.0` and `mlp.2` have one each and are none.
    """
    sizes: dict[str, Counter[int]] = defaultdict(Counter)
    numbered: dict[str, tuple[str, int]] = {}
    for tensor in tensors:
        match = _NUMBER.search(f".{tensor.name}")
        if match is None:
            continue
        container, index = f".{tensor.name}"[: match.start()], int(match[1])
        numbered[tensor.name] = container, index
        sizes[container][index] += is_matrix(tensor)
    blocks = {c: {i for i, count in counts.items() if count >= 3} for c, counts in sizes.items()}
    return {
        name: (index, max(blocks[container]) + 1)
        for name, (container, index) in numbered.items()
        if index in blocks[container]
    }


def summary(chosen: Mapping[str, Chosen]) -> str:
    """`320 x Q4_K, 96 x Q6_K, 520 x F32`, the most frequent first."""
    counts = Counter(c.ggml_type.name for c in chosen.values())
    return ", ".join(f"{count} x {name}" for name, count in counts.most_common())


def parse_overrides(lines: Iterable[str]) -> list[tuple[re.Pattern[str], GGMLType]]:
    """Overrides from `PATTERN=TYPE` lines; empty ones are left out.

    Raises:
        ValueError: a line is none, its pattern no regular expression, or its type not one that can be written.
    """
    found = []
    for line in filter(None, map(str.strip, lines)):
        pattern, equals, name = (part.strip() for part in line.rpartition("="))
        kinds = {kind.name: kind for kind in writable()}
        if not equals or name.upper() not in kinds:
            raise ValueError(
                f"'{line}' does not say PATTERN=TYPE with a type among {', '.join(kinds)}; for example: img_mod=Q8_0"
            )
        try:
            found.append((re.compile(pattern), kinds[name.upper()]))
        except re.error as error:
            raise ValueError(
                f"'{pattern}' in '{line}' is no regular expression: {error}; write it as in img_mod=Q8_0"
            ) from None
    return found


def writable() -> tuple[GGMLType, ...]:
    """The types that a tensor of numbers can be given, the largest first."""
    kinds = {kind for recipe in RECIPES.values() for kind in (recipe.bulk, recipe.delicate) if kind is not None}
    return tuple(sorted(kinds, key=lambda kind: (-_bits(kind), kind.name)))
