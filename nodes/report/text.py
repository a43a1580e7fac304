"""The report in words, from the same object that the route serves."""

from __future__ import annotations

from collections.abc import Iterator

from ...loaders import sizes

LABELS = {"resident": "resident", "streamed": "streamed each pass", "on_disk": "in the file only", "in_ram": "in RAM"}
EVENTS = 12  # of stages, the last ones; a picture has about ten
COLUMNS = {"vram_used": "VRAM", "ram_anonymous": "RAM", "ram_file": "RAM of files"}


def text(report: dict, label: str = "") -> str:
    """Several lines for people; `label` says when it was."""
    parts = [f"Memory: {label}"] if label else []
    for model in report["models"]:
        parts += _model(model)
    if not report["models"]:
        parts.append("no model is loaded")
    parts += [_ram(report["host_ram"]), *map(_vram, report["vram"]), *_caches(report["caches"])]
    parts += [f"dequantising on {one['what']}: {one['choice']}" for one in report["dispatch"]]
    last = report["events"][-EVENTS:]
    parts += [f"{one['what']} {one['action']}, {size(one['nbytes'])}: {one['why']}" for one in last]
    parts += _timeline(report["timeline"])
    return "\n".join(parts)


def size(nbytes: float | None) -> str:
    """Bytes in the decimal unit that suits; `?` where the system does not say."""
    if nbytes is None:
        return "?"
    return sizes.size(nbytes)


def _model(model: dict) -> Iterator[str]:
    types = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in model["quant_types"].items())
    about = "; ".join(filter(None, (model["architecture"] or model["class"], types, f"on {model['device']}")))
    yield f"{model['name']} ({about})"
    weights = model["bytes"]
    parts = [f"{size(weights[part])} {said}" for part, said in LABELS.items() if weights[part]]
    ring = f"; ring {size(weights['ring'])}" if weights["ring"] else ""
    yield f"  weights {size(weights['total'])}: {', '.join(parts) or 'nothing yet'}{ring}"
    if model["source"]:
        yield f"  from {model['source']['reason']}"
    if (in_place := model["unified_memory"]) and in_place["mode"] != "off":
        yield f"  used in place {size(in_place['bytes'])}: {in_place['reason']}"
    if model["plan"]:
        yield f"  plan {model['plan']['text']}"
    if step := model["last_step"]:
        compute = "not measured yet" if step["compute_ms"] is None else f"{step['compute_ms']:.1f} ms"
        yield (
            f"  last pass {step['ms']:.1f} ms: compute {compute}, copies {step['copy_ms']:.1f} ms, "
            f"{step['gb_per_s']:.2f} GB/s: {step['bound_by']} binds; "
            f"{model['passes']} passes on this plan, {model['misses']} misses"
        )
    for lora in model["loras"]:
        yield f"  LoRA {lora['name']} at {lora['strength']:g} ({lora['way']}): {lora['weights']} weights, " + size(
            lora["bytes"]
        )
    patches = model["patches"]
    if patches["at_use"] or patches["by_comfyui"]:
        yield f"  patches at use {patches['at_use']}, {size(patches['bytes'])}; by ComfyUI {patches['by_comfyui']}"


def _ram(ram: dict) -> str:
    kept = f", {size(ram['kept_locked'])} of files kept locked" if ram["kept_locked"] else ""
    return (
        f"RAM: this process {size(ram['resident'])} (anonymous {size(ram['anonymous'])}, file {size(ram['file'])}, "
        f"shared {size(ram['shared'])}); {size(ram['available'])} of {size(ram['total'])} available{kept}"
    )


def _vram(gpu: dict) -> str:
    return (
        f"VRAM: {gpu['device']} {gpu['name']}: allocated {size(gpu['allocated'])}, reserved {size(gpu['reserved'])}, "
        f"{size(gpu['free'])} of {size(gpu['total'])} free"
    )


def _caches(caches: list[dict]) -> Iterator[str]:
    for cache in caches:
        if cache["bytes"] is None:
            yield f"kept {cache['name']}: {cache['entries']}"
        else:
            yield (
                f"cache of {cache['name']}: {cache['entries']} files, {size(cache['bytes'])} of at most "
                f"{size(cache['bound_bytes'])}, {cache['hits']} hits, {cache['misses']} misses"
            )


def _timeline(timeline: dict) -> Iterator[str]:
    if not timeline["samples"]:
        return
    said = (f"{said} {size(timeline['peak'][name])}" for name, said in COLUMNS.items() if timeline["peak"][name])
    yield f"this prompt: {timeline['samples'][-1][0] / 1e3:.1f} s, at most {', '.join(said)}"
    marks = ", ".join(f"{mark['label'] or mark['stage']} at {mark['ms'] / 1e3:.1f} s" for mark in timeline["marks"])
    if marks:
        yield f"  {marks}"
