"""The same figures as the public packages: transformers, sacrebleu, rouge_score, nltk, scipy."""
import random
import time

import numpy as np
import pytest
import torch

import evaluate as E
from conftest import need, package
from model import GPT

WORDS = "the a cat dog sat ran on under mat, 3.5 1,000 it's end. (so) well-known 12-3 &amp; said: 'no' ÿ".split()


def random_pairs(n, seed=0):
    rng = random.Random(seed)

    def text(low=0):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, 14)))
    pairs = []
    for _ in range(n):
        reference = text(1)
        words = reference.split()
        near = " ".join(w if rng.random() < 0.7 else rng.choice(WORDS) for w in words[:rng.randint(0, len(words))])
        pairs.append((rng.choice([near, near, text()]), [reference, text(1)]))
    return pairs


def test_bleu_equals_sacrebleu():
    sacrebleu = package("sacrebleu")
    for seed, n in enumerate((1, 2, 3, 5, 20, 200) * 5):
        predictions, references = zip(*random_pairs(n, seed))
        for how_many in (1, 2):
            streams = [[r[i] for r in references] for i in range(how_many)]
            expected = sacrebleu.corpus_bleu(list(predictions), streams).score
            assert E.bleu(predictions, [r[:how_many] for r in references]) == pytest.approx(expected, abs=1e-8)


def test_nist_equals_nltk():
    corpus_nist = package("nltk.translate.nist_score").corpus_nist
    for seed in range(10):
        predictions, references = zip(*random_pairs(30, seed))
        words, truths = [p.split() for p in predictions], [[r.split() for r in rs] for rs in references]
        for keep in (1, 2):
            some = [rs[:keep] for rs in truths]
            ours = float(E.nist_of(np.sum(E.nist_counts(words, some), 0)))
            assert ours == pytest.approx(corpus_nist(some, words), rel=1e-9)


def test_rouge_equals_rouge_score():
    scorer = package("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for prediction, (reference, _) in random_pairs(300):
        for name, score in scorer.score(reference, prediction).items():
            assert E.rouge(prediction, reference)[name] == pytest.approx(tuple(score), abs=1e-12)


def test_bradley_terry_is_the_maximum_that_scipy_finds():
    optimize = package("scipy.optimize")
    rng = np.random.default_rng(0)
    for n in (2, 4, 9):
        wins = rng.integers(1, 30, size=(n, n)) * (1 - np.eye(n))

        def loss(beta):
            return (wins * np.log1p(np.exp(beta[None, :] - beta[:, None]))).sum()
        best = optimize.minimize(loss, np.zeros(n), method="BFGS", options={"gtol": 1e-9}).x
        expected = 1000 + 400 / np.log(10) * (best - best.mean())
        assert E.bradley_terry(wins) == pytest.approx(expected, abs=1e-3)


def strided(model, ids, T, stride):
    """Mean nats by transformers' recipe for models of fixed length, but each window's first target counts too."""
    total, done = 0.0, 0
    for start in range(0, len(ids) - 1, stride):
        end = min(start + T, len(ids) - 1)
        logp = model(torch.tensor([ids[start:end]])).logits[0].log_softmax(-1)
        total -= logp[done - start:].gather(1, torch.tensor(ids[done + 1:end + 1])[:, None]).sum().item()
        done = end
        if end == len(ids) - 1:
            return total / (len(ids) - 1)


def one_by_one(model, context, choice):
    """log P(choice | context), one example at a time, all logits: how a plain loop does it."""
    logits = model(torch.tensor([context + choice])).logits[0, len(context) - 1:-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(choice)[:, None]).sum().item()


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_perplexity_and_choices_of_a_random_model_equal_transformers(tmp_path, kind):
    tf = package("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, n_positions=64, n_embd=48, n_layer=3, n_head=4) if kind == "GPT2" else dict(
        vocab_size=300, max_position_embeddings=64, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2)
    cls = tf.GPT2LMHeadModel if kind == "GPT2" else tf.LlamaForCausalLM
    theirs = cls(getattr(tf, kind + "Config")(**sizes, initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(300, size=200).tolist()
    groups = [[rng.integers(300, size=n).tolist(), [rng.integers(300, size=m).tolist() for m in (1, 4, 7)]]
              for n in (5, 30, 57)]
    with torch.no_grad():
        for T, stride in ((64, 64), (64, 32), (20, 7)):
            expected = strided(theirs, ids, T, stride)
            assert np.log(E.perplexity(ours, ids, T, stride)) == pytest.approx(expected, abs=1e-4)
        for (context, rows), scores in zip(groups, E.continuations(ours, groups)):
            expected = [one_by_one(theirs, context, row) for row in rows]
            assert [s[0] for s in scores] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_smollm2_has_the_perplexity_and_the_picks_of_transformers(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tf = package("transformers")
    theirs = tf.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    subject = E.Subject(smollm2, E.get_args(["--dtype", "float32"]), "cpu")
    ids = subject.start + subject.tokenizer.encode(need("tinyshakespeare.txt").read_text()[:9000])
    with torch.no_grad():
        for T, stride in ((512, 512), (512, 256)):
            expected = strided(theirs, ids, T, stride)
            assert np.log(E.perplexity(subject.model, ids, T, stride)) == pytest.approx(expected, abs=1e-3)

    # the same 24 questions in batches with shared contexts, and one choice at a time as a plain loop would
    rows = E.read_rows(need("eval/hellaswag_val_200.jsonl"), 24)
    questions = [E.read_choices(*row) for row in rows]
    started = time.time()
    scores = E.scored(subject, "questions", questions, ())
    batched, started = time.time() - started, time.time()
    for q, found in zip(questions, scores):
        (context, choices), = subject.groups([q])
        with torch.no_grad():
            expected = [one_by_one(theirs, context, choice) for choice in choices]
        assert [s[0] for s in found] == pytest.approx(expected, abs=2e-3)
        assert np.argmax([s[0] for s in found]) == np.argmax(expected)
    print(f"\n24 HellaSwag questions: {batched:.1f} s, one choice at a time {time.time() - started:.1f} s")
