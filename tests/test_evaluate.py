"""The evaluation room as a specification: what each figure is, whatever the batch, the cache or the restart."""
import gc
import itertools
import json
import math
import weakref

import numpy as np
import pytest
import torch

import data
import evaluate as E
from bpe import Tokenizer
from conftest import call
from data import arithmetic
from model import GPT, GPTConfig, init_weights, save_run

TEXT = "the cat sat on the mat, naïve 你好 and 993-7=986. Question: who? Answer: A. B. " * 30


pytestmark = pytest.mark.usefixtures("one_thread")


def make_run(out, seed=0, **config):
    """An untrained model with a tokenizer: noise, but the same noise every time."""
    tokenizer = Tokenizer.train([TEXT], 290)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=64, n_embd=32, n_layer=2, **config))
    init_weights(model, seed)
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    save_run(out, model, {"tokenizer": tokenizer.spec(), "args": {"data": "bios:0.6,arithmetic:0.4"}})
    tokenizer.save(out)
    return out


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("out") / "run")


@pytest.fixture(scope="module")
def model(run_dir):
    return GPT.from_pretrained(run_dir).eval()


def evaluate(*args, check=0, stdin=""):
    """evaluate.py in this process -> (the metrics of its last line, all that it printed)."""
    out, err = call(E, "--device", "cpu", *args, check=check, stdin=stdin)
    return json.loads(out.splitlines()[-1]) if not check else {}, out + err


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Intervals


def test_wilson_is_honest_at_zero_and_one():
    figure = E.share([False] * 50)  # 3.8416 / 53.8416, Wilson 1927
    assert figure.value == figure.low == 0 and figure.high == pytest.approx(0.07135, abs=1e-5)
    assert E.share([True] * 50).low == pytest.approx(1 - 0.07135, abs=1e-5)


def test_the_bootstrap_of_a_mean_is_about_two_standard_errors():
    values = np.random.default_rng(1).normal(size=400)
    figure, half = E.mean(values), 1.96 * values.std() / 20
    assert figure.value == pytest.approx(values.mean())
    assert (figure.low, figure.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.2 * half)


def test_a_mean_of_equal_numbers_is_not_certain_and_one_example_has_no_interval():
    assert E.mean([0.0] * 50) == E.share([False] * 50) and E.mean([1, 1]).low < 0.5
    assert E.mean([0.5, 0.5]) == (0.5, 0.5, 0.5)
    for figure in E.mean([0.3]), E.bootstrap([[3.0, 2]]), E.distinct(["a b".split()], 1):
        assert math.isfinite(figure.value) and math.isnan(figure.low) and math.isnan(figure.high)


def test_strata_are_drawn_each_for_itself():
    far_apart = [np.c_[np.zeros(50), np.ones(50)], np.c_[np.full(50, 9.0), np.ones(50)]]
    assert E.bootstrap(far_apart) == (4.5, 4.5, 4.5) and E.bootstrap(np.concatenate(far_apart)).high > 5


# Text against text


def test_bleu_of_a_perfect_and_of_a_foreign_text():
    assert E.bleu(["the cat sat on the mat."], [["the cat sat on the mat."]]) == pytest.approx(100)
    assert E.bleu(["dog"], [["the cat sat"]]) == 0
    # four matches of 4, 3 of 3 … but half as long: exp(1 - 8/4)
    assert E.bleu(["a b c d"], [["a b c d e f g h"]]) == pytest.approx(100 * math.exp(-1))


def test_lcs_equals_the_table():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.integers(4, size=rng.integers(0, 90)).tolist() for _ in "ab")
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, j in itertools.product(range(len(a)), range(len(b))):
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
        assert E.lcs(a, b) == table[-1, -1]


def test_distinct_repetition_and_their_interval():
    texts = ["a b a b".split(), "a c".split(), "d e f".split()]
    figure = E.distinct(texts, 1)
    assert figure.value == 6 / 9
    others = [sum((text for text in texts if text is not left_out), []) for left_out in texts]
    left = [len(set(words)) / len(words) for words in others]
    half = 1.959964 * math.sqrt(2 * np.var(left))
    assert figure.low == pytest.approx(6 / 9 - half)
    assert E.repetition("a b c d a b c d".split()) == pytest.approx(1 / 5) and E.repetition(["a"]) == 0


def test_pass_at_k_counts_the_subsets():
    right = [True, True, False, False, False, False]
    for k in range(1, 7):
        draws = list(itertools.combinations(right, k))
        assert E.pass_at_k(6, 2, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_ece_is_the_gap_between_confidence_and_accuracy():
    assert E.ece([0.95] * 4 + [0.15] * 4, [1, 1, 1, 0] + [0] * 4).value == pytest.approx((4 * 0.2 + 4 * 0.15) / 8)
    assert E.ece([1.0, 1.0], [True, True]).value == 0


def test_the_interval_of_the_calibration_error_holds_it_and_counts_questions():
    rng = np.random.default_rng(0)
    for n in 50, 1000:
        for _ in range(10):
            confidence = rng.random(n)
            figure = E.ece(confidence, rng.random(n) < confidence)
            assert 0 <= figure.low <= figure.value <= figure.high
    once, right = rng.random(100), rng.random(100) < 0.5
    four = E.ece(np.repeat(once, 4), np.repeat(right, 4), per=4)  # nothing new is known
    assert four == pytest.approx(E.ece(once, right))


# Ratings


def test_elo_moves_k_times_the_surprise_and_the_order_matters():
    assert E.elo([(0, 1, 1)], 2).tolist() == [[1016, 984]]
    assert E.elo([(0, 1, 0.5)], 2).tolist() == [[1000, 1000]]
    battles = [(0, 1, 1), (0, 1, 0)]
    first, second = E.elo(battles, 2, orders=np.array([[0, 1], [1, 0]]))
    assert first[0] < 1000 < second[0] and first[0] + second[0] == pytest.approx(2000)


def test_bradley_terry_finds_the_planted_ratings():
    planted = np.array([1200, 1000, 950, 850.0])
    expected = 1 / (1 + 10 ** ((planted[None] - planted[:, None]) / 400))
    wins = 1000 * expected * (1 - np.eye(4))
    assert E.bradley_terry(wins) == pytest.approx(planted)
    both = E.bradley_terry(np.stack([wins, wins.T]))
    assert both[1] == pytest.approx(2000 - planted)


def test_a_player_who_always_loses_has_no_finite_rating():
    assert not E.connected(E.win_matrix([(0, 1, 1), (1, 2, 1), (0, 2, 1)], 3))
    assert E.connected(E.win_matrix([(0, 1, 1), (1, 2, 1), (2, 0, 1)], 3))
    assert E.connected(E.win_matrix([(0, 1, 0.5), (1, 2, 0.5)], 3))


def test_battles_over_one_prompt_are_drawn_together(tmp_path):
    """Both orders of a pair say nothing new: the interval stays. Many players need no matrix a battle."""
    rng = np.random.default_rng(0)
    rows = [{"model_a": "x", "model_b": "y", "winner": "xy"[int(rng.random() < 0.4)], "prompt": i} for i in range(60)]
    widths = []
    for times in 1, 4:
        file = jsonl(tmp_path / f"b{times}.jsonl", [row for row in rows for _ in range(times)])
        low, high = evaluate("--task", f"arena={file}")[0]["intervals"]["bt_x"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.15)


def test_the_win_matrix_counts_ties_half():
    assert E.win_matrix([(0, 1, 1), (1, 0, 1), (0, 1, 0.5), (2, 0, 0)], 3).tolist() == [
        [0, 1.5, 1], [1.5, 0, 0], [0, 0, 0]]


def test_arena_from_a_file(tmp_path):
    rows = [{"model_a": "x", "model_b": "y", "winner": w} for w in ("model_a", "x", "tie", "y")] * 20
    metrics, text = evaluate("--task", f"arena={jsonl(tmp_path / 'b.jsonl', rows)}", "--orders", 20)
    gap = 400 * math.log10(2.5 / 1.5)
    assert metrics["bt_x"] - metrics["bt_y"] == pytest.approx(gap, abs=0.01)
    assert 1000 < metrics["elo_x"] < metrics["intervals"]["elo_x"][1] and "0.62 (80)" in text


# What a model says of text


@pytest.mark.parametrize("n, T, stride", [(100, 16, 16), (100, 16, 5), (17, 16, 16), (9, 16, 16), (101, 16, 1),
                                          (2, 4, 4)])
def test_windows_predict_every_token_once(n, T, stride):
    spans = list(E.windows(n, T, stride))
    assert [i for _, done, end in spans for i in range(done + 1, end + 1)] == list(range(1, n))
    assert all(end - start <= T for start, _, end in spans)
    assert all(done - start >= T - stride for start, done, _ in spans[1:])


def test_window_losses_are_those_of_the_plain_forward(model):
    ids = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(0))
    logp = model(ids[None, :64])[0].log_softmax(-1)[0]
    spans = list(E.windows(150, 64, 32))
    losses = E.window_losses(model, ids.numpy(), spans)
    expected = -logp[:-1].gather(1, ids[1:64, None])[:, 0]
    assert (losses[0][:63] - expected).abs().max() < 1e-4
    assert E.perplexity(model, ids, stride=32) == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("config", [dict(), dict(pos="alibi"), dict(pos="learned", n_kv_head=1),
                                    dict(prefix_lm=True)])
def test_shared_contexts_score_as_whole_texts(tmp_path, config):
    model = GPT.from_pretrained(make_run(tmp_path, **config)).eval()
    rng = np.random.default_rng(0)
    groups = [[rng.integers(256, size=n).tolist(), [rng.integers(256, size=m).tolist() for m in sizes]]
              for n, sizes in ((20, (1, 5, 3)), (7, (9,)), (1, (2, 2)), (58, (6, 2)))]
    for (context, rows), scores in zip(groups, E.continuations(model, groups)):
        for row, (logp, n, greedy) in zip(rows, scores):
            prefix = torch.tensor([len(context)]) if config.get("prefix_lm") else None
            logits = model(torch.tensor([context + row[:-1]]), prefix=prefix)[0][0, len(context) - 1:]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(row)[:, None]).sum().item()
            assert logp == pytest.approx(expected, abs=1e-3) and n == len(row)
            assert greedy == int(logits.argmax(-1).tolist() == row)


def test_words_and_bytes_are_those_of_the_text(run_dir, tmp_path):
    text = "one two  three\nnaïve 你好, x" * 9
    (tmp_path / "t.txt").write_text(text)
    metrics, _ = evaluate("--init", run_dir, "--task", f"text={tmp_path / 't.txt'}", "--window", 16, "--stride", 8)
    tokens = len(Tokenizer.load(run_dir).encode(text))
    nats = metrics["t/loss"] * tokens
    assert math.log(metrics["t/byte_perplexity"]) == pytest.approx(nats / len(text.encode()), rel=1e-4)
    assert math.log(metrics["t/word_perplexity"]) == pytest.approx(nats / len(text.split()), rel=1e-4)
    assert metrics["t/bpb"] == pytest.approx(nats / len(text.encode()) / math.log(2), rel=1e-4)


def test_overlap_lowers_the_loss_of_a_model_that_reads_its_context():
    """GPT-2 large: 19.44 without overlap, 16.45 with half. Here a model that copies the token before the last."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=8, n_embd=32, n_layer=1))
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        x = torch.randint(0, 64, (32, 2)).repeat(1, 5)[:, :9]  # a b a b …
        loss = model(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.randint(0, 64, (20, 2)).repeat(1, 12).flatten()
    assert E.perplexity(model.eval(), ids, stride=4) < 0.95 * E.perplexity(model, ids)


# Questions

ROWS = {
    "hellaswag": ({"activity_label": "Run", "ctx_a": "A man runs.", "ctx_b": "he", "label": "3",
                   "endings": ["stops. [x]", "flies.", "eats.", "is."]}, "Run: A man runs. He", " is.", 3),
    "arc": ({"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"},
            "Question: Why?\nAnswer:", " no", 1),
    "mmlu": ({"question": "Why?", "choices": ["so", "no"], "answer": 1}, "Why?\nA. so\nB. no\nAnswer:", " B", 1),
    "piqa": ({"goal": "Cut", "sol1": "knife", "sol2": "spoon", "label": 0}, "Question: Cut\nAnswer:", " knife", 0),
    "blimp": ({"sentence_good": "He is.", "sentence_bad": "He are."}, "", "He is.", 0),
    "ours": ({"prompt": "1+1=", "choices": ["2", "3"], "answer": 0}, "1+1=", "2", 0),
}


@pytest.mark.parametrize("name", ROWS)
def test_known_rows_are_read(name):
    row, context, right, index = ROWS[name]
    q = E.read_choices("here", row)
    assert q.context == context and q.choices[index] == right
    assert [i for i, label in q.right if label] == [index]


@pytest.mark.parametrize("row", [
    {"prompt": "a", "choices": ["b", " "], "answer": 0}, {"prompt": "a", "choices": ["b", "c"], "answer": 2},
    {"prompt": "a", "choices": ["b"], "answer": 0}, {"sentence_good": "a", "sentence_bad": ""},
    {**ROWS["hellaswag"][0], "endings": ["is.", "[header]", "a", "b"]},
    {"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [0, 0]},
     "mc2_targets": {"choices": ["a"], "labels": [1]}}])
def test_a_row_without_two_choices_and_an_answer_is_refused(row):
    with pytest.raises(E.BadInput, match="here is no row"):
        E.read_choices("here", row)


def test_truthfulqa_picks_among_mc1_and_weighs_mc2(run_dir, tmp_path):
    row = {"question": "Who?", "mc1_targets": {"choices": ["cat", "mat"], "labels": [1, 0]},
           "mc2_targets": {"choices": ["cat", "the cat", "mat"], "labels": [1, 1, 0]}}
    file = jsonl(tmp_path / "tqa.jsonl", [row])
    metrics, _ = evaluate("--init", run_dir, "--task", f"choices={file}")
    args = E.get_args(["--dtype", "float32"])
    subject = E.Subject(run_dir, args, "cpu")
    q = E.read_choices("", row)
    p = [math.exp(s[0]) for s in E.continuations(subject.model, subject.groups([q]))[0]]
    by_name = dict(zip(q.choices, p))
    assert metrics["tqa/mc2"] == pytest.approx((by_name[" cat"] + by_name[" the cat"]) / sum(p), abs=1e-4)
    assert metrics["tqa/accuracy"] == float(by_name[" cat"] > by_name[" mat"])


def test_solved_questions_come_first_and_are_not_asked(run_dir, tmp_path):
    rows = [{"prompt": f"{i}+1=", "choices": [str(i + 1), "0"], "answer": 0} for i in range(4)]
    file = jsonl(tmp_path / "q.jsonl", rows)
    args = E.get_args(["--shots", "2", "--dtype", "float32"])
    shots, asked = E.load(file, E.read_choices, args)
    assert shots == [("0+1=", "1"), ("1+1=", "2")] and [q.context for q in asked] == ["2+1=", "3+1="]
    subject = E.Subject(run_dir, args, "cpu")
    ids, choices = subject.groups(asked, shots)[0]
    assert subject.tokenizer.decode(ids[1:] + choices[0]) == "0+1=1\n\n1+1=2\n\n2+1=3"


def test_a_token_across_the_border_counts_with_the_choice(run_dir):
    subject = E.Subject(run_dir, E.get_args(["--dtype", "float32"]), "cpu")
    whole = subject.tokenizer.encode("the cat")
    context, (row,) = subject.groups([E.Question("", "the c", ("at",))])[0]
    assert context + row == subject.start + whole


@pytest.mark.parametrize("text, answer, right", [
    ("986\n12+", "986\n", True), ("9866", "986", False), ("986", "986", True), (" 986", "986", True),
    ("98.5", "98", False), ("98. So", "98", True), ("6 + 12 = 18\n#### 18", "2*9\n#### 18", True),
    ("so $1,018.", "#### 1018", True), ("none", "#### 3", False), ("#### 7 or 8", "#### 7", True),
    ("986", "986\n", False), ("none", "#### none", False)])
def test_what_counts_as_the_answer(text, answer, right):
    assert E.gives_answer(text, answer) is right


def test_answers_are_those_of_data_exact_match(run_dir, model, tmp_path):
    tokenizer = Tokenizer.load(run_dir)
    told = [tokenizer.decode(model.generate([[tokenizer.eot] + tokenizer.encode(p)], 3, temperature=0)[0][0])
            for p in ("the mat", "the cat")]
    rows = [{"prompt": "the mat", "answer": told[0]}, {"prompt": "the cat", "answer": "no"}]
    if told[0][-1:].isalnum():  # then nothing may go on behind it
        rows[0]["answer"] += "."
    expected = data.exact_match(model, tokenizer, rows)[0]
    metrics, _ = evaluate("--init", run_dir, "--task", f"answers={jsonl(tmp_path / 'a.jsonl', rows)}")
    assert metrics["a/accuracy"] == expected


def test_samples_of_a_question_give_pass_at_k(run_dir, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": "the", "answer": "x"}] * 3)
    metrics, _ = evaluate("--init", run_dir, "--task", f"answers={file}", "--num_samples", 4, "--temperature", 1)
    assert {"a/pass@1", "a/pass@2", "a/pass@4", "a/accuracy"} <= metrics.keys()


def test_arithmetic_has_exactly_so_many_digits(run_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(E, "answered", lambda subject, questions, *rest: asked.extend(questions) or {})
    E.task_arithmetic(None, "4", E.get_args([]))
    held_out = {q for q, _ in arithmetic.draw("val", 8000, 4)}
    assert len(asked) > 100 and all(q.context in held_out for q in asked)
    assert all(len(part) == 4 for q in asked for part in q.context[:-1].replace("-", "+").split("+"))


def test_perturbed_questions_keep_their_choices(run_dir, tmp_path):
    rows = [{"prompt": "the cat sat on the", "choices": [" mat", " cat"], "answer": i % 2} for i in range(6)]
    file = jsonl(tmp_path / "q.jsonl", rows)
    metrics, _ = evaluate("--init", run_dir, "--task", f"choices={file}", "--perturb", *E.PERTURB)
    every = [metrics["q/accuracy"], *(metrics[f"q/accuracy_{name}"] for name in E.PERTURB)]
    assert metrics["q/robust"] <= min(every)
    assert E.PERTURB["case"]("The Cat", None) == "the cat"


def test_careless_typing_never_changes_a_number():
    class Always:
        def random(self):
            return 0.0
    assert E.PERTURB["swap"]("What is 1234-5678, exactly?", Always()) == "Waht is 1234-5678, eaxctly?"
    assert E.PERTURB["drop"]("1234-56=", Always()) == "1234-56="


# Batches, memory and the log


@pytest.fixture
def subject(run_dir):
    return E.Subject(run_dir, E.get_args(["--dtype", "float32"]), "cpu")


def test_items_of_similar_length_go_together_within_the_budget(subject):
    subject.budget, seen, sized = 40, [], []
    items = [[n % 7 + 1, "x" * (n % 11 + 1)] for n in range(50)]

    def size(item):
        sized.append(item)
        return item[0], len(item[1])

    def compute(batch):
        seen.append(batch)
        return [item[0] for item in batch]
    assert subject.ask(["k"], items, size, compute) == [rows for rows, _ in items]
    assert len(sized) <= 50  # once each, or planning would take longer than asking
    for batch in seen:
        longest = max(len(text) for _, text in batch)
        assert len(batch) == 1 or longest * sum(rows for rows, _ in batch) <= 40
    assert [len(batch[0][1]) for batch in seen] == sorted((len(batch[0][1]) for batch in seen), reverse=True)


def test_where_memory_ends_a_batch_is_halved(subject):
    def compute(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        return batch
    items = [[i] for i in range(20)]
    assert subject.ask(["k"], items, lambda item: (1, 8), compute) == items and subject.budget >= 8
    with pytest.raises(E.BadInput, match="memory ends at one question"):
        subject.ask(["l"], items, lambda item: (4, 8), lambda batch: compute([0] * 4))


def test_one_model_at_a_time_is_in_memory(run_dir, tmp_path, monkeypatch):
    loaded, load = [], GPT.from_pretrained

    def from_pretrained(*args):
        gc.collect()
        assert not any(model() for model in loaded)
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model
    monkeypatch.setattr(E.GPT, "from_pretrained", from_pretrained)
    other, prompts = make_run(tmp_path / "other", seed=1), jsonl(tmp_path / "p.jsonl", [{"prompt": "the cat"}])
    evaluate("--init", run_dir, other, "--task", f"winrate={prompts}", "samples", "--max_new_tokens", 3,
             "--judge", f"model={run_dir}", "--battles", tmp_path / "b.jsonl")
    assert len(loaded) == 3


def test_every_answer_has_luck_of_its_own_and_a_greedy_one_needs_none(subject, monkeypatch):
    seeds, args = [], E.get_args(["--temperature", "1"])
    monkeypatch.setattr(subject.model, "generate", lambda prompts, new, seed, **_: (
        seeds.append(seed) or ([[1]] * len(prompts), [[0.0]] * len(prompts))))
    E.write_answers(subject, [[1, 2]] * 30, 4, args)
    E.write_answers(subject, [[1, 2]] * 30, 4, E.get_args(["--temperature", "1", "--seed", "1"]))
    assert len({*seeds[0], *seeds[1]}) == 60  # and another --seed draws others
    E.write_answers(subject, [[1, 2]] * 30, 4, E.get_args([]))
    assert seeds[2] == [0]


def test_a_prompt_beyond_the_context_is_cut_and_told(run_dir, tmp_path):
    rows = [{"prompt": "the cat " * 99, "answer": "x"}, {"prompt": "the", "answer": "x"}]
    _, text = evaluate("--init", run_dir, "--task", f"answers={jsonl(tmp_path / 'a.jsonl', rows)}")
    assert "a: 1 prompts longer than the model's context were cut" in text


def test_an_answer_in_a_chat_ends_with_its_turn(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(E, "write_answers", lambda subject, prompts, *rest: [["986", [-0.1]]] * len(prompts))
    rows = [{"prompt": "993-7=", "answer": "986\n"}, {"question": "993-7?", "answer": "986"}]
    args = ["--init", run_dir, "--task", f"answers={jsonl(tmp_path / 'a.jsonl', rows)}", "--texts", tmp_path / "x/t"]
    assert evaluate(*args, "--chat")[0]["a/accuracy"] == 1 and evaluate(*args)[0]["a/accuracy"] == 0
    assert len((tmp_path / "x/t").read_text().splitlines()) == 4


def test_choices_in_a_chat_stand_where_the_answer_would(run_dir):
    subject = E.Subject(run_dir, E.get_args(["--dtype", "float32", "--chat"]), "cpu")
    context, rows = subject.groups([E.Question("", "who?", (" the cat", " the mat"))])[0]
    for row, word in zip(rows, ("the cat", "the mat")):
        chat = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": word}]
        whole, mask = E.render_chat(subject.tokenizer, chat)
        assert context + row == whole[:sum(mask) + mask.index(1) - 1]  # all but the token that ends it


def test_another_judge_of_the_same_name_is_asked_again(run_dir, subject, tmp_path, monkeypatch):
    args = E.get_args(["--judge", f"model={tmp_path / 'judge'}", "--dtype", "float32", "--resume"])
    asked, pairs = [], [({"prompt": "the cat"}, " sat", " mat")]
    monkeypatch.setattr(E, "continuations", lambda model, groups: asked.append(1) or [[[-1.0, 1, 1], [-2.0, 1, 1]]])
    for seed, times in (1, 1), (1, 1), (2, 2):
        if len(asked) < times:
            make_run(tmp_path / "judge", seed=seed)
        assert E.judge(pairs, args, subject) == [1] and len(asked) == times


def test_a_reward_model_judges_as_it_was_trained(run_dir, subject, tmp_path):
    where = make_run(tmp_path / "rm", seed=3, scalar_head=True)
    answers = ["sat", "mat on", "naïve", "986", "the cat"]
    scores = E.RewardModel(where)(["the"] * 5, answers)
    pairs = [({"prompt": "the"}, a, b) for a in answers for b in answers]
    expected = [(1 + (x > y) - (x < y)) / 2 for x in scores for y in scores]
    assert E.judge(pairs, E.get_args(["--judge", f"reward={where}"]), subject) == expected
    assert not data.reads_texts(json.loads((where / "run.json").read_text()))


# The whole script


def test_files_of_one_name_keep_their_figures_apart_and_settings_say_the_window(run_dir, tmp_path):
    files = []
    for name, text in ("a", "the cat"), ("b", "naïve 你好"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "t.txt")
        files[-1].write_text(text * 50)
    metrics, _ = evaluate("--init", run_dir, "--task", *(f"text={file}" for file in files))
    assert all(f"text={file}/loss" in metrics for file in files)
    assert metrics["settings"]["window"] == metrics["settings"]["stride"] == 64


def test_every_task_on_one_page_and_a_column_for_each_run(run_dir, tmp_path):
    other = make_run(tmp_path / "other", seed=1)
    words = jsonl(tmp_path / "w.jsonl", [{"text": "the cat sat on the mat"}] * 3)
    judged = jsonl(tmp_path / "j.jsonl", [{"true": True, "informative": i > 0} for i in range(4)])
    pairs = jsonl(tmp_path / "p.jsonl", [{"prediction": "the cat", "reference": ["the cat", "a cat"]}] * 2)
    tasks = f"lastword={words}", "samples", f"judged={judged}", f"pairs={pairs}"
    metrics, text = evaluate("--init", run_dir, other, "--max_new_tokens", 8, "--json", tmp_path / "all.json",
                             "--task", *tasks)
    runs = metrics["runs"]
    assert {"run", "other", "j", "p"} == runs.keys() and "metric" in text
    assert runs["j"]["true_and_informative"] == 0.75 and runs["p"]["rougeL"] == 1
    assert runs["run"]["w/perplexity"] > 1 and runs["run"]["intervals"].keys() == {
        k for k in runs["run"] if k not in ("intervals", "settings")}
    assert json.loads((tmp_path / "all.json").read_text()) == metrics
    assert json.loads((other / "evaluate.json").read_text()) == runs["other"]


def test_batches_never_change_a_figure_and_resuming_asks_nothing_again(run_dir, tmp_path, monkeypatch):
    rows = [{"prompt": "the cat " * n, "choices": ["sat", "mat on", "a"], "answer": 0} for n in (1, 5, 2, 9)]
    file = jsonl(tmp_path / "q.jsonl", rows)
    args = ["--init", run_dir, "--task", f"choices={file}", "samples", "--max_new_tokens", 5]
    whole, _ = evaluate(*args)
    single, _ = evaluate(*args, "--forward_tokens", 1)
    assert single == whole
    log = run_dir / "evaluate.jsonl"
    log.write_text(log.read_text()[:-20])  # a crash in the middle of the last line
    monkeypatch.setattr(E, "continuations", None)
    again, _ = evaluate(*args, "--resume")
    assert again == whole
    assert len(log.read_text().splitlines()) >= 4


def test_the_default_finds_the_run_its_data_and_the_loss_of_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import train
    tokenizer = Tokenizer.train([TEXT], 290)
    folders, _ = data.prepare("arithmetic", tokenizer, root=tmp_path / "data")
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data" / "__init__.py"))
    run = make_run(tmp_path / "out" / "x")
    ids = data.open_tokens(folders["arithmetic"][1] / "val.bin")
    expected = train.validate(GPT.from_pretrained(run), {"arithmetic": (1, ids)}, 64, 1000, 4,
                              E.setup_process("cpu"), torch.tensor([len(b) for b in tokenizer.token_bytes()]))
    (run / "run.json").write_text((run / "run.json").read_text().replace("bios:0.6,arithmetic:0.4", "arithmetic"))
    later = tmp_path / "out" / "y"  # of rlhf.py: a task's few letters, which no corpus here is written in
    later.mkdir()
    (later / "run.json").write_text(json.dumps({"tokenizer": {"kind": "char", "ranks": "?"}, "args": {}}))
    metrics, _ = evaluate("--eval_tokens", 1000, "--limit", 10)
    assert metrics["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    assert metrics["val_bpb"] == pytest.approx(expected["val_bpb"], abs=1e-4)
    assert 0 <= metrics["accuracy"] <= 1


def test_two_runs_fight_in_both_orders_and_the_arena_reads_it(run_dir, tmp_path):
    other = make_run(tmp_path / "other", seed=1, scalar_head=True)
    rows = [{"prompt": prompt, "answer": "x"} for prompt in ("the cat", "the mat", "naïve")]
    prompts = jsonl(tmp_path / "prompts.jsonl", rows)
    battles = tmp_path / "battles.jsonl"
    args = ["--init", run_dir, other, "--task", f"winrate={prompts}", "--max_new_tokens", 6, "--battles", battles]
    for judge in "check", f"reward={other}", f"model={run_dir}":
        metrics, _ = evaluate(*args, "--judge", judge)
        rows = [json.loads(line) for line in battles.read_text().splitlines()]
        assert [(r["model_a"], r["model_b"]) for r in rows] == [("run", "other"), ("other", "run")] * 3
        assert rows[0]["answer_a"] == rows[1]["answer_b"]
        points = [{"model_a": 1, "model_b": 0}.get(r["winner"], 0.5) for r in rows]
        won = sum(p if r["model_a"] == "run" else 1 - p for p, r in zip(points, rows)) / 6
        assert metrics["win_rate_run_over_other"] == pytest.approx(won, abs=1e-5)
        if judge[:5] != "model":
            assert metrics["consistent_run_over_other"] == 1
    metrics, _ = evaluate(*args, "--judge", "human", stdin="a\nwhat\nb\nt\n")  # orders change in turn
    rows = [json.loads(line) for line in battles.read_text().splitlines()]
    assert "consistent_run_over_other" not in metrics
    assert [(r["model_a"], r["winner"]) for r in rows] == [("other", "model_a"), ("run", "model_b"),
                                                           ("other", "tie")]


def test_a_person_goes_on_where_the_answers_ended(run_dir, tmp_path):
    other, prompts = make_run(tmp_path / "other", seed=1), jsonl(tmp_path / "p.jsonl", [{"prompt": p} for p in "abc"])
    args = ["--init", run_dir, other, "--task", f"winrate={prompts}", "--max_new_tokens", 4, "--judge", "human",
            "--battles", tmp_path / "b.jsonl"]
    assert "go on with --resume" in evaluate(*args, check=2, stdin="a\nb\n")[1]
    metrics, text = evaluate(*args, "--resume", stdin="t\n")
    assert text.count("better: a, b or t") == 1
    assert metrics["win_rate_run_over_other"] == pytest.approx((0 + 0 + 0.5) / 3, abs=1e-4)  # other, run, other first


def test_a_probe_reads_what_is_there_and_leaves_the_model_as_it_was(model):
    rng = np.random.default_rng(0)
    rows = [(ids.tolist(), int(ids[-1] % 2)) for ids in rng.integers(40, size=(600, 5))]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    guess = E.probe(model, rows[:500], rows[500:], 2, rank=8, steps=100, lr=0.03)
    assert np.mean(guess.numpy() == [y for _, y in rows[500:]]) > 0.9
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_probe_reports_a_random_model_and_the_majority(run_dir, tmp_path):
    texts = [f"the {w} sat {i}" for i in range(30) for w in ("cat", "mat")]
    file = jsonl(tmp_path / "p.jsonl", [{"text": t, "description": "animal", "label": "cat" in t} for t in texts])
    metrics, _ = evaluate("--init", run_dir, "--task", f"probe={file}", "--steps", 5)
    assert {f"p/{kind}_animal" for kind in ("accuracy", "random_model", "majority")} <= metrics.keys()


def test_a_description_that_stands_on_one_side_of_the_split_is_left_out(run_dir, tmp_path):
    rows = [{"text": f"the {w} sat {i}", "description": "a", "label": w} for i in range(10) for w in ("cat", "mat")]
    file = jsonl(tmp_path / "p.jsonl", [*rows, {**rows[0], "description": "b"}])
    metrics, _ = evaluate("--init", run_dir, "--task", f"probe={file}", "--steps", 1)
    assert "p/accuracy" in str(metrics) and "_b" not in str(metrics)


def test_numbers_may_be_players_and_answers_of_sentencepiece_keep_their_space(run_dir, tmp_path):
    file = jsonl(tmp_path / "b.jsonl", [{"model_a": 1, "model_b": 2, "winner": w} for w in (1, 2, "tie", 1)])
    assert "1" in evaluate("--task", f"arena={file}")[1]
    model, tokenizer = GPT.from_pretrained(run_dir), Tokenizer.from_pretrained(run_dir)
    (ids,), _ = model.generate([tokenizer.encode("the cat")], 8, temperature=0)
    rows = [{"prompt": "the cat", "answer": tokenizer.decode(ids)}]
    _, plain = data.exact_match(model, tokenizer, rows)
    tokenizer.prefix = "prepend"  # only what is written counts here
    tokenizer.encode = lambda text, **k: Tokenizer.from_pretrained(run_dir).encode(text)
    assert data.exact_match(model, tokenizer, rows)[1] == plain


@pytest.mark.parametrize("args, words", [
    ("--task arithmetic --seed -1", "--seed -1"), ("--task nonsense", "nonsense"),
    ("--task choices", "needs a file"), ("--task choices=missing", "missing"),
    ("--task choices={empty}", "is empty"), ("--task arena={empty}", "is empty"),
    ("--task arena={battle}", "line 1 has the winner 'nobody'"),
    ("--task choices={long}", "longer than the model's context of 64"), ("--task text={empty}", "longer one"),
    ("--task choices={battle}", "no row that this task reads"), ("--task judged={battle}", "true or false"),
    ("--task text --stride 99", "--stride"), ("--task arithmetic=x", "positive number"), ("--limit -1", "--limit"),
    ("--task checks", "no question is known"),
    ("--task samples={battle}", "line 1 has no prompt"), ("--task samples --texts {one}/x", "--texts"),
    ("--task winrate={battle}", "two runs"), ("--task val", "tokenizer"), ("--init nowhere", "nowhere"),
    ("--task answers={answer} --shots 2 --shots_from {answer}", "lower --shots"),
    ("--task answers={answer} --num_samples 2", "--temperature"), ("--task choices={one} --shots 3", "--shots 3")])
def test_bad_input_is_one_sentence_and_status_two(run_dir, tmp_path, args, words):
    rows = {"long": [{"prompt": "a", "choices": ["the cat 你好 " * 40, "b"], "answer": 0}], "empty": [],
            "battle": [{"model_a": "x", "model_b": "y", "winner": "nobody"}],
            "one": [{"prompt": "a", "choices": ["b", "c"], "answer": 0}],
            "answer": [{"prompt": "a", "answer": "b"}]}
    paths = {name: jsonl(tmp_path / f"{name}.jsonl", made) for name, made in rows.items()}
    _, text = evaluate("--init", run_dir, *args.format(**paths).split(), check=2)
    sentence = text.splitlines()[-1]
    assert sentence.startswith("evaluate.py: error: ") and words in sentence and "BadInput" not in sentence
