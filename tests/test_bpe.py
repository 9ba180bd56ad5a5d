"""bpe.py: what a tokenizer promises. Equality with other people's packages is in parity/."""
import json
import os
import struct
import subprocess
import sys

import pytest
import regex
from conftest import ROOT, need
from hypothesis import given, settings, strategies as st

import bpe
from bpe import DIGIT, PATTERNS, BadInput, StreamDecoder, Tokenizer

TEXT = ("It's a far, far better thing that I do, than I have ever done; it is a far, far\n"
        "better rest that I go to than I have ever known. 1859, 12 months, 3 cities.\n") * 3
# Characters that every Unicode version at work here knows alike.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn", "Co"))
SPACES = st.sampled_from("  \n\n\t\r\u3000\xa0a1'sD!/'ll_é你٣")
ANY_TEXT = st.one_of(st.text(), st.text(ASSIGNED), st.text(SPACES, max_size=60))


def learn(**options):
    return Tokenizer.train([TEXT], **({"vocab_size": 300} | options))


def write_tok512(path):
    """llama2.c's format: the 256 bytes, the letters of "▁ab" and two merges, the later scored lower."""
    tokens = [("<unk>", 0), ("\n<s>\n", 0), ("\n</s>\n", 0)]
    tokens += [(f"<0x{b:02X}>", 0) for b in range(256)]
    tokens += [(" a", -1.0), ("ab", -2.0), (" ", -3.0), ("a", -4.0), ("b", -5.0)]
    data = b"".join(struct.pack("<fi", score, len(t)) + t.encode() for t, score in tokens)
    path.write_bytes(struct.pack("<i", 7) + data)


# Training

def reference_merges(text, n):
    """Sennrich's Algorithm 1 as it stands: count every pair again for every merge."""
    words = [list(chunk.encode()) for chunk in bpe.splitter((PATTERNS["gpt2"],))(text)]
    merges = []
    for new in range(256, 256 + n):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [new]
                i += 1
    return merges


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("aab \n"), max_size=60) | st.text(max_size=40))
def test_incremental_counting_makes_the_merges_of_counting_again(text):
    text = bpe.clean(text)
    chunks = bpe.count_chunks([text], [PATTERNS["gpt2"]])
    # A pair that overlaps itself (a a a) is counted at each place by both, and merged from the left.
    assert bpe.train_merges(chunks, 30, 1) == reference_merges(text, 30)


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT)
def test_counting_words_first_counts_the_same_chunks(text):
    text = bpe.clean(text)
    split = bpe.splitter((PATTERNS["gpt2"],))
    counted = bpe.count_chunks([text], [PATTERNS["gpt2"]])
    assert counted == bpe.Counter(split(text))


@pytest.mark.parametrize("pattern, vocab_size", [("gpt2", 512), ("gpt2", 4096), ("cl100k", 512)])
def test_ranks_equal_those_of_rustbpe(pattern, vocab_size):
    text = need("tinyshakespeare.txt").read_bytes().decode()
    golden = need(f"golden/shakespeare_{pattern}_{vocab_size}.tiktoken").read_bytes()
    ranks = Tokenizer.train([text], vocab_size, pattern=pattern).ranks
    assert ranks == bpe.parse_ranks(golden, "golden")


def test_pieces_of_a_stream_train_what_the_whole_text_trains(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 20)
    small = list(bpe.read_pieces([file], size=100))
    assert len(small) > 50 and "".join(small) == TEXT * 20
    assert Tokenizer.train(small, 300) == Tokenizer.train([TEXT * 20], 300)


def test_lines_that_end_in_crlf_are_cut_before_a_space(tmp_path):
    file = tmp_path / "dos.txt"
    text = TEXT.replace("\n", "\r\n") * 20
    file.write_bytes(text.encode())
    small = list(bpe.read_pieces([file], size=200))
    assert len(small) > 20 and "".join(small) == text
    for pattern in PATTERNS:
        assert Tokenizer.train(small, 300, pattern) == Tokenizer.train([text], 300, pattern)


def test_folders_archives_and_files_are_read_alike(tmp_path):
    import gzip
    import lzma
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text(TEXT)
    for name, pack in (("a.gz", gzip), ("a.xz", lzma)):
        (tmp_path / name).write_bytes(pack.compress(TEXT.encode()))
    for path in (tmp_path, tmp_path / "a.gz", tmp_path / "a.xz"):
        assert "".join(bpe.read_pieces([path])) == TEXT


def test_special_tokens_come_after_the_vocabulary_in_the_order_given():
    tokenizer = learn(special=["<b>", "<a>"])
    assert len(tokenizer.ranks) == 300
    assert tokenizer.special == {"<b>": 300, "<a>": 301} and tokenizer.n_vocab == 302


def test_min_frequency_leaves_rare_pairs_alone():
    tokenizer = Tokenizer.train(["abababab xyz"], 257, min_frequency=2)
    assert b"ab" in tokenizer.ranks
    with pytest.raises(BadInput, match="seen 5 times or more"):
        Tokenizer.train(["abababab xyz"], 300, min_frequency=5)


def test_digits_makes_every_digit_a_token():
    tokenizer = Tokenizer.train(["993-7=986 is so\n" * 50], 258, digits=True)
    assert [tokenizer.spell(i) for i in tokenizer.encode("993")] == [b"9", b"9", b"3"]


def test_a_custom_pattern_loses_no_text():
    tokenizer = Tokenizer.train([TEXT], 260, pattern=r"[a-z]+")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_digits_and_a_pattern_are_one_expression_with_the_same_chunks(name, text):
    text = bpe.clean(text)
    in_turn = [chunk for piece in regex.findall(bpe.whole(DIGIT), text)
               for chunk in regex.findall(PATTERNS[name], piece)]
    assert len(bpe.fold([DIGIT, PATTERNS[name]])) == 1
    assert bpe.splitter((DIGIT, PATTERNS[name]))(text) == in_turn


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_chunks_joined_are_the_text(name, text):
    text = bpe.clean(text)
    assert "".join(bpe.splitter((PATTERNS[name],))(text)) == text


# Encoding and decoding

TRAINED = [learn(), learn(pattern="o200k"), learn(pattern="cl100k", digits=True),
           Tokenizer.train([TEXT], 260, pattern=r"[a-z]+|\d")]


@pytest.mark.parametrize("tokenizer", TRAINED)
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_round_trip_both_ways(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@pytest.mark.parametrize("tokenizer", TRAINED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_decode_of_any_ids_never_raises_and_streams_alike(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1)))
    text = tokenizer.decode(ids)
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == text


@pytest.mark.parametrize("tokenizer", TRAINED)
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_the_readable_encoder_equals_the_fast_one(tokenizer, text):
    chunks = bpe.splitter(tuple(tokenizer.patterns))(text)
    slow = [i for chunk in chunks for i in tokenizer._encode_chunk(chunk)]
    assert tokenizer.encode(text) == slow


def test_a_stream_never_breaks_a_character():
    tokenizer = learn()
    stream = StreamDecoder(tokenizer)
    pushed = [stream.push(i) for i in tokenizer.encode("你é👩‍👧")]
    assert "".join(pushed) == "你é👩‍👧" and "\ufffd" not in "".join(pushed)
    assert "" in pushed  # held back


def test_half_a_character_at_the_end_is_flushed_as_one_replacement():
    stream = StreamDecoder(learn())
    assert stream.push(0xE4) == "" and stream.flush() == "\ufffd"


def test_special_names_in_text_are_text_unless_allowed():
    tokenizer = learn()
    text = "a<|endoftext|>b"
    assert tokenizer.eot not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    allowed = tokenizer.encode(text, allowed_special=["<|endoftext|>"])
    assert allowed == [97, tokenizer.eot, 98] == tokenizer.encode(text, allowed_special="all")
    assert tokenizer.decode(allowed) == text
    assert tokenizer.eot not in tokenizer.encode_batch([text])[0]


def test_the_longest_of_two_special_names_wins():
    tokenizer = learn(special=["<a", "<a>"])
    assert tokenizer.encode("<a>", allowed_special="all") == [301]


def test_token_bytes_of_special_tokens_are_empty():
    tokenizer = learn()
    pieces = tokenizer.token_bytes()
    assert len(pieces) == tokenizer.n_vocab == len(tokenizer)
    assert pieces[-4:] == [b""] * 4 and b"".join(pieces[i] for i in tokenizer.encode(TEXT)) == TEXT.encode()


def test_a_batch_is_its_texts():
    texts = [TEXT, "", "993-7=986", "\ud800"]
    for tokenizer in TRAINED:
        assert tokenizer.encode_batch(texts, threads=2) == [tokenizer.encode(t) for t in texts]
    assert learn().encode_batch([]) == []


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    tokenizer = learn()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("text", ["a" * 200_000, " " * 1_200_000 + "a", "\n" * 200_000, "你" * 200_000,
                                  "ab1!" * 100_000, "A" * 200_000], ids=lambda t: repr(t[:4]))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_runs_are_neither_quadratic_nor_fatal(text, pattern):
    tokenizer = Tokenizer.train([TEXT], 256, pattern=pattern)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merging_a_long_chunk_is_not_quadratic():
    ranks = {b"a" * n: n for n in (1, 2, 4, 8)}
    assert bpe.merge([b"a"] * 100_004, ranks) == [b"a" * 8] * 12500 + [b"a" * 4]


def test_a_character_tokenizer_has_one_id_a_character():
    tokenizer = Tokenizer.train(["banana", "né"], 0, kind="char")
    assert tokenizer.encode("ban") == [1, 0, 2] and len(tokenizer.ranks) == 4
    assert tokenizer.decode(tokenizer.encode("éna")) == "éna"
    with pytest.raises(BadInput, match="'x' is not in the vocabulary"):
        tokenizer.encode("x")


# Keeping

@pytest.mark.parametrize("options", [{}, {"kind": "char"}, {"digits": True, "pattern": "o200k"},
                                     {"special": []}], ids=str)
@pytest.mark.parametrize("name", ["run.json", "meta.json"])
def test_save_and_load_give_an_equal_tokenizer(tmp_path, options, name):
    tokenizer = learn(**options)
    tokenizer.save(tmp_path)
    (tmp_path / name).write_text(json.dumps({"tokenizer": tokenizer.spec()}))
    for loaded in (Tokenizer.load(tmp_path), Tokenizer.from_pretrained(tmp_path)):
        assert loaded == tokenizer
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_tokenizers_differ_by_ranks_patterns_or_specials():
    assert learn() == learn()
    for other in (learn(vocab_size=301), learn(pattern="o200k"), learn(special=["<x>"]), 3):
        assert learn() != other


def test_a_bare_rank_file_takes_its_pattern_from_its_name(tmp_path):
    tokenizer = learn(pattern="cl100k")
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.tiktoken").rename(tmp_path / "mine_cl100k.tiktoken")
    assert Tokenizer.from_pretrained(tmp_path / "mine_cl100k.tiktoken") == tokenizer


def test_llama2c_tokenizer_merges_the_highest_score_first(tmp_path):
    write_tok512(tmp_path / "tok.bin")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "tok.bin")
    assert tokenizer.encode("ab") == [259, 263]  # "▁a" before "ab"
    assert tokenizer.encode("b\n") == [261, 263, 3 + 10]
    assert tokenizer.eot == 2
    tokenizer.save(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": tokenizer.spec()}))
    assert Tokenizer.load(tmp_path) == tokenizer


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_sentencepiece_round_trip_and_stream(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "tok.bin"
    if not path.exists():
        write_tok512(path)
    tokenizer = Tokenizer.from_pretrained(path)
    text = text.replace("▁", " ")  # which is how sentencepiece writes a space
    ids = tokenizer.encode(text)
    stream = StreamDecoder(tokenizer)
    assert tokenizer.decode(ids) == text == "".join(map(stream.push, ids)) + stream.flush()


# What the user can mend

def refused(match, run):
    with pytest.raises(BadInput, match=match) as info:
        run()
    assert "\n" not in str(info.value)


def test_bad_training_input_is_one_sentence():
    refused("empty", lambda: Tokenizer.train([], 300))
    refused("empty", lambda: Tokenizer.train([""], 300))
    refused("empty", lambda: Tokenizer.train([], 0, kind="char"))
    refused("below the 256 bytes", lambda: learn(vocab_size=255))
    refused("has only 5 merges; set --vocab_size to 261 or less",
            lambda: Tokenizer.train(["abcdef"], 1000))
    refused("twice", lambda: learn(special=["<a>", "<a>"]))
    refused("no regular expression", lambda: learn(pattern="(a"))
    refused("capturing group", lambda: learn(pattern="(a)|b"))
    refused("matches the empty text", lambda: learn(pattern="a*"))
    refused("an empty one", lambda: learn(special=[""]))


def test_bad_ids_and_names_are_one_sentence():
    tokenizer = learn()
    refused("outside the vocabulary of 304", lambda: tokenizer.decode([304]))
    refused("outside the vocabulary", lambda: tokenizer.decode([-1]))
    refused("not a special token", lambda: tokenizer.encode("a", allowed_special=["<x>"]))
    refused("no folder, no file", lambda: Tokenizer.from_pretrained("nothing-here"))


@pytest.mark.parametrize("data", [b"", b"!!! 0", b"YQ== x", b"YQ==", b"YQ== 0\nYQ== 1",
                                  b"YQ== 0\nYg== 0", b"\xff\xfe"], ids=repr)
def test_a_corrupt_rank_file_is_one_sentence(tmp_path, data):
    (tmp_path / "x.tiktoken").write_bytes(data)
    refused("corrupt", lambda: Tokenizer.from_pretrained(tmp_path / "x.tiktoken"))


def test_a_changed_or_missing_rank_file_is_one_sentence(tmp_path):
    tokenizer = learn()
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": tokenizer.spec()}))
    refused("cannot be read", lambda: Tokenizer.load(tmp_path))
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.tiktoken"
    file.write_bytes(file.read_bytes()[:-9])
    refused("corrupt", lambda: Tokenizer.load(tmp_path))
    (tmp_path / "meta.json").write_text("{")
    refused("not valid JSON", lambda: Tokenizer.load(tmp_path))


def test_other_kinds_of_tokenizer_json_are_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    for data in ({}, {"model": {"type": "Unigram", "vocab": [["a", 0]]}}, [],
                 {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
                 {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
                  "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "ByteLevel"}}):
        file.write_text(json.dumps(data))
        refused(r"tokenizer\.json has", lambda: Tokenizer.from_pretrained(tmp_path))
    file.unlink()
    refused("holds no tokenizer", lambda: Tokenizer.from_pretrained(tmp_path))


def test_offline_without_cached_ranks_is_one_sentence(tmp_path, monkeypatch):
    def unreachable(self, request, **_):
        raise bpe.requests.ConnectionError("no network", request=request)

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(bpe.requests.Session, "send", unreachable)
    monkeypatch.setattr(bpe.tiktoken.registry, "ENCODINGS", {})
    refused("TIKTOKEN_CACHE_DIR", lambda: Tokenizer.from_pretrained("r50k_base"))


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    learn().save(tmp_path)
    before = (tmp_path / "tokenizer.tiktoken").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learn(vocab_size=310).save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.tiktoken"]
    assert (tmp_path / "tokenizer.tiktoken").read_bytes() == before


# The command line

def run(*args, cwd, input=None):
    return subprocess.run([sys.executable, str(ROOT / "bpe.py"), *map(str, args)], cwd=cwd,
                          input=input, capture_output=True, text=True)


def test_the_commands_from_training_to_bench(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    assert "270 tokens" in run("train", "book.txt", "--vocab_size", 266, cwd=tmp_path).stdout
    ids = run("encode", "far better", cwd=tmp_path).stdout.split()
    assert run("decode", *ids, cwd=tmp_path).stdout == "far better\n"
    assert run("decode", cwd=tmp_path, input=" ".join(ids)).stdout == "far better\n"
    assert "10 bytes" in run("inspect", "far better", cwd=tmp_path).stdout
    glitch = run("inspect", "--glitch", "--files", "book.txt", cwd=tmp_path).stdout
    assert "of 270 tokens never occur" in glitch and "b'\\x00'" in glitch and "b'b'\n" not in glitch
    table = run("compare", "book.txt", "--tokenizers", "out/tokenizer", cwd=tmp_path).stdout
    assert "bytes/token" in table and "out/tokenizer" in table
    table = run("bench", "book.txt", "--vocab_size", 266, "--trainers", "bpe.py", cwd=tmp_path).stdout
    assert "1.00" in table and "same" in table
    assert json.loads((tmp_path / "out/tokenizer/tokenizer.json").read_text())["model"]["merges"]


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path):
    for args in (["train", "none.txt"], ["encode", "x"], ["train", os.devnull], ["bench", "none.txt"]):
        done = run(*args, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("bpe.py: error: ")


def test_colours_mark_every_token():
    tokenizer = learn()
    ids = tokenizer.encode("far better")
    shown = bpe.show(tokenizer, ids, colour=True)
    assert shown.count("\x1b[0m") == len(ids)
    assert regex.sub(r"\x1b\[[\d;]*m", "", shown) == "far better"
