"""
Pretraining: next-token prediction on packed windows of T tokens,

    L = -1/(B T) Σ_b Σ_t log p(x_{b,t+1} | x_{b,≤t}),

with AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024), one process or many.

    python train.py                                          # the default world: three minutes on a laptop
    python train.py --data shakespeare --tokenizer char --out out/shakespeare
    torchrun --nproc_per_node 8 train.py --preset gpt2 --data text --input books/ --tokenizer gpt2 \\
        --batch_tokens 524288 --lr 0.01
    torchrun --nproc_per_node 8 train.py --preset gpt2-xl --parallel fsdp --tp 2 --recompute selective   # and so on
"""
import argparse
import json
import math
import shutil
import signal
import time
from pathlib import Path

import torch

import data
from bpe import BadInput, cli, replace_file
from model import (GPT, GPTConfig, MODES, PRESETS, adamw_groups, all_reduce, check_layout, count_parameters,
                   flops_per_token, init_weights, load_run, load_safetensors, peak_flops, peak_memory, save_run,
                   setup_process, shard)

# -----------------------------------------------------------------------------
# Muon


# Odd quintics a x + b x³ + c x⁵, each the closest to 1 on the interval that the one before left, from [0.01, 1]
# to [0.975, 1.025] (Polar Express, Amsel et al. 2025). Each interval is taken 5 % too wide at the top: there the
# quintics shoot up, and in bf16 a nearly rank-one gradient reaches it by rounding alone; without the margin
# updates of norm 10^7 end the training.
POLAR = [(7.7262, -20.4694, 13.7165), (3.5156, -2.3944, 0.4274), (2.6572, -1.8205, 0.3744), (1.9436, -1.2618, 0.3311)]


def orthogonalize(G):
    """
    The nearest semi-orthogonal matrices U Vᵀ of G = U S Vᵀ (n, r, c), any scale. G is divided by its Frobenius
    norm; then each step is X ← (a + b A + c A²) X with A = X Xᵀ, which maps every singular value by one quintic.
    """
    X = G.bfloat16() if G.is_cuda else G.float()
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # A is the smaller of the two squares
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if X.shape[-1] >= 2 * X.shape[-2] and not X.is_cuda:
        X = polar_factor(X @ X.mT) @ X
    else:
        for a, b, c in POLAR:
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


def polar_factor(A):
    """The product P of all steps' polynomials of A = X Xᵀ (n, m, m): P X is orthogonal. Cheaper when X is wide."""
    P = None
    for a, b, c in POLAR:
        Q = torch.baddbmm(A, A, A, beta=b, alpha=c)
        Q.diagonal(dim1=-2, dim2=-1).add_(a)
        P = Q if P is None else Q @ P
        A = Q @ A @ Q
    return P


class Muon(torch.optim.Optimizer):
    """
    Momentum, orthogonalized: m ← μ m + g,  W ← W - lr (λ W + s · orthogonalize(g + μ m)) for matrices W (r, c),
    s = sqrt(max(1, r/c)), so that an update changes every layer's output by about lr whatever its shape.
    Matrices of one shape go through Newton-Schulz together.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, mu, decay = group["lr"], group["momentum"], group["weight_decay"]
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (r, c), params in shapes.items():
                grads = [p.grad for p in params]
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_mul_(momenta, mu)
                torch._foreach_add_(momenta, grads)
                updates = orthogonalize(torch.stack(grads) + mu * torch.stack(momenta))
                if decay:
                    torch._foreach_mul_(params, 1 - lr * decay)
                torch._foreach_sub_(params, (updates * (max(1, r / c) ** 0.5 * lr)).unbind())


def make_optimizers(model, args, device, capturable=False):
    """
    AdamW for everything, or Muon for the blocks' matrices and AdamW, at its own rate, for embeddings, head and
    vectors. Every trainable parameter is in exactly one group.
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] if args.optimizer == "muon" else []
    taken = {id(p) for p in matrices}
    groups = [{**g, "params": [p for p in g["params"] if id(p) not in taken]}
              for g in adamw_groups(model, args.weight_decay if args.optimizer == "adamw" else 0.0)]

    def rate(lr):  # a recorded step reads its rate from the device
        return torch.tensor(lr, device=device) if capturable else lr
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, args.beta2), eps=1e-8,
                                    lr=rate(args.lr if args.optimizer == "adamw" else args.adam_lr),
                                    fused=device.type in ("cuda", "cpu"), capturable=capturable)]
    if matrices:
        optimizers.append(Muon(matrices, lr=rate(args.lr), weight_decay=args.weight_decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = float(group["lr"])
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters()), "a parameter is missing or held twice"
    return optimizers


ELEMENTWISE = ("adamw",)  # optimizers that may see a part of a parameter at a time


def sees_whole(optimizer, name, shape):
    """Must this optimizer see a parameter whole? Muon: the blocks' matrices."""
    return optimizer not in ELEMENTWISE and name.startswith("blocks.") and len(shape) == 2


# -----------------------------------------------------------------------------
# Schedules: the share of the peak learning rate at progress t in [0, 1), after the warm-up

SCHEDULES = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * t)),  # down to a tenth, as GPT-3
    "wsd": lambda t: min(1.0, (1 - t) / 0.4),  # warm up, stay, decay over the last 40 %
}


def lr_share(step, steps, warmup, schedule):
    """Linear warm-up that is above zero at step 0, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))


# -----------------------------------------------------------------------------
# Validation and precision


@torch.no_grad()
def validate(model, sources, T, max_tokens, rows, process, token_bytes):
    """
    Nats per token and bits per byte over the first tokens of each validation file, max_tokens shared by the
    mixture's weights: Σ loss / Σ tokens over all ranks, and Σ loss / (ln 2 · Σ bytes of the predicted tokens).
    """
    model.eval()
    losses, sums = {}, torch.zeros(3, dtype=torch.float64)
    for name, (weight, ids) in sources.items():
        part = torch.zeros(3, dtype=torch.float64)
        limit = max(1, round(max_tokens * weight)) if max_tokens else 0
        for x, y in data.eval_batches(ids, T, limit, rows, process.dp_rank, process.dp_world):
            x, y = torch.from_numpy(x).to(process.device), torch.from_numpy(y)
            loss = model(x, y.to(process.device), reduction="sum")[1]
            y = y[y != -100]
            part += torch.tensor([loss.item(), len(y), token_bytes[y].sum().item()], dtype=torch.float64)
        if process.world > 1:
            part = all_reduce(part.to(process.device)).cpu()
        losses[f"val_loss_{name}"] = round((part[0] / part[1]).item(), 5)
        sums += part
    model.train()
    metrics = {"val_loss": (sums[0] / sums[1]).item(), "val_bpb": (sums[0] / sums[2] / math.log(2)).item()}
    return metrics | (losses if len(losses) > 1 else {})


def choose_dtype(name, device, rows, width):
    """float32, bfloat16 or float16; "auto" takes bf16 on GPUs that have it, and on a CPU where it is faster."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu" or not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):  # an MLP forward and backward, weights cast as in training
        w = torch.randn(4 * width, width, requires_grad=True)
        for i in range(4):
            start = time.perf_counter() if i else 0
            x = torch.randn(rows, width, dtype=dtype)
            ((x @ w.to(dtype).T).relu().square() @ w.to(dtype)).sum().backward()
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


# -----------------------------------------------------------------------------
# One optimizer step


class Trainer:
    """
    What a step changes: model, optimizers, scaler. micro_step adds a micro-batch's gradient and loss, update
    clips and applies them. With graphs both are recorded as CUDA graphs and replayed, because a small model's
    kernels take longer to launch than to run; then gradients and rates live in fixed tensors.
    """

    def __init__(self, model, args, process, dtype, accumulate, graphs):
        self.model, self.grad_clip, self.accumulate = model, args.grad_clip or math.inf, accumulate
        self.sharded = shard(model, process, args, whole=lambda name, shape: sees_whole(args.optimizer, name, shape))
        self.optimizers = make_optimizers(self.sharded.stand_in, args, process.device, capturable=graphs)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=dtype == torch.float16)
        self.waiting = []  # micro-batches for a pipeline
        self.loss, self.norm = (torch.zeros((), device=process.device) for _ in range(2))
        self.graphs, self.batch = [] if graphs else None, None

    def micro_step(self, x, y, last=True):
        """Add the gradient and the loss of x, y (B, T) to the step's; ranks talk only at its last micro-batch."""
        if self.graphs is not None:
            if not self.graphs:
                self.record(x, y)
            for static, new in zip(self.batch, (x, y)):
                static.copy_(new, non_blocking=True)
            self.graphs[0].replay()
        else:
            self._micro_step(x, y, last)

    def update(self):
        self._update() if self.graphs is None else self.graphs[1].replay()

    def _micro_step(self, x, y, last=True):
        if self.sharded.pipeline is not None:  # it takes them all at once
            self.waiting.append((x, y))
            if last:
                x, y = (torch.cat(z) for z in zip(*self.waiting))
                self.loss += self.sharded.pipeline.step(x, y, len(self.waiting)) * self.sharded.process.pp
                self.waiting = []
            return
        loss = self.sharded(x, y, last=last)[1] / self.accumulate
        self.scaler.scale(loss).backward()
        self.loss += loss.detach()

    def _update(self):
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.norm.copy_(self.sharded.reduce(self.grad_clip))
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=self.graphs is None)
        self.sharded.publish()
        self.scaler.update()

    def record(self, x, y):
        tensors = lambda: [*self.model.parameters(), *(t for o in self.optimizers for s in o.state.values()
                                                       for t in s.values())]
        before = {id(t): t.detach().clone() for t in tensors()}
        self.batch = x.clone(), y.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compilation and optimizer state come first, outside the graphs
                self._micro_step(*self.batch)
                self._update()
        torch.cuda.current_stream().wait_stream(side)
        for body in (lambda: self._micro_step(*self.batch), self._update):
            self.graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(self.graphs[-1]):
                body()
        with torch.no_grad():  # as if nothing had run
            for t in tensors():
                t.copy_(before[id(t)]) if id(t) in before else t.zero_()
        self.loss.zero_()

    def set_lr(self, share):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                lr = group["peak_lr"] * share
                group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else group.update(lr=lr)

    def state_dict(self, sharded=False):
        """Whole tensors on rank 0, or the parts of every rank; see model.Sharded."""
        return self.sharded.state_dict(self.optimizers, sharded) | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        self.sharded.load_state_dict(state, self.optimizers)
        self.scaler.load_state_dict(state["scaler"])


# -----------------------------------------------------------------------------


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    flag = dict(action=argparse.BooleanOptionalAction)
    # run
    add("--out", default="out/base", help="run directory; a finished run already there is kept as OUT.old")
    add("--resume", action="store_true", help="go on from OUT/optim.pt, with its arguments unless given again")
    add("--seed", type=int, default=0, help="of weights, data order and dropout")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of activations")
    add("--compile", default=None, **flag, help="torch.compile (default: on CUDA)")
    add("--graphs", default=None, **flag, help="record a step as CUDA graphs (default: one GPU, < 50M parameters)")
    # data
    add("--data", default="bios:0.6,arithmetic:0.4", help=f"weighted mixture of {', '.join(data.CORPORA)}")
    add("--input", help="a local file or folder for the corpus, instead of its download")
    add("--tokenizer", help="char, a tiktoken name, a file or a folder (default: train a BPE on the data)")
    add("--vocab_size", type=int, default=1024, help="of a tokenizer trained here, beside its special tokens")
    # model
    add("--preset", default="nano", choices=sorted(PRESETS), help="architecture; the flags below change it")
    for name in ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
        add(f"--{name}", type=int, help=f"(default: the preset's; nano {getattr(GPTConfig, name)})")
    for name in ("norm", "act", "pos", "init"):
        add(f"--{name}", help=f"(default: the preset's; nano {getattr(GPTConfig, name)})")
    for name in ("qk_norm", "embd_norm", "bias", "tied"):
        add(f"--{name}", default=None, **flag)
    add("--dropout", type=float)
    # optimization
    add("--steps", type=int, default=800)
    add("--batch_tokens", type=int, default=2048, help="tokens per optimizer step over all processes")
    add("--micro_batch", type=int, default=0, help="rows per forward pass and process (0: as fits)")
    add("--optimizer", default="muon", choices=["muon", "adamw"])
    add("--lr", type=float, default=0.02, help="peak, of Muon's matrices or of AdamW")
    add("--adam_lr", type=float, default=0.01, help="peak, of embeddings, head and vectors beside Muon")
    add("--schedule", default="linear", choices=sorted(SCHEDULES))
    add("--warmup", type=int, default=20, help="steps")
    add("--weight_decay", type=float, default=0.0, help="of matrices")
    add("--beta2", type=float, default=0.95)
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0: none")
    # processes
    add("--parallel", default="ddp", choices=list(MODES), help="; ".join(f"{k}: {v}" for k, v in MODES.items()))
    add("--hsdp_shard", type=int, default=0, help="processes of an hsdp group (0: one machine's)")
    add("--tp", type=int, default=1, help="tensor parallelism: processes that share each matrix")
    add("--pp", type=int, default=1, help="pipeline parallelism: stages of layers")
    add("--pp_schedule", default="1f1b", choices=["gpipe", "1f1b"])
    add("--cp", type=int, default=1, help="context parallelism: processes that share each sequence")
    add("--recompute", default="none", choices=["none", "block", "selective"],
        help="in the backward pass, for memory: whole blocks, or all but matrix products and attention")
    add("--offload", default=False, **flag, help="optimizer state and the weights it steps in main memory")
    add("--ckpt", default="full", choices=["full", "sharded"], help="optim.pt whole, or one file a process")
    add("--timeout", type=float, default=120, help="seconds after which a process that waits for another gives up")
    # looking
    add("--eval_every", type=int, default=250, help="steps; 0: only at the end")
    add("--eval_tokens", type=int, default=65536, help="validation tokens; 0: all")
    add("--save_every", type=int, default=250, help="steps; 0: only at the end")
    add("--keep", default="last", choices=["last", "best"], help="whose weights model.safetensors holds")
    add("--log_every", type=int, default=10, help="steps between printed lines; log.jsonl has every step")
    args = parser.parse_args(argv)
    if args.resume:  # saved arguments become the defaults, so what is given again wins
        parser.set_defaults(**{**load_optim(args.out)["args"], "resume": True})
        args = parser.parse_args(argv)
    return args


def load_optim(out):
    """What --resume needs; tensors are mapped from the file, so that each process reads only its own part."""
    path = Path(out) / "optim.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for file in state.get("files", []):
            part = torch.load(path.with_name(file), map_location="cpu", weights_only=True, mmap=True)
            for name, pieces in part["model"].items():
                state["model"].setdefault(name, []).extend(pieces)
            for mine, theirs in zip(state["optimizers"], part["optimizers"]):
                for i, values in theirs["state"].items():
                    for key, pieces in values.items():
                        mine["state"].setdefault(i, {}).setdefault(key, []).extend(pieces)
        return state
    except FileNotFoundError:
        raise BadInput(f"--resume: there is no {path}; start without --resume, or give the run's --out") from None
    except Exception as error:  # pickle, zip and torch each have their own
        raise BadInput(f"{path} is damaged ({type(error).__name__}): start again without --resume") from None


def make_config(args, n_vocab):
    names = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "norm", "act", "pos", "init",
             "qk_norm", "embd_norm", "bias", "tied", "dropout")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return GPTConfig(**{**PRESETS[args.preset], **given, "vocab_size": n_vocab})


def split_batch(args, T, process):
    """(rows of a step over all processes, rows of a micro-batch, micro-batches); BadInput names a size that works."""
    rows, rest = divmod(args.batch_tokens, T * process.dp_world)
    if rest or not rows:
        step = T * process.dp_world
        raise BadInput(f"--batch_tokens {args.batch_tokens} is not a multiple of block_size {T} x {process.dp_world} "
                       f"process(es): use {max(1, rows) * step} or {(rows + 1) * step}")
    limit = 65536 if process.device.type == "cuda" else 16384  # tokens that one forward pass may hold
    most = max(1, min(rows, limit * process.cp // T, rows // (4 * process.pp) if process.pp > 1 else rows))
    micro = args.micro_batch or next(m for m in range(most, 0, -1) if rows % m == 0)
    if rows % micro:
        fits = [m for m in range(1, rows + 1) if rows % m == 0]
        raise BadInput(f"--micro_batch {micro} does not divide the {rows} rows of a process: use one of {fits}")
    return rows * process.dp_world, micro, rows // micro


def save_optim(out, trainer, process, sharded, **rest):
    """
    OUT/optim.pt, replaced at once. Returns the whole weights on rank 0. sharded: each process writes its parts beside
    it, and then optim.pt names their files, so that it never names one that is not whole.
    """
    path = Path(out) / "optim.pt"
    if not sharded:
        state = trainer.state_dict()
        if process.rank == 0:
            with replace_file(path) as f:
                torch.save({**state, **rest}, f)
    else:
        state = trainer.state_dict(sharded=True)
        names = [f"optim-{rest['step']}-{r}-of-{process.world}.pt" for r in range(process.world)]
        with replace_file(path.with_name(names[process.rank])) as f:
            torch.save({name: state[name] for name in ("model", "optimizers")}, f)
        process.wait()
        if process.rank == 0:
            groups = [{"state": {}, "param_groups": o["param_groups"]} for o in state["optimizers"]]
            with replace_file(path) as f:
                torch.save({"model": {}, "optimizers": groups, "scaler": state["scaler"], "files": names, **rest}, f)
        state = {"model": {key[1]: t for key, t in trainer.sharded.gather(trainer.sharded.held()).items()}}
    if process.rank == 0:
        for old in path.parent.glob("optim-*-of-*.pt"):
            if not sharded or old.name not in names:
                old.unlink()
    return state.get("model", {})


def start_run(out):
    """An empty run directory; a finished run that was there moves to OUT.old."""
    old = out.with_name(out.name + ".old")
    if (out / "model.safetensors").exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    elif out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)


def report(model, tokenizer, folders, say):
    """Ask the model what its corpora can check, show a few samples, and return the metrics."""
    metrics = {}
    for name, (_, folder) in folders.items():
        for metric, rows in json.loads((folder / "checks.json").read_text()).items():
            metrics[metric], answers = data.exact_match(model, tokenizer, rows)
            say(f"{metric}: {metrics[metric]:.1%} of {len(rows)} questions about {name}, for example")
            for row, answer in list(zip(rows, answers))[:: max(1, len(rows) // 3)][:3]:
                say(f"    {row['prompt']}|{answer.splitlines()[0] if answer.strip() else answer!r}")
    tokens, _ = model.generate([[tokenizer.eot]] * 3, max_new_tokens=100, temperature=0.8, stop=[tokenizer.eot])
    say("samples:\n" + "\n".join("    " + tokenizer.decode(row).replace("\n", "\n    ") for row in tokens))
    return metrics


def main():
    args = get_args()
    process = setup_process(args.device, args)
    device, main_process = process.device, process.rank == 0
    say = print if main_process else lambda *a, **k: None
    started = time.time()

    # data and tokenizer: rank 0 prepares, the others read
    if main_process:
        folders, tokenizer = data.prepare(args.data, args.tokenizer, args.vocab_size, args.input)
    if process.world > 1:
        process.wait()
        if not main_process:
            folders, tokenizer = data.prepare(args.data, args.tokenizer, args.vocab_size, args.input)
    config = make_config(args, tokenizer.n_vocab)
    T = config.block_size
    check_layout(config, process, T)
    rows, micro, accumulate = split_batch(args, T, process)
    loader = data.TokenLoader([(w, data.open_tokens(f / "train.bin")) for w, f in folders.values()], T, args.seed)
    val = {name: (w, data.open_tokens(f / "val.bin")) for name, (w, f) in folders.items()}
    token_bytes = torch.tensor([len(b) for b in tokenizer.token_bytes()])
    corpus = {name: json.loads((f / "meta.json").read_text())["sha256"] for name, (_, f) in folders.items()}

    # model and optimizer
    dtype = choose_dtype(args.dtype, device, micro * T, config.n_embd)
    args.dtype = str(dtype).removeprefix("torch.")
    model = GPT(config)
    init_weights(model, args.seed)
    model.compute_dtype = dtype
    (total, matmul), flops = count_parameters(model), flops_per_token(model, T)
    graphs = device.type == "cuda" and process.world == 1 and dtype != torch.float16 and total < 50e6 and not args.offload
    trainer = Trainer(model, args, process, dtype, accumulate, graphs if args.graphs is None else args.graphs)
    if dtype == torch.float16 and not trainer.sharded.plain:
        raise BadInput("--dtype float16 scales the loss, which works with --parallel ddp alone: use bfloat16")
    if device.type == "cuda" if args.compile is None else args.compile:
        model.compile_parts()

    out, step, best = Path(args.out), 0, {"val_loss": math.inf}
    if args.resume:
        saved = load_optim(args.out)
        if saved["config"] != vars(config) or saved["corpus"] != corpus:
            raise BadInput(f"--resume: the model or the data differ from those of {out}: "
                           f"give the run's own flags, or start without --resume")
        trainer.load_state_dict(saved)
        step, best = saved["step"], saved["best"]
        del saved  # lets go of the file, which the next save replaces
    if main_process:
        if args.resume:  # the log goes back to the step that was saved
            lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
            with replace_file(out / "log.jsonl", "w") as f:
                f.writelines(lines[:step])
        else:
            start_run(out)
            tokenizer.save(out)
        log = open(out / "log.jsonl", "a")
    peak = peak_flops(device)
    say(f"{total / 1e6:.2f}M parameters, {matmul / 1e6:.2f}M in matrix products; {rows} rows x {T} tokens a step in "
        f"{accumulate} x {process.dp_world} micro-batches; {device}, {args.dtype}, {args.optimizer}\n"
        f"MFU = (6 x {matmul:,} + 12 L H D T) x tokens/s / "
        + (f"{peak / 1e12:.0f} TFLOP/s dense bf16" if peak else "the device's peak, which is not known here: mfu n/a"))

    if process.world > 1:
        say(f"{args.parallel} over {process.dp_world} x tp {args.tp} x cp {args.cp} x pp {args.pp}" + (
            f"; {accumulate} micro-batches leave a stage idle {trainer.sharded.pipeline.bubble(accumulate):.0%} of the "
            f"time ({args.pp_schedule})" if args.pp > 1 else ""))

    def save(metrics, weights=True):
        """What resuming needs, then what the next stages need; `weights` False leaves an earlier best in place."""
        if main_process:
            log.flush()
        whole = save_optim(out, trainer, process, args.ckpt == "sharded", step=step, best=best, args=vars(args),
                           config=vars(config), corpus=corpus)
        if weights and main_process:
            save_run(out, model, {"stage": "train", "step": step, "metrics": metrics, "args": vars(args),
                                  "tokenizer": tokenizer.spec()}, whole)
        process.wait()

    # loop
    stop = []  # signals that came
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: stop.append(True))
    model.train()
    first, interrupted, metrics = step, False, {}
    pending, timed, clock = [], [0, 0.0], time.time()  # steps without a line yet; steps and seconds after the first
    while True:
        last = step >= args.steps
        evaluating = last or (args.eval_every and step % args.eval_every == 0)
        alone = process.world == 1
        if pending and (evaluating or step % args.log_every == 0 or step == first + 1 or (alone and stop)):
            # one copy from the device for all steps since the last line; ranks agree here on stopping
            stats = torch.stack([s for s, _ in pending] + [torch.full((2,), float(bool(stop)), device=device)])
            *stats, (stopped, _) = (all_reduce(stats) / process.world).tolist()
            interrupted, seconds = stopped > 0, (time.time() - clock) / len(pending)
            if step > first + 1:  # the first step compiles
                timed = [timed[0] + len(pending), timed[1] + seconds * len(pending)]
            tokens_per_s = rows * T / seconds
            for (loss, norm), (_, line) in zip(stats, pending):
                line.update(loss=round(loss, 5), grad_norm=round(norm, 4), tokens_per_s=round(tokens_per_s))
                if main_process:
                    log.write(json.dumps(line) + "\n")
                if not math.isfinite(loss):
                    raise BadInput(f"the loss is {loss} at step {line['step']} (lr {line['lr']:.2g}, gradient norm "
                                   f"{norm:.2g}): lower --lr or raise --warmup; {out} keeps its last save")
            rate = flops * tokens_per_s / process.world
            mfu = f"mfu {rate / peak:.1%}" if peak else f"{rate / 1e12:.3g} TFLOP/s, mfu n/a"
            left = divmod(round((args.steps - step) * seconds), 60) if timed[0] else None
            say(f"step {step}/{args.steps}  loss {loss:.4f}  lr {line['lr']:.2e}  norm {norm:.2f}  "
                f"{tokens_per_s:,.0f} tok/s  {mfu}  {peak_memory(device) / 2 ** 30:.2f} GiB"
                + (f"  {left[0]}:{left[1]:02} left" if left else ""), flush=True)
            pending, clock = [], time.time()
        if evaluating and not interrupted and (step > first or last):
            metrics = validate(trainer.sharded, val, T, args.eval_tokens, micro, process, token_bytes)
            say(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
            if metrics["val_loss"] < best["val_loss"]:
                best = metrics
                if args.keep == "best":
                    save(metrics)
        if last or interrupted:
            break
        if args.save_every and step % args.save_every == 0 and step > first:
            save(metrics, weights=args.keep == "last")
        if not pending:
            clock = time.time()  # neither validation nor saving is training

        share = lr_share(step, args.steps, args.warmup, args.schedule)
        trainer.set_lr(share)
        if config.dropout:  # masks too are a function of (seed, step, rank)
            torch.manual_seed(hash((args.seed, step, process.rank)) % 2 ** 32)
        for i in range(accumulate):
            batch = torch.from_numpy(loader.batch(step * rows + (i * process.dp_world + process.dp_rank) * micro, micro))
            batch = (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
            trainer.micro_step(batch[:, :-1], batch[:, 1:], last=i == accumulate - 1)
        trainer.update()
        step += 1
        pending.append((torch.stack((trainer.loss, trainer.norm)), {"step": step, "lr": args.lr * share}))
        trainer.loss.zero_()

    # what it learned
    save(metrics, weights=args.keep == "last")
    if interrupted:
        say(f"stopped at step {step} and saved: python train.py --resume --out {out} goes on from here")
    elif main_process:
        metrics = best if args.keep == "best" else metrics
        if not trainer.sharded.plain:  # one whole model, to look at
            model = load_run(out, device)[0]
            model.compute_dtype = dtype
        elif args.keep == "best":
            model.load_state_dict(load_safetensors(out / "model.safetensors"))
        metrics = metrics | report(model, tokenizer, folders, say)
        if timed[0]:
            tokens_per_s = timed[0] * rows * T / timed[1]
            metrics |= {"tokens_per_s": round(tokens_per_s), "peak_memory": peak_memory(device)}
            metrics |= {"mfu": flops * tokens_per_s / process.world / peak} if peak else {}
        metrics |= {"seconds": round(time.time() - started, 1)}
        metrics = {name: round(value, 5) for name, value in metrics.items()}
        save_run(out, model, {"stage": "train", "step": step, "metrics": metrics, "args": vars(args),
                              "tokenizer": tokenizer.spec()})
        print(json.dumps(metrics))
    process.close()


if __name__ == "__main__":
    cli(main)
