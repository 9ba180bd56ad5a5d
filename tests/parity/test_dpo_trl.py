"""trl's own trainers on a tiny Llama against dpo.py on the same weights: the loss and the gradient of every weight."""
import copy
import json
import random

import pytest
import torch

import dpo
from conftest import package
from model import GPT, Process, from_hf_tensors
from parity import oracle_dpo as oracle

CPU = Process(torch.device("cpu"), 0, 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_golden_numbers_are_what_the_installed_trl_says():
    trl = package("trl")
    golden = json.loads(oracle.GOLDEN.read_text())[f"trl {trl.__version__}"]
    for name, loss in (oracle.new_losses() if trl.__version__ >= "1" else oracle.old_losses()).items():
        value, gradient = oracle.evaluate(loss)
        assert value == pytest.approx(golden[name][0], abs=1e-9)
        assert (torch.tensor(gradient) - torch.tensor(golden[name][1])).abs().max() < 1e-9


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(transformers' model, its folder, its tokenizer)."""
    package("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    torch.manual_seed(0)
    vocab = {c: i for i, c in enumerate("<>abcdefghijklmnopqrstuvwxyz0123456789 .,")}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<", eos_token=">", unk_token="<")
    config = LlamaConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         attn_implementation="eager", initializer_range=0.3, pad_token_id=0, eos_token_id=1,
                         bos_token_id=None, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder, tokenizer


def some_examples(kto=False):
    rng = random.Random(1)
    ids = lambda n: [rng.randrange(2, 40) for _ in range(n)]
    return [dpo.Example(ids(rng.randint(2, 8)), [ids(rng.randint(1, 8)) + [1] for _ in range(2 - kto)],
                        float(i % 2) if kto else 1.0) for i in range(5)]


def ours(folder, examples, refs, mismatched, *flags):
    """Loss and gradients, name -> tensor, of one step of dpo.py."""
    args = dpo.get_args(["--data", "pairs", "--input", "x", "--device", "cpu", "--grad_clip", "0", *map(str, flags)])
    model = GPT.from_pretrained(folder)
    trainer = dpo.Trainer(model, args, CPU, 64)
    trainer.rows, trainer.ends, grads = 2, torch.tensor([1]), {}
    trainer.optimizer.step = lambda: grads.update({n: p.grad.clone() for n, p in model.named_parameters()})
    return trainer.step(examples, refs, mismatched)["loss"], grads, model.config


def padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([r + [value] * (width - len(r)) for r in rows])


def compare(loss, model, folder, examples, refs, mismatched, *flags):
    model.zero_grad()
    loss.backward()
    mine, grads, config = ours(folder, examples, refs, mismatched, *flags)
    theirs = {n: p.grad for n, p in model.named_parameters()}
    theirs = from_hf_tensors(theirs, "llama", config, "gradients")
    assert mine == pytest.approx(loss.item(), abs=1e-5, rel=1e-6)
    for name, grad in grads.items():
        limit = 1e-5 * max(1, theirs[name].abs().max().item())  # IPO's loss is 36, its gradients as much larger
        assert (grad[:len(theirs[name])] - theirs[name]).abs().max() < limit, name


def trainer_kwargs(tmp_path):
    return dict(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
                per_device_train_batch_size=5)


@pytest.mark.parametrize("kind,flags", [
    ("sigmoid", ["--loss", "dpo", "--sft_weight", 0]), ("hinge", ["--loss", "hinge"]),
    ("ipo", ["--loss", "ipo", "--beta", 0.3]), ("robust", ["--loss", "robust"]),
    ("sigmoid_norm", ["--loss", "dpo", "--length_normalize", "--sft_weight", 0]),
    (["sigmoid", "sft"], ["--loss", "dpo", "--sft_weight", 0.7])])
def test_dpo_trainer(llama, tmp_path, kind, flags):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    model, folder, tokenizer = llama
    config = DPOConfig(**trainer_kwargs(tmp_path), loss_type=kind, beta=0.3 if kind == "ipo" else 0.1,
                       label_smoothing=0.1, loss_weights=[1.0, 0.7] if isinstance(kind, list) else None)
    rows = Dataset.from_list([{"prompt": "ab", "chosen": "cd", "rejected": "ef"}] * 5)
    trainer = DPOTrainer(model, copy.deepcopy(model), args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    examples, refs = some_examples(), [[-20.0 - i, -30.0 + i] for i in range(5)]
    rows = [e.prompt + e.responses[k] for k in (0, 1) for e in examples]
    mask = [[0] * len(e.prompt) + [1] * len(e.responses[k]) for k in (0, 1) for e in examples]
    batch = dict(input_ids=padded(rows, 0), attention_mask=padded([[1] * len(r) for r in rows], 0),
                 completion_mask=padded(mask, 0), ref_chosen_logps=torch.tensor([r[0] for r in refs]),
                 ref_rejected_logps=torch.tensor([r[1] for r in refs]))
    compare(trainer.compute_loss(trainer.model, batch), model, folder, examples, refs, [None] * 5, *flags)


@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo"])
def test_trainers_without_a_reference(llama, tmp_path, name):
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    model, folder, tokenizer = llama
    rows = Dataset.from_list([{"prompt": "ab", "chosen": "cd", "rejected": "ef"}] * 5)
    extra = {"orpo": {}, "cpo": {"loss_type": "sigmoid", "cpo_alpha": 1.0},
             "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}}[name]
    kind = (ORPOConfig, ORPOTrainer) if name == "orpo" else (CPOConfig, CPOTrainer)
    config = kind[0](**trainer_kwargs(tmp_path), beta=2.0 if name == "simpo" else 0.1, **extra)
    trainer = kind[1](model, args=config, train_dataset=rows, processing_class=tokenizer)
    examples, batch = some_examples(), {}
    for k, which in enumerate(("chosen", "rejected")):
        full = [e.prompt + e.responses[k] for e in examples]
        batch |= {f"{which}_input_ids": padded(full, 0),
                  f"{which}_attention_mask": padded([[1] * len(r) for r in full], 0),
                  f"{which}_labels": padded([[-100] * len(e.prompt) + e.responses[k] for e in examples], -100)}
    compare(trainer.compute_loss(model, batch), model, folder, examples, [[0.0, 0.0]] * 5, [None] * 5, "--loss", name)


def test_kto_trainer(llama, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer
    model, folder, tokenizer = llama
    rows = Dataset.from_list([{"prompt": "ab", "completion": "cd", "label": bool(i % 2)} for i in range(5)])
    config = KTOConfig(**trainer_kwargs(tmp_path), beta=0.1, desirable_weight=1.3, undesirable_weight=0.6)
    trainer = KTOTrainer(model, copy.deepcopy(model), args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    examples = some_examples(kto=True)
    refs, wrong_refs = [[-20.0 - i] for i in range(5)], [-40.0 - i for i in range(5)]
    wrong = [(e.prompt, [examples[i - 1].responses[0]]) for i, e in enumerate(examples)]

    def arrays(groups, prefix):
        full = [p + r for p, (r,) in groups]
        return {f"{prefix}input_ids": padded(full, 0),
                f"{prefix}attention_mask": padded([[1] * len(r) for r in full], 0),
                f"{prefix}completion_mask": padded([[0] * len(p) + [1] * len(r) for p, (r,) in groups], 0)}
    batch = arrays([(e.prompt, e.responses) for e in examples], "") | arrays(wrong, "KL_") | dict(
        label=torch.tensor([e.p > 0.5 for e in examples]), ref_logps=torch.tensor([r[0] for r in refs]),
        ref_KL_logps=torch.tensor(wrong_refs))
    compare(trainer.compute_loss(trainer.model, batch), model, folder, examples, refs,
            [(g, [r]) for g, r in zip(wrong, wrong_refs)], "--loss", "kto",
            "--weight_liked", 1.3, "--weight_disliked", 0.6)
