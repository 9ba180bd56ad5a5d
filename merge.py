"""
Merging: one model out of several, without training. With θ_i the weights, w_i their --weights, θ_0 the --base they were
tuned from, τ_i = θ_i - θ_0 the task vectors and λ the --scale:

    linear           Σ w_i θ_i / Σ w_i                                      model soups, Wortsman et al. 2022
    average          the same over the saves of one run, or their EMA       SWA, Izmailov et al. 2018
    slerp            sin((1-t) Ω) / sin Ω · θ_a + sin(t Ω) / sin Ω · θ_b    Shoemake 1985; Ω is their angle
    task_arithmetic  θ_0 + λ Σ w_i τ_i                                      Ilharco et al. 2023
    ties             θ_0 + λ mean of the trimmed τ_i that agree in sign     Yadav et al. 2023
    dare_linear      task_arithmetic of τ_i · mask / density                Yu et al. 2024
    dare_ties        ties of them
    passthrough      layers of several models, stacked
    lora             θ_0 + Σ w_i (alpha / r) B_i A_i                        Hu et al. 2022

    python merge.py linear out/a out/b --out out/soup
    python merge.py ties out/a out/b --base out/base --density 0.2 --out out/ties
    python merge.py slerp A B --t attn=0,0.5,1 mlp=1,0.5,0 0.5 --out out/slerp      # t by layer, by part
    python merge.py passthrough A@0:24 B@8:32 --out out/deep                        # layers 0-23, then 8-31
    python merge.py average out/run --last 5 --out out/averaged

A model is a run directory or a Hugging Face folder, and the merge is what the first is, or with task vectors the base,
with the first one's chat template; a folder with a PEFT adapter is its base plus (alpha / r) B A, in every method.
Tensors go through memory in pieces of 16M numbers, as float32.
--mergekit: where mergekit (Goddard et al. 2024) differs from the papers, do as it does.
"""
import argparse
import contextlib
import functools
import json
import math
import re
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from bpe import BadInput, Tokenizer, cli, hub, is_hub_name, replace_file
from model import (GPTConfig, check_out, hf_places, load_shards, scan_safetensors, split_qkv, to_hf_config,
                   write_safetensors)

# -----------------------------------------------------------------------------
# The methods, over tensors of one shape, float32


def linear(tensors, weights=None):
    """Σ w θ / Σ w; weights: one number each, equal unless given."""
    weights = weights or [1.0] * len(tensors)
    return sum(w * t for w, t in zip(weights, tensors)) / sum(weights)


def inner_products(a, b):
    """(a·a, b·b, a·b) as floats, summed in float64."""
    a, b = a.flatten().double(), b.flatten().double()
    return tuple(torch.dot(x, y).item() for x, y in ((a, a), (b, b), (a, b)))


def slerp(a, b, t, inner=None, mergekit=False):
    """
    From a (t = 0) to b (t = 1) at constant angular speed: sin((1-t) Ω) / sin Ω · a + sin(t Ω) / sin Ω · b, with Ω the
    angle between the whole tensors (Shoemake 1985, 3.3). Two of one norm keep it; the ends are exact. inner: their
    inner_products, where a and b are only pieces of them. On one line, where sin Ω is 0, and in mergekit wherever
    |cos Ω| > 0.9995 (fine-tunes of one base nearly always), it is (1-t) a + t b.
    """
    aa, bb, ab = inner or inner_products(a, b)
    cos = ab / math.sqrt(aa * bb) if aa * bb else 1.0
    if abs(cos) > (0.9995 if mergekit else 1 - 1e-12):
        return (1 - t) * a + t * b
    angle = math.acos(cos)
    return math.sin((1 - t) * angle) / math.sin(angle) * a + math.sin(t * angle) / math.sin(angle) * b


def task_arithmetic(base, deltas, weights=None, scale=1.0):
    """θ_0 + λ Σ w τ (Ilharco et al. 2023, 2); a negative weight forgets a task. deltas: the τ."""
    weights = weights or [1.0] * len(deltas)
    return base + scale * sum(w * d for w, d in zip(weights, deltas))


def kth_largest(pieces, k):
    """
    The k-th largest magnitude, k from 1, of all the numbers that pieces() iterates over. Floats without sign have the
    order of their bits, so two counts find it, of the upper 16 bits and of the lower 16 among those; nothing is sorted.
    """
    high = 0
    for step in range(2):
        counts = torch.zeros(1 << 16, dtype=torch.long)
        for piece in pieces():
            bits = piece.float().abs().flatten().view(torch.int32)
            bits = bits >> 16 if step == 0 else bits[bits >> 16 == high] & 0xffff
            counts += torch.bincount(bits, minlength=1 << 16)
        above = counts.flip(0).cumsum(0)  # how many lie in this bin or a higher one
        place = int(torch.searchsorted(above, k))
        k -= int(above[place - 1]) if place else 0
        high = (high << 16) + 0xffff - place
    return torch.tensor(high, dtype=torch.int32).view(torch.float32).item()


def trim(delta, density, threshold=None):
    """
    TIES, step 1: keep the density · n entries of largest magnitude (and what equals the smallest of them), zero the
    rest. threshold: that smallest magnitude, where delta is a piece of a longer vector.
    """
    if density >= 1:
        return delta
    if threshold is None:
        threshold = kth_largest(lambda: [delta], max(1, int(density * delta.numel())))
    return delta * (delta.abs() >= threshold)


def ties(base, deltas, weights=None, scale=1.0, mergekit=False):
    """
    TIES, steps 2 and 3 (Yadav et al. 2023, algorithm 1), of trimmed task vectors: in each place elect the sign of Σ
    τ, then average what has that sign. θ_0 + λ Σ w τ / Σ w over them. mergekit elects by Σ w τ, and + where that is
    0.
    """
    weights = weights or [1.0] * len(deltas)
    votes = sum(w * d for w, d in zip(weights, deltas)) if mergekit else sum(deltas)
    elected = votes.sign() if not mergekit else torch.where(votes >= 0, 1.0, -1.0)
    total, mass = torch.zeros_like(base), torch.zeros_like(base)
    for w, d in zip(weights, deltas):
        agrees = (d * (w if mergekit else 1)).sign() == elected
        agrees &= d != 0
        total += w * d * agrees
        mass += w * agrees
    return base + scale * total / torch.where(mass == 0, 1, mass)


def dare(delta, density, generator=None, rescale=None):
    """
    Drop And REscale (Yu et al. 2024, eq. 2): each entry stays with probability density, and what stays is divided by
    it, so that the expectation is delta. rescale: another factor than 1 / density.
    """
    if density >= 1:
        return delta
    mask = torch.bernoulli(torch.full_like(delta, density), generator=generator)
    return delta * mask * (1 / density if rescale is None else rescale)


def lora(base, A, B, scale):
    """W + (alpha / r) B A; A (r, in), B (out, r)."""
    return base + scale * (B @ A)


def passthrough(slices, find):
    """
    {new name: (number of its model, name there)}: layers start … stop - 1 of each model in turn, numbered anew; what
    lies before the layers is the first model's, what lies behind them the last one's. slices: [(names, start, stop)].
    """
    stack, depth = {}, 0
    for i, (names, start, stop) in enumerate(slices):
        for name in names:
            match = find(name)
            if match is None:
                if i == (0 if before_layers(name) else len(slices) - 1):
                    stack[name] = i, name
            elif start <= int(match[1]) < stop:
                stack[name[:match.start(1)] + str(depth + int(match[1]) - start) + name[match.end(1):]] = i, name
        depth += stop - start
    return stack


# -----------------------------------------------------------------------------
# Models as files, read a piece at a time


LAYER = re.compile(r"(?:^|\.)(?:blocks|layers|h)\.(\d+)\.").search  # ours; LLaMA's and OPT's; GPT-2's and BLOOM's
PIECE = 1 << 24  # numbers


def before_layers(name):
    return re.search(r"wte|wpe|embed|embd_in|embd_norm|rel_bias", name) is not None


class Weights:
    """The tensors of a run directory or a Hugging Face folder: entries {name: (dtype, shape)}, and rows of one."""

    def __init__(self, path, file=None):
        scan = lambda file: {name: (file, *entry) for name, entry in scan_safetensors(file).items()}
        self.path, self.places = path, load_shards(path, scan) if file is None else scan(path / file)
        self.entries = {name: (dtype, shape) for name, (_, dtype, shape, _) in self.places.items()}
        self.depth = 1 + max((int(match[1]) for match in map(LAYER, self.entries) if match), default=-1)

    def rows(self, name, start, stop):
        """Rows start … stop - 1 of a tensor, float32 (float64 stays); read, not mapped: memory is free after."""
        file, dtype, shape, offset = self.places[name]
        width = math.prod(shape[1:]) * dtype.itemsize
        data = torch.empty((stop - start) * width, dtype=torch.uint8)
        with open(file, "rb", buffering=0) as f:
            f.seek(offset + start * width)
            view, done = memoryview(data.numpy()), 0
            while done < len(view):
                if not (n := f.readinto(view[done:])):
                    raise BadInput(f"{file} became shorter while it was read: copy or save it again")
                done += n
        t = data.view(dtype).view(stop - start, *shape[1:])
        return t if dtype == torch.float64 or not dtype.is_floating_point else t.float()


class Adapted:
    """A base with a PEFT adapter in it: W + (alpha / r) B A where the adapter has a pair, and DoRA's norms of rows."""

    def __init__(self, base, path):
        self.base, self.path, self.entries, self.depth = base, path, base.entries, base.depth
        try:
            c = json.loads((path / "adapter_config.json").read_text())
            self.config = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}} | c
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{path}/adapter_config.json cannot be read ({error}): save the adapter again") from None
        if c.get("peft_type") != "LORA" or c.get("bias", "none") != "none":
            raise BadInput(f"{path} is not a plain LoRA adapter (peft_type {c.get('peft_type')}, "
                           f"bias {c.get('bias')}), and only W + (alpha / r) B A "
                           f"can be merged: run it beside its base instead")
        own, self.pairs, self.whole = Weights(path, "adapter_model.safetensors"), {}, {}
        ours, _ = read_config(base)
        places = peft_places(config_of(base)) if ours else {}
        self.transposed = not ours and self.config.get("fan_in_fan_out")  # GPT-2's Conv1D keeps (in, out)
        for name, (_, shape) in own.entries.items():
            module, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
            t, whole = own.rows(name, 0, shape[0]), kind.replace(".modules_to_save", "")
            if kind in ("A.weight", "B.weight", "magnitude_vector", "magnitude_vector.weight"):
                name = module + ".weight"
                for place, cut in places.get(name, [(name, None)]):  # q, k and v of a fused matrix share A
                    pair = self.pairs.setdefault(self.target(place), {"scale": self.scale(module)})
                    pair[kind[0]] = cut(t) if cut and kind[0] != "A" else t
            elif not module:
                self.whole[self.target(places.get(whole, [(whole,)])[0][0])] = t
            else:
                raise BadInput(f"{path} has {name}, which is no part of a LoRA of matrices: run it beside its base")
        if self.transposed and any("m" in pair for pair in self.pairs.values()):
            raise BadInput(f"{path} is a DoRA of transposed matrices: merge it with python lora.py merge")
        for name, t in self.whole.items():
            if list(t.shape) != list(self.entries[name][1]):
                raise BadInput(f"{path} has {name} of {list(t.shape)}, its base of {list(self.entries[name][1])}: "
                               f"merge it with python lora.py merge")
        for name, pair in self.pairs.items():
            if not {"A", "B"} <= pair.keys() or len(pair["A"]) != pair["B"].shape[1]:
                raise BadInput(f"{path} lacks half of the pair of {name}: save the adapter again")
            shape = (pair["B"].shape[0], pair["A"].shape[1])
            if self.entries[name][1] != (shape[::-1] if self.transposed else shape):
                raise BadInput(f"{path} fits a matrix {list(shape)} where {base.path} has {name} of "
                               f"{list(self.entries[name][1])}: give --base the model that it was trained on")

    def target(self, name):
        if name not in self.entries:
            raise BadInput(f"{self.path} adapts {name}, which {self.base.path} does not have: give --base the model "
                           f"that it was trained on")
        return name

    def scale(self, module):
        found = lambda patterns, default: next(
            (value for part, value in patterns.items() if re.fullmatch(rf"(.*\.)?({part})", module)), default)
        alpha = found(self.config["alpha_pattern"], self.config["lora_alpha"])
        rank = found(self.config["rank_pattern"], self.config["r"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def rows(self, name, start, stop):
        if name in self.whole:
            return self.whole[name][start:stop]
        W = self.base.rows(name, start, stop)
        if name not in self.pairs:
            return W
        A, B = self.pairs[name]["A"], self.pairs[name]["B"]
        scale = self.pairs[name]["scale"]
        if self.transposed:
            return lora(W, B.T, A.T[start:stop], scale)
        W = lora(W, A, B[start:stop], scale)
        if "m" in self.pairs[name]:  # DoRA (Liu et al. 2024): rows of that length
            W = W * (self.pairs[name]["m"].flatten()[start:stop] / W.norm(dim=1)).unsqueeze(1)
        return W


def open_model(name, base=None):
    """Weights, or Adapted, of a path or hub name; base: the --base of an adapter that does not name its own."""
    path = Path(name)
    if not path.exists() and is_hub_name(str(name)):
        path = hub(str(name))
    if (path / "adapter_config.json").exists():
        try:
            base = base or json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        except ValueError as error:
            raise BadInput(f"{path}/adapter_config.json cannot be read ({error}): save the adapter again") from None
        if not base or not (Path(base).exists() or is_hub_name(base)):
            raise BadInput(f"{path} is an adapter, and its base {base or 'has no name'} is not here: give --base")
        return Adapted(open_model(base), path)
    if not any((path / file).exists() for file in ("run.json", "config.json")):
        raise BadInput(f"{name}: no run.json, config.json or adapter_config.json there; give a run directory, "
                       f"a Hugging Face folder or an adapter's")
    return Weights(path)


def rows_of(letter, c, stacked, t):
    return split_qkv(t, c, stacked)["qkv".index(letter)]


def peft_places(c):
    """
    {name of a weight in the exported model: [(its name in a run, a function that cuts its rows out of a fused
    matrix's, or None)]}, by which adapters of a run name what they change; {} where transformers has no such
    architecture.
    """
    places = {}
    with contextlib.suppress(BadInput):
        kind, _ = to_hf_config(c)
        for ours, theirs, part, fused in hf_places(kind, c):
            cut = functools.partial(rows_of, part[-1], c, kind in ("gpt2", "openai-gpt")) if fused else None
            places.setdefault(theirs, []).append((ours, cut))
    return places


def home(model):
    """The folder that holds a model's weights, but for what an adapter adds."""
    return home(model.base) if isinstance(model, Adapted) else model.path


def label(model):
    """The folder with the chat template and the like of a model: a run's own, an adapter's too; else its home."""
    return model.path if all((path / "run.json").exists() for path in (model.path, home(model))) else home(model)


def folders(model):
    """Where a model is read from: an adapter's folder, its base's, and so on."""
    return [model.path, *(folders(model.base) if isinstance(model, Adapted) else ())]


def read_config(model, folder=None):
    """(is it a run of ours?, run.json or config.json of its home, or of that folder)."""
    ours = (home(model) / "run.json").exists()
    file = (folder or home(model)) / ("run.json" if ours else "config.json")
    try:
        return ours, json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read ({error}): copy or save it again") from None


def config_of(model):
    return GPTConfig(**read_config(model)[1]["config"])


def read_tokenizer(model):
    try:
        return Tokenizer.from_pretrained(home(model))
    except BadInput:  # none, or of a kind that bpe.py does not read
        return None


def refuse_codes(models):
    for m in models:
        if read_config(m)[1].get("quantize"):
            raise BadInput(f"{home(m)} is quantized: merge what it was made from, and quantize that")


def check_alike(models, stacked=False):
    """BadInput unless all are of one architecture and read the same ids; in a stack, but for the number of layers."""
    first, (ours, _) = models[0], read_config(models[0])
    tokenizer = read_tokenizer(first)
    for other in models[1:]:
        if read_config(other)[0] != ours:
            run, folder = (first, other) if ours else (other, first)
            raise BadInput(f"{run.path} is a run and {folder.path} a Hugging Face folder: turn that into a run with "
                           f"python model.py import {folder.path} --out DIR first")
        layered = {name for m in (first, other) for name in m.entries if stacked and LAYER(name)}
        for name in sorted((first.entries.keys() | other.entries.keys()) - layered):
            a, b = (list(m.entries[name][1]) if name in m.entries else None for m in (first, other))
            if a != b:
                raise BadInput(f"{name} is {a or 'missing'} in {first.path} and {b or 'missing'} in {other.path}: only "
                               f"models of one architecture can be merged")
        free = {"block_size", "dropout", "init"} | ({"n_layer", "attn"} if stacked else set())
        a, b = ({} if not ours else asdict(config_of(m)) for m in (first, other))
        if differ := [key for key in a if key not in free and a[key] != b[key]]:
            raise BadInput(f"{differ[0]} is {a[differ[0]]} in {first.path} and {b[differ[0]]} in {other.path}: "
                           f"only models of one architecture can be merged")
        there = read_tokenizer(other)
        if tokenizer is not None and there is not None and tokenizer != there:
            raise BadInput(f"{first.path} and {other.path} have different tokenizers, so one id is two words: merge "
                           f"only models that share one")


# -----------------------------------------------------------------------------
# Merging file by file


def spans(shape):
    """Ranges of rows that hold about PIECE numbers each."""
    rows = max(1, PIECE // max(1, math.prod(shape[1:])))
    n = shape[0] if shape else 1
    return [(start, min(start + rows, n)) for start in range(0, n, rows)] if math.prod(shape) else []


class Deltas:
    """Task vectors over a base, tensor by tensor, dropped and trimmed as the method asks, each time the same."""

    def __init__(self, models, base, args):
        self.models, self.base, self.args = models, base, args
        self.random = args.method.startswith("dare")
        self.keep = 1.0 if args.method in ("task_arithmetic", "lora", "dare_linear") else \
            args.trim if self.random else args.density
        self.density = args.density if self.random else 1.0
        self.thresholds, self.factors = {}, {}

    def plain(self, i, name):
        for start, stop in spans(self.base.entries[name][1]):
            yield self.models[i].rows(name, start, stop) - self.base.rows(name, start, stop)

    def dropped(self, i, name):
        """Model i's task vector in pieces, what DARE drops set to 0."""
        if self.density >= 1:
            yield from self.plain(i, name)
            return
        seed = zlib.crc32(f"{self.args.seed} {i} {name}".encode())
        if self.args.mergekit and (i, name) not in self.factors:
            generator = torch.Generator().manual_seed(seed)
            sums = torch.tensor([[d.abs().sum(dtype=torch.float64), dare(d, self.density, generator, 1.0).abs().sum(
                dtype=torch.float64)] for d in self.plain(i, name)]).sum(0)
            self.factors[i, name] = (sums[0] / sums[1]).item() if sums[1] else 1.0
        generator = torch.Generator().manual_seed(seed)
        for delta in self.plain(i, name):
            yield dare(delta, self.density, generator, self.factors.get((i, name)))

    def trimmed(self, i, name):
        """And what TIES trims: from each tensor by itself in mergekit, from the whole task vector in the paper."""
        names = [name] if self.args.mergekit else list(self.base.entries)
        threshold = self.threshold(i, names) if self.keep < 1 else None
        for delta in self.dropped(i, name):
            yield trim(delta, self.keep, threshold)

    def threshold(self, i, names):
        key = i, names[0] if self.args.mergekit else ""
        if key not in self.thresholds:
            size = sum(math.prod(self.base.entries[name][1]) for name in names)
            self.thresholds[key] = kth_largest(lambda: (d for name in names for d in self.dropped(i, name)),
                                               max(1, int(self.keep * size)))
        return self.thresholds[key]


def merge_linear(name, models, args, deltas):
    for start, stop in spans(models[0].entries[name][1]):
        yield linear([m.rows(name, start, stop) for m in models], args.weights)


def merge_slerp(name, models, args, deltas):
    (a, b), t = models, t_of(name, args.t, models[0].depth)
    inner = [inner_products(a.rows(name, *span), b.rows(name, *span)) for span in spans(a.entries[name][1])]
    inner = [sum(column) for column in zip(*inner)]
    for span in spans(a.entries[name][1]):
        yield slerp(a.rows(name, *span), b.rows(name, *span), t, inner, args.mergekit)


def merge_deltas(name, models, args, deltas):
    pieces = [deltas.trimmed(i, name) for i in range(len(models))]
    for (start, stop), *taus in zip(spans(deltas.base.entries[name][1]), *pieces):
        theta = deltas.base.rows(name, start, stop)
        if args.method.endswith("ties"):
            yield ties(theta, taus, args.weights, args.scale, args.mergekit)
        else:
            yield task_arithmetic(theta, taus, args.weights, args.scale)


# method: (the pieces of a merged tensor, --density unless given)
METHODS = {"linear": (merge_linear, 1.0), "average": (merge_linear, 1.0), "slerp": (merge_slerp, 1.0),
           "task_arithmetic": (merge_deltas, 1.0), "ties": (merge_deltas, 0.2), "dare_linear": (merge_deltas, 0.1),
           "dare_ties": (merge_deltas, 0.1), "lora": (merge_deltas, 1.0), "passthrough": (None, 1.0)}


def parse_t(rule):
    """[PART=]T or [PART=]T,T,… -> (PART, [T, …])."""
    part, _, values = rule.rpartition("=")
    try:
        return part, [float(v) for v in values.split(",")]
    except ValueError:
        raise BadInput(f"--t {rule} is not [PART=]T or [PART=]T,T,… with numbers T, such as attn=0,0.5,1") from None


def t_of(name, rules, depth):
    """
    slerp's t of a tensor, by the first rule whose PART is in its name. Several T are anchors at even distances from
    the first layer to the last, between which t is linear; what lies before the layers takes the first, behind them
    the last.
    """
    anchors, layer = next((anchors for part, anchors in rules if part in name), None), LAYER(name)
    if anchors is None:
        raise BadInput(f"--t says nothing about {name}: let its last word be a number for all the rest")
    place = int(layer[1]) / max(1, depth - 1) if layer else float(not before_layers(name))
    i, share = divmod(place * (len(anchors) - 1), 1)
    following = anchors[min(int(i) + 1, len(anchors) - 1)]
    return (1 - share) * anchors[int(i)] + share * following


def saves_of(run, last):
    """The step folders of a run, in order, the last so many."""
    steps = sorted(Path(run).glob("step-*/model.safetensors"), key=lambda path: int(path.parent.name[5:]))
    if not steps:
        raise BadInput(f"{run} holds no step folders to average: train it with --keep all")
    return [str(path.parent) for path in (steps[-last:] if last else steps)]


def ema_weights(n, decay):
    """Weights of n saves that make e ← decay · e + (1 - decay) · θ, from e = the first, their linear merge."""
    return [decay ** (n - 1)] + [(1 - decay) * decay ** (n - 1 - i) for i in range(1, n)]


def open_stack(parts):
    """passthrough's models, its stack, and the numbers of the layers in it as (model, layer)."""
    models, slices, layers = [], [], []
    for part in parts:
        name, _, span = part.rpartition("@")
        match = re.fullmatch(r"(\d*):(\d*)", span)
        model = open_model(name if match else part)
        start, stop = (int(match[1] or 0), int(match[2] or model.depth)) if match else (0, model.depth)
        if not start < stop <= model.depth:
            raise BadInput(f"{part}: {model.path} has layers 0 to {model.depth - 1}, and @START:STOP takes START to "
                           f"STOP - 1")
        layers += [(len(models), layer) for layer in range(start, stop)]
        models.append(model)
        slices.append((model.entries, start, stop))
    return models, passthrough(slices, LAYER), layers


def stacked_config(models, layers):
    """run.json or config.json of a stack: so many layers, and what is said layer by layer in their order."""
    ours, new = read_config(models[0])
    if not ours:
        key = next((k for k in ("num_hidden_layers", "n_layer") if k in new), None)
        if key is None:
            raise BadInput(f"{models[0].path}/config.json does not say how many layers there are: "
                           f"they cannot be stacked")
        configs = [read_config(m)[1] for m in models]
        for name, value in new.items():
            if isinstance(value, list) and len(value) == new[key] > 1:
                new[name] = [configs[i][name][layer] for i, layer in layers]
        return new | {key: len(layers)}
    c = new["config"]
    for name, plain, why in (("share", 1, "share their weights"), ("resid_mix", False, "mix by their number"),
                             ("place", None, "are scaled by their count")):
        if c[name] == "deepnorm" if plain is None else c[name] != plain:
            raise BadInput(f"{models[0].path} has {name}={c[name]}, whose layers {why}: they cannot be stacked")
    configs = [config_of(m) for m in models]
    kinds, experts = ([getattr(configs[i], name)[layer] for i, layer in layers]
                      for name in ("attn_kinds", "moe_layers"))
    c |= {"n_layer": len(layers), "attn": kinds[0] if len(set(kinds)) == 1 else ",".join(kinds)}
    if GPTConfig(**c).moe_layers != experts:
        raise BadInput(f"the stack would have experts in layers {[i for i, has in enumerate(experts) if has]}, which "
                       f"no moe_every and moe_first say: take slices that keep their rhythm")
    return new | {"config": c}


def open_all(args):
    """
    (models, first the one whose entries the merge has; the folder that labels it; entries; pieces of a tensor by name;
    config).
    """
    if args.method == "passthrough":
        models, stack, layers = open_stack(args.models)
        refuse_codes(models)
        check_alike(models, stacked=True)
        entries = {new: models[i].entries[name] for new, (i, name) in stack.items()}
        pieces = lambda new: copied(models[stack[new][0]], stack[new][1])
        return models, label(models[0]), entries, pieces, labelled(models[0], stacked_config(models, layers))
    (merge, density), args.t = METHODS[args.method], [parse_t(rule) for rule in args.t]
    args.density = density if args.density is None else args.density
    if args.method == "average":
        args.models = [save for run in args.models for save in saves_of(run, args.last)]
        args.weights = args.weights if args.ema is None else ema_weights(len(args.models), args.ema)
    models = [open_model(path, args.base) for path in args.models]
    refuse_codes(models)
    check_args(args, models)
    deltas = None
    if merge is merge_deltas:
        base = open_model(args.base) if args.base else models[0].base if args.method == "lora" else None
        if base is None:
            raise BadInput(f"{args.method} adds up what was learned since a common base: give it as --base")
        deltas = Deltas(models, base, args)
    first = deltas.base if deltas else models[0]
    check_alike([first, *models])

    def pieces(name):
        floating = first.entries[name][0].is_floating_point
        return merge(name, models, args, deltas) if floating else copied(first, name)
    return [first, *models], label(models[0]), first.entries, pieces, labelled(models[0], read_config(first)[1])


def labelled(model, config):
    """run.json of a merge: what it says of itself is the first named model's, what its weights are stands in config."""
    ours, own = read_config(model, label(model))
    own = {key: value for key, value in own.items() if key not in ("base", "base_print", "adapter")}
    return own | {"config": config["config"]} if ours else config


def copied(model, name):
    return (model.rows(name, *span) for span in spans(model.entries[name][1]))


def check_args(args, models):
    if args.method == "lora" and not all(isinstance(m, Adapted) for m in models):
        raise BadInput("merge.py lora takes folders with an adapter_config.json; for whole models: task_arithmetic")
    if args.method == "lora" and not args.base and len({m.base.path.resolve() for m in models}) > 1:
        other = next(m for m in models if m.base.path.resolve() != models[0].base.path.resolve())
        raise BadInput(f"{models[0].path} is an adapter of {models[0].base.path}, {other.path} of {other.base.path}: "
                       f"give --base the model to add both to")
    if args.method == "slerp" and len(models) != 2:
        raise BadInput(f"slerp is an arc between two models, not {len(models)}: use linear for more")
    if args.weights and len(args.weights) != len(models):
        raise BadInput(f"--weights has {len(args.weights)} numbers for {len(models)} models: give one each")
    if args.weights and METHODS[args.method][0] is merge_linear and abs(sum(args.weights)) < 1e-8:
        raise BadInput("--weights of a linear merge add up to 0, by which it is divided: change one")
    for name in ("density", "trim"):
        if not 0 < getattr(args, name) <= 1:
            raise BadInput(f"--{name} {getattr(args, name)} is not a share of the entries: give one above 0, up to 1")


def as_dtype(entries, pieces, dtype):
    """Entries of the new dtype (None: as they are), and a function that iterates over a tensor's pieces in it."""
    new = {name: (dtype if dtype and old.is_floating_point else old, shape) for name, (old, shape) in entries.items()}
    return new, lambda name: (piece.to(new[name][0]) for piece in pieces(name))


def shards_of(entries, limit):
    """[names] of files of at most limit bytes."""
    sizes, shards = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in entries.items()}, [[]]
    for name in entries:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > limit:
            shards.append([])
        shards[-1].append(name)
    return shards, sum(sizes.values())


def write_model(out, entries, pieces, limit):
    """model.safetensors, or shards and their index."""
    shards, total = shards_of(entries, limit)
    files = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards):
        write_safetensors(out / file, {name: entries[name] for name in names},
                          (piece for name in names for piece in pieces(name)), {"format": "pt"})
    if len(shards) > 1:
        with replace_file(out / "model.safetensors.index.json", "w") as f:
            json.dump({"metadata": {"total_size": total},
                       "weight_map": {name: file for file, names in zip(files, shards) for name in names}}, f, indent=1)


# -----------------------------------------------------------------------------


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("method", choices=list(METHODS))
    add("models", nargs="+",
        help="run directories, Hugging Face folders, hub names or adapters; to stack: PATH@START:STOP")
    add("--base", help="the model that the others, or an adapter, were tuned from")
    add("--out", default="out/merged", help="folder of the merge; a finished run already there is kept as OUT.old")
    add("--weights", type=float, nargs="+", help="of each model (default: equal; of task vectors 1)")
    add("--t", nargs="+", default=["0.5"],
        help="slerp: [PART=]T, or T,T,… from the first layer to the last; the first that fits a tensor counts")
    add("--scale", type=float, default=1.0, help="λ, of the sum of task vectors")
    add("--density", type=float,
        help="share of a task vector's entries that stay: the largest (ties, default 0.2), or at random "
             "(dare, default 0.1)")
    add("--trim", type=float, default=1.0, help="dare_ties: share of all entries that ties then keeps of what is left")
    add("--last", type=int, default=0, help="average: so many last saves of a run (0: all)")
    add("--ema", type=float, help="average: decay of an exponential average instead of equal weights")
    add("--mergekit", action="store_true",
        help="as mergekit: TIES trims each tensor by itself and elects signs after --weights; DARE keeps a tensor's "
             "sum of magnitudes instead of dividing by the density; slerp is linear above |cos| 0.9995")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the file (default: the first's, of task vectors the base's)")
    add("--shard_gb", type=float, default=5.0, help="largest file of a Hugging Face folder")
    add("--seed", type=int, default=0, help="of what dare drops")
    return parser.parse_args(argv)


def main():
    args = get_args()
    if args.ema is not None and not 0 <= args.ema < 1:
        raise BadInput(f"--ema {args.ema} is not a decay: give one from 0 up to, but not, 1")
    models, folder, entries, pieces, config = open_all(args)
    ours = (home(models[0]) / "run.json").exists()
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    entries, pieces = as_dtype(entries, pieces, dtype)

    out = Path(args.out).resolve()
    lost = {out, out.with_name(out.name + ".old")}
    if any(lost & {path.resolve(), *path.resolve().parents} for m in models for path in folders(m)):
        raise BadInput(f"--out {args.out} would take the place of one of the models that are merged: give another "
                       f"folder")
    check_out(out)
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write_model(new, entries, pieces, math.inf if ours else args.shard_gb * 1e9)
        if ours:
            config |= {"stage": "merge", "metrics": {}, "merge": vars(args)}
        elif dtype:
            config |= {key: args.dtype for key in ("dtype", "torch_dtype")}
        with replace_file(new / ("run.json" if ours else "config.json"), "w") as f:
            json.dump(config, f, indent=1)
        for file in folder.iterdir():  # the tokenizer and its like
            keep = ("tokenizer.tiktoken",) if ours else ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
            if any(map(file.match, keep)) and not (new / file.name).exists() and not file.name.endswith("index.json"):
                shutil.copy(file, new)
        if out.exists():
            old = out.with_name(out.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    n = sum(math.prod(shape) for _, shape in entries.values())
    print(f"{args.out}: {args.method} of {', '.join(str(m) for m in args.models)}, {n:,} parameters")


if __name__ == "__main__":
    from merge import main
    cli(main)
