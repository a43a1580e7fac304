"""Which tensor gets which type: the rules of loaders/recipes.py, on the names of real models."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest
from pack.loaders import recipes
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant.quantize import QUANTISERS
from pack.loaders.recipes import DELICATE, FALLBACKS, FLOATS, RECIPES, Wanted, choose, parse_overrides, writable

T = GGMLType
ROOT = Path(__file__).resolve().parents[1]


def wanted(name: str, *shape: int, own: GGMLType = T.BF16) -> Wanted:
    return Wanted(name, shape, own)


def block(container: str, index: int, width: int = 512) -> list[Wanted]:
    """A block of a diffusion transformer, in Flux's names."""
    start = f"{container}.{index}."
    return [
        wanted(f"{start}img_mod.lin.weight", 6 * width, width),
        wanted(f"{start}img_attn.qkv.weight", 3 * width, width),
        wanted(f"{start}img_attn.qkv.bias", 3 * width),
        wanted(f"{start}img_attn.norm.query_norm.scale", 128),
        wanted(f"{start}img_attn.proj.weight", width, width),
        wanted(f"{start}img_mlp.0.weight", 4 * width, width),
        wanted(f"{start}img_mlp.2.weight", width, 4 * width),
    ]


def model(width: int = 512) -> list[Wanted]:
    return [
        wanted("img_in.weight", width, 64),
        wanted("time_in.in_layer.weight", width, 256),
        wanted("t_embedder.mlp.0.weight", width, 256),
        wanted("t_embedder.mlp.2.weight", width, width),
        *(tensor for index in range(19) for tensor in block("double_blocks", index, width)),
        wanted("final_layer.linear.weight", 64, width),
        wanted("final_layer.adaLN_modulation.1.weight", 2 * width, width),
    ]


def types(recipe: str, tensors: list[Wanted] | None = None, overrides: str = "") -> dict[str, GGMLType]:
    chosen = choose(model() if tensors is None else tensors, RECIPES[recipe], parse_overrides(overrides.splitlines()))
    return {name: choice.ggml_type for name, choice in chosen.items()}


def test_every_type_has_a_recipe_that_is_mostly_it() -> None:
    bulk = {recipe.bulk for recipe in RECIPES.values()}
    assert bulk == set(QUANTISERS) | {T.F32, T.F16, T.BF16}
    assert set(writable()) == bulk


@pytest.mark.parametrize("name", RECIPES)
def test_file_types_are_llama_cpps(name: str) -> None:
    theirs = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(name, f"MOSTLY_{name}")
    assert gguf.LlamaFileType[theirs] == RECIPES[name].file_type


@pytest.mark.parametrize("name", RECIPES)
def test_a_better_type_is_one_of_more_bits(name: str) -> None:
    recipe = RECIPES[name]
    if recipe.delicate is not None:
        assert recipes._bits(recipe.delicate) > recipes._bits(recipe.bulk)


def test_fallbacks_end_in_small_blocks_of_no_fewer_bits() -> None:
    large = {kind for kind in QUANTISERS if BLOCKS[kind].elements > 32}
    assert set(FALLBACKS) == large
    for kind, other in FALLBACKS.items():
        assert BLOCKS[other].elements == 32
        assert recipes._bits(other) >= recipes._bits(kind) - 0.25  # MXFP4 for NVFP4 is the one that is smaller


def test_blocks_are_quantised_and_what_is_outside_is_kept() -> None:
    found = types("Q4_K_S")
    for name, kind in found.items():
        inside = name.startswith("double_blocks")
        assert kind is ((T.Q4_K if inside else T.BF16) if name.endswith(".weight") else T.F32), name


def test_delicate_matrices_are_better_in_half_of_the_blocks() -> None:
    found = types("Q4_K_M")
    better = {name for name, kind in found.items() if kind is T.Q6_K}
    assert {re.sub(r"\d+", "", name, count=1) for name in better} == {
        "double_blocks..img_attn.qkv.weight",
        "double_blocks..img_mlp.2.weight",
    }
    numbers = sorted({int(name.split(".")[1]) for name in better})
    assert numbers == [0, 1, 4, 7, 10, 13, 16, 17, 18]  # 19 blocks: 2 in front, 3 at the end, every third between
    assert all(name.endswith("mlp.2.weight") or "qkv" in name for name in better)


def test_delicate_matrices_are_better_everywhere_where_the_recipe_says_so() -> None:
    found = types("Q3_K_L")
    assert {found[f"double_blocks.{i}.img_attn.qkv.weight"] for i in range(19)} == {T.Q5_K}
    assert {found[f"double_blocks.{i}.img_attn.proj.weight"] for i in range(19)} == {T.Q3_K}


@pytest.mark.parametrize(
    "name",
    [
        *("blocks.0.self_attn.v.weight", "blocks.0.ffn.2.weight", "joint_blocks.3.x_block.attn.qkv.weight"),
        *("joint_blocks.3.x_block.mlp.fc2.weight", "transformer_blocks.1.attn.to_v.weight"),
        *(
            "transformer_blocks.1.img_mlp.net.2.weight",
            "layers.2.feed_forward.w2.weight",
            "layers.2.attention.qkv.weight",
        ),
        *("single_blocks.0.linear2.weight", "encoder.block.0.layer.0.SelfAttention.v.weight"),
        *("encoder.block.0.layer.1.DenseReluDense.wo.weight", "model.layers.0.mlp.down_proj.weight"),
        *("model.layers.0.self_attn.v_proj.weight", "transformer_blocks.0.attn.add_v_proj.weight"),
        *("down_blocks.0.transformer_blocks.0.ff.net.2.weight", "double_blocks.0.img_mlp.2.weight"),
    ],
)
def test_delicate_matrices_of_models_in_the_wild(name: str) -> None:
    assert DELICATE.search(name)


@pytest.mark.parametrize(
    "name",
    [
        *("blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight", "joint_blocks.3.x_block.attn.proj.weight"),
        *(
            "single_blocks.0.linear1.weight",
            "transformer_blocks.1.attn.to_out.0.weight",
            "layers.2.feed_forward.w1.weight",
        ),
        *("double_blocks.0.img_mod.lin.weight", "double_blocks.2.img_attn.proj.weight"),
    ],
)
def test_other_matrices_are_not_delicate(name: str) -> None:
    assert not DELICATE.search(name)


def test_rows_that_do_not_fit_get_smaller_blocks_or_keep_their_bits() -> None:
    by_width = {width: types("Q4_K_S", model(width)) for width in (512, 96, 72)}
    name = "double_blocks.5.img_attn.proj.weight"
    assert {width: found[name] for width, found in by_width.items()} == {512: T.Q4_K, 96: T.Q5_0, 72: T.BF16}
    reasons = choose(model(96), RECIPES["Q4_K_S"])
    assert reasons[name].reason == "rows of 96 are no whole blocks of Q4_K"


def test_convolutions_are_stored_in_rows_of_256() -> None:
    convolutions = [
        wanted(f"input_blocks.{i}.0.{part}.weight", 320, 320, 3, 3) for i in (1, 2) for part in ("in", "out", "skip")
    ]
    small = wanted("input_blocks.1.0.emb.weight", 30, 9, 3, 3)
    video = wanted("input_blocks.1.0.time.weight", 64, 32, 3, 4, 4)
    chosen = choose([*convolutions, small, video], RECIPES["Q4_K_S"])
    assert {(chosen[c.name].ggml_type, chosen[c.name].shape) for c in convolutions} == {(T.Q4_K, (3600, 256))}
    assert (chosen[small.name].ggml_type, chosen[small.name].shape) == (T.BF16, (30, 9, 3, 3))
    assert (chosen[video.name].ggml_type, chosen[video.name].shape) == (T.Q4_K, (64, 1536))


def test_shapes_that_gguf_has_no_dimensions_for() -> None:
    chosen = choose([wanted("patch_embedding.weight", 8, 4, 1, 2, 2), wanted("scale")], RECIPES["Q8_0"])
    assert chosen["patch_embedding.weight"].shape == (8, 16)
    assert chosen["scale"].shape == (1,)


def test_large_matrices_outside_of_the_blocks_become_q8_0() -> None:
    tensors = [*model(), wanted("shared.weight", 40_000, 1024), wanted("small_table.weight", 4_000, 1024)]
    found = types("Q3_K_S", tensors)
    assert (found["shared.weight"], found["small_table.weight"]) == (T.Q8_0, T.BF16)


def test_what_is_quantised_already_stays_so_where_it_is_kept() -> None:
    tensors = [Wanted(t.name, t.shape, t.own, T.Q6_K if len(t.shape) > 1 else None) for t in model()]
    vocabulary = Wanted("shared.weight", (40_000, 1024), T.F32, T.Q4_K)
    odd = Wanted("img_in.conv.weight", (32, 3, 3, 3), T.F32, T.Q8_0)  # flat in its file
    found = types("Q3_K_S", [*tensors, vocabulary, odd])
    assert found["double_blocks.3.img_attn.proj.weight"] is T.Q3_K
    assert found["final_layer.linear.weight"] is T.Q6_K
    assert found["img_in.weight"] is T.Q8_0  # rows of 64
    assert found["shared.weight"] is T.Q4_K
    assert found["img_in.conv.weight"] is T.F32
    assert found["double_blocks.3.img_attn.qkv.bias"] is T.F32
    plain = Wanted("img_in.weight", (64, 64), T.BF16, T.F32)  # loaded to be computed with in bfloat16
    assert types("Q4_0", [*model()[1:], plain])["img_in.weight"] is T.F32


def test_routers_and_relative_positions_are_kept() -> None:
    names = ("double_blocks.0.ff_i.gate.weight", "double_blocks.0.relative_attention_bias.weight")
    found = types("Q4_0", [*model(), *(wanted(name, 64, 512) for name in names)])
    assert {found[name] for name in names} == {T.F32}


def test_bfloat16_outside_of_matrices_becomes_f32_unless_it_is_large() -> None:
    tables = {"modulation": (6, 512), "pos_embed": (1, 36864, 1536), "norm.weight": (512,), "half.bias": (512,)}
    tensors = [*model(), *(wanted(name, *shape) for name, shape in tables.items() if name != "half.bias")]
    found = types("Q4_K_M", [*tensors, wanted("half.bias", 512, own=T.F16)])
    assert [found[name] for name in tables] == [T.F32, T.BF16, T.F32, T.F16]


def test_plain_recipes_change_matrices_only() -> None:
    found = types("F16")
    assert {kind for name, kind in found.items() if name.endswith(".weight")} == {T.F16}
    assert {kind for name, kind in found.items() if not name.endswith(".weight")} == {T.F32}


def test_numbers_that_are_no_floats_are_kept() -> None:
    tokenizer = wanted("spiece_model", 70_000, own=T.I8)
    table = wanted("double_blocks.0.index.weight", 64, 512, own=T.I64)
    found = types("Q4_K_M", [*model(), tokenizer, table], ".*=Q8_0")
    assert (found["spiece_model"], found["double_blocks.0.index.weight"]) == (T.I8, T.I64)
    assert not {T.I8, T.I64} & FLOATS


def test_overrides_come_first_and_the_first_counts() -> None:
    found = types("Q4_K_M", overrides="img_mod = q8_0\n\ndouble_blocks\\.1\\.=Q5_K\nimg_in=Q4_0\ndouble_blocks.1.=F32")
    assert found["double_blocks.1.img_mod.lin.weight"] is T.Q8_0
    assert found["double_blocks.1.img_attn.proj.weight"] is T.Q5_K
    assert found["double_blocks.11.img_attn.proj.weight"] is T.F32
    assert found["double_blocks.2.img_attn.proj.weight"] is T.Q4_K
    assert found["img_in.weight"] is T.Q4_0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("img_mod", "'img_mod' does not say PATTERN=TYPE with a type among F32, BF16, F16, Q8_0, "),
        ("img_mod=Q9_9", "'img_mod=Q9_9' does not say PATTERN=TYPE"),
        ("img_mod=Q8_1", "does not say PATTERN=TYPE"),
        ("img_(mod=Q8_0", r"'img_\(mod' in 'img_\(mod=Q8_0' is no regular expression"),
    ],
)
def test_overrides_that_say_nothing_are_errors(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_overrides([line])


def test_the_nodes_page_names_every_recipe() -> None:
    page = (ROOT / "web" / "docs" / "SluiceSaveGGUF.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]+\d\w*)`", page))
    assert {name for name in RECIPES if name not in named} == set()
