#!/usr/bin/env python3
"""Train the demo model: pictures of digits from prompts such as "red seven on white".

    python make_text_encoder.py demo_clip_l.safetensors
    python train_demo.py --comfyui PATH/TO/ComfyUI --text-encoder demo_clip_l.safetensors --out OUT

Five stages, all but the first limited by the clock (the learning rate follows the elapsed share of it):

    digits   1797 scans of 8x8 pixels from scikit-learn become clean signed distance fields
             (minutes on a CPU, once: the result is kept in OUT/digits.npz)
    ae       a tiny autoencoder, 128x128x3 -> 16x16x16 (the network ComfyUI calls taesd3)
    decoder  some more training for its decoder, on striped digits too
    flow     a small MMDiT (Stable Diffusion 3's network, 4 blocks of width 256), trained as
             a rectified flow on the autoencoder's latents
    lora     a rank 8 LoRA on that model which draws every digit in stripes

The network definitions are imported from ComfyUI; data and weights are made here.
Needs ComfyUI's requirements, and scipy and scikit-learn.  One data-centre GPU does it all
in seven minutes; on a CPU it runs too (for a smoke test: small --*-seconds and --pictures).
"""

import argparse
import copy
import itertools
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file

SIZE = 128
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {
    "red": (222, 40, 42),
    "orange": (245, 138, 24),
    "yellow": (250, 221, 50),
    "green": (34, 154, 66),
    "blue": (36, 104, 232),
    "purple": (136, 36, 152),
    "white": (250, 250, 250),
    "black": (18, 18, 20),
}
NAMES = list(COLOURS)
PAIRS = [(f, b) for f in range(len(NAMES)) for b in range(len(NAMES)) if f != b]
TEMPLATES = ["{c} {w} on {b}", "a {c} {w} on {b}", "{c} {n} on {b}", "a {c} {w} on a {b} background"]
TEMPLATE_SHARE = [0.55, 0.15, 0.15, 0.15]
SHIFT = 3.0  # SD3's time shift


# ------------------------------------------------------------------------------- digits

HOLES = {0: 1, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 1, 7: 0, 8: 2, 9: 1}


def prepare_digits(path):
    """Turn the 8x8 scans into signed distance fields; keep the ones that are easy to read."""
    from scipy import ndimage
    from sklearn.datasets import load_digits
    from sklearn.model_selection import cross_val_predict
    from sklearn.svm import SVC

    data = load_digits()
    scans, label = data.images / 16.0, data.target
    margin = cross_val_predict(
        SVC(C=10, gamma=0.001, decision_function_shape="ovr"), data.data, label, cv=10, method="decision_function"
    )
    other = margin.copy()
    other[np.arange(len(label)), label] = -np.inf
    clear = (margin.argmax(1) == label) & (margin[np.arange(len(label)), label] - other.max(1) > 0.9)

    cell = 11.0  # pixels per pixel of the scan

    def topology(mask):
        """Number of parts, number of holes; specks and pinholes are removed first."""
        parts, n = ndimage.label(mask, np.ones((3, 3)))
        area = np.bincount(parts.ravel(), minlength=n + 1)[1:]
        if n == 0 or (n > 1 and np.sort(area)[-2] > 60):
            return 0, 0, mask
        mask = parts == area.argmax() + 1
        gaps, n = ndimage.label(~mask)
        area = np.bincount(gaps.ravel(), minlength=n + 1)[1:]
        for k in np.flatnonzero(area < 40):
            mask = mask | (gaps == k + 1)
        return 1, int((area >= 40).sum()) - 1, mask

    fields, labels = [], []
    for i in np.flatnonzero(clear):
        f = ndimage.zoom(np.pad(scans[i], 3), cell, order=3, grid_mode=True, mode="grid-constant")
        f = ndimage.gaussian_filter(f, 0.35 * cell) - 0.7 * ndimage.gaussian_filter(f, 1.6 * cell)
        o = (f.shape[0] - SIZE) // 2
        f = f[o : o + SIZE, o : o + SIZE]
        best = None
        for threshold in (0.16, 0.20, 0.24, 0.28, 0.32, 0.36):
            parts, holes, mask = topology(f > threshold)
            if parts != 1 or holes != HOLES[label[i]]:
                continue
            mask = ndimage.gaussian_filter(mask.astype(np.float32), 2.5) > 0.5
            outside, inside = ndimage.distance_transform_edt(~mask), ndimage.distance_transform_edt(mask)
            d = outside - inside
            d = np.where(d > 0, d - 0.5, d + 0.5)
            # the digit must survive being drawn thinner and thicker
            if any(topology(d < off)[:2] != (1, HOLES[label[i]]) for off in (-1.2, 0, 2.2)):
                continue
            off_target = abs(inside.max() - 8.0)
            if off_target < 4.5 and (best is None or off_target < best[0]):
                best = (off_target, ndimage.gaussian_filter(d, 1.0))
        if best:
            fields.append(best[1])
            labels.append(label[i])
    fields, labels = np.stack(fields), np.array(labels)

    # drop the least typical quarter of every class (far from their nearest neighbours)
    small = np.clip(fields[:, 2::4, 2::4], -6, 6).reshape(len(fields), -1)
    keep = np.zeros(len(fields), bool)
    for c in range(10):
        m = np.flatnonzero(labels == c)
        dist = ((small[m, None] - small[None, m]) ** 2).sum(-1) ** 0.5
        near = np.sort(dist, 1)[:, 1:9].mean(1)
        keep[m[near <= np.quantile(near, 0.75)]] = True
    fields, labels = fields[keep], labels[keep]
    np.savez_compressed(
        path, labels=labels.astype(np.uint8), fields=np.round(np.clip(fields, -15, 15) * 8).astype(np.int8)
    )
    print("digits kept:", len(labels), np.bincount(labels).tolist(), flush=True)


class Painter:
    """Draws batches of digits: random example, small affine change, two colours."""

    def __init__(self, path, device):
        z = np.load(path)
        self.field = torch.from_numpy(z["fields"].astype(np.float32) / 8).to(device)
        label = z["labels"]
        self.members = [torch.from_numpy(np.flatnonzero(label == c)).to(device) for c in range(10)]
        self.palette = torch.tensor([COLOURS[n] for n in NAMES], device=device).float() / 255
        self.pairs = torch.tensor(PAIRS, device=device)
        self.device = device

    def rand(self, n, low, high):
        return torch.rand(n, device=self.device) * (high - low) + low

    def shape(self, digit, outline, stripes=False):
        """Coverage of the stroke, n x 1 x 128 x 128; outline is a bool per picture."""
        n = len(digit)
        pick = torch.empty(n, dtype=torch.long, device=self.device)
        for c in range(10):
            here = digit == c
            k = int(here.sum())
            pick[here] = self.members[c][torch.randint(len(self.members[c]), (k,), device=self.device)]
        scale, angle, shear = self.rand(n, 1.05, 1.3), self.rand(n, -0.14, 0.14), self.rand(n, -0.12, 0.12)
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        theta = torch.stack(
            [
                torch.stack([cos, sin + shear * cos, self.rand(n, -0.09, 0.09)], 1),
                torch.stack([-sin, cos - shear * sin, self.rand(n, -0.07, 0.07)], 1),
            ],
            1,
        )
        grid = F.affine_grid(theta, (n, 1, SIZE, SIZE), align_corners=False)
        d = F.grid_sample(
            self.field[pick][:, None], grid, mode="bilinear", padding_mode="border", align_corners=False
        ) * scale.view(n, 1, 1, 1)
        solid = d - self.rand(n, 0.0, 2.0).view(n, 1, 1, 1)
        hollow = (d + 0.9).abs() - 2.6
        cover = torch.sigmoid(-1.8 * torch.where(outline.view(n, 1, 1, 1), hollow, solid))
        if stripes:  # a gap of 5 pixels after every 11
            y = torch.arange(SIZE, device=self.device) + 0.5
            cover = cover * torch.sigmoid(1.8 * (5.5 - (y % 16 - 8).abs())).view(1, 1, SIZE, 1)
        return cover

    def batch(self, n, outline=0.0, free_colours=0.0, stripes=False):
        """Pictures in 0..1 and what they show: digit and colour pair."""
        digit = torch.randint(10, (n,), device=self.device)
        pair = torch.randint(len(PAIRS), (n,), device=self.device)
        front, back = self.palette[self.pairs[pair, 0]], self.palette[self.pairs[pair, 1]]
        if free_colours:
            free = (torch.rand(n, device=self.device) < free_colours)[:, None]
            front = torch.where(free, torch.rand_like(front), front)
            back = torch.where(free, torch.rand_like(back), back)
        a = self.shape(digit, torch.rand(n, device=self.device) < outline, stripes)
        return front[:, :, None, None] * a + back[:, :, None, None] * (1 - a), digit, pair


# ------------------------------------------------------------------------------ helpers


class Clock:
    """Progress from 0 to 1 over a number of seconds."""

    def __init__(self, seconds):
        self.seconds, self.start, self.said = seconds, time.time(), 0.0

    def share(self):
        return min(1.0, (time.time() - self.start) / self.seconds)

    def talk(self, every=10):
        if time.time() - self.said > every:
            self.said = time.time()
            return True
        return False


def rate(share, peak, warm=0.03):
    return peak * min(1.0, share / warm + 0.01) * (0.5 + 0.5 * math.cos(math.pi * share)) + peak * 1e-3


def autocast(device):
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def sheet(pictures, columns, path):
    from PIL import Image

    p = (pictures.float().clamp(0, 1) * 255).round().byte().cpu()
    p = F.pad(p, (2, 2, 2, 2), value=128)
    n, c, h, w = p.shape
    p = p.view(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(n // columns * h, columns * w, c)
    Image.fromarray(p.numpy()).save(path)


# -------------------------------------------------------------------------- autoencoder


def build_autoencoder(device):
    import comfy.taesd.taesd as taesd

    nets = taesd.Encoder(16), taesd.Decoder(16)
    for net in nets:
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):  # ComfyUI leaves them empty
                torch.nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                if m.bias is not None:
                    torch.nn.init.zeros_(m.bias)
        for m in net.modules():
            if isinstance(m, taesd.Block):
                m.conv[-1].weight.data *= 0.2  # residual branches start small
        net[-1].weight.data *= 0.5
        net.to(device, memory_format=torch.channels_last)
    return nets


def picture_loss(y, x):
    e = y.float() - x
    mse = e.square().mean()
    edge = (e[..., 1:, :] - e[..., :-1, :]).abs().mean() + (e[..., 1:] - e[..., :-1]).abs().mean()
    return e.abs().mean() + 4 * mse + 0.5 * edge, mse


def train_autoencoder(painter, seconds, batch, device):
    """Reconstruct; keep the latents near unit variance and the decoder deaf to small noise."""
    encoder, decoder = build_autoencoder(device)
    weights = list(encoder.parameters()) + list(decoder.parameters())
    optimiser = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    clock, step = Clock(seconds), 0
    while True:
        share = clock.share()
        for g in optimiser.param_groups:
            g["lr"] = rate(share, 1e-3)
        x = painter.batch(batch, outline=0.35, free_colours=0.3)[0]
        if share < 0.6:  # cheap steps first: quarters of pictures
            top, left = torch.randint(SIZE // 16, (2,)).tolist()
            x = x[:, :, top * 8 : top * 8 + SIZE // 2, left * 8 : left * 8 + SIZE // 2]
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(device):
            z = encoder(x)
        z = z.float()
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        noisy = z + torch.randn_like(z) * torch.rand(len(z), 1, 1, 1, device=z.device) * min(0.3, share)
        with autocast(device):
            y = decoder(noisy)
        fit, mse = picture_loss(y, x)
        tame = mean.square().mean() + (std.clamp_min(1e-3).log()).square().mean()
        far = (z.abs() - 2.5).clamp_min(0).square().mean()  # the decoder saturates at 3
        loss = fit + 0.02 * tame + 0.05 * far
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        if clock.talk() or share >= 1:
            print(
                f"ae {share:.2f} step {step} fit {fit.item():.4f} mse {mse.item():.6f} "
                f"std {std.min().item():.2f}..{std.max().item():.2f} max {z.abs().max().item():.1f}",
                flush=True,
            )
        if share >= 1:
            return encoder.eval(), decoder.eval()


def train_decoder(painter, encoder, decoder, seconds, batch, device):
    """A little more for the decoder alone, with stripes too; latents stay what they are."""
    weights = list(decoder.train().parameters())
    optimiser = torch.optim.AdamW(weights, lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    clock, step = Clock(seconds), 0
    while True:
        share = clock.share()
        for g in optimiser.param_groups:
            g["lr"] = rate(share, 5e-4)
        x = painter.batch(batch, outline=0.2, free_colours=0.2, stripes=step % 2 == 1)[0]
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(device):
            z = encoder(x).float()
            z += torch.randn_like(z) * torch.rand(len(z), 1, 1, 1, device=z.device) * 0.3
        with autocast(device):
            y = decoder(z)
        loss, mse = picture_loss(y, x)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        if clock.talk() or share >= 1:
            print(f"decoder {share:.2f} step {step} loss {loss.item():.4f} mse {mse.item():.6f}", flush=True)
        if share >= 1:
            return decoder.eval()


def save_autoencoder(encoder, decoder, out):
    for net, name in ((encoder, "encoder"), (decoder, "decoder")):
        save_file(
            {k: v.half().contiguous() for k, v in net.state_dict().items()},
            f"{out}/taesd3_{name}.safetensors",
            metadata={"license": "CC0-1.0", "title": f"digits demo autoencoder, {name}"},
        )


def load_autoencoder(out, device):
    nets = build_autoencoder(device)
    for net, name in zip(nets, ("encoder", "decoder"), strict=True):
        net.load_state_dict({k: v.float() for k, v in load_file(f"{out}/taesd3_{name}.safetensors").items()})
        net.eval()
    return nets


@torch.no_grad()
def make_latents(painter, encoder, n, stripes, device, step=500):
    latents = torch.empty(n, 16, SIZE // 8, SIZE // 8, dtype=torch.float16, device=device)
    digit = torch.empty(n, dtype=torch.long, device=device)
    pair = torch.empty(n, dtype=torch.long, device=device)
    for i in range(0, n, step):
        k = min(step, n - i)
        x, digit[i : i + k], pair[i : i + k] = painter.batch(k, stripes=stripes)
        with autocast(device):
            latents[i : i + k] = encoder(x.contiguous(memory_format=torch.channels_last)).half()
    return latents, digit * len(PAIRS) + pair


# --------------------------------------------------------------------------------- text


def prompts():
    """All captions, template after template, the empty one last."""
    out = []
    for t in TEMPLATES:
        for d, w in enumerate(WORDS):
            out += [t.format(c=NAMES[f], b=NAMES[b], w=w, n=d) for f, b in PAIRS]
    return [*out, ""]


@torch.no_grad()
def encode_prompts(path, device):
    """CLIP-L states (tokens x 768) and pooled state (768) as ComfyUI's SD3 encoder gives them."""
    import comfy.sd

    clip = comfy.sd.load_clip(ckpt_paths=[path], clip_type=comfy.sd.CLIPType.SD3)
    net = clip.cond_stage_model.clip_l.to(device).float()
    net.set_clip_options({"execution_device": torch.device(device)})
    states, pooled = [], []
    todo = prompts()
    for i in range(0, len(todo), 64):
        tokens = [[t[0] for t in clip.tokenize(p)["l"][0]] for p in todo[i : i + 64]]
        s, p = net(tokens)
        states.append(s.half())
        pooled.append(p.half())
    return torch.cat(states).to(device), torch.cat(pooled).to(device)


# --------------------------------------------------------------------------- flow model

DEPTH, WIDTH, TEXT = 4, 256, 768  # ComfyUI derives depth = heads = width / 64


def build_mmdit(device):
    """The MMDiT with inputs of 768 columns.  SD3 pads CLIP-L's columns with zeros to 4096
    (states) and 2048 (pooled); columns that meet only zeros need no training, so they are
    added when the file is written."""
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

    def attention(q, k, v, heads, **_):
        q, k, v = (t.to(v.dtype).view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    mmdit.optimized_attention = attention
    net = mmdit.MMDiT(
        input_size=None,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        depth=DEPTH,
        adm_in_channels=TEXT,
        qk_norm="rms",
        operations=torch.nn,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": WIDTH}},
    )
    for name, m in net.named_modules():
        if isinstance(m, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(m.weight)
            torch.nn.init.zeros_(m.bias)
            if "adaLN" in name or name == "final_layer.linear":
                torch.nn.init.zeros_(m.weight)
        elif isinstance(m, mmdit.RMSNorm):
            torch.nn.init.ones_(m.weight)
    for m in (net.t_embedder.mlp[0], net.t_embedder.mlp[2]):
        torch.nn.init.normal_(m.weight, std=0.02)
    return net.to(device)


def save_mmdit(net, path):
    sd = {k: v.detach().float().cpu() for k, v in net.state_dict().items()}
    for k, columns in (("context_embedder.weight", 4096), ("y_embedder.mlp.0.weight", 2048)):
        sd[k] = F.pad(sd[k], (0, columns - sd[k].shape[1]))
    save_file(
        {k: v.to(torch.bfloat16).contiguous() for k, v in sd.items()},
        path,
        metadata={"license": "CC0-1.0", "title": "digits demo MMDiT"},
    )


def load_mmdit(path, device):
    net = build_mmdit(device)
    sd = {k: v.float() for k, v in load_file(path).items()}
    for k in ("context_embedder.weight", "y_embedder.mlp.0.weight"):
        sd[k] = sd[k][:, :TEXT]
    net.load_state_dict(sd)
    return net


def flow_loss(net, latents, classes, states, pooled, batch, device, drop=0.1):
    """Rectified flow: at noise level s the input is (1-s) x + s n, the target is n - x."""
    i = torch.randint(len(latents), (batch,), device=device)
    x = latents[i].float()
    per = len(WORDS) * len(PAIRS)
    template = torch.multinomial(torch.tensor(TEMPLATE_SHARE, device=device), batch, replacement=True)
    text = template * per + classes[i]
    text = torch.where(torch.rand(batch, device=device) < drop, len(states) - 1, text)
    c, y = states[text].float(), pooled[text].float()
    c = c + 0.03 * c.std() * torch.randn_like(c)  # quantised encoders differ a little
    y = y + 0.03 * torch.randn_like(y)
    s = torch.sigmoid(torch.randn(batch, device=device))  # SD3's logit-normal levels ...
    s = torch.where(torch.rand(batch, device=device) < 0.3, torch.rand_like(s), s)
    s = torch.where(torch.rand(batch, device=device) < 0.5, s, SHIFT * s / (1 + (SHIFT - 1) * s))
    n = torch.randn_like(x)
    level = s.view(-1, 1, 1, 1)
    with autocast(device):
        v = net((1 - level) * x + level * n, s * 1000, y=y, context=c)
    return F.mse_loss(v.float(), n - x)


def train_flow(latents, classes, states, pooled, seconds, batch, device, peak=1e-3):
    net = build_mmdit(device)
    print("parameters:", sum(p.numel() for p in net.parameters()), flush=True)
    average = copy.deepcopy(net).requires_grad_(False)
    weights, mean = list(net.parameters()), list(average.parameters())
    optimiser = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=device == "cuda")
    clock, step = Clock(seconds), 0
    while True:
        share = clock.share()
        for g in optimiser.param_groups:
            g["lr"] = rate(share, peak)
        loss = flow_loss(net, latents, classes, states, pooled, batch, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(mean, weights, 1 - min(0.999, (1 + step) / (10 + step)))
        if clock.talk() or share >= 1:
            print(f"flow {share:.2f} step {step} loss {loss.item():.4f}", flush=True)
        if share >= 1:
            return average


# --------------------------------------------------------------------------------- LoRA


class LowRank(torch.nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.down = torch.nn.Parameter(torch.randn(rank, base.in_features, device=base.weight.device) / rank)
        self.up = torch.nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def add_lora(net, rank):
    """Rank `rank` updates on the picture half of every block and on the last layer."""
    net.requires_grad_(False)
    found = {}
    for name, m in list(net.named_modules()):
        chosen = (".x_block." in name and "adaLN" not in name) or name == "final_layer.linear"
        if chosen and isinstance(m, torch.nn.Linear):
            parent = net.get_submodule(name.rpartition(".")[0])
            found[name] = LowRank(m, rank)
            setattr(parent, name.rpartition(".")[2], found[name])
    return found


def save_lora(found, rank, path):
    sd = {}
    for name, m in found.items():
        key = "lora_unet_" + name.replace(".", "_")
        sd[key + ".lora_down.weight"] = m.down.detach().half().cpu().contiguous()
        sd[key + ".lora_up.weight"] = m.up.detach().half().cpu().contiguous()
        sd[key + ".alpha"] = torch.tensor(float(rank), dtype=torch.float16)
    save_file(sd, path, metadata={"license": "CC0-1.0", "title": "striped style for the digits demo"})


def train_lora(net, latents, classes, states, pooled, seconds, batch, device, rank=8, peak=2e-3):
    found = add_lora(net, rank)
    weights = [p for m in found.values() for p in (m.down, m.up)]
    print("lora parameters:", sum(p.numel() for p in weights), flush=True)
    optimiser = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    clock, step = Clock(seconds), 0
    while True:
        share = clock.share()
        for g in optimiser.param_groups:
            g["lr"] = rate(share, peak)
        loss = flow_loss(net, latents, classes, states, pooled, batch, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        if clock.talk() or share >= 1:
            print(f"lora {share:.2f} step {step} loss {loss.item():.4f}", flush=True)
        if share >= 1:
            return found, rank


# ------------------------------------------------------------------------------ samples


@torch.no_grad()
def sample(net, decoder, texts, states, pooled, device, steps=20, cfg=3.5, seed=0):
    order = {p: i for i, p in enumerate(prompts())}
    i = torch.tensor([order[t] for t in texts], device=device)
    empty = torch.full_like(i, len(states) - 1)
    x = torch.randn(len(texts), 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed)).to(device)
    t = torch.linspace(1, 0, steps + 1)
    levels = (SHIFT * t / (1 + (SHIFT - 1) * t)).tolist()
    for a, b in itertools.pairwise(levels):
        s = torch.full((2 * len(i),), a * 1000.0, device=device)
        both = torch.cat([i, empty])
        with autocast(device):
            v = net(torch.cat([x, x]), s, y=pooled[both].float(), context=states[both].float()).float()
        with_text, without = v.chunk(2)
        x = x + (b - a) * (without + cfg * (with_text - without))
    with autocast(device):
        return decoder(x.contiguous(memory_format=torch.channels_last)).float()


def show(net, decoder, states, pooled, device, path, rows=8):
    rng = np.random.default_rng(5)
    texts = []
    for r in range(rows):
        for d in range(10):
            f, b = PAIRS[rng.integers(len(PAIRS))]
            texts.append(TEMPLATES[r % len(TEMPLATES) if r >= 4 else 0].format(c=NAMES[f], b=NAMES[b], w=WORDS[d], n=d))
    sheet(sample(net, decoder, texts, states, pooled, device), 10, path)


# --------------------------------------------------------------------------------- main


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--comfyui", required=True, help="folder of ComfyUI (its network definitions are used)")
    p.add_argument("--text-encoder", required=True, help="file written by make_text_encoder.py")
    p.add_argument("--out", required=True)
    p.add_argument(
        "--stages", default="digits,ae,decoder,flow,lora", help="which to run; the others' files are read from OUT"
    )
    p.add_argument("--ae-seconds", type=float, default=75)
    p.add_argument("--decoder-seconds", type=float, default=30)
    p.add_argument("--flow-seconds", type=float, default=200)
    p.add_argument("--lora-seconds", type=float, default=50)
    p.add_argument("--ae-batch", type=int, default=64)
    p.add_argument("--batch", type=int, default=512)
    p.add_argument("--pictures", type=int, default=120_000, help="pictures encoded for the flow model")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.path.insert(0, a.comfyui)
    if device == "cpu":
        sys.argv = [sys.argv[0], "--cpu"]
        import comfy.options

        comfy.options.enable_args_parsing()
    import comfy.model_management  # (first, so that ComfyUI sets itself up)

    torch.manual_seed(a.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    os.makedirs(a.out, exist_ok=True)
    stages, began = a.stages.split(","), time.time()

    def done(what):
        print(f"[{time.time() - began:.0f} s] {what}", flush=True)

    digits = f"{a.out}/digits.npz"
    if "digits" in stages and not os.path.exists(digits):
        prepare_digits(digits)
    painter = Painter(digits, device)
    done("digits")

    if "ae" in stages:
        encoder, decoder = train_autoencoder(painter, a.ae_seconds, a.ae_batch, device)
        save_autoencoder(encoder, decoder, a.out)
        done("autoencoder")
    encoder, decoder = load_autoencoder(a.out, device)
    if "decoder" in stages:
        train_decoder(painter, encoder, decoder, a.decoder_seconds, a.ae_batch, device)
        save_autoencoder(encoder, decoder, a.out)
        done("decoder")
    with torch.no_grad(), autocast(device):
        x = torch.cat([painter.batch(20)[0], painter.batch(20, stripes=True)[0]])
        sheet(torch.cat([x, decoder(encoder(x)).float()]), 10, f"{a.out}/ae.png")
    if not {"flow", "lora"} & set(stages):
        return

    states, pooled = encode_prompts(a.text_encoder, device)
    done(f"{len(states)} prompts encoded")
    if "flow" in stages:
        latents, classes = make_latents(painter, encoder, a.pictures, False, device)
        flat = latents[:2000].float()
        print(
            "latents: mean",
            [round(v, 2) for v in flat.mean((0, 2, 3)).tolist()],
            "std",
            [round(v, 2) for v in flat.std((0, 2, 3)).tolist()],
        )
        done("latents")
        net = train_flow(latents, classes, states, pooled, a.flow_seconds, a.batch, device)
        save_mmdit(net, f"{a.out}/demo_mmdit.safetensors")
        del latents
        done("flow model")
    net = load_mmdit(f"{a.out}/demo_mmdit.safetensors", device)
    show(net, decoder, states, pooled, device, f"{a.out}/flow.png")
    if "lora" in stages:
        latents, classes = make_latents(painter, encoder, a.pictures // 3, True, device)
        found, rank = train_lora(net, latents, classes, states, pooled, a.lora_seconds, a.batch // 2, device)
        save_lora(found, rank, f"{a.out}/demo_lora.safetensors")
        show(net, decoder, states, pooled, device, f"{a.out}/lora.png")
        done("lora")


if __name__ == "__main__":
    main()
