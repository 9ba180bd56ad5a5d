"""The sample room as a specification: a prompt goes in, the same text comes out whatever the door."""
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

import data
import sample as sample_room
from bpe import Tokenizer, cli
from conftest import ROOT
from model import GPT, GPTConfig, init_weights, save_run

TEXT = "the cat sat on the mat, naïve 你好 and 993-7=986. " * 30


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """An untrained model with a tokenizer: its text is noise, but always the same noise."""
    out = tmp_path_factory.mktemp("out") / "run"
    tokenizer = Tokenizer.train([TEXT], 280)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=32, n_embd=32))
    init_weights(model)
    model.head.weight.data.normal_(std=0.5)
    save_run(out, model, {"tokenizer": tokenizer.spec()})
    tokenizer.save(out)
    return out


def sample(*args, stdin=None, check=0):
    """sample.py in this process (its arithmetic must be that of the model beside it): stdout, stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, args)])
        patch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        try:
            cli(sample_room.main)
        except SystemExit as exit:
            status = exit.code
    assert status == check, err.getvalue()
    return out.getvalue(), err.getvalue()


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
    (["--prompt", "@missing"], "missing")])
def test_bad_input_is_one_sentence_and_status_two(run_dir, args, word):
    _, err = sample("--init", run_dir, "--prompt", "the", *args, check=2)
    assert err.splitlines()[-1].startswith("sample.py: error: ") and word in err


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
