"""The sample room as a specification: a prompt goes in, the same text comes out whatever the door."""
import argparse
import functools
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import lora
import model as model_room
import sample as sample_room
from bpe import BadInput, Tokenizer, chat_stops, render_chat
from conftest import ROOT, call
from model import GPT, GPTConfig, init_weights, process_logits, save_run
from sample import MedusaHeads, Solved, TextStream, accept_exactly, speculative_generate

TEXT = "the cat sat on the mat, naïve 你好 and 993-7=986. " * 30


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """An untrained model with a tokenizer: its text is noise, but always the same noise."""
    out = tmp_path_factory.mktemp("out") / "run"
    tokenizer = Tokenizer.train([TEXT], 280)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=32, n_embd=32))
    init_weights(model)
    model.head.weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    save_run(out, model, {"tokenizer": tokenizer.spec()})
    tokenizer.save(out)
    return out


@pytest.fixture(scope="module")
def run(run_dir):
    return GPT.from_pretrained(run_dir).eval(), Tokenizer.load(run_dir)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def sample(*args, stdin="", check=0, terminal=None):
    """sample.py in this process (its arithmetic must be that of the model beside it): stdout, stderr."""
    stdin = stdin if terminal is None else Terminal(terminal)
    return call(sample_room, "--device", "cpu", *args, check=check, stdin=stdin)


def test_the_prompt_may_come_from_a_flag_a_file_or_a_pipe(run_dir, tmp_path):
    (tmp_path / "prompt.txt").write_text("the cat")
    args = "--init", run_dir, "--max_new_tokens", 20
    flag, _ = sample(*args, "--prompt", "the cat")
    assert flag.startswith("the cat") and len(flag) > len("the cat\n")
    assert sample(*args, "--prompt", f"@{tmp_path / 'prompt.txt'}")[0] == flag
    assert sample(*args, stdin="the cat\n")[0] == flag
    script = [sys.executable, str(ROOT / "sample.py"), "--device", "cpu", *map(str, args)]
    piped = subprocess.run(script, input="the cat\n", capture_output=True, encoding="utf-8")
    assert piped.returncode == 0 and piped.stdout.startswith("the cat")


def test_streamed_text_equals_the_decoded_tokens(run_dir):
    tokenizer, model = Tokenizer.load(run_dir), GPT.from_pretrained(run_dir)
    prompt = [tokenizer.eot] + tokenizer.encode("naïve 你")
    tokens, _ = model.generate([prompt], 60, temperature=1.0, seed=3, stop=[tokenizer.eot])
    out, err = sample("--init", run_dir, "--prompt", "naïve 你", "--temperature", 1.0, "--seed", 3,
                      "--max_new_tokens", 60)
    assert out == "naïve 你" + tokenizer.decode(tokens[0]) + "\n"
    assert "tokens/s" in err


def test_several_samples_are_those_of_the_seeds_alone(run_dir):
    args = "--init", run_dir, "--prompt", "the", "--max_new_tokens", 10
    many, _ = sample(*args, "--num_samples", 3, "--seed", 4)
    alone = [sample(*args, "--seed", seed)[0].rstrip("\n") for seed in (4, 5, 6)]
    assert all(f"--- {i + 1}\n{text}" in many for i, text in enumerate(alone))


@pytest.mark.parametrize("args, word", [
    (["--init", "nowhere"], "nowhere"), (["--temperature", "-1"], "--temperature"), (["--top_p", "0"], "--top_p"),
    (["--top_k", "0"], "--top_k"), (["--prompt", "the cat sat " * 40], "context"),
    (["--prompt", "@missing"], "missing"), (["--min_p", "2"], "--min_p"), (["--typical_p", "0"], "--typical_p"),
    (["--repetition_penalty", "0"], "--repetition_penalty"), (["--stop", ""], "--stop"),
    (["--beams", "2", "--num_samples", "3"], "--beams"), (["--contrastive", "2"], "--contrastive"),
    (["--contrastive", "0.5", "--top_k", "0"], "--top_k"),
    (["--choices", "a"], "--choices"), (["--choices", "a", "a"], "--choices"), (["--nearest"], "--shots_from"),
    (["--cot", "shots"], "--shots_from"), (["--cot", "auto"], "--questions"),
    (["--votes", "3", "--temperature", "0"], "--votes"), (["--questions", "missing.jsonl"], "missing.jsonl"),
    (["--questions", __file__], "line 1"), (["--load", "chat.json"], "--load"),
    (["--max_new_tokens", "-1"], "negative"),
    (["--prompt", "the cat sat " * 40, "--beams", "2"], "context"),
    (["--prompt", "the cat sat " * 40, "--choices", "a", "b"], "context")])
def test_bad_input_is_one_sentence_and_status_two(run_dir, args, word):
    prompt = () if "--questions" in args else ("--prompt", "the")
    _, err = sample("--init", run_dir, *prompt, *args, check=2)
    assert err.splitlines()[-1].startswith("sample.py: error: ") and word in err


def test_a_question_is_needed_before_it_can_be_answered(run_dir):
    assert "--questions" in sample("--init", run_dir, "--votes", 2, terminal="", check=2)[1]


def test_no_run_yet_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "python train.py" in sample("--prompt", "the", check=2)[1]


def test_a_checkpoint_with_another_tokenizer_is_refused(run_dir, tmp_path):
    for path in run_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Tokenizer.train([TEXT[::-1]], 280).save(tmp_path)
    assert "tokenizer" in sample("--init", tmp_path, "--prompt", "the", check=2)[1]


def test_exact_match_asks_greedily_after_the_start_of_a_document(run_dir):
    tokenizer, model = Tokenizer.load(run_dir), GPT.from_pretrained(run_dir)
    prompt = [tokenizer.eot] + tokenizer.encode("the mat")
    told = tokenizer.decode(model.generate([prompt], 4, temperature=0)[0][0])
    rows = [{"prompt": "the mat", "answer": told[:2]}, {"prompt": "the mat", "answer": "no such answer"}]
    assert data.exact_match(model, tokenizer, rows)[0] == 0.5


# Text as it comes


@settings(max_examples=200, deadline=None)
@given(st.text("abc\n", max_size=30), st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(1, 4), min_size=1))
def test_text_ends_before_the_stop_string_that_is_complete_first(text, stops, sizes):
    """Whatever the pieces that it comes in, and what was shown is never taken back."""
    stream, shown, at, turn = TextStream(BYTES, stops, fresh=True), "", 0, 0
    while at < len(text) and not stream.done:
        size, turn = sizes[turn % len(sizes)], turn + 1
        shown += stream.put(text[at:at + size])
        at += size
    shown += stream.flush()
    complete = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert shown == (text[:min(complete)[1]] if complete else text)


BYTES = Tokenizer.train(["ab"], 256)


def test_half_a_character_or_half_a_stop_string_is_not_shown():
    stream = TextStream(BYTES, ["END"])
    assert [stream.push(i) for i in BYTES.encode("é EN")] == ["", "é", " ", "", ""]
    assert [stream.push(i) for i in BYTES.encode("d")] == ["ENd"]
    assert [stream.push(i) for i in BYTES.encode("END")] == ["", "", ""] and stream.done and stream.flush() == ""


def test_stop_strings_cut_every_kind_of_text(run_dir):
    args = "--init", run_dir, "--prompt", "the", "--max_new_tokens", 25, "--temperature", 0
    for how in (), ("--num_samples", 2), ("--beams", 2), ("--contrastive", 0.4):
        whole = sample(*args, *how)[0].removeprefix("--- 1\n").split("\n--- 2\n")[0].removesuffix("\n")
        stop = whole[8:11]
        found = sample(*args, *how, "--stop", stop, "never there")[0].removeprefix("--- 1\n")
        found = found.split("\n--- 2\n")[0].removesuffix("\n")
        assert stop not in found[3:] and ("--beams" in how or found == whole[:whole.index(stop, 3)]), how


def test_logprobs_are_those_of_the_whole_text_at_once(run_dir, run):
    model, tokenizer = run
    out, _ = sample("--init", run_dir, "--prompt", "the cat", "--max_new_tokens", 12, "--logprobs", "--temperature", 0)
    lines = re.findall(r"^ +(-\d+\.\d{4})  (.*)$", out, re.MULTILINE)
    prompt = [tokenizer.eot] + tokenizer.encode("the cat")
    ids = model.generate([prompt], 12, [tokenizer.eot], temperature=0)[0][0]
    logits = model(torch.tensor([prompt + ids]))[0][0, len(prompt) - 1:-1]
    logp = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    assert [float(logprob) for logprob, _ in lines] == pytest.approx([*logp, sum(logp)], abs=1e-3)
    assert [shown for _, shown in lines[:-1]] == [repr(tokenizer.decode([i])) for i in ids]


# Search


def test_contrastive_search_without_a_penalty_is_greedy(run):
    model, tokenizer = run
    prompts = [tokenizer.encode("the cat"), tokenizer.encode("993-7=986. the")]
    expected = [model.generate([p], 12, temperature=0)[0][0] for p in prompts]
    assert sample_room.contrastive_search(model, prompts, 12, alpha=0.0) == expected


def test_contrastive_search_is_its_formula_without_a_cache(run):
    model, tokenizer = run
    prompts, k, alpha = [tokenizer.encode("the cat"), tokenizer.encode("993-7=986. the")], 4, 0.6
    expected = []
    for ids in map(list, prompts):
        for _ in range(10):
            with torch.no_grad():
                p, candidates = model(torch.tensor([ids]))[0][0, -1].softmax(-1).topk(k)
                h = F.normalize(model.trunk(torch.tensor([ids + [c] for c in candidates.tolist()])), dim=-1)
            likeness = (h[:, :-1] @ h[:, -1:].mT).amax((1, 2))
            ids.append(int(candidates[((1 - alpha) * p - alpha * likeness).argmax()]))
        expected.append(ids[-10:])
    assert sample_room.contrastive_search(model, prompts, 10, alpha, k) == expected


def test_searches_end_where_the_context_ends(run):
    model, tokenizer = run
    prompts, T = [tokenizer.encode("the cat")], model.config.block_size
    longest = T - len(prompts[0])
    assert len(sample_room.contrastive_search(model, prompts, 99)[0]) == longest
    assert {len(ids) for _, ids in sample_room.beam_search(model, prompts, 99, 3)[0]} == {longest + 1}


# Choice


def test_a_choice_has_the_probability_that_the_whole_text_gives_it(run):
    model, tokenizer = run
    texts, choices = ["the", "the cat sat"], ["cat on", " mat", "986", " sat and the"]
    prompts = [(tokenizer.encode(t), [tokenizer.encode(t + c) for c in choices]) for t in texts]
    scores = sample_room.choice_scores(model, prompts)
    for (ids, rows), found in zip(prompts, scores):
        for row, logp in zip(rows, found.tolist()):
            start = len(os.path.commonprefix([ids, *rows]))
            with torch.no_grad():
                every = model(torch.tensor([row]))[0][0].log_softmax(-1)
            assert logp == pytest.approx(sum(float(every[i - 1, row[i]]) for i in range(start, len(row))), abs=1e-4)


def test_choices_are_drawn_as_often_as_they_are_likely():
    logp = torch.tensor([0.5, 0.3, 0.2]).log() - 7  # as part of a larger world
    assert sample_room.choose(logp) == [0]
    picks = torch.tensor(sample_room.choose(logp, 1.0, range(4000)))
    assert (picks.bincount() / 4000 - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.03
    cold = torch.tensor(sample_room.choose(logp, 0.5, range(4000)))
    assert (cold.bincount()[0] / 4000 - 0.25 / 0.38).abs() < 0.03


def test_choices_on_the_command_line(run_dir, run):
    model, tokenizer = run
    out, _ = sample("--init", run_dir, "--prompt", "the", "--choices", " cat", " mat", "--logprobs")
    *lines, best = out.splitlines()
    logp = {eval(line.split(maxsplit=1)[1]): float(line.split()[0]) for line in lines}
    assert best == max(logp, key=logp.get) and set(logp) == {" cat", " mat"}


# Prompting


def flags(**others):
    args = dict(vars(sample_room.get_args(["--temperature", "0.8"])), chat=False)
    return argparse.Namespace(**{**args, **others})


@pytest.mark.parametrize("text, answer", [
    ("so it is 12.\n#### 1,234", "1234"), ("The answer is $18.00. Then 5 more", "18"), ("9 and 10 make 19", "19"),
    ("Therefore, the answer is: 2.50", "2.5"), ("the answer is (B).", "(b)"), ("", ""), ("answer is -7", "-7")])
def test_the_answer_of_a_text(text, answer):
    assert sample_room.extract(text) == answer


def test_the_most_frequent_answer_wins_and_silence_is_no_vote():
    assert sample_room.vote(["3", "", "7", "7", ""]) == ("7", 0.4)
    assert sample_room.vote(["3", "7"]) == ("3", 0.5) and sample_room.vote([""]) == ("", 0.0)


GSM = "A <<1+2=3>>sum\nof 3.\n#### 3"


def test_a_demonstration_with_and_without_its_chain_of_thought(run):
    assert sample_room.worked(GSM, True) == "A sum of 3. The answer is 3." and sample_room.worked(GSM, False) == "3"
    asker = sample_room.Asker(run[1], flags(), 999)
    ids = asker.ids(Solved("1+2?", ""), [Solved("2+2?", "4"), Solved("3+3=", "6\n", "{}")], " So")
    assert run[1].decode(ids) == "<|endoftext|>Question: 2+2?\nAnswer: 4\n\n3+3=6\nQuestion: 1+2?\nAnswer: So"


def test_through_the_template_demonstrations_are_turns_and_the_lead_begins_the_answer(run):
    asker = sample_room.Asker(run[1], flags(chat=True, system="be brief"), 999)
    ids = asker.ids(Solved("1+2?", ""), [Solved("2+2?", "4")], "So")
    turns = [("system", "be brief"), ("user", "2+2?"), ("assistant", "4"), ("user", "1+2?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert ids == render_chat(run[1], messages, generation=True)[0] + run[1].encode("So")


def test_the_first_shots_go_where_all_do_not_fit(run):
    shots = [Solved(f"{i}+{i}?", str(2 * i)) for i in range(9)]
    asker = sample_room.Asker(run[1], flags(), 150)
    kept = asker.fitting(Solved("1+2?", ""), shots, 10)
    assert 0 < len(kept) < 9 and kept == shots[-len(kept):] and len(asker.ids(Solved("1+2?", ""), kept)) <= 140
    with pytest.raises(BadInput, match="context of 20"):
        sample_room.Asker(run[1], flags(), 20).fitting(Solved("1+2?" * 9, ""), shots, 10)


def test_an_embedding_does_not_depend_on_its_neighbours(run):
    texts = ["the cat sat on the mat", "993-7=986.", "naïve", ""]
    together = sample_room.embed(*run, texts)
    alone = torch.cat([sample_room.embed(*run, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_nearest_demonstration_stands_last(run):
    pool = torch.eye(4) + 0.1
    query = 5 * pool[2] + 2 * pool[0] + pool[3]
    assert sample_room.nearest(pool, query, 3) == [3, 0, 2]


def test_demonstrations_by_nearest_neighbour_leave_the_question_itself_out(run, tmp_path):
    rows = [{"prompt": p, "answer": "x"} for p in ("the cat", "the mat", "993-7=", "986-7=", "the cat sat")]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = flags(shots_from=tmp_path / "pool.jsonl", shots=2, nearest=True)
    for question in rows:
        [shots] = sample_room.demonstrations(*run, [Solved(question["prompt"], "", "{}")], args, [])
        assert len(shots) == 2 and question["prompt"] not in [s.question for s in shots]
    first = sample_room.demonstrations(*run, [Solved("the cat", "")], flags(shots_from=args.shots_from, shots=2), [])
    assert [s.question for s in first[0]] == ["the cat", "the mat"]


def test_k_means_finds_clusters_that_are_there_and_orders_them_from_the_centre():
    g = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = (centres[:, None] + torch.randn(3, 20, 2, generator=g)).flatten(0, 1)
    clusters = sample_room.k_means(x, 3)
    assert sorted(sorted(c) for c in clusters) == [[*range(20)], [*range(20, 40)], [*range(40, 60)]]
    for c in clusters:
        far = (x[c] - x[c].mean(0)).norm(dim=1)
        assert (far.diff() >= 0).all()
    assert sorted(sum(sample_room.k_means(torch.ones(4, 2), 3), [])) == [0, 1, 2, 3]  # equal questions


@pytest.fixture
def scripted(run, monkeypatch):
    """Answers from a list in place of the model's, and the prompts that were asked."""
    def script(*answers):
        asked, answers = [], iter(answers)

        def write(model, tokenizer, prompts, new, seeds, args, ends, stops):
            asked.extend((tokenizer.decode(p).removeprefix("<|endoftext|>"), args.temperature) for p in prompts)
            return [[sample_room.Text(next(answers), []) for _ in seeds] for _ in prompts]
        monkeypatch.setattr(sample_room, "by_sampling", write)
        monkeypatch.setattr(run[0].config, "block_size", 4096)
        monkeypatch.setattr(sample_room, "Asker", lambda tokenizer, args, T: asker(tokenizer, args, 10 ** 6))
        return asked
    asker = sample_room.Asker
    return script


def test_zero_shot_chain_of_thought_asks_twice(run, scripted):
    asked = scripted(" 1 and 2.", " 9.", " 3.", " 4 of them")
    found = sample_room.think(*run, [(Solved("1+2?", ""), ())], flags(cot="zero"), [0, 1], [])
    stem = "Question: 1+2?\nAnswer: Let's think step by step."
    assert asked == [(stem, 0.8), (stem + " 1 and 2.\nTherefore, the answer is", 0.0),
                     (stem + " 9.\nTherefore, the answer is", 0.0)]
    assert found == [[("Let's think step by step. 1 and 2.", "3"), ("Let's think step by step. 9.", "4")]]


def test_auto_cot_takes_a_simple_thought_from_every_cluster(run, scripted):
    pool = [Solved(q, "") for q in ("the cat sat", "the cat", "993-7=", "986-7=")]
    asked = scripted(" One. Two. Three. Four. Five. Six. Seven.", " Easy.", " Sure.", " Fine.",
                     " 1.", " 2.", " 3.", " 4.")
    shots = sample_room.auto_cot(*run, pool, 2, flags(cot="auto"), [])
    assert len(shots) == 2 and {s.question[:3] == "the" for s in shots} == {True, False}
    assert shots[0].answer == "Let's think step by step. Easy. The answer is 2."
    assert all(temperature == 0 for _, temperature in asked)


def test_votes_are_counted_over_seeds(run_dir, tmp_path, scripted):
    rows = [{"question": "1+2?", "answer": "so 3\n#### 3"}, {"question": "2+2?", "answer": "#### 4"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scripted(" 3", " 5", " 3", " 5", " 5", " 4")
    out, _ = sample("--init", run_dir, "--questions", tmp_path / "q.jsonl", "--votes", 3, "--max_new_tokens", 8)
    first, second, total = map(json.loads, out.splitlines())
    assert (first["prediction"], first["votes"], first["right"]) == ("3", pytest.approx(2 / 3), True)
    assert (second["prediction"], second["right"]) == ("5", False)
    assert total["accuracy"] == 0.5 and total["questions"] == 2 and total["interval"][0] < 0.5 < total["interval"][1]


def test_few_shot_answers_on_the_command_line_end_where_the_shots_end(run_dir, tmp_path):
    rows = [{"prompt": "the ", "answer": "cat\n"}] * 3
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = "--init", run_dir, "--shots_from", tmp_path / "q.jsonl", "--shots", 2, "--max_new_tokens", 8
    out, _ = sample(*args, "--questions", tmp_path / "q.jsonl")
    *lines, total = map(json.loads, out.splitlines())
    assert len(lines) == total["questions"] == 3 and not any("\n" in line["texts"][0] for line in lines)
    assert "answer: " in sample(*args, "--prompt", "the ")[0]
    chosen, _ = sample(*args, "--questions", tmp_path / "q.jsonl", "--choices", "cat", "mat")
    assert [len(json.loads(line)["logprobs"]) for line in chosen.splitlines()[:3]] == [2, 2, 2]


# Chat


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """An untrained model whose tokenizer has a chat template."""
    out = tmp_path_factory.mktemp("out") / "chat"
    tokenizer = Tokenizer.train([TEXT], 280)
    tokenizer.chat = {"template": "chatml", "system": None}
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=64, n_embd=32))
    init_weights(model)
    model.head.weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    save_run(out, model, {"tokenizer": tokenizer.spec()})
    tokenizer.save(out)
    return out


def talk(chat_dir, *lines, flags=(), **more):
    lines = "".join(f"{line}\n" for line in lines)
    out, err = sample("--init", chat_dir, "--max_new_tokens", 12, *flags, terminal=lines, **more)
    return [part.removesuffix("\n") for part in out.split("> ")[1:]], err


def test_a_terminal_and_a_template_open_a_chat(chat_dir):
    (answer, last), _ = talk(chat_dir, "hi")
    tokenizer, model = Tokenizer.load(chat_dir), GPT.from_pretrained(chat_dir)
    prompt = render_chat(tokenizer, [{"role": "user", "content": "hi"}], generation=True)[0]
    ids = model.generate([prompt], 12, chat_stops(tokenizer), temperature=0.8)[0][0]
    assert answer == tokenizer.decode(ids) and last == ""


def test_without_a_terminal_or_a_template_text_goes_on_as_before(run_dir, chat_dir):
    args = "--max_new_tokens", 8, "--prompt", "the"
    assert sample("--init", chat_dir, *args)[0].startswith("the")
    assert sample("--init", chat_dir, *args[:2], stdin="the")[0].startswith("the")
    assert "> " not in sample("--init", run_dir, *args[:2], terminal="")[0]
    assert not sample("--init", chat_dir, *args, "--chat")[0].startswith("the")


def test_commands_of_the_chat(chat_dir, tmp_path):
    file = tmp_path / "chat.json"
    said, _ = talk(chat_dir, "/temperature 0", "/system be kind", "hi", f"/save {file}", "/clear", "hi",
                   f"/load {file}", "/temperature", "/system", "/help", "/temperature hot", "/what", "/save",
                   "/load nowhere", "/quit", "hi")
    messages = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"] and len(file.read_text().splitlines()) == 1
    assert messages[0]["content"] == "be kind" and messages[2]["content"] == said[2] == said[5]
    assert said[7] == "temperature: 0.0" and said[8] == "system: be kind" and "/save FILE" in said[9]
    assert [word in line for word, line in zip(["0 or more", "/help", "/save", "nowhere"], said[10:])] == [True] * 4
    assert len(said) == 15  # nothing after /quit


def test_a_saved_chat_goes_on_where_it_stood(chat_dir, tmp_path):
    file, T0 = tmp_path / "chat.json", ("--temperature", 0)
    said, _ = talk(chat_dir, "hi", f"/save {file}", "and", flags=T0)
    assert talk(chat_dir, "and", flags=(*T0, "--load", file))[0][0] == said[2]


@pytest.mark.parametrize("held", ["[1]", "{}", '{"messages": [{"role": "user", "text": 1}]}', "{"])
def test_a_file_that_holds_no_chat_is_one_sentence(chat_dir, tmp_path, held):
    (tmp_path / "chat.json").write_text(held)
    assert "chat.json" in talk(chat_dir, flags=("--load", tmp_path / "chat.json"), check=2)[1].splitlines()[-1]


def test_history_is_trimmed_by_whole_turns_and_the_system_text_stays(chat_dir):
    tokenizer = Tokenizer.load(chat_dir)
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"the cat {i}"} for i in range(9)]
    sizes = []
    for room in range(70, 400, 10):
        try:
            ids, first = sample_room.fit(tokenizer, "be kind", messages, room)
        except BadInput:
            continue
        assert first % 2 == 0 and len(ids) <= room
        assert ids == render_chat(tokenizer, messages[first:], system="be kind", generation=True)[0]
        assert first == 0 or len(render_chat(tokenizer, messages[first - 2:], system="be kind",
                                             generation=True)[0]) > room  # not more than needed
        sizes.append(first)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 3 and sizes[-1] == 0


def test_a_long_chat_and_a_long_message_do_not_end_it(chat_dir):
    said, err = talk(chat_dir, *["the cat"] * 6, "the mat " * 60, "the", "/quit", flags=("--temperature", 0))
    assert "left out" in err and err.count("left out") == 1
    assert "shorten it" in said[6] and said[7]


def test_control_c_stops_the_answer_and_not_the_chat(chat_dir, tmp_path, monkeypatch):
    stream = GPT.stream

    def interrupted(self, prompts, *args, **more):
        for n, news in enumerate(stream(self, prompts, *args, **more)):
            yield news
            if n == 3 and interrupted.once:
                interrupted.once = False
                raise KeyboardInterrupt
    interrupted.once = True
    monkeypatch.setattr(GPT, "stream", interrupted)
    file = tmp_path / "chat.json"
    said, _ = talk(chat_dir, "hi", "the", f"/save {file}", flags=("--temperature", 0))
    kept = [m["content"] for m in json.loads(file.read_text())["messages"]]
    assert kept[:3] == ["hi", said[0], "the"] and said[1] and len(said[0]) < len(said[1]) + 40


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_control_c_in_a_real_terminal(chat_dir):
    import pty
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "sample.py"), "--init", str(chat_dir), "--device", "cpu"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = b""

    def wait_for(mark, count=1, remind=lambda: None):
        nonlocal shown
        until = time.time() + 120
        while shown.count(mark) < count:
            assert time.time() < until, shown
            if select.select([ours], [], [], 2)[0]:
                shown += os.read(ours, 4096)
            else:
                remind()
    try:
        wait_for(b"> ")
        interrupt = functools.partial(process.send_signal, signal.SIGINT)
        interrupt()  # at the prompt: nothing to stop
        wait_for(b"/quit leaves", remind=interrupt)  # Python forgets one that comes just before it begins to read
        wait_for(b"> ", 2)
        os.write(ours, b"hi\n")
        wait_for(b"> ", 3)
        os.write(ours, b"/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)


# speculative decoding

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
STYLES = [dict(), dict(pos="alibi"), dict(pos="learned"), dict(attn="window", window=6)]


def make(seed=0, **kwargs):
    """A small model with noise on every weight."""
    model = GPT(GPTConfig(**{**dict(block_size=128, vocab_size=50, n_layer=2, n_head=2, n_embd=32), **kwargs}))
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def drafter(name, model, style):
    if name not in ("medusa", "blockwise"):
        return {"small": make(1, n_layer=1, **style), "itself": model, "ngram": "ngram"}[name]
    heads, torch_seed = MedusaHeads(32, 3), torch.Generator().manual_seed(0)
    for layer in heads.layers:
        layer.weight.data.normal_(std=0.3, generator=torch_seed)
    heads.grow(heads.accuracy, 12, [[0], [0, 0], [0, 0, 0]] if name == "blockwise" else None)
    return heads


@pytest.mark.parametrize("name", ["small", "ngram", "itself", "medusa", "blockwise"])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_greedy_text_with_guesses_is_greedy_text(name, style):
    model = make(**style)
    guess, stats = drafter(name, model, style), {}
    texts, logprobs = model.generate(PROMPTS, 40, temperature=0)
    got, got_logprobs = speculative_generate(model, guess, PROMPTS, 40, temperature=0, stats=stats)
    assert got == texts
    for a, b in zip(logprobs, got_logprobs):
        assert a == pytest.approx(b, abs=1e-4)
    if name == "itself":  # every guess is right but those behind a row's end
        assert stats["rounds"] == 3 * 8  # the first id, and 5 a round
    for more in (dict(stop=[texts[0][7]]), dict(repetition_penalty=1.5), dict(presence_penalty=2.0)):
        more |= dict(temperature=0)
        assert speculative_generate(model, guess, PROMPTS, 40, **more)[0] == model.generate(PROMPTS, 40, **more)[0]


def chi_square(counts, p):
    expected = p * counts.sum()
    return ((counts - expected) ** 2 / expected)[p > 0].sum().item()


def test_accepted_ids_follow_the_model_and_a_wrong_rule_does_not():
    """12 ids, 11 degrees of freedom: 31.3 is passed once in a thousand."""
    generator, n, k = torch.Generator().manual_seed(0), 100_000, 3
    q, p = (torch.randn(m, 12, generator=generator).softmax(-1) for m in (k + 1, k))
    drafted = torch.stack([row.multinomial(n, True, generator=generator) for row in p], 1)
    u = torch.rand(n, k + 1, generator=generator)

    def first(q, p):
        count, last = accept_exactly(q.expand(n, -1, -1), p.expand(n, -1, -1), drafted, u[:, :k], u[:, k])
        return count, torch.bincount(torch.where(count > 0, drafted[:, 0], last), minlength=12).double()

    count, ids = first(q, p)
    assert chi_square(ids, q[0].double()) < 31.3
    share = torch.minimum(q[0], p[0]).sum().item()  # Leviathan et al. 2023, theorem 3.5
    assert (count > 0).double().mean().item() == pytest.approx(share, abs=3 * (share * (1 - share) / n) ** 0.5)
    both = count > 0
    second = torch.where(count > 1, drafted[:, 1], accept_exactly(
        q.expand(n, -1, -1), p.expand(n, -1, -1), drafted, u[:, :k], u[:, k])[1])[both]
    assert chi_square(torch.bincount(second, minlength=12).double(), q[1].double()) < 31.3
    assert chi_square(first(q, (2 * p.log()).softmax(-1))[1], q[0].double()) > 500  # not what the ids were drawn from
    greedy = F.one_hot(p.argmax(-1), 12).float()
    assert chi_square(first(q, greedy)[1], q[0].double()) > 500


@pytest.mark.parametrize("settings", [dict(), dict(top_k=5), dict(temperature=0.7, top_p=0.8)], ids=str)
def test_text_with_guesses_has_the_models_distribution(settings):
    """Three ids in a row: all that goes wrong with a cache after a rejected guess shows in their joint distribution."""
    model, n = make(vocab_size=12, n_layer=1), 6000
    got, _ = speculative_generate(model, make(3, vocab_size=12, n_layer=1), [[1, 2]] * n, 3, k=2, seed=[*range(n)],
                                  **settings)

    def next_id(rows):
        with torch.no_grad():
            return process_logits(model(torch.tensor(rows))[0][:, -1], **settings).softmax(-1)

    ids = range(12)
    joint = next_id([[1, 2]])[0][:, None, None] * next_id([[1, 2, a] for a in ids])[:, :, None] \
        * next_id([[1, 2, a, b] for a in ids for b in ids]).view(12, 12, 12)
    counts = torch.zeros(12, 12, 12).index_put_(tuple(torch.tensor(got).T), torch.ones(n), accumulate=True)
    assert counts[joint == 0].sum() == 0
    many = joint * n > 5
    freedom = int(many.sum())
    assert ((counts - joint * n) ** 2 / (joint * n))[many].sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_a_row_with_guesses_does_not_depend_on_its_batch():
    model, draft = make(), make(1, n_layer=1)
    together, _ = speculative_generate(model, draft, PROMPTS, 30, seed=[5, 6, 7])
    for i, prompt in enumerate(PROMPTS):
        assert speculative_generate(model, draft, [prompt], 30, seed=[5 + i])[0][0] == together[i]


def test_the_text_so_far_guesses_what_followed_before():
    ids = torch.tensor([[1, 2, 3, 9, 1, 2, 3, 0, 0], [7, 7, 7, 7, 0, 0, 0, 0, 0], [5, 1, 6, 5, 2, 8, 5, 0, 0]])
    got = sample_room.look_up(ids, torch.tensor([7, 4, 7]), 2)
    assert got[0].tolist() == [9, 1] and got[1, 0] == 7 and got[2].tolist() == [2, 8]


def test_a_tree_has_the_masks_and_paths_of_its_nodes():
    tree = sample_room.Tree([[0], [1], [0, 0], [0, 1], [1, 0]], "cpu")
    assert tree.depth.tolist() == [0, 1, 1, 2, 2, 2]
    assert tree.parent.tolist() == [0, 0, 0, 1, 1, 2]
    assert tree.leaves.tolist() == [[0, 1, 3], [0, 1, 4], [0, 2, 5]]
    assert tree.sees.int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0],
                                        [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1]]
    kept = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    way, count = tree.longest(kept)
    assert way[0].tolist() == [0, 2, 5] and count.tolist() == [2, 0]


def test_the_tree_that_grows_has_the_likeliest_paths():
    heads = MedusaHeads(8, 2)
    heads.grow([[0.6, 0.2, 0.1], [0.5, 0.3, 0.1]], 5)  # 0.6; 0.30, 0.2, 0.18; 0.10 and 0.1
    assert sorted(zip(heads.tree.depth.tolist()[1:], heads.tree.rank.tolist()))[:3] == [(1, 0), (1, 1), (2, 0)]
    assert len(heads.tree.depth) == 6


def test_typical_acceptance_is_its_formula():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 3
    tree, nodes = sample_room.Tree([[0], [0, 0]], "cpu"), torch.tensor([[0, 3, 5], [1, 2, 6]])
    kept = sample_room.accept_typically(logits, nodes, tree)
    for b in range(2):
        for n in (1, 2):
            p = logits[b, n - 1].softmax(-1)
            limit = min(0.09, 0.3 * torch.exp((p * p.log()).sum()).item())
            assert kept[b, n] == (p[nodes[b, n]] > limit)


def test_heads_learn_what_follows_and_keep_greedy_text_as_it_is(tmp_path):
    model = make(vocab_size=10)
    rows = (torch.arange(64)[None] * 3 + torch.arange(40)[:, None]) % 10
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.clone() for p in model.parameters()]
    heads = MedusaHeads(32, 3)
    sample_room.train_medusa(model.requires_grad_(False), heads, rows, 100, lr=1e-2, say=lambda *a, **k: None)
    assert all(row[0] > 0.9 for row in heads.accuracy)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    heads.save(tmp_path / "medusa.safetensors")
    heads, stats = MedusaHeads.load(tmp_path / "medusa.safetensors", model), {}
    got, _ = speculative_generate(model, heads, [[1, 4, 7]], 40, temperature=0, stats=stats)
    assert got == model.generate([[1, 4, 7]], 40, temperature=0)[0]
    assert stats["kept"] > 2.5 * stats["rounds"]


def test_guesses_on_the_command_line(tmp_path):
    tokenizer = Tokenizer.train([TEXT], 280)
    for name, layers in (("big", 2), ("small", 1)):
        save_run(tmp_path / name, make(vocab_size=tokenizer.n_vocab, n_layer=layers), {"tokenizer": tokenizer.spec()})
        tokenizer.save(tmp_path / name)
    args = "--init", tmp_path / "big", "--prompt", "the cat", "--max_new_tokens", 20, "--temperature", 0
    plain, err = sample(*args)
    assert re.search(r"prefill [\d,]+ tokens/s; 20 tokens, [\d,]+ tokens/s; "
                     r"[\d.]+ MB a token, [\d.]+ GB/s, \d+% of", err)
    for draft in (tmp_path / "small", "ngram"):
        guessed, err = sample(*args, "--draft", draft)
        assert guessed == plain and "guesses kept a round" in err
    told, _ = sample("--init", tmp_path / "big", "--train_medusa", 3, "--medusa_heads", 2)
    assert "head 2: the id after the next 2" in told
    for draft in ("medusa", "blockwise"):
        assert sample(*args, "--draft", draft)[0] == plain


def test_bad_guessers_are_one_sentence(run_dir, tmp_path):
    other = Tokenizer.train([TEXT[::-1]], 280)
    save_run(tmp_path / "other", make(vocab_size=other.n_vocab), {"tokenizer": other.spec()})
    other.save(tmp_path / "other")
    for draft, word in ((tmp_path / "other", "tokenizer"), ("medusa", "--train_medusa"), ("nowhere", "nowhere")):
        err = sample("--init", run_dir, "--prompt", "the", "--draft", draft, check=2)[1]
        assert word in err.splitlines()[-1]
    long = GPT.from_pretrained(run_dir).context - 2
    err = sample("--init", run_dir, "--prompt", " ".join("the" for _ in range(long)), "--draft", "ngram", check=2)[1]
    assert "context" in err.splitlines()[-1]


def test_guesses_write_what_fits_into_the_context(run_dir):
    out, err = sample("--init", run_dir, "--prompt", "the", "--draft", "ngram", "--max_new_tokens", 200,
                      "--temperature", 0)
    plain, _ = sample("--init", run_dir, "--prompt", "the", "--max_new_tokens", 200, "--temperature", 0)
    assert "stays inside the context" in err and plain.startswith(out.rstrip("\n")) and len(out) > 20


@pytest.mark.parametrize("known, right, wrong", [
    ("December 2, 1950", "December 2, 1950. He", "October 2, 1996."), ("Duluth, MN", "Duluth, MN. Reuben Jord", "Dulu"),
    ("cat", "cat", "catfish"), ("1/2", "1/2", "1/25"), ("room 5", "Room 5.", "room 5.5")])
def test_an_answer_in_words_is_right_where_the_text_begins_with_it(known, right, wrong):
    assert not sample_room.numeric(known)
    for text, expected in ((right, True), (wrong, False)):
        assert sample_room.is_right(sample_room.extract("####" + text, False), known) == expected


def test_the_kind_of_an_answer_is_each_questions_own(run_dir, tmp_path):
    rows = [{"prompt": "the cat", "answer": "5"}, {"prompt": "the mat", "answer": "blue"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both, _ = sample("--init", run_dir, "--questions", tmp_path / "q.jsonl", "--max_new_tokens", 12)
    (tmp_path / "q.jsonl").write_text(json.dumps(rows[0]) + "\n")
    alone, _ = sample("--init", run_dir, "--questions", tmp_path / "q.jsonl", "--max_new_tokens", 12)
    assert both.splitlines()[0] == alone.splitlines()[0]


def test_numbers_are_compared_as_numbers():
    assert all(map(sample_room.numeric, ("12", "$1,234.50", "so 3\n#### 3", "-7", "50%", "8.", "12 apples",
                                         "2 and 1. The answer is 3.")))
    assert not any(map(sample_room.numeric, ("", "1/2", "December 2, 1950", "B", "2 May 1950", "#### red")))
    assert sample_room.is_right(sample_room.extract("so 12 apples. #### 3.0"), "#### 3")
    assert sample_room.is_right(sample_room.extract("#### 1,000"), "1000 boxes")
    assert not data.is_right("1" * 5000, "#### 3") and sample_room.extract("#### " + "9" * 400 + ".5") == "inf"
    assert sample_room.extract("#### 12345678901234567") != sample_room.extract("#### 12345678901234568")


def test_penalties_count_what_no_longer_fits(run_dir):
    model = GPT.from_pretrained(run_dir)
    (ids,), _ = model.generate([[1, 2]], 100, temperature=0, presence_penalty=1e4)
    assert model.context < 102 and len(set(ids)) == 100


def test_penalties_with_guesses_multiply_no_integers():
    whole = argparse.Namespace(tree=sample_room.Tree([[0], [0, 0], [1]], "cpu"))  # nodes: root, 0, 1, 0 0
    nodes, seen = torch.tensor([[5, 1, 2, 1]]), torch.zeros(1, 7, dtype=torch.int32)
    found = sample_room.Speculator.counts(whole, nodes, seen)
    assert found.dtype == torch.int32
    assert found[0, :, 1].tolist() == [0, 1, 0, 2] and found[0, :, 2].tolist() == [0, 0, 1, 0]


def test_a_recorded_graph_is_dropped_where_the_model_is_wired_anew():
    model = make()
    seen = [model.wiring()]
    assert model.wiring() == seen[0]
    lora.apply(model, lora.Adapter("lora", lora_rank=2))
    seen.append(model.wiring())
    with lora.disabled(model):
        seen.append(model.wiring())
    assert model.wiring() == seen[1]
    lora.merge(model)
    seen.append(model.wiring())
    assert len(set(seen)) == 4


def test_no_row_holds_more_than_the_context(run_dir):
    read = lambda n: float(re.search(r"([\d.]+) MB a token", sample(
        "--init", run_dir, "--prompt", "the", "--temperature", 0, "--max_new_tokens", n)[1])[1])
    assert read(2000) <= 1.5 * read(20)


def test_searches_and_choices_have_no_dropout(run_dir, tmp_path):
    model = GPT.from_pretrained(run_dir)
    model.config.dropout = 0.3
    save_run(tmp_path / "dropout", model, {"tokenizer": Tokenizer.load(run_dir).spec()})
    Tokenizer.load(run_dir).save(tmp_path / "dropout")
    for more in (["--beams", 3, "--max_new_tokens", 6], ["--choices", " sat", " on", "--logprobs"]):
        outs = [sample("--init", folder, "--prompt", "the cat", *more)[0]
                for folder in (run_dir, tmp_path / "dropout", tmp_path / "dropout")]
        assert outs[0] == outs[1] == outs[2]


def test_what_was_cut_is_never_drawn():
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    p = process_logits(logits, top_k=40).softmax(-1)
    sums = torch.nn.functional.pad(p, (0, 120)).view(64, -1, 256).sum(-1).cumsum(-1)
    for shift in (-2e-7, -6e-8, 0.0, 6e-8):  # at the borders between blocks of ids
        for block in range(0, 19):
            u = (sums[:, block] / sums[:, -1] + shift).clamp(0, 1 - 2 ** -24)
            assert (p.gather(1, model_room.invert(p, u)[:, None]) > 0).all()


def test_guesses_leave_room_for_themselves(chat_dir):
    flags = ("--temperature", 0, "--max_new_tokens", 200)
    (guessed, _), _ = talk(chat_dir, "hi", flags=(*flags, "--draft", "ngram"))
    (plain, _), _ = talk(chat_dir, "hi", flags=flags)
    assert guessed and plain.startswith(guessed[:-3]) and len(guessed) > len(plain) / 2


@pytest.mark.parametrize("flags, words", [
    (["--beams", 2, "--contrastive", 0.5], "--beams with --contrastive"),
    (["--beams", 2, "--draft", "ngram"], "--draft"), (["--train_medusa", 0], "--train_medusa"),
    (["--beams", 2, "--logprobs"], "--logprobs"), (["--choices", "a", "b", "--cot", "zero"], "--cot zero"),
    (["--seed", 2 ** 70], "--seed"), (["--temperature", "nan"], "--temperature"),
    (["--beams", 2, "--repetition_penalty", 5], "--repetition_penalty"), (["--length_penalty", 2], "--length_penalty"),
    (["--contrastive", 0.5, "--num_samples", 3], "--num_samples"), (["--choices", "a", "b", "--stop", "."], "--stop"),
    (["--cot", "zero", "--num_samples", 2], "--num_samples"), (["--beams", 2, "--temperature", 3], "--temperature"),
    (["--presence_penalty", "inf"], "--presence_penalty"), (["--system", "x"], "--system")])
def test_flags_that_would_change_nothing_are_refused(run_dir, flags, words):
    _, err = sample("--init", run_dir, "--prompt", "the", *flags, check=2)
    assert words in err and len(err.strip().splitlines()) == 1


def test_an_answer_does_not_depend_on_who_is_asked_beside_it(run_dir, tmp_path):
    rows = [{"prompt": "the cat", "answer": "x"}, {"prompt": "the cat sat on the mat, naive", "answer": "y"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = []
    for many in (1, 2):
        out, _ = sample("--init", run_dir, "--questions", tmp_path / "q.jsonl", "--max_new_tokens", 12, "--rows", many)
        texts.append([json.loads(line).get("texts") for line in out.splitlines()[:2]])
    assert texts[0] == texts[1]
