"""Checks of vision projectors inside the host: which one belongs to a text encoder, and what is said without one.

`python mmproj_checks.py FOLDER` prints one JSON line for each check.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402
from host import encoder_files  # noqa: E402
from host.tiny_encoder import ENCODERS, LLAMA, TEXT, VOCABULARY  # noqa: E402
from pack.loaders import mmproj, text_encoder  # noqa: E402
from pack.loaders.gguf.errors import GGUFError  # noqa: E402
from pack.loaders.gguf.reader import GGUFFile  # noqa: E402
from pack.loaders.mmproj import find_projector, is_projector  # noqa: E402
from pack.loaders.text_encoder import load_text_encoder  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

TINY = ENCODERS["qwen25_7b"]
MADE = encoder_files.Files({}, {}, {}, None, {})
MODEL = "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf"


def folder(name: str, *projectors: str) -> Path:
    """A folder with the model and projectors of these names."""
    place = FOLDER / name
    place.mkdir()
    encoder_files.write_model(place / MODEL, TINY, MADE)
    for projector in projectors:
        encoder_files.write_projector(place / projector, TINY, MADE)
    return place


def found(place: Path) -> str | None:
    with GGUFFile(place / MODEL) as model:
        projector = find_projector(model)
        if projector is None:
            return None
        projector.close()
        return projector.path.name


def with_width(path: Path, width: int) -> None:
    metadata = {"general.type": "mmproj", "clip.projector_type": TINY.projector, "clip.vision.projection_dim": width}
    encoder_files.write_gguf(path, "clip", metadata, MADE.projector)


def refusal(action) -> str:
    try:
        action()
    except GGUFError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def check_found_by_name() -> None:
    assert found(folder("one", "mmproj-F16.gguf")) == "mmproj-F16.gguf"
    assert found(folder("none")) is None


def check_the_most_alike_name_wins() -> None:
    names = ("mmproj-Omni-3B-F16.gguf", "Qwen2.5-VL-7B-Instruct-mmproj-F16.gguf", "a-mmproj.gguf")
    assert found(folder("several", *names)) == names[1]


def check_width_and_kind_decide_before_names() -> None:
    place = folder("widths", "mmproj-other.gguf")
    with_width(place / "Qwen2.5-VL-7B-Instruct-mmproj.gguf", 99)
    assert found(place) == "mmproj-other.gguf"
    kind = {"general.type": "mmproj", "clip.projector_type": "pixtral", "clip.vision.projection_dim": 256}
    encoder_files.write_gguf(place / "mmproj-other.gguf", "clip", kind, MADE.projector)
    assert found(place) is None


def check_found_by_metadata_alone() -> None:
    place = folder("metadata", "vision-tower.gguf")
    (place / "broken.gguf").write_bytes(b"GGUF")
    with GGUFFile(place / "vision-tower.gguf") as file, GGUFFile(place / MODEL) as model:
        assert is_projector(file) and not is_projector(model)
    assert found(place) == "vision-tower.gguf"


def check_chosen_projector_is_joined() -> None:
    place = folder("chosen")
    elsewhere = FOLDER / "elsewhere.gguf"
    encoder_files.write_projector(elsewhere, TINY, MADE)
    clip = load_text_encoder([place / MODEL, elsewhere], TINY.clip_type)
    assert sees(clip).isfinite().all()
    names = {one.file.path.name for one in clip.patcher.get_attachment("sluice").others}
    assert names == {"elsewhere.gguf"}


def check_chosen_projector_of_another_model_is_refused() -> None:
    place = folder("another")
    with_width(FOLDER / "narrow.gguf", 99)
    said = refusal(lambda: load_text_encoder([place / MODEL, FOLDER / "narrow.gguf"], TINY.clip_type))
    assert "narrow.gguf" in said and "vision projector of another model" in said and "published with" in said


def sees(clip) -> torch.Tensor:
    clip.load_model()
    return clip.cond_stage_model.qwen25_7b.transformer.preprocess_embed(
        {"type": "image", "data": torch.rand(1, 56, 56, 3)}, device=torch.device("cpu")
    )[0]


def check_picture_without_projector() -> None:
    clip = load_text_encoder([folder("blind") / MODEL], TINY.clip_type)
    said = refusal(lambda: sees(clip))
    assert MODEL in said and "'visual.*'" in said and "mmproj-*.gguf" in said


def check_unknown_tensor_in_projector() -> None:
    place = folder("odd")
    metadata = {"general.type": "mmproj", "clip.projector_type": TINY.projector, "clip.vision.projection_dim": 256}
    extra = next(iter(MADE.projector.values()))
    encoder_files.write_gguf(place / "mmproj.gguf", "clip", metadata, {**MADE.projector, "v.strange.weight": extra})
    said = refusal(lambda: load_text_encoder([place / MODEL], TINY.clip_type))
    assert "mmproj.gguf" in said and "'v.strange.weight'" in said


def check_small_gemma_reads_text_beside_its_projector() -> None:
    """The host's own encoder of a Gemma 3 4B that sees fails at every text, so the projector is left out."""
    large = ENCODERS["gemma3_12b"]
    sees = {**next(iter(large.sizes.values())), "num_hidden_layers": 4}
    reads = {name: size for name, size in sees.items() if name not in ("vision_config", "mm_tokens_per_image")}
    sizes = {f"{LLAMA}:Gemma3_4B_Vision_Config": sees, f"{LLAMA}:Gemma3_4B_Config": reads}
    tiny = replace(large, model=f"{LLAMA}:Gemma3_4B_Vision", sizes=sizes)
    place = FOLDER / "gemma"
    place.mkdir()
    path, projector = place / "gemma-3-4b-it-Q4_K_M.gguf", place / "mmproj-gemma-3-4b.gguf"
    with encoder_files.shrunk(tiny):
        made = encoder_files.files_of(tiny)
        encoder_files.write_model(path, tiny, made)
        encoder_files.write_projector(projector, tiny, made)
        lines = Lines()
        mmproj.log.addHandler(lines)
        mmproj.log.setLevel(logging.INFO)
        clip = load_text_encoder([path], tiny.clip_type)
        mmproj.log.removeHandler(lines)
        tokens = {k: [[(t % VOCABULARY, w) for t, w in b] for b in v] for k, v in clip.tokenize(TEXT).items()}
        assert clip.encode_from_tokens(tokens).isfinite().all()
        said = [line for line in lines if projector.name in line]
        assert len(said) == 1 and "48 layers" in said[0], list(lines)
        said_of_chosen = refusal(lambda: load_text_encoder([path, projector], tiny.clip_type))
        assert "48 layers" in said_of_chosen and "leave it out" in said_of_chosen


def check_file_with_the_tokenizer_comes_first() -> None:
    """The host looks for it in the first of LTX's two files, and the node says that their order does not matter."""
    tiny = ENCODERS["gemma2"]
    model, dense, connectors = (FOLDER / name for name in ("g.gguf", "g.safetensors", "connectors.safetensors"))
    with encoder_files.shrunk(tiny):
        made = encoder_files.files_of(tiny)
        encoder_files.write_model(model, tiny, made)
        encoder_files.write_safetensors(dense, tiny, made)
    save_file({"text_embedding_projection.weight": torch.zeros(4, 4)}, connectors)
    for order in ([connectors, model], [model, connectors]):
        files: list[GGUFFile] = []
        first, second = text_encoder._sources(order, files, "ltxv")
        assert (first.path, second.path) == (model, connectors) and "spiece_model" in first.tensors
        files[0].close()
    assert sorted([connectors, dense], key=text_encoder._brings_no_tokenizer) == [dense, connectors]


class Lines(logging.Handler, list):
    def __init__(self) -> None:
        super().__init__(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.append(record.getMessage())

    __hash__ = object.__hash__  # type: ignore[assignment]


def main() -> None:
    with encoder_files.shrunk(TINY), torch.inference_mode():
        MADE.__dict__.update(encoder_files.files_of(TINY).__dict__)
        for name, check in sorted(globals().items()):
            if not name.startswith("check_"):
                continue
            try:
                check()
                failure = ""
            except Exception:
                failure = traceback.format_exc()
            print(json.dumps({"check": name.removeprefix("check_"), "failure": failure}), flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)


main()
