"""
Quantization: weights in 2 to 8 bits, measured by what they cost and what they save.

    q = round(w / s + z) in 0 … 2^b - 1,    ŵ = (q - z) s,    s and z shared by a group of weights

is all of it; methods differ in how they choose s, z and q. From data alone: absmax, symmetric, zeropoint (round to
nearest, RTN), HQQ (Badri & Shaji 2023). From what passes through a layer: GPTQ (Frantar et al. 2022), AWQ (Lin et al.
2023), SmoothQuant (Xiao et al. 2022). With uneven levels: NF4 and FP4 (QLoRA, Dettmers et al. 2023), fp8. With 8-bit
activations: LLM.int8() (Dettmers et al. 2022), SmoothQuant, fp8. While training: straight-through (Bengio et al. 2013).

    python quantize.py                                              # the newest run: table of methods, and out/int4
    python quantize.py --init out/base --method gptq --bits 4 --group 128 --out out/int4
    python quantize.py --show 3.14159                               # one number in every format, bit by bit
    python quantize.py --bench gpt2                                 # int8 and int4 against float, tokens/s
"""
import argparse
import contextlib
import copy
import csv
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from bpe import BadInput, Tokenizer, cli, read_json, replace_file
from model import VECTORS, Stored, triton, vector_product

# -----------------------------------------------------------------------------
# Codes and where they lie: what quantize returns, what the file holds


class QTensor(NamedTuple):
    """
    A matrix (N, K) in few bits. group: weights of a row that share a scale; 0: a whole row, -1: the whole matrix.
    parts, by name:
        codes       (N, K bits / 8) uint8: each row one stream of bits, the first code in the highest bits; 8 bits:
                    (N, K) int8, the code less 128; fp8: (N, K) float8_e4m3fn
        scale       (N, K / group) bfloat16, or float32 where a row or matrix shares one, and for nf4, fp4
        zero        the same shape, float16; without it 2^(bits - 1)
        scale8, scale8_max, scale8_mean     nf4, fp4: the scales in 8 bits, see double_quantize
        in_scale    (K,) float32: x is multiplied by it first (AWQ, SmoothQuant)
        up, down    (N, r), (r, K) bfloat16: up · down is added (ZeroQuant-V2)
    """
    method: str
    bits: int
    group: int
    shape: tuple
    parts: dict

    def to(self, device):
        return self._replace(parts={name: t.to(device) for name, t in self.parts.items()})

    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in self.parts.values())


def pack(codes, bits):
    """Codes (N, K) in 0 … 2^bits - 1 -> (N, ⌈K bits / 8⌉) uint8."""
    if bits == 8:
        return (codes.int() - 128).to(torch.int8)
    codes = codes.to(torch.uint8)
    if bits == 4 and codes.shape[1] % 2 == 0:
        return codes[:, ::2] << 4 | codes[:, 1::2]
    stream = (codes[..., None] >> places(bits, codes.device)).flatten(1) & 1
    stream = F.pad(stream, (0, -stream.shape[1] % 8)).view(len(codes), -1, 8)
    return (stream << places(8, codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed, bits, width):
    """The way back: uint8 (N, width)."""
    if bits == 8:
        return (packed.to(torch.int16) + 128).to(torch.uint8)
    if bits == 4 and width % 2 == 0:
        return torch.stack((packed >> 4, packed & 15), -1).flatten(1)
    stream = (packed[..., None] >> places(8, packed.device)).flatten(1) & 1
    stream = stream[:, :width * bits].view(len(packed), width, bits)
    return (stream << places(bits, packed.device)).sum(-1, dtype=torch.uint8)


def places(bits, device):
    """What the bits of a code are shifted by, the first one first; in bytes, so that nothing becomes an int64."""
    return torch.arange(bits - 1, -1, -1, dtype=torch.uint8, device=device)


def grouped(w, group):
    """(N, K) -> (N, K / group, group); (1, 1, N K) where the matrix is one group."""
    return w.reshape(1, 1, -1) if group < 0 else w.unflatten(1, (-1, group or w.shape[1]))


# -----------------------------------------------------------------------------
# Even levels: scale and zero of groups w (…, g), over the last axis


def absmax(w, bits=8):
    """s = max|w| / (2^(b-1) - 1), z the middle: codes ±127 in 8 bits; one code of 2^b is never used."""
    return w.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1), None


def symmetric(w, bits=8):
    """s = max|w| / (2^(b-1) - 1/2): all 2^b codes, the largest weight rounds to half a step (torchao, gpt-fast)."""
    return w.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5), None


def zeropoint(w, bits=8):
    """
    s = (max - min) / (2^b - 1), z = -round(min / s), a whole number: min and max are codes 0 and 2^b - 1. (In signed
    form: scale 255 / (max - min), zero point -round(scale · min) - 128, codes -128 … 127.) Equal weights c: s = |c|;
    weights far from 0 with a small range: s = max|w| / 2047, because z is stored in float16.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = torch.maximum((high - low) / (2 ** bits - 1), torch.maximum(-low, high) / 2047)
    scale = torch.where(high == low, low.abs(), scale)
    return scale, -(low / nonzero(scale)).round()


def nonzero(scale):
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def hqq(w, bits=4, iterations=20, beta=10.0, growth=1.01, p=0.7):
    """
    HQQ (Badri & Shaji 2023): s of the range, z a real number that minimizes |w - ŵ|^p, p < 1: errors are sparse but
    for a few large ones. Half-quadratic splitting: e ← shrink(w - ŵ), z ← mean(q - (w - e) / s), with growing β, until
    the mean error stops falling.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    inverse = torch.where(high - low > 1e-4, (2 ** bits - 1) / nonzero(high - low), 1.0).clamp(max=2e4)
    zero, best = -low * inverse, math.inf
    for _ in range(iterations):
        q = (w * inverse + zero).round().clamp(0, 2 ** bits - 1)
        restored = (q - zero) / inverse
        error = w - restored
        sparse = error.sign() * (error.abs() - error.abs().pow(p - 1) / beta).clamp(min=0)
        zero = (q - (w - sparse) * inverse).mean(-1, keepdim=True)
        mean = error.abs().mean().item()
        if mean >= best:
            break
        best, beta = mean, beta * growth
    return 1 / inverse, zero


GRIDS = {"absmax": absmax, "symmetric": symmetric, "zeropoint": zeropoint, "hqq": hqq}


def fit(w, bits, grid, exact):
    """(scale, zero) as they will be stored: bfloat16 and float16 unless exact, so that codes are rounded for those."""
    scale, zero = GRIDS[grid](w, bits)
    scale = nonzero(scale if exact else scale.bfloat16().float())
    return scale, 2.0 ** (bits - 1) if zero is None else zero.clamp(-65504, 65504).half().float()


def encode(w, scale, zero, bits):
    return (w / scale + zero).round().clamp(0, 2 ** bits - 1)


def even(method, bits, group, shape, codes, scale, zero, **parts):
    """A QTensor from codes, scale and zero in floats; zero a number: the middle, which is not stored."""
    kind = torch.float32 if group <= 0 else torch.bfloat16
    parts = {"codes": pack(codes.reshape(shape), bits), "scale": scale.flatten(1).to(kind), **parts}
    if torch.is_tensor(zero):
        parts["zero"] = zero.flatten(1).half()
    return QTensor(method, bits, group, tuple(shape), parts)


def nearest(method, w, bits, group):
    """Round to nearest on one of GRIDS."""
    groups = grouped(w, group)
    scale, zero = fit(groups, bits, method, group <= 0)
    codes = encode(groups, scale, zero, bits)
    if torch.is_tensor(zero):
        zero = zero.squeeze(-1)
    return even(method, bits, group, w.shape, codes, scale.squeeze(-1), zero)


# -----------------------------------------------------------------------------
# Uneven levels: NF4, FP4, fp8


def normal_levels():
    """
    NF4: 16 numbers in [-1, 1] between which a normal variable falls equally often, with an exact 0 (QLoRA, app. E):
    eight quantiles on the right, seven on the left, from probability 0.9677 on, divided by the largest.
    """
    p = torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1]
    left = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((torch.special.ndtri(p), torch.zeros(1, dtype=torch.float64), -left)).sort().values
    return (levels / levels.max()).float()


# FP4: sign, two bits of exponent, one of mantissa, the largest scaled to 1; bitsandbytes' order of codes.
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
LEVELS = {"nf4": normal_levels(), "fp4": torch.cat((FP4, -FP4))}


def to_levels(x, levels):
    """Index of the nearest level for each x, the lower where two are as near."""
    order = levels.argsort()
    sorted_levels = levels[order]
    return order[torch.bucketize(x, (sorted_levels[1:] + sorted_levels[:-1]) / 2)]


def dynamic_code(signed):
    """
    256 numbers in [-1, 1] or [0, 1]: seven decades, each with twice as many steps as the one below it, so that the
    relative error is small near 1 and the range is 10^7 (dynamic tree quantization, Dettmers et al. 2022, 1.3).
    """
    code = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        values = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        code += values + [-v for v in values] * signed
    return torch.tensor(sorted(code), dtype=torch.float32)


DYNAMIC = dynamic_code(signed=True)


def double_quantize(scale):
    """
    QLoRA's second quantization: the scales less their mean, in blocks of 256, each divided by its largest magnitude
    and rounded to dynamic_code. A scale costs 8 + 32 / 256 bits instead of 32.
    """
    mean = scale.mean()
    blocks = F.pad((scale - mean).flatten(), (0, -scale.numel() % 256)).view(-1, 256)
    largest = blocks.abs().amax(1)
    codes = to_levels(blocks / nonzero(largest)[:, None], DYNAMIC.to(scale.device)).to(torch.uint8)
    return {"scale8": codes.flatten()[:scale.numel()].view_as(scale), "scale8_max": largest,
            "scale8_mean": mean.view(1)}


def single_scale(parts):
    """The scales (N, K / group) of double_quantize."""
    values = DYNAMIC.to(parts["scale8"].device)[parts["scale8"].flatten().int()]
    values = F.pad(values, (0, -len(values) % 256)).view(-1, 256) * parts["scale8_max"][:, None]
    return values.flatten()[:parts["scale8"].numel()].view_as(parts["scale8"]) + parts["scale8_mean"]


def codebook(method, w, bits, group, double=True):
    """NF4 or FP4: w / max|w| of its group, rounded to LEVELS."""
    if bits != 4:
        raise BadInput(f"--method {method} has 16 levels, 4 bits, not --bits {bits}: leave --bits out")
    groups = grouped(w, group)
    scale = groups.abs().amax(-1, keepdim=True)
    codes = to_levels(groups * (1 / nonzero(scale)), LEVELS[method].to(w.device))
    scale = scale.squeeze(-1)
    parts = double_quantize(scale) if double else {"scale": scale}
    return QTensor(method, bits, group, tuple(w.shape), {"codes": pack(codes.view(w.shape), 4), **parts})


FP8_MAX = 448.0  # of e4m3: 1.75 · 2^8; its smallest number is 2^-9


def to_fp8(x, largest):
    """x scaled so that `largest` becomes 448, in e4m3, and the factor that undoes it."""
    scale = nonzero(largest.float()) / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def fp8(w, bits=8, group=0):
    if bits != 8 or group > 0:
        raise BadInput(f"--method fp8 has 8 bits and a scale for each row (--group 0) or one (--group -1), not "
                       f"--bits {bits} --group {group}")
    largest = w.abs().amax() if group < 0 else w.abs().amax(1, keepdim=True)
    codes, scale = to_fp8(w, largest)
    return QTensor("fp8", 8, group, tuple(w.shape), {"codes": codes, "scale": scale.view(-1, 1)})


# -----------------------------------------------------------------------------
# Methods that know what passes through the layer: x (n, K), as statistics that observe() gathers


def awake(h):
    """
    The Hessian h (K, K) where inputs that were always 0 count as much as the mean does: an expert that few tokens meet
    has such, and their weights are to be rounded like others, not left to the errors of the rest.
    """
    mean = h.diagonal().mean()
    return h + torch.diag((h.diagonal() == 0) * torch.where(mean > 0, mean, 1))


def gptq(w, bits, group, hessian, act_order=False, damp=0.01, block=128, grid="zeropoint"):
    """
    GPTQ: columns are rounded one after the other, and those still to come take up the error,

        e_i = (w_i - ŵ_i) / U_ii,    w_j ← w_j - e_i U_ij  (j > i),    H = 2 X Xᵀ / n,    H⁻¹ = Uᵀ U,

    which minimizes ‖(W - Ŵ) X‖² greedily (Frantar et al. 2022, alg. 1). hessian (K, K) is H, up to a factor; damp:
    share of its mean diagonal that is added to it. A group's scale and zero are chosen when its first column is
    reached, from weights as they are then; a block of columns passes its errors on at once. act_order: columns with a
    large H_ii first, and every group's scale and zero before the start.
    """
    w, h, K = w.clone(), awake(hessian.double()), w.shape[1]
    size = K if group <= 0 else group
    groups = grouped(w, group)
    scale, zero = (torch.as_tensor(t).to(w).expand(*groups.shape[:2], 1)[..., 0].expand(len(w), -1).clone()
                   for t in fit(groups, bits, grid, group <= 0))  # (N, K / group)
    order = h.diagonal().argsort(descending=True) if act_order else torch.arange(K, device=w.device)
    w, h, codes = w[:, order], h[order][:, order], torch.empty_like(w)
    h = h + damp * h.diagonal().mean() * torch.eye(K, dtype=h.dtype, device=w.device)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).to(w)
    block = size if size > block and group > 0 else max(1, block // size) * size if size < block else block
    place = (order // size).tolist()
    for start in range(0, K, block):
        end = min(start + block, K)
        errors = torch.empty(len(w), end - start, dtype=w.dtype, device=w.device)
        for i in range(start, end):
            g = place[i]
            if not act_order and group > 0 and i % size == 0:
                s, z = fit(w[:, i:i + size], bits, grid, False)
                scale[:, g], zero[:, g] = s[:, 0], z[:, 0] if torch.is_tensor(z) else z
            codes[:, i] = encode(w[:, i], scale[:, g], zero[:, g], bits)
            e = (w[:, i] - (codes[:, i] - zero[:, g]) * scale[:, g]) / u[i, i]
            w[:, i + 1:end] -= e[:, None] * u[i, i + 1:end]
            errors[:, i - start] = e
        w[:, end:] -= errors @ u[start:end, end:]
    rows = slice(1) if group < 0 else slice(None)  # a matrix with one scale stores it once
    stored = zero[rows] if grid in ("zeropoint", "hqq") else 2.0 ** (bits - 1)
    return even("gptq", bits, group, w.shape, codes[:, order.argsort()], scale[rows], stored)


def awq(w, bits, group, hessian, mean_abs, steps=20, cuts=10):
    """
    AWQ: weights that meet large inputs deserve small errors, so W diag(s) is rounded and x / s multiplied, with
    s = mean|x|^a, a the best of 0, 0.05 … 0.95 (Lin et al. 2023, eq. 4-5). Then each group's range is cut to 100, 95 …
    50 %, whichever is best. Best: the smallest ‖(W - Ŵ) X‖² = tr((W - Ŵ) H (W - Ŵ)ᵀ), of the group for the cut.
    """
    def loss(d, h):
        return (d @ h * d).sum()

    def rounded(groups, cut=1.0):
        scale, zero = fit(groups * cut, bits, "zeropoint", group <= 0)
        return encode(groups, scale, zero, bits), scale, zero

    best, hessian = math.inf, awake(hessian)
    for i in range(steps):
        s = mean_abs.clamp(min=1e-8).pow(i / steps).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        codes, scale, zero = rounded(grouped(w * s, group))
        error = loss(((codes - zero) * scale).view_as(w) / s - w, hessian).item()
        if error < best:
            best, chosen = error, s
    groups = grouped(w * chosen, group)
    h = (hessian / chosen / chosen[:, None]).to(w)
    size = groups.shape[-1]
    inner = torch.stack([h[i:i + size, i:i + size] for i in range(0, len(h), size)]) if group >= 0 else None
    least = None
    for i in range(cuts + 1 if group >= 0 else 1):  # a matrix with one scale is not cut
        codes, scale, zero = rounded(groups, 1 - 0.05 * i)
        d = (codes - zero) * scale - groups
        error = 0 * scale if inner is None else (torch.einsum("ngi,gij->ngj", d, inner) * d).sum(-1, keepdim=True)
        if least is None:
            least, kept = error, [codes, scale, zero]
        better = error < least
        kept = [torch.where(better, new, old) for new, old in zip((codes, scale, zero), kept)]
        least = torch.where(better, error, least)
    codes, scale, zero = kept
    return even("awq", bits, group, w.shape, codes, scale[..., 0], zero[..., 0], in_scale=(1 / chosen).float())


def smoothquant(w, bits, group, max_abs, alpha=0.5):
    """
    Weights and activations in 8 bits, rows of both with a scale of their own. Before, s = max|x|^α / max|w|^(1-α)
    moves a part of the inputs' outliers into the weights: x / s, W diag(s) (Xiao et al. 2022, eq. 4).
    """
    eight_bit_rows("smoothquant", bits, group)
    s = max_abs.clamp(min=1e-5).pow(alpha) / w.abs().amax(0).clamp(min=1e-5).pow(1 - alpha)
    q = nearest("absmax", w * s, 8, 0)
    return q._replace(method="smoothquant", parts={**q.parts, "in_scale": (1 / s).float()})


def llm_int8(w, bits=8, group=0):
    """LLM.int8()'s weights: absmax of each row; what is special about it happens to x, see int8_product."""
    eight_bit_rows("llm_int8", bits, group)
    return nearest("absmax", w, 8, 0)._replace(method="llm_int8")


def eight_bit_rows(method, bits, group):
    if bits != 8 or group:
        raise BadInput(f"--method {method} has 8 bits and a scale for each row, not --bits {bits} --group {group}: "
                       f"give --bits 8 --group 0")


def compensate(W, q, rank):
    """Adds the best rank-r approximation of the error, W - Ŵ ≈ up · down (ZeroQuant-V2's LoRC, Yao et al. 2023)."""
    u, s, v = torch.linalg.svd(W.float() - dequantize(q), full_matrices=False)
    root = s[:rank].sqrt()
    parts = {"up": (u[:, :rank] * root).bfloat16(), "down": (root[:, None] * v[:rank]).bfloat16()}
    return q._replace(parts={**q.parts, **parts})


# -----------------------------------------------------------------------------
# The two functions that everything else calls


METHODS = {  # (W (N, K) float32, bits, group, calibration by name) -> QTensor
    **{name: functools.partial(nearest, name) for name in GRIDS},
    "nf4": functools.partial(codebook, "nf4"),  # double
    "fp4": functools.partial(codebook, "fp4"),
    "fp8": fp8,
    "gptq": gptq,            # hessian
    "awq": awq,              # hessian, mean_abs
    "smoothquant": smoothquant,  # max_abs
    "llm_int8": llm_int8,
}
NEEDS = {"gptq": ("hessian",), "awq": ("hessian", "mean_abs"), "smoothquant": ("max_abs",)}


def quantize(W, method, bits=4, group=0, **calibration):
    """
    W (N, K), any float dtype -> QTensor. group: weights of a row that share a scale; 0: a row (nf4, fp4: 64), -1: all.
    calibration: see the methods; double=False of nf4 and fp4 keeps their scales in float32.
    Raises BadInput for an unknown method, bits outside 2 … 8, a group that does not divide K, weights not finite.
    """
    if method not in METHODS:
        raise BadInput(f"--method {method} is unknown: choose one of {', '.join(METHODS)}")
    if not 2 <= bits <= 8:
        raise BadInput(f"--bits {bits} is out of range: give 2 to 8")
    if W.dim() != 2:
        raise BadInput(f"weights of shape {list(W.shape)} are no matrix (N, K): quantize Linears' and embeddings'")
    group = group or (64 if method in LEVELS else 0)
    if group > 0 and W.shape[1] % group:
        fits = [g for g in (256, 128, 64, 32, 16, 8) if W.shape[1] % g == 0]
        raise BadInput(f"--group {group} does not divide rows of {W.shape[1]} weights: use one of {fits}, or 0, a row")
    if not torch.isfinite(W).all():
        raise BadInput("the weights hold NaN or infinity: quantize a run whose training did not diverge")
    return METHODS[method](W.detach().float(), bits, group, **calibration)


def dequantize(q, dtype=torch.float32):
    """The matrix (N, K) that q stands for."""
    w = scaled(q)
    if "in_scale" in q.parts:
        w = w * q.parts["in_scale"]
    if "up" in q.parts:
        w = w + q.parts["up"].float() @ q.parts["down"].float()
    return w.to(dtype)


def scaled(q):
    """(q - z) s: what multiplies the scaled input, without the low-rank part; float32 (N, K)."""
    codes = q.parts["codes"]
    if q.method == "fp8":
        return codes.float() * q.parts["scale"]
    scale = single_scale(q.parts) if "scale8" in q.parts else q.parts["scale"].float()
    if q.method in LEVELS:
        values = LEVELS[q.method].to(codes.device)[unpack(codes, 4, q.shape[1]).int()]
    elif q.bits == 8:
        values = codes.float()
        if "zero" in q.parts:
            values = values.view(*scale.shape, -1) + (128 - q.parts["zero"].float()[..., None])
    else:
        values = unpack(codes, q.bits, q.shape[1]).float().view(*scale.shape, -1)
        values = values - (q.parts["zero"].float()[..., None] if "zero" in q.parts else 2 ** (q.bits - 1))
    return (values.view(*scale.shape, -1) * scale[..., None]).view(q.shape)


# -----------------------------------------------------------------------------
# Products that read the codes: for the few rows of a decoding step, where time is the bytes that are read


def int8_cpu(x, codes, scale):
    return torch._weight_int8pack_mm(x.bfloat16(), codes, scale).to(x.dtype)


def int4_cpu(x, packed, group, scale_m):
    return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, scale_m).to(x.dtype)


def int4_cuda(x, packed, group, scale_m):
    return torch._weight_int4pack_mm(x.bfloat16(), packed, group, scale_m).to(x.dtype)


def int8_kernel(q):
    """8 bits, symmetric, a scale a row: (a function of x (M, K) and more, what it takes beside x), or None."""
    codes, scale = q.parts["codes"], q.parts["scale"][:, 0]
    if codes.device.type == "cpu":  # fast with bfloat16 alone: other dtypes take a scalar loop
        return int8_cpu, (codes, scale.bfloat16())


def int4_kernel(q):
    """
    Up to 4 bits on an even grid. torch's kernels hold w = (q - 8) s + m: scale and m (K / g, N, 2) in bfloat16, g one
    of 32 … 256; the order of the codes is the processor's own, so it is made here and never saved.
    """
    (N, K), device = q.shape, q.parts["codes"].device
    group = next((g for g in (256, 128, 64, 32) if (q.group or K) % g == 0 and K % g == 0), 0)
    if not group or q.group < 0:
        return None
    scale, middle = q.parts["scale"].float(), 2 ** (q.bits - 1)  # which becomes code 8, so that m is small
    m = (middle - q.parts["zero"].float() if "zero" in q.parts else torch.zeros_like(scale)) * scale
    scale_m = torch.stack((scale, m), -1).repeat_interleave(K // group // scale.shape[1], 1)
    scale_m = scale_m.transpose(0, 1).bfloat16().contiguous()
    codes = unpack(q.parts["codes"], q.bits, K) + (8 - middle)
    if device.type == "cpu" and N % 16 == 0:
        return int4_cpu, (torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1), group, scale_m)
    if device.type == "cuda" and N % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0):
        tiles = next(t for t in (8, 4, 2) if K % (16 * t) == 0)
        return int4_cuda, (torch._convert_weight_to_int4pack(pack(codes, 4), tiles), group, scale_m)


def kernel_of(q):
    """int8_kernel or int4_kernel of what they can read, or None."""
    even = q.method in GRIDS or q.method in ("gptq", "awq")
    if even and q.bits == 8 and q.group == 0 and "zero" not in q.parts:
        return int8_kernel(q)
    return int4_kernel(q) if even and q.bits <= 4 else None


# -----------------------------------------------------------------------------
# Products with activations in 8 bits


def int_mm(a, b):
    """a (M, K) int8, b (N, K) int8 -> a bᵀ (M, N), float32."""
    M, (N, K) = len(a), b.shape
    if a.is_cuda and K % 8 == N % 8 == 0:
        return torch._int_mm(F.pad(a, (0, 0, 0, max(0, 32 - M))), b.T)[:M].float()
    if a.device.type == "cpu" and torch.cpu._is_vnni_supported():
        return torch._int_mm(a, b.T).float()
    return a.float() @ b.float().T  # exact below 2^24; faster than _int_mm where there is no instruction for it


OUTLIER = 6.0


def int8_product(x, parts, threshold=OUTLIER):
    """
    LLM.int8() (Dettmers et al. 2022): columns of x (M, K) that hold an |x| of 6 or more are multiplied in x's dtype
    with the dequantized weights, the others as int8, with absmax of each row of x and of W.
    """
    codes, scale = parts["codes"], parts["scale"]
    large = x.abs() >= threshold
    columns = large.any(0)
    rows = nonzero(x.masked_fill(large, 0).abs().amax(1, keepdim=True).float()) / 127
    x8 = (x / rows).round().masked_fill(columns, 0).to(torch.int8)
    y = (int_mm(x8, codes) * rows * scale[:, 0]).to(x.dtype)
    if threshold < math.inf and columns.any():
        o = columns.nonzero()[:, 0]
        y = torch.addmm(y, x[:, o], (codes[:, o] * scale).to(x.dtype).T)
    return y


def fp8_product(x, parts):
    """x and W in e4m3, a scale for each row of x and for each row of W or for all of it."""
    codes, scale = parts["codes"], parts["scale"]
    x8, rows = to_fp8(x, x.abs().amax(1, keepdim=True))
    fast = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)
    if fast and codes.shape[0] % 16 == codes.shape[1] % 16 == 0:
        columns = scale.T.expand(1, len(codes)).contiguous()
        return torch._scaled_mm(x8, codes.T, rows, columns, out_dtype=torch.bfloat16).to(x.dtype)
    return F.linear(x8.float() * rows, codes.float() * scale).to(x.dtype)


WITH_ACTIVATIONS = {
    "llm_int8": int8_product,
    "smoothquant": lambda x, parts: int8_product(x, parts, math.inf),
    "fp8": fp8_product,
}


# -----------------------------------------------------------------------------
# A Linear over a QTensor


class FrozenProduct(torch.autograd.Function):
    """x Ŵᵀ, where only x has a gradient: the backward pass dequantizes again, so no float copy of W is kept."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return F.linear(x, dequantize(linear.q, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize(ctx.linear.q, grad.dtype), None


class QuantLinear(nn.Module):
    """y = x Ŵᵀ + b over a QTensor, whose parts are buffers; the gradient passes to x (QLoRA), never to Ŵ."""

    def __init__(self, q, bias=None):
        super().__init__()
        self.method, self.bits, self.group, self.shape = q.method, q.bits, q.group, tuple(q.shape)
        self.names = list(q.parts)
        for name, t in q.parts.items():
            self.register_buffer(name, t)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = self.shape
        self.kernel, self.packed = None, ()  # made at the first product

    @property
    def q(self):
        return QTensor(self.method, self.bits, self.group, self.shape, {n: getattr(self, n) for n in self.names})

    @property
    def weight(self):
        """The dequantized matrix, made anew at each look."""
        return dequantize(self.q)

    def forward(self, x):
        train = x.requires_grad and torch.is_grad_enabled()
        return self.biased(FrozenProduct.apply(x, self)) if train else self.product(x)

    def biased(self, y):
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x):
        """x Ŵᵀ + b: few rows by a kernel that reads the codes, many by the dequantized matrix, in x's dtype."""
        if not x.numel():  # an expert that nobody asks
            return x.new_zeros(*x.shape[:-1], self.out_features)
        few, flat = x.numel() <= VECTORS * self.in_features, x.reshape(-1, self.in_features)
        if few and x.is_cuda and triton is not None and self.stored() is not None:
            return vector_product(flat, self).view(*x.shape[:-1], -1)
        if self.kernel is None:
            self.kernel, self.packed = kernel_of(self.q) or (False, ())
        few = self.kernel and few
        if not few and self.method not in WITH_ACTIVATIONS:
            return self.biased(F.linear(x, dequantize(self.q, x.dtype)))
        scaled_x = flat * self.in_scale.to(x.dtype) if "in_scale" in self.names else flat
        y = self.kernel(scaled_x, *self.packed) if few else WITH_ACTIVATIONS[self.method](scaled_x, self.q.parts)
        if "up" in self.names:
            y = y + flat @ self.down.to(x.dtype).T @ self.up.to(x.dtype).T
        return self.biased(y).view(*x.shape[:-1], -1)

    def stored(self):
        """
        What model.py's vector_product can read, in words of 32 bits: codes of 8 bits, a scale a row, or of 4 with 8, 16
        … to a group.
        """
        K, group = self.in_features, self.group
        whole = self.bits == 8 and K % 4 == 0 and group == 0 and "zero" not in self.names
        power = 8 <= group == group & -group and K % group == 0
        halves = self.bits == 4 and K % 8 == 0 and (power or group == 0)
        plain = type(self) in (QuantLinear, QuantEmbedding) and "up" not in self.names  # no adapter
        if not plain or self.method not in (*GRIDS, "gptq", "awq") or not (whole or halves):
            return None
        return Stored(self.codes, self.bits, self.group, self.scale, getattr(self, "zero", None),
                      getattr(self, "in_scale", None))

    def _apply(self, move, recurse=True):
        """To another device, never to another dtype; the kernel's own copy of the codes is made again."""
        def keep(t):
            moved = move(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)
        self.kernel, self.packed = None, ()
        return super()._apply(keep, recurse)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.method}, bits={self.bits}, group={self.group}"


class QuantEmbedding(QuantLinear):
    """An embedding table over a QTensor; product(x) is that of a head that shares it."""

    def forward(self, ids):
        rows = {name: getattr(self, name)[ids.flatten()] for name in self.names}
        q = QTensor(self.method, self.bits, self.group, (ids.numel(), self.in_features), rows)
        return dequantize(q).view(*ids.shape, -1)


# -----------------------------------------------------------------------------
# Quantization-aware training


def fake_quantize(w, bits, group=0):
    """ŵ of round to nearest, with the gradient of w: rounding counts as the identity (Bengio et al. 2013)."""
    with torch.no_grad():
        groups = grouped(w.float(), group)
        scale, zero = fit(groups, bits, "zeropoint", group <= 0)
        error = ((encode(groups, scale, zero, bits) - zero) * scale).view_as(w).to(w.dtype) - w
    return w + error


class QATLinear(nn.Linear):
    """A Linear that always multiplies by its rounded weights; the weights that the optimizer sees stay as they are."""

    def __init__(self, linear, bits, group):
        nn.Module.__init__(self)
        self.weight, self.bias, self.bits, self.group = linear.weight, linear.bias, bits, group
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        weight = fake_quantize(self.weight, self.bits, self.group)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def use_qat(model, flag):
    """Train with the rounding in place, in every Linear of the blocks. flag: qatBITS or qatBITS:GROUP: qat4:128."""
    match = re.fullmatch(r"qat([2-8])(?::(\d+))?", flag)
    if not match:
        raise BadInput(f"--quantize {flag} is unknown: give qat2 to qat8, with a group after a colon, as in qat4:128")
    bits, group = int(match[1]), int(match[2] or 128)
    for name, linear in linears(model).items():
        if group and linear.in_features % group:
            raise BadInput(f"--quantize {flag}: groups of {group} do not divide the {linear.in_features} inputs of "
                           f"{name}: give another after a colon, as in qat{bits}:32, or :0 for rows")
        model.set_submodule(name, QATLinear(linear, bits, group))


# -----------------------------------------------------------------------------
# A model, layer by layer


def linears(model):
    """name -> Linear of the blocks; an expert's or adapter's included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks.")}


class Enough(Exception):
    pass


def stages(model, idx):
    """Names of the blocks' Linears in the order of their calls; those that read the same tensor stand together."""
    order, last, hooks = [], None, []

    def saw(name):
        def hook(module, inputs):
            nonlocal last
            if not any(name in stage for stage in order):
                order.append([]) if inputs[0] is not last else None
                order[-1].append(name)
            last = inputs[0]
        return hook
    for name, m in linears(model).items():
        hooks.append(m.register_forward_pre_hook(saw(name)))
    model.trunk(idx)
    for hook in hooks:
        hook.remove()
    called = {name for stage in order for name in stage}  # an expert may have been asked nothing
    order += [[name] for name in linears(model) if name not in called]
    return sorted(order, key=lambda names: block_of(names[0]))


def block_of(name):
    """The number of the block that a Linear stands in: 3 of "blocks.3.attn.q"."""
    return int(name.split(".")[1])


def run_from(model, l, idx, x):
    """The trunk on ids idx up to the first Enough, from block l on, which reads x (None: from the start)."""
    before = model.blocks[:0 if x is None else l]
    for block in before:
        block.forward = lambda x, *rest: x
    enter = model.blocks[l].register_forward_pre_hook(lambda block, args: args if x is None else (x, *args[1:]))
    with contextlib.suppress(Enough):
        model.trunk(idx)
    enter.remove()
    for block in before:
        del block.forward


def entering(model, l, batches, streams):
    """The residual stream that enters block l, for each batch; streams: that of block l - 1."""
    seen = []

    def hook(block, args):
        seen.append(args[0])
        raise Enough
    handle = model.blocks[l].register_forward_pre_hook(hook)
    for idx, x in zip(batches, streams):
        run_from(model, max(0, l - 1), idx, x)
    handle.remove()
    return seen


def passes(order):
    """
    The stages that one pass over the texts can observe, since none reads what another gives: the experts' of a layer,
    their first matrices and their last.
    """
    found = {}
    for names in order:
        found.setdefault(re.sub(r"(?<=\.experts\.)\d+", "", names[0]), []).append(names)
    return list(found.values())


def observe(model, names, batches, streams=None, hessians=True):
    """
    What Linears of one block read while the model runs the ids of `batches`: name -> hessian 2 X Xᵀ / n (K, K),
    mean_abs and max_abs (K,), and outliers, the share of |x| ≥ 6. streams: what enters the block, for each batch, where
    known.
    """
    alone, device, l = model.config.share == 1, model.device, block_of(names[0])
    found, count, waiting = {}, dict.fromkeys(names, 0), set()

    def watch(name, module):
        K = module.in_features
        found[name] = seen = {part: torch.zeros(shape, device=device) for part, shape in (
            ("hessian", (K, K) if hessians else ()), ("mean_abs", K), ("max_abs", K), ("outliers", ()))}

        def hook(module, inputs):
            x = inputs[0].detach().reshape(-1, K).float()
            if hessians:
                seen["hessian"].addmm_(x.T, x, alpha=2)
            seen["mean_abs"] += x.abs().sum(0)
            seen["max_abs"] = x.abs().amax(0).maximum(seen["max_abs"]) if len(x) else seen["max_abs"]
            seen["outliers"] += (x.abs() >= OUTLIER).float().mean(1).sum()
            count[name] += len(x)
            waiting.discard(name)
            if alone and not waiting:  # nothing after it matters
                raise Enough
        return module.register_forward_pre_hook(hook)

    def end(block, inputs, x):
        raise Enough  # experts that no token of this batch chose were waited for
    handles = [watch(name, model.get_submodule(name)) for name in names]
    handles += [model.blocks[l].register_forward_hook(end)] if alone else []
    for idx, x in zip(batches, streams or [None] * len(batches)):
        waiting |= {*names}
        run_from(model, l, idx, x)
    for handle in handles:
        handle.remove()
    for name, seen in found.items():
        for part in ("hessian", "mean_abs", "outliers"):
            seen[part] /= max(1, count[name])
        if not count[name]:  # an expert that no token chose: round to nearest
            K = len(seen["mean_abs"])
            seen |= {"hessian": torch.eye(K, device=device), "mean_abs": torch.ones(K, device=device),
                     "max_abs": torch.ones(K, device=device)}
    return found


@torch.no_grad()
def outlier_share(model, batches):
    """The share of the inputs of all the blocks' Linears, quantized or not, that are outliers to LLM.int8()."""
    counts = torch.zeros(2, dtype=torch.float64)

    def hook(module, inputs):
        counts.add_(torch.tensor([(inputs[0].abs() >= OUTLIER).sum().item(), inputs[0].numel()]))
    hooks = [m.register_forward_pre_hook(hook) for name, m in model.named_modules()
             if isinstance(m, (nn.Linear, QuantLinear)) and name.startswith("blocks.")]
    for idx in batches:
        model.trunk(idx)
    for h in hooks:
        h.remove()
    return (counts[0] / counts[1]).item()


@torch.no_grad()
def quantize_model(model, method, bits, group, batches=(), embeddings=0, rank=0, **options):
    """
    Replace the blocks' Linears by QuantLinears, in place and in the order of their calls: what calibrates a layer has
    passed through the layers before it as they are now (GPTQ's true sequential). batches: tensors of ids (B, T).
    embeddings: bits of wte and head, 8: rows, round to nearest, fewer: HQQ in groups; 0: left alone. rank: see
    compensate.
    """
    model.eval()
    order = stages(model, batches[0]) if method in NEEDS else [[name] for name in linears(model)]
    needs, streams, at = NEEDS.get(method, ()), [None] * len(batches), -1
    for together in passes(order):
        while needs and model.config.share == 1 and at < block_of(together[0][0]):
            at += 1
            streams = entering(model, at, batches, streams)
        seen = observe(model, [names[0] for names in together], batches, streams, "hessian" in needs) if needs else {}
        for first, name in ((names[0], name) for names in together for name in names):
            linear = model.get_submodule(name)
            try:
                known = {k: seen[first][k] for k in needs}
                q = quantize(linear.weight, method, bits, group, **options, **known)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from None
            except torch.linalg.LinAlgError:
                raise BadInput(f"{name}: the inputs' Hessian is singular: give more --calibration_tokens") from None
            q = compensate(linear.weight, q, rank) if rank else q
            model.set_submodule(name, QuantLinear(q, linear.bias))
    for name, kind in (("wte", QuantEmbedding), ("head", QuantLinear)) if embeddings else ():
        module = getattr(model, name)
        if module is not None:
            how = ("symmetric", 8, 0) if embeddings == 8 else ("hqq", embeddings, max(group, 0))
            setattr(model, name, kind(quantize(module.weight, *how)))
    return model


# -----------------------------------------------------------------------------
# The file: model.safetensors holds the parts as buffers, run.json says under "quantize" what they are


def describe(model):
    """name -> {method, bits, group, parts} of every quantized module: what install needs to know."""
    return {name: {"method": m.method, "bits": m.bits, "group": m.group, "parts": m.names}
            for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def layout(method, bits, group, shape, rank=0):
    """name -> (shape, dtype) of each part that a QTensor of this kind can have."""
    N, K = shape
    scales = (1, 1) if group < 0 else (N, K // (group or K))
    count = math.prod(scales)
    coarse = torch.float32 if group <= 0 or method in LEVELS or method == "fp8" else torch.bfloat16
    codes = torch.float8_e4m3fn if method == "fp8" else torch.int8 if bits == 8 else torch.uint8
    return {"codes": ((N, K if bits == 8 else math.ceil(K * bits / 8)), codes), "scale": (scales, coarse),
            "zero": (scales, torch.float16), "in_scale": ((K,), torch.float32),
            "scale8": (scales, torch.uint8), "scale8_max": ((math.ceil(count / 256),), torch.float32),
            "scale8_mean": ((1,), torch.float32),
            "up": ((N, rank), torch.bfloat16), "down": ((rank, K), torch.bfloat16)}


def install(model, described, tensors, source):
    """
    Put QuantLinears where `described` says, on the meta device, and return the names of their tensors;
    model.build_model then checks every shape against the file. Raises BadInput where the file is of another model.
    """
    kept = set()
    try:
        for name, d in described.items():
            old = model.get_submodule(name)
            shape = tuple(old.weight.shape)
            rank = tensors[f"{name}.up"].shape[1] if "up" in d["parts"] else 0
            places = layout(d["method"], d["bits"], d["group"], shape, rank)
            parts = {part: torch.empty(places[part][0], dtype=places[part][1], device="meta") for part in d["parts"]}
            for part, t in parts.items():
                kept.add(f"{name}.{part}")
                there = tensors.get(f"{name}.{part}", t)
                if there.dtype != t.dtype:
                    raise BadInput(f"{source} has {name}.{part} in {there.dtype}, but {t.dtype} is due: quantize again")
            kind = QuantEmbedding if isinstance(old, nn.Embedding) else QuantLinear
            q = QTensor(d["method"], d["bits"], d["group"], shape, parts)
            model.set_submodule(name, kind(q, getattr(old, "bias", None)))
    except (AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"{source}/run.json says of {name} what its model or file does not hold ({error}): "
                       f"quantize again") from None
    return kept


# -----------------------------------------------------------------------------
# Data: what calibrates, and what perplexity is measured on


def read_ids(init, run, tokenizer, args):
    """
    {"train": [(name, ids)], "val": …}: the text files given by --calibration and --text, else the token files that the
    run was trained beside, each with its share of the tokens wanted, else this Python's own source.
    """
    import data
    from data import stdlib
    from data import text as text_files
    start, found = tokenizer.begin, data.corpora(run)
    ids = {}
    for split, path, want in (("train", args.calibration, 32 * args.calibration_tokens),
                              ("val", args.text, args.eval_tokens)):
        if path is None and found:
            limit = {name: max(2, round(want * weight)) + 1 if want else None for name, (weight, _) in found.items()}
            ids[split] = [(name, np.asarray(data.open_tokens(folder / f"{split}.bin")[:limit[name]]).astype(np.int64))
                          for name, (_, folder) in found.items()]
            continue
        row, files = [], [Path(path)] if path else list(stdlib.files(split))
        for piece, starts in (p for file in files for p in text_files.read(file)):
            row += (start if starts else []) + list(tokenizer.encode(text_files.clean(piece)))
            if 0 < want < len(row):
                break
        row = row[:want + 1] if want else row
        ids[split] = [(Path(path).name if path else "stdlib", np.array(row, dtype=np.int64))]
    return ids


def calibration_batches(texts, T, tokens, seed, device, rows=8):
    """Random windows of T tokens, so many of each text as its length's share: a list of (rows, T)."""
    rng, windows = np.random.default_rng(seed), []
    total = sum(len(ids) for _, ids in texts)
    for name, ids in texts:
        if len(ids) < T:
            raise BadInput(f"the calibration text {name} has {len(ids)} tokens, less than one window of {T}: give "
                           f"--calibration FILE with more text")
        for start in rng.integers(0, len(ids) - T + 1, max(1, round(tokens / T * len(ids) / total))):
            windows.append(ids[start:start + T])
    return [b.to(device) for b in torch.from_numpy(np.stack(windows)).split(rows)]


def perplexity(model, texts, window, stride):
    """exp(nats / tokens) over all texts; every token but the first of a text is predicted once."""
    import evaluate
    T = window or model.context
    if not 0 < (stride or T) <= T <= model.context:
        raise BadInput(f"--window {T} and --stride {stride}: the stride must be at most the window, which must be at "
                       f"most the model's context of {model.context}")
    nats, count = 0.0, 0
    for name, ids in texts:
        if len(ids) < 2:
            raise BadInput(f"the text {name} holds no token to predict: give --text FILE with more text")
        nats += math.log(evaluate.perplexity(model, ids, window, stride)) * (len(ids) - 1)
        count += len(ids) - 1
    return math.exp(nats / count)


# -----------------------------------------------------------------------------
# One run into few bits, and back to measure it


def load_float(init, device):
    """(model in float32 with its adapter in the weights, run.json, tokenizer) of a run that is not quantized."""
    from lora import plain
    path = Path(init) / "run.json"
    run = read_json(path) if path.exists() else {}
    if run.get("quantize"):
        raise BadInput(f"--init {init} is quantized already: give the run that it was made from, {run['args']['init']}")
    return plain(init, device, torch.float32).eval(), run, Tokenizer.from_pretrained(init)


def write(out, model, run, tokenizer, args, metrics, dtype=torch.bfloat16):
    """The run directory: what is quantized as its parts, the rest in dtype. Returns the bytes of its weights."""
    from model import save_run
    described = describe(model)
    parts = {f"{name}.{part}" for name, d in described.items() for part in d["parts"]}
    weights = {name: t if name in parts else t.to(dtype) for name, t in model.state_dict().items()}
    save_run(out, model, {
        "stage": "quantize", "step": run.get("step", 0), "metrics": metrics, "quantize": described,
        "args": {**run.get("args", {}), **vars(args)}, "tokenizer": run.get("tokenizer") or tokenizer.spec()}, weights)
    tokenizer.save(out)
    return os.path.getsize(Path(out) / "model.safetensors")


def step_seconds(model, steps, compile, context=16):
    """Seconds a decoding step takes, batch 1, greedy, behind a prompt and as many steps that are not timed."""
    news = model.stream([list(range(1, context + 1))], 2 * steps, poll=steps, compile=compile, temperature=0.0)
    next(news)
    start = time.perf_counter()
    next(news)  # looks at its tokens, so it waits for the device
    return (time.perf_counter() - start) / steps


def measure(args):
    """
    tokens/s and peak memory of a run, in a process of its own: main memory beyond what Python and torch took before,
    or a GPU's allocations.
    """
    from model import GPT, peak_memory, setup_process

    def peak():
        status = Path("/proc/self/status")  # getrusage's peak is the parent's here
        if device.type == "cuda" or not status.exists():
            return peak_memory(device)
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    device = setup_process(args.device).device
    with contextlib.suppress(OSError):  # Linux: the peak counts from here
        Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else torch.bfloat16 if device.type == "cuda" else \
        torch.float32
    model = GPT.from_pretrained(args.measure, device, dtype).eval()
    seconds = min(step_seconds(model, min(32, model.context // 2 - 8), args.compile) for _ in range(3))
    print(json.dumps({"tokens_per_s": round(1 / seconds, 1), "peak_memory": peak() - before}))


# -----------------------------------------------------------------------------
# The table


ROWS = ("float32", "bfloat16", "symmetric:8:0", "zeropoint:8:0", "llm_int8", "smoothquant", "fp8", "fp4", "nf4",
        "absmax:4", "zeropoint:4", "hqq:4", "awq:4", "gptq:4", "zeropoint:3", "hqq:3", "awq:3", "gptq:3", "gptq:2")
OWN = {"llm_int8": (8, 0), "smoothquant": (8, 0), "fp8": (8, 0), "nf4": (4, 64), "fp4": (4, 64)}  # bits, group


def parse_row(text, args):
    """
    'gptq:3:64' -> (gptq, 3, 64); what is left out is --bits and --group, or the method's own, which where it has no
    other is its own in a table whatever the flags say.
    """
    method, *numbers = text.split(":")
    bits, group = OWN.get(method, (4, 128))
    named = args.method == method  # then its refusal of a flag is right
    bits = args.bits if args.bits and (named or method not in OWN) else bits
    group = args.group if args.group is not None and (named or method in LEVELS or method not in OWN) else group
    try:
        bits, group, *more = [*map(int, numbers), *(bits, group)[len(numbers):]]
    except ValueError:
        more = True
    if more:
        raise BadInput(f"--rows {text}: give method, method:bits or method:bits:group, as in gptq:4:128")
    return method, bits, group


def table_row(text, init, args, device, speed=None):
    """
    One line of the table: the run in this form, written to a file, and measured as what is read from it; its speed
    and memory in a process of their own, unless they are given: they are the same for every run of one shape.
    """
    from model import GPT
    model, run, tokenizer = load_float(init, device)
    ids = read_ids(init, run, tokenizer, args)
    row, start = {"init": str(init), "row": text}, time.perf_counter()
    if text in ("float32", "bfloat16"):
        row |= {"method": text, "bits": 32 if text == "float32" else 16, "group": ""}
        dtype = getattr(torch, text)
    else:
        method, bits, group = parse_row(text, args)
        row |= {"method": method, "bits": bits, "group": group}
        T = args.window or model.context
        batches = calibration_batches(ids["train"], T, args.calibration_tokens, args.seed, device)
        options = {"act_order": True} if args.act_order and method == "gptq" else {}
        quantize_model(model, method, bits, group, batches, args.embeddings, args.rank, **options)
        row |= {"outliers": outlier_share(model, batches[:2])} if method == "llm_int8" else {}
        dtype = torch.float32
    row["seconds"] = round(time.perf_counter() - start, 1)
    with tempfile.TemporaryDirectory() as folder:
        size = write(folder, model, run, tokenizer, args, {}, torch.float32 if text == "float32" else torch.bfloat16)
        model = GPT.from_pretrained(folder, device, dtype).eval()
        row |= {"megabytes": round(size / 1e6, 3),
                "perplexity": perplexity(model, ids["val"], args.window, args.stride)}
        del model
        if speed:
            return row | speed
        command = [sys.executable, __file__, "--measure", folder, "--device", str(device)]
        command += ["--dtype", text] if text in ("float32", "bfloat16") else []
        command += ["--compile"] if args.compile else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"--table {text}: measuring its speed failed: {done.stderr.strip().splitlines()[-1]}")
    return row | json.loads(done.stdout.splitlines()[-1])


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(inits, args, device):
    """Every row for every run; prints means over the runs, writes a line a row and run as CSV, and the plot."""
    rows = []
    print(f"{'method':12} {'bits':>4} {'group':>5} {'MB':>9} {'of bf16':>8} {'perplexity':>11} {'of float32':>17} "
          f"{'tokens/s':>9} {'of bf16':>8} {'peak MB':>8}")
    for text in args.rows:
        new = [table_row(text, inits[0], args, device)]
        speed = {key: new[0][key] for key in ("tokens_per_s", "peak_memory")}
        new += [table_row(text, init, args, device, speed) for init in inits[1:]]
        rows += new
        mean = {key: statistics.mean(r[key] for r in new) for key in
                ("megabytes", "perplexity", "tokens_per_s", "peak_memory")}
        base = {name: [r for r in rows if r["method"] == name] for name in ("float32", "bfloat16")}
        for r, whole in zip(new, base["float32"]):
            r["increase"] = r["perplexity"] / whole["perplexity"] - 1
        more = [100 * r["increase"] for r in new if "increase" in r]
        cost = f"{statistics.mean(more):+.2f} % ± {spread(more):.2f}" if more else "-"
        half = base["bfloat16"]
        share = {key: f"{mean[key] / statistics.mean(r[key] for r in half):.3g}" if half else "-"
                 for key in ("megabytes", "tokens_per_s")}
        first, outliers = new[0], [r["outliers"] for r in new if "outliers" in r]
        print(f"{first['method']:12} {first['bits']:4} {first['group']:5} {mean['megabytes']:9.2f} "
              f"{share['megabytes']:>8} {mean['perplexity']:11.3f} {cost:>17} {mean['tokens_per_s']:9.1f} "
              f"{share['tokens_per_s']:>8} {mean['peak_memory'] / 1e6:8.1f}"
              + (f"  {statistics.mean(outliers):.2%} of all inputs are outliers" if outliers else ""), flush=True)
    prefix = Path(args.plot)
    with replace_file(prefix.with_suffix(".csv"), "w") as f:
        writer = csv.DictWriter(f, fieldnames=list(dict.fromkeys(key for r in rows for key in r)))
        writer.writeheader()
        writer.writerows(rows)
    with replace_file(prefix.with_suffix(".svg"), "w") as f:
        f.write(plot(rows))
    print(f"{prefix}.csv, {prefix}.svg")
    return rows


def plot(rows):
    """Perplexity, on a logarithmic axis, against megabytes, as SVG: a point a row, the mean of its runs."""
    points = {}
    for r in rows:
        points.setdefault(r["row"], []).append((r["megabytes"], r["perplexity"]))
    points = {name: [statistics.mean(z) for z in zip(*p)] for name, p in points.items()}
    width, height, left, bottom = 900, 560, 70, 50
    xs, ys = [p[0] for p in points.values()], [math.log(p[1]) for p in points.values()]
    x0, x1, y0, y1 = 0, max(xs) * 1.12, min(ys), max(max(ys), min(ys) + 1e-3)
    y0, y1 = y0 - 0.05 * (y1 - y0), y1 + 0.05 * (y1 - y0)

    def at(x, log_y):
        return (left + (x - x0) / (x1 - x0) * (width - left - 20),
                height - bottom - (log_y - y0) / (y1 - y0) * (height - bottom - 20))
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
             f'font-size="12">', f'<rect width="{width}" height="{height}" fill="white"/>']
    for i in range(6):
        x, log_y = x0 + (x1 - x0) * i / 5, y0 + (y1 - y0) * i / 5
        px, py = at(x, log_y)
        lines += [f'<path d="M{left} {py:.1f}H{width - 20}M{px:.1f} 20V{height - bottom}" stroke="#ddd"/>',
                  f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{math.exp(log_y):.2f}</text>',
                  f'<text x="{px:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:.3g}</text>']
    taken = []
    for name, (x, y) in sorted(points.items(), key=lambda p: p[1][1]):
        px, py = at(x, math.log(y))
        text_y = py + 4
        while any(abs(text_y - other) < 12 and abs(px - other_x) < 110 for other_x, other in taken):
            text_y -= 3
        taken.append((px, text_y))
        bits = name.partition(":")[2].partition(":")[0] or str(OWN.get(name, (16, 0))[0])
        colour = {"2": "#7a0403", "3": "#c8553d", "4": "#e8a33d", "8": "#3b7dbf"}.get(bits, "#444")
        lines += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>',
                  f'<text x="{px + 7:.1f}" y="{text_y:.1f}">{name}</text>']
    lines += [f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">megabytes on disk</text>',
              f'<text x="16" y="{height / 2}" text-anchor="middle" transform="rotate(-90 16 {height / 2})">perplexity'
              f'</text>', "</svg>"]
    return "\n".join(lines) + "\n"


# -----------------------------------------------------------------------------
# Number formats


FLOATS = {  # name: (dtype, bits of the exponent, of the mantissa)
    "fp32": (torch.float32, 8, 23), "fp16": (torch.float16, 5, 10), "bf16": (torch.bfloat16, 8, 7),
    "fp8 e4m3": (torch.float8_e4m3fn, 4, 3), "fp8 e5m2": (torch.float8_e5m2, 5, 2)}


def float_bits(x, name):
    """(sign, exponent, mantissa) of the number x as strings of bits, and the number that they stand for."""
    dtype, exponent, mantissa = FLOATS[name]
    largest = torch.finfo(dtype).max
    value = torch.tensor(max(-largest, min(largest, x)) if math.isfinite(x) else x).to(dtype)
    size = 1 + exponent + mantissa
    whole = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[size]
    bits = f"{value.view(whole).item() & (2 ** size - 1):0{size}b}"
    return bits[0], bits[1:1 + exponent], bits[1 + exponent:], value.float().item()


def show(numbers):
    """Every number in every format: the bits, what they mean, and the error."""
    x = torch.tensor(numbers)
    if not torch.isfinite(x).all():
        raise BadInput("--show takes finite numbers, as in --show 3.14159 -0.5")
    scale = nonzero(x.abs().max()).item()
    print("floats: (-1)^sign · 2^(exponent - bias) · 1.mantissa, bias 2^(bits of exponent - 1) - 1; an exponent of 0 "
          "means\n2^(1 - bias) · 0.mantissa. Beyond the largest number they are cut here.")
    for number in numbers:
        print(f"\n{number!r}\n{'format':9} {'sign':4} {'exponent':8} {'mantissa':23}  stands for, and how")
        for name, (_, exponent, mantissa) in FLOATS.items():
            sign, e, m, value = float_bits(number, name)
            power = max(1, int(e, 2)) - (2 ** (exponent - 1) - 1)
            fraction = (int(e, 2) > 0) + int(m, 2) / 2 ** mantissa
            print(f"{name:9} {sign:4} {e:8} {m:23}  {value:<14.9g} {'-' if sign == '1' else ''}2^{power} · "
                  f"{fraction:.9g}, error {value - number:+.2g}")
        code = round(number / scale * 127)
        print(f"{'int8':9} {code & 255:08b}{'':30}  {code * scale / 127:<14.9g} {code} · {scale:.6g} / 127, "
              f"{scale:.6g} the largest magnitude shown, error {code * scale / 127 - number:+.2g}")
        code = to_levels(torch.tensor(number / scale), LEVELS["nf4"]).item()
        level = LEVELS["nf4"][code].item()
        print(f"{'nf4':9} {code:04b}{'':34}  {level * scale:<14.9g} level {code}, {level:.6f} · {scale:.6g}, "
              f"error {level * scale - number:+.2g}")


# -----------------------------------------------------------------------------
# Speed


def bandwidth(device):
    """Bytes/s: of a sum over 512 MB on a CPU, which only reads; of a 2 GB copy, read and written, on a GPU."""
    seconds = []
    if device.type == "cuda":
        a = torch.zeros(2 ** 31, dtype=torch.uint8, device=device)
        b = torch.empty_like(a)
    else:
        a = torch.zeros(2 ** 27)
    for _ in range(5):
        start = time.perf_counter()
        b.copy_(a) if device.type == "cuda" else a.sum()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return a.numel() * a.element_size() * (1 + (device.type == "cuda")) / min(seconds)


def bytes_read(model, cache):
    """
    Bytes that one step of one row reads at least: every weight but an embedding that is no head, of experts those that
    a token meets; and the cache.
    """
    from moe import active_share
    c = model.config
    size = 2 * c.n_layer * c.n_kv_head * c.head_dim * cache * torch.empty((), dtype=model.compute_dtype).element_size()
    for name, t in model.state_dict().items():
        if not name.startswith("wpe") and not (name.startswith("wte") and model.head is not None):
            size += round(t.numel() * t.element_size() * (active_share(c) if ".experts." in name else 1))
    return size


def bench(args, device):
    """Decoding, batch 1, of a preset with random weights: float against int8 and int4, in turns, medians."""
    from model import GPT, init_roughly, preset
    with device:
        whole = GPT(preset(args.bench)).eval()
    init_roughly(whole, args.seed)
    group, steps = 32 if args.group is None else args.group, args.steps

    def variant(name):
        copied = copy.deepcopy(whole)
        if name in ("float32", "bfloat16"):
            copied = copied.to(getattr(torch, name))
            copied.compute_dtype = getattr(torch, name)
            return copied
        method, bits, size = ("symmetric", 8, 0) if name == "int8" else ("zeropoint", 4, group)
        quantize_model(copied, method, bits, size, embeddings=bits)
        copied.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return copied.to(copied.compute_dtype)
    names = (["float32"] if device.type == "cpu" else []) + ["bfloat16", "int8", "int4"]
    models = {name: variant(name) for name in names}
    x = torch.randn(1, whole.config.n_embd, device=device)
    for name in names[-2:]:
        linear = next(m for place, m in models[name].named_modules() if place.endswith("mlp.up") or ".experts." in place
                      and place.endswith(".up"))
        exact = F.linear(x, linear.weight.float(), None if linear.bias is None else linear.bias.float())
        off = ((linear(x.to(models[name].compute_dtype)) - exact).norm() / exact.norm()).item()
        if not off < 0.02:
            raise BadInput(f"--bench: the {name} kernel is off by {off:.2%} on this device: its speed means nothing")
    seconds, speeds = {name: [] for name in names}, []
    for _ in range(args.rounds):
        speeds.append(bandwidth(device))
        for name in names:
            seconds[name].append(step_seconds(models[name], steps, args.compile))
    peak, result = max(speeds), {"preset": args.bench, "device": str(device), "threads": torch.get_num_threads()}
    what = "copy, read and written" if device.type == "cuda" else "read by a sum"
    print(f"{args.bench}, batch 1, {steps} steps after 16 tokens, median of {args.rounds} rounds in turns; {device}, "
          f"torch {torch.__version__}; memory {peak / 1e9:.1f} GB/s, {what}")
    base = statistics.median(seconds[names[0]])
    cache = 64 * math.ceil((16 + 2 * steps) / 64)
    for name in names:
        median = statistics.median(seconds[name])
        size = bytes_read(models[name], cache)
        print(f"{name:9} {1 / median:9.1f} tokens/s  {1e3 * median:8.3f} ms  {base / median:5.2f} x {names[0]}  "
              f"{size / 1e6:8.1f} MB a step  {size / median / 1e9:7.1f} GB/s, {size / median / peak:.0%} of memory's",
              flush=True)
        result[name] = {"tokens_per_s": round(1 / median, 1), "ratio": round(base / median, 3),
                        "megabytes": round(size / 1e6, 1), "bandwidth_share": round(size / median / peak, 3)}
    return result | {"bandwidth": peak}


# -----------------------------------------------------------------------------


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init", nargs="+", help="run, Hugging Face folder or hub name; --table: or several (default: the newest run)")
    add("--out", default="out/int4", help="run directory; a finished run already there is kept as OUT.old")
    add("--method", help=f"one of {', '.join(METHODS)} (default: gptq, and the table)")
    add("--bits", type=int, help="2 to 8 (default: 4, or the method's own)")
    add("--group", type=int, help="weights of a row that share a scale; 0: a row, -1: a matrix (default: 128, or the "
        "method's own)")
    add("--embeddings", type=int, default=0, help="bits of the embedding and the head; 0: they stay in bfloat16")
    add("--rank", type=int, default=0, help="of a matrix product that is added to make up for the error; 0: none")
    add("--act_order", action="store_true", help="gptq: columns with large inputs first")
    add("--calibration", help="text file to calibrate with (default: the run's training data, or Python's source)")
    add("--calibration_tokens", type=int, default=16384)
    add("--text", help="text file for the perplexity (default: the run's validation data, or Python's source)")
    add("--eval_tokens", type=int, default=32768, help="of that text; 0: all of it")
    add("--window", type=int, default=0, help="tokens that perplexity reads at once; 0: the model's context")
    add("--stride", type=int, default=0, help="tokens from one window to the next; 0: the window, no overlap")
    add("--table", action="store_true", help="size, perplexity, speed and memory of --rows")
    add("--rows", nargs="+", default=ROWS, metavar="METHOD[:BITS[:GROUP]]", help=f"(default: {' '.join(ROWS)})")
    add("--plot", default="out/quantize", help="the table goes to PLOT.csv and PLOT.svg")
    add("--show", nargs="+", type=float, metavar="X", help="numbers to print in every format, bit by bit")
    add("--bench", metavar="PRESET", help="tokens/s of a preset with random weights, float, int8 and int4")
    add("--steps", type=int, default=32, help="of --bench, in each round")
    add("--rounds", type=int, default=5, help="of --bench")
    add("--measure", metavar="DIR", help="tokens/s and peak memory of one run, as JSON")
    add("--compile", action="store_true", help="torch.compile the decoding step, where speed is measured")
    add("--seed", type=int, default=0, help="of the calibration windows and of --bench's weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of --measure")
    return parser.parse_args(argv)


def newest_float(root="out"):
    """The newest run that reads texts, or what it was quantized from."""
    from data import reads_texts
    from model import newest_run
    path = newest_run(root, reads_texts)
    run = read_json(path / "run.json")
    return run["args"]["init"] if run.get("quantize") else str(path)


def main():
    from model import check_out, setup_process, start_run
    args = get_args()
    if args.show:
        return show(args.show)
    if args.measure:
        return measure(args)
    device = setup_process(args.device).device
    if min(args.steps, args.rounds, args.seed + 1) < 1:
        raise BadInput("--steps and --rounds need 1 or more, --seed 0 or more")
    if args.bench:
        return print(json.dumps(bench(args, device)))
    inits = args.init or [newest_float()]
    if args.rank < 0 or args.stride < 0 or args.window < 0:
        raise BadInput("--rank, --window and --stride cannot be negative: leave them out, or give 0 or more")
    if len(inits) > 1 and (args.method or not args.table):
        raise BadInput("--init names several runs: that is for --table, --method makes one")
    if args.embeddings and not 2 <= args.embeddings <= 8:
        raise BadInput(f"--embeddings {args.embeddings} is out of range: give 2 to 8, or 0 to leave them alone")
    metrics = {}
    if args.table or not args.method:
        rows = table(inits, args, device)
        metrics["table"] = rows
    if args.method or not args.table:
        check_out(args.out, inits[0])
        init, method = inits[0], args.method or "gptq"
        args.init = str(init)
        method, bits, group = parse_row(method, args)
        model, run, tokenizer = load_float(init, device)
        ids = read_ids(init, run, tokenizer, args)
        before = perplexity(model, ids["val"], args.window, args.stride)
        batches = () if method not in NEEDS else calibration_batches(
            ids["train"], args.window or model.context, args.calibration_tokens, args.seed, device)
        start = time.time()
        options = {"act_order": True} if args.act_order and method == "gptq" else {}
        quantize_model(model, method, bits, group, batches, args.embeddings, args.rank, **options)
        seconds = time.time() - start
        after = perplexity(model, ids["val"], args.window, args.stride)
        metrics |= {"perplexity_float": before, "perplexity": after, "val_loss": math.log(after), "seconds": seconds}
        start_run(args.out)
        metrics["bytes"] = write(args.out, model, run, tokenizer, args, metrics)
        T = args.window or model.context
        print(f"{args.out}: {method}, {bits} bits, group {group}: {metrics['bytes'] / 1e6:.2f} MB; perplexity "
              f"{before:.4f} -> {after:.4f} ({after / before - 1:+.2%}) on the first "
              f"{sum(len(x) - 1 for _, x in ids['val']):,} tokens of {', '.join(name for name, _ in ids['val'])} (val),"
              f" window {T}, stride {args.stride or T}; {seconds:.1f} s")
    print(json.dumps(metrics))


if __name__ == "__main__":
    from quantize import main
    cli(main)
