"""The lora room as a specification: what is added, what it leaves alone, and that it comes off again."""
import json

import pytest
import torch

import lora
from bpe import BadInput, Tokenizer
from conftest import call
from model import GPT, PRESETS, GPTConfig, init_weights, load_safetensors, meta_model, preset, save_run

NANO = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=100, block_size=64)
STYLES = {
    "nano": dict(),
    "llama": dict(norm="rmsnorm", act="swiglu", init="gpt2", qk_norm=False, embd_norm=False),
    "gpt2": dict(norm="layernorm", bias=True, tied=True, pos="learned", act="gelu_tanh", init="gpt2", qk_norm=False,
                 embd_norm=False, n_kv_head=4),
}
SILENT = ("lora", "dora", "adalora", "serial", "parallel", "zeroinit")  # they begin as the base
MERGES = ("lora", "dora", "adalora")


pytestmark = pytest.mark.usefixtures("one_thread")


def make(style="nano", seed=0, **more):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**NANO | STYLES[style] | more))
    init_weights(model, seed)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def shake(model, seed=1):
    """As if the adapter had learned something."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    if model.virtual is not None:
        model.virtual.fresh = False


def idx(seed=0, rows=2, T=20):
    return torch.randint(0, 100, (rows, T), generator=torch.Generator().manual_seed(seed))


def adapter(tune, **flags):
    return lora.Adapter(tune, virtual_tokens=5, lora_rank=4, **flags)


def logits(model, x):
    with torch.no_grad():
        return model(x)[0]


# What is added


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tune", SILENT)
def test_a_fresh_adapter_changes_nothing(style, tune):
    model = make(style)
    before = logits(model, idx())
    lora.apply(model, adapter(tune))
    torch.testing.assert_close(logits(model, idx()), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tune, flags", [("bitfit", {}), ("lora", {"train_embeddings": True})])
def test_what_is_trained_of_a_bf16_base_is_float32(tune, flags):
    model = make("gpt2").bfloat16()
    model.compute_dtype = torch.bfloat16
    before = logits(model, idx())
    lora.apply(model, adapter(tune, **flags))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.blocks[0].attn.q.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model, idx()).float(), before.float(), rtol=0.05, atol=0.05)


def test_at_step_0_a_has_no_gradient_and_b_has_one():
    model = make()
    lora.apply(model, adapter("lora", lora_targets="all,head"))
    model(idx(), idx())[1].backward()
    for part in lora.grafts(model):
        assert part.lora_A.grad.abs().max() == 0 and part.lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("tune", lora.METHODS)
def test_only_what_the_adapter_consists_of_takes_a_gradient(tune):
    model = make("gpt2")
    base = {name for name, _ in model.named_parameters()}
    lora.apply(model, adapter(tune))
    shake(model)
    model.train()
    model(idx(), idx())[1].backward()
    mine = {name for name, p in model.named_parameters() if p.grad is not None}
    assert mine == set(lora.trained_names(model)) and mine
    assert mine <= base if tune == "bitfit" else not mine & base


def test_every_linear_is_found_square_or_not_and_targets_may_be_patterns():
    model = make("llama")
    assert len(lora.find_targets(model, "all")) == 2 * 7
    assert lora.find_targets(model, "q,head") == ["blocks.0.attn.q", "blocks.1.attn.q", "head"]
    assert lora.find_targets(model, r"blocks\.1\.mlp\..*") == [f"blocks.1.mlp.{m}" for m in ("gate", "up", "down")]
    with pytest.raises(BadInput, match="down, gate, head, k, o, q, up, v, wte"):
        lora.find_targets(model, "query")


def test_scales():
    for flags, scale in ((dict(lora_alpha=12), 3.0), (dict(), 2.0), (dict(lora_alpha=12, rslora=True), 6.0)):
        model = make()
        lora.apply(model, adapter("lora", **flags))
        assert lora.grafts(model)[0].lora_scale == scale


def test_counts_on_llama_7b():
    config = preset("llama-7b")  # 4,194,304: the seven-billion model's q and v at rank 8 (Lightning's LoRA study)
    for flags, expected in ((dict(lora_rank=8), 4_194_304), (dict(lora_rank=8, lora_targets="all,head"), 20_277_248),
                            (dict(lora_rank=16, lora_targets="all,head"), 40_554_496)):
        model = meta_model(config)
        lora.apply(model, lora.Adapter("lora", **flags))
        assert lora.trained_share(model)[0] == expected


@pytest.mark.parametrize("style", ("nano", "gpt2"))
def test_an_adapted_head_is_seen_by_loss_and_by_logits(style):
    model, x = make(style), idx()
    lora.apply(model, adapter("lora", lora_targets="wte" if style == "gpt2" else "head,wte"))
    shake(model)
    loss = model(x, x)[1]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), x.flatten()))
    before = logits(model, x)
    lora.merge(model)
    assert (logits(model, x) - before).abs().max() < 1e-5 * before.abs().max()


def test_adapters_stay_in_float32_over_a_bf16_base():
    model = make("llama").to(torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    lora.apply(model, adapter("lora"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(idx(), idx())[1].backward()
    assert lora.grafts(model)[0].lora_B.grad.dtype == torch.float32


# Taking it off again


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tune", MERGES)
def test_merged_equals_unmerged_and_unmerging_is_exact(style, tune):
    model = make(style)
    lora.apply(model, adapter(tune, lora_targets="all"))
    shake(model)
    before, weights = logits(model, idx()), {n: p.clone() for n, p in model.named_parameters()}
    lora.merge(model)
    assert (logits(model, idx()) - before).abs().max() < 1e-5 * before.abs().max()
    lora.unmerge(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model, idx()), before)


def test_what_no_weight_can_do_is_not_merged():
    for tune in ("prefix", "serial", "zeroinit"):
        model = make()
        lora.apply(model, adapter(tune))
        with pytest.raises(BadInput, match="cannot be merged"):
            lora.merge(model)


@pytest.mark.parametrize("tune", lora.METHODS)
def test_disabled_is_the_base_and_only_for_so_long(tune):
    model = make("gpt2")
    base = logits(model, idx())
    lora.apply(model, adapter(tune, train_embeddings=tune == "lora"))
    shake(model)
    tuned = logits(model, idx())
    with pytest.raises(ZeroDivisionError), lora.disabled(model):
        assert torch.equal(logits(model, idx()), base)
        1 / 0
    assert torch.equal(logits(model, idx()), tuned) and not torch.equal(tuned, base)


def test_several_adapters_take_turns_on_one_base_and_add_up():
    model = make()
    base, seen, kept = logits(model, idx()), [], []
    for seed, flags in ((1, dict(lora_targets="q,v")), (2, dict(lora_targets="all", rslora=True))):
        lora.apply(model, adapter("lora", **flags))
        shake(model, seed)
        seen.append(logits(model, idx()))
        kept.append(lora.detach(model))
        assert torch.equal(logits(model, idx()), base)
    for expected, tensors in zip(seen, kept):
        lora.attach(model, *tensors)
        torch.testing.assert_close(logits(model, idx()), expected, rtol=1e-5, atol=1e-5)
        lora.detach(model)
    deltas = {}
    for w, tensors in zip((0.25, -2.0), kept):
        lora.attach(model, *tensors)
        for name, m in model.named_modules():
            if isinstance(m, lora.LowRank):
                deltas[name] = deltas.get(name, 0) + w * (m.effective() - m.weight).detach()
        lora.detach(model)
    lora.attach(model, *lora.weighted(kept, (0.25, -2.0)))
    for name, delta in deltas.items():
        m = model.get_submodule(name)
        torch.testing.assert_close((m.effective() - m.weight).detach(), delta, rtol=1e-4, atol=1e-5)


def test_relora_puts_what_it_learned_into_the_weights_and_starts_anew():
    model = make()
    lora.apply(model, adapter("lora", lora_targets="all,wte"))
    shake(model)
    before = logits(model, idx())
    old = lora.grafts(model)[0].lora_A.clone()
    lora.restart(model, seed=7)
    assert (logits(model, idx()) - before).abs().max() < 1e-5 * before.abs().max()
    assert all((m.lora_A if isinstance(m, lora.LowRankEmbedding) else m.lora_B).abs().max() == 0
               for m in lora.grafts(model))
    assert not torch.equal(lora.grafts(model)[0].lora_A, old)


def test_adalora_prunes_down_to_its_budget_and_along_the_cube():
    model = make()
    lora.apply(model, adapter("adalora", lora_targets="all"))
    ranks = [len(m.lora_A) for m in lora.grafts(model)]
    assert set(ranks) == {6}  # half as many again as the rank it ends with
    allocator = lora.RankAllocator(model, average=4, steps=20, warm=4, final=5)
    assert allocator.budget(4) == sum(ranks) and allocator.budget(15) == 4 * len(ranks)
    assert allocator.budget(10) == int(2 * len(ranks) * (5 / 11) ** 3 + 4 * len(ranks))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(20):
        (model(idx(step), idx(step))[1] + 0.5 * lora.orthogonality(model)).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
    assert sum((m.lora_E != 0).sum().item() for m in lora.grafts(model)) == 4 * len(ranks)
    with pytest.raises(BadInput, match="nothing to prune"):
        lora.RankAllocator(model, average=6, steps=20, warm=4, final=5)


# Virtual tokens


@pytest.mark.parametrize("tune", ("prompt", "ptuning", "prefix", "ptuning2", "zeroinit", "serial"))
def test_generation_with_a_cache_equals_whole_forward_passes(tune):
    model = make("llama")
    lora.apply(model, adapter(tune))
    shake(model)
    tokens, _ = model.generate([[1, 2, 3], [4, 5, 6, 7]], max_new_tokens=8, temperature=0)
    for row, start in zip(tokens, ([1, 2, 3], [4, 5, 6, 7])):
        for _ in range(8):
            start = start + [logits(model, torch.tensor([start]))[0, -1].argmax().item()]
        assert start[-8:] == row


@pytest.mark.parametrize("tune", ("prompt", "prefix"))
def test_packed_documents_each_see_the_virtual_tokens(tune):
    model = make("gpt2")
    lora.apply(model, adapter(tune))
    shake(model)
    a, b = idx(1, 1, 9), idx(2, 1, 12)
    doc_ids = torch.tensor([[0] * 9 + [1] * 12])
    positions = torch.cat((torch.arange(9), torch.arange(12)))[None]
    with torch.no_grad():
        packed = model(torch.cat((a, b), 1), doc_ids=doc_ids, positions=positions)[0]
    torch.testing.assert_close(packed, torch.cat((logits(model, a), logits(model, b)), 1), rtol=1e-5, atol=1e-5)


def test_a_trained_prompt_is_read_anew_after_each_change():
    model = make()
    lora.apply(model, adapter("prompt"))
    before = logits(model, idx())
    model.train()
    shake(model)
    assert not torch.equal(logits(model.eval(), idx()), before)


def test_prompts_begin_at_random_at_embeddings_or_at_a_text():
    model, tokenizer = make(), Tokenizer.train(["yes no maybe " * 20], 260)
    model = make(vocab_size=tokenizer.n_vocab)
    lora.apply(model, adapter("prompt", virtual_init="yes no"), tokenizer)
    ids = (tokenizer.encode("yes no") * 5)[:5]
    assert torch.equal(model.virtual.table, model.wte.weight[ids])
    model = make()
    lora.apply(model, adapter("prompt"))
    rows = {tuple(row.tolist()) for row in model.wte.weight}
    assert all(tuple(row.tolist()) in rows for row in model.virtual.table)
    with pytest.raises(BadInput, match="needs a tokenizer"):
        lora.apply(make(), adapter("prompt", virtual_init="yes no"))


# Files


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "base"
    model, tokenizer = make("gpt2", vocab_size=300, n_embd=64), Tokenizer.train(["the cat sat on the mat " * 20], 262)
    save_run(out, model, {"stage": "train", "tokenizer": tokenizer.spec()})
    tokenizer.save(out)
    return out


@pytest.mark.parametrize("tune", lora.METHODS)
def test_an_adapter_comes_back_from_its_folder(base, tmp_path, tune):
    model, where = lora.start(base, adapter(tune, train_embeddings=tune == "dora", lora_targets="q,up"))
    shake(model)
    model.eval()
    lora.save(tmp_path, model, {"stage": "sft"}, where)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "run.json"]
    again = GPT.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, idx()), logits(model, idx()), rtol=1e-5, atol=1e-5)
    assert lora.added("blocks.0.attn.q.lora_A") and again.adapter.tune == lora.WRITTEN.get(tune, tune)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    if tune == "lora":
        assert size < 0.15 * (base / "model.safetensors").stat().st_size


def test_an_adapter_for_another_base_is_refused_in_a_sentence(base, tmp_path):
    model, _ = lora.start(base, adapter("lora"))
    lora.save(tmp_path / "a", model, {}, base)
    other = make("gpt2", seed=3, vocab_size=300, n_embd=64)
    save_run(tmp_path / "other", other, {})
    for change, message in ((dict(base=str(tmp_path / "other")), "adapter for another base"),
                            (dict(base=str(tmp_path / "gone")), "cannot be read")):
        run = json.loads((tmp_path / "a" / "run.json").read_text())
        (tmp_path / "a" / "run.json").write_text(json.dumps(run | change))
        with pytest.raises(BadInput, match=message):
            GPT.from_pretrained(tmp_path / "a")
    with pytest.raises(BadInput, match="for another base"):  # PEFT's own folder knows shapes and names alone
        (tmp_path / "a" / "run.json").unlink()
        save_run(tmp_path / "wide", make("llama", n_embd=96, n_layer=1), {})
        lora.load(tmp_path / "a", base=tmp_path / "wide")


def test_a_fingerprint_is_the_same_in_bf16_and_tells_trained_weights_apart():
    large = torch.nn.Linear(2 ** 13, 3456, bias=False)  # more entries than float32 can count
    with torch.no_grad():
        large.weight.copy_(torch.arange(3456)[:, None] % 97)
    first = lora.fingerprint(large)
    assert first == lora.fingerprint(large.to(torch.bfloat16))
    large.weight.data *= 1.02
    assert first != lora.fingerprint(large)


def test_a_tuned_adapter_goes_on_and_another_method_finds_it_in_the_weights(base, tmp_path):
    model, _ = lora.start(base, adapter("lora"))
    shake(model)
    lora.save(tmp_path / "a", model, {}, base)
    again, where = lora.start(tmp_path / "a", adapter("lora"))
    assert again.adapter.tune == "lora" and str(where) == str(base)
    for new in (adapter("serial"), None):
        merged, where = lora.start(tmp_path / "a", new)
        torch.testing.assert_close(logits(merged.eval(), idx()), logits(model, idx()), rtol=1e-5, atol=1e-5)
        assert where == (tmp_path / "a" if new else None)


def test_new_tokens_get_rows_that_learn(base, tmp_path):
    tokenizer = Tokenizer.load(base)
    tokenizer.n_vocab = 390  # the base has 300 rows, padded to 320
    with pytest.raises(BadInput, match="--train_embeddings"):
        lora.start(base, adapter("lora"), tokenizer=tokenizer)
    model, _ = lora.start(base, adapter("lora", train_embeddings=True), tokenizer=tokenizer)
    assert logits(model, idx()).shape[-1] == 390
    torch.testing.assert_close(model.wte.weight[350], model.wte.weight[:300].mean(0))
    shake(model)
    lora.save(tmp_path, model, {}, base)
    torch.testing.assert_close(logits(GPT.from_pretrained(tmp_path), idx()), logits(model, idx()), rtol=1e-5, atol=1e-5)


# A quantized base


def test_qlora_is_lora_over_the_dequantized_weights(base, tmp_path):
    model, _ = lora.start(base, adapter("lora", quantize="nf4", lora_targets="all"))
    shake(model)
    plain = GPT.from_pretrained(base)
    for name, m in plain.named_modules():
        if name.startswith("blocks.") and hasattr(m, "in_features"):
            m.weight.data = model.get_submodule(name).weight
    lora.apply(plain, adapter("lora", lora_targets="all"))
    for m, theirs in zip(lora.grafts(plain), lora.grafts(model)):
        m.lora_A.data, m.lora_B.data = theirs.lora_A.data, theirs.lora_B.data
    torch.testing.assert_close(logits(model, idx()), logits(plain, idx()), rtol=1e-5, atol=1e-5)
    for m in (model, plain):
        m(idx(), idx())[1].backward()
    for ours, theirs in zip(lora.grafts(model), lora.grafts(plain)):
        torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A.grad, rtol=1e-4, atol=1e-6)
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" not in n} == {False}
    lora.save(tmp_path, model, {}, base)
    torch.testing.assert_close(logits(GPT.from_pretrained(tmp_path), idx()), logits(model, idx()), rtol=1e-5, atol=1e-5)
    with pytest.raises(BadInput, match="quantized"):
        lora.merge(model)
    merged = lora.plain(tmp_path)  # onto the weights before they were quantized
    assert merged.adapter is None and (logits(merged, idx()) - logits(model, idx())).abs().mean() < 0.5


def test_a_quantized_base_takes_a_third_of_bf16s_bytes():
    model = make("llama", n_embd=256, n_layer=1)
    lora.quantize_base(model, "nf4")
    q = model.blocks[0].mlp.up
    packed = sum(b.numel() * b.element_size() for b in q.buffers())
    assert packed < 0.30 * 2 * q.in_features * q.out_features


# The command line


def run(*args, check=0):
    return call(lora, *args, check=check)[check > 0]


def test_merge_writes_a_plain_model(base, tmp_path):
    model, _ = lora.start(base, adapter("lora"))
    shake(model)
    tokenizer = Tokenizer.load(base)
    lora.save(tmp_path / "a", model, {"tokenizer": tokenizer.spec()}, base)
    tokenizer.save(tmp_path / "a")
    run("merge", tmp_path / "a", "--out", tmp_path / "plain")
    plain = GPT.from_pretrained(tmp_path / "plain")
    assert plain.adapter is None
    torch.testing.assert_close(logits(plain, idx()), logits(model, idx()), rtol=1e-5, atol=1e-5)
    assert "holds no adapter_config.json" in run("merge", base, "--out", tmp_path / "x", check=2)
    run("merge", tmp_path / "a", "--out", tmp_path / "plain")
    assert (tmp_path / "plain.old" / "model.safetensors").exists()
    for out in (base, tmp_path / "a"):
        assert "take the place" in run("merge", tmp_path / "a", "--out", out, check=2)
        assert "take the place" in run("import", tmp_path / "a", "--init", base, "--out", out, check=2)


def test_count_lists_every_method(base):
    lines = run("count", base).splitlines()
    assert [line.split()[0] for line in lines] == list(lora.METHODS)
    counted = run("count", "llama-7b", "--tune", "bitfit")
    assert "bitfit" in counted and "has none" in counted


SCRIPT = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
if "--fail" in sys.argv:
    sys.exit(3)
(out / "run.json").write_text(json.dumps({"metrics": {"seen": sys.argv[1], "seconds": 1}}))
"""


def test_runs_are_launched_once_and_a_failure_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lora, "__file__", str(tmp_path / "lora.py"))
    (tmp_path / "script.py").write_text(SCRIPT)
    runs = {str(tmp_path / name): [name] for name in "abc"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text('{"metrics": {"seen": "half"}}')  # of a run that was stopped
    for done in (3, 0):  # the second time all are there
        found = lora.launch("script.py", runs, 2)
        assert found == {out: {"seen": flags[0], "seconds": 1} for out, flags in runs.items()}
        assert capsys.readouterr().err.count("is done") == done
    with pytest.raises(BadInput, match="script.py d --fail --out"):
        lora.launch("script.py", {str(tmp_path / "d"): ["d", "--fail"]}, 1)


def test_the_table_takes_each_methods_best_rate(base, monkeypatch, tmp_path):
    asked = []

    def launch(script, runs, jobs):
        asked.append(runs)
        return {out: {"accuracy": 0.5 if "1e-2" in out else 0.25, "trained": 7, "tokens_per_s": 9,
                      "peak_memory": 2 ** 20} for out in runs}
    monkeypatch.setattr(lora, "launch", launch)
    lines = run("table", "--init", base, "--out", tmp_path, "--lrs", "1e-3,1e-2", "--seeds", 2).splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names == ["full", *(m for m in lora.METHODS), "lora, all", "dora, all", "qlora, all"]
    assert len(asked[0]) == 2 * len(names) and len(asked[1]) == 2 * len(names)
    assert all("1e-2" in out for out in asked[1])
    assert all(line.endswith("1e-2 | 9 | 1 MiB | 50.0% ± 0.0% |") for line in lines[2:])


@pytest.mark.parametrize("flags, message", [
    (dict(lora_rank=0), "--lora_rank 0"), (dict(lora_dropout=1.0), "--lora_dropout"), (dict(tune="lor"), "--tune lor"),
    (dict(virtual_tokens=0), "--virtual_tokens 0")])
def test_a_bad_flag_is_named(flags, message):
    with pytest.raises(BadInput, match=message):
        lora.Adapter(**flags)


def test_unfit_models_are_refused():
    for model, tune, message in ((make(), "bitfit", "has none"), (make(pos="alibi"), "prefix", "pos=alibi"),
                                 (make(), "lora", "already")):
        if message == "already":
            lora.apply(model, adapter("lora"))
        with pytest.raises(BadInput, match=message):
            lora.apply(model, adapter(tune))
    assert len(PRESETS) > 20


@pytest.mark.parametrize("tune", ["lora", "dora"])
def test_an_adapter_on_top_of_a_folded_one_learns(tune, tmp_path):
    model = make()
    save_run(tmp_path / "base", model, {})
    lora.apply(model, adapter("lora"))
    shake(model)
    lora.save(tmp_path / "first", model, {}, tmp_path / "base")
    second = lora.plain(tmp_path / "first")
    torch.testing.assert_close(logits(second, idx()), logits(model, idx()), atol=1e-4, rtol=1e-4)
    lora.apply(second, adapter(tune))
    before = logits(second, idx())
    second(idx(), idx())[1].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in second.parameters() if p.requires_grad)
    shake(second)
    assert not torch.allclose(logits(second, idx()), before)


@pytest.mark.parametrize("method", ["nf4", "hqq", "symmetric", "zeropoint", "fp8", "llm_int8"])
def test_the_base_may_be_quantized_by_any_method_that_needs_no_texts(method):
    model = make(n_embd=64)
    lora.quantize_base(model, method)
    lora.apply(model, adapter("lora", quantize=method))
    shake(model)
    assert torch.isfinite(logits(model, idx())).all()


def test_a_method_that_needs_texts_is_refused_for_the_base():
    with pytest.raises(BadInput, match="calibrate"):
        lora.quantize_base(make(), "gptq")


def test_fused_modules_keep_their_own_scales(tmp_path):
    model = make("gpt2")
    lora.apply(model, adapter("lora", lora_targets="q,k,v"))
    shake(model)
    for i, m in enumerate(lora.grafts(model)):
        m.lora_scale *= 1 + (i > 2)  # as an alpha_pattern says of the second block
    save_run(tmp_path / "base", make("gpt2"), {})
    lora.save(tmp_path / "adapter", model, {}, tmp_path / "base")
    again = lora.load(tmp_path / "adapter")
    torch.testing.assert_close(logits(again, idx()), logits(model, idx()), atol=1e-5, rtol=1e-5)


def test_an_alpha_pattern_may_name_alternatives(tmp_path):
    model = make()
    lora.apply(model, adapter("lora", lora_targets="q,v"))
    shake(model)
    save_run(tmp_path / "base", make(), {})
    lora.save(tmp_path / "adapter", model, {}, tmp_path / "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = {key.split(".")[-3] for key in load_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")}
    config["alpha_pattern"] = {"|".join(sorted(names)): 3 * model.adapter.alpha}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    again = lora.load(tmp_path / "adapter")
    for ours, theirs in zip(lora.grafts(model), lora.grafts(again)):
        assert theirs.lora_scale == pytest.approx(3 * ours.lora_scale)


@pytest.mark.parametrize("tune", ["prompt", "prefix"])
def test_text_goes_on_beyond_what_virtual_tokens_leave_of_the_context(tune):
    model = make()
    lora.apply(model, adapter(tune))
    assert model.context == 59
    ids, _ = model.eval().generate([[1, 2, 3]], 80, temperature=0)
    assert len(ids[0]) == 80


def test_an_adapter_is_merged_once():
    model = make()
    lora.apply(model, adapter("lora"))
    lora.merge(model)
    with pytest.raises(BadInput, match="unmerge"):
        lora.merge(model)


def test_dora_over_rows_of_zeros_has_finite_gradients():
    model = make()
    for block in model.blocks:
        block.attn.o.weight.data.zero_()
    lora.apply(model, adapter("dora", lora_targets="o"))
    model(idx(), idx())[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
