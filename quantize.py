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
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from bpe import BadInput

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
    stream = (codes[..., None] >> torch.arange(bits - 1, -1, -1, device=codes.device)).flatten(1) & 1
    stream = F.pad(stream, (0, -stream.shape[1] % 8)).view(len(codes), -1, 8)
    return (stream << torch.arange(7, -1, -1, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(packed, bits, width):
    """The way back: uint8 (N, width)."""
    if bits == 8:
        return (packed.to(torch.int16) + 128).to(torch.uint8)
    if bits == 4 and width % 2 == 0:
        return torch.stack((packed >> 4, packed & 15), -1).flatten(1)
    stream = (packed[..., None] >> torch.arange(7, -1, -1, device=packed.device)).flatten(1) & 1
    stream = stream[:, :width * bits].view(len(packed), width, bits)
    return (stream << torch.arange(bits - 1, -1, -1, device=packed.device)).sum(-1).to(torch.uint8)


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
    form: scale 255 / (max - min), zero point -round(scale · min) - 128, codes -128 … 127.) Equal weights c: s = |c|.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = (high - low) / (2 ** bits - 1)
    scale = torch.where(scale == 0, low.abs(), scale)
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
        mean = error.abs().mean().item()
        if mean >= best:
            break
        best = mean
        sparse = error.sign() * (error.abs() - error.abs().pow(p - 1) / beta).clamp(min=0)
        zero = (q - (w - sparse) * inverse).mean(-1, keepdim=True)
        beta *= growth
    return 1 / inverse, zero


GRIDS = {"absmax": absmax, "symmetric": symmetric, "zeropoint": zeropoint, "hqq": hqq}


def fit(w, bits, grid, exact):
    """(scale, zero) as they will be stored: bfloat16 and float16 unless exact, so that codes are rounded for those."""
    scale, zero = GRIDS[grid](w, bits)
    scale = nonzero(scale if exact else scale.bfloat16().float())
    return scale, 2.0 ** (bits - 1) if zero is None else zero.half().float()


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
# The two functions that everything else calls


METHODS = {  # (W (N, K) float32, bits, group, calibration by name) -> QTensor
    **{name: lambda w, bits, group, name=name: nearest(name, w, bits, group) for name in GRIDS},
    "nf4": lambda w, bits, group, double=True: codebook("nf4", w, bits, group or 64, double),
    "fp4": lambda w, bits, group, double=True: codebook("fp4", w, bits, group or 64, double),
    "fp8": fp8,
}


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
    codes, group = q.parts["codes"], q.group
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

    @property
    def q(self):
        return QTensor(self.method, self.bits, self.group, self.shape, {n: getattr(self, n) for n in self.names})

    @property
    def weight(self):
        """The dequantized matrix, made anew at each look."""
        return dequantize(self.q)

    def forward(self, x):
        y = FrozenProduct.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x):
        return F.linear(x, dequantize(self.q, x.dtype))

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.method}, bits={self.bits}, group={self.group}"
