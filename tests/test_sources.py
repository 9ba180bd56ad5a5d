"""The data sources: what each one's documents and checks promise."""

import gzip
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from conftest import need

from bpe import BadInput
from data import arithmetic, bios, shakespeare, stdlib, text

ROOT = Path(__file__).resolve().parent.parent


def texts(documents):
    return [piece for piece, _ in documents]


def joined(*args):
    return "".join(texts(text.documents(*args)))


def run_module(name, *flags):
    return subprocess.run([sys.executable, "-m", name, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)


def refusal(call, *args, **kwargs):
    """The sentence of the BadInput that the call, or the reading of what it yields, ends in."""
    with pytest.raises(BadInput) as caught:
        list(call(*args, **kwargs))
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


# -----------------------------------------------------------------------------
# bios


@pytest.fixture(scope="module")
def trained_on():
    return texts(bios.documents("train"))


def test_the_world_is_the_same_on_every_machine():
    assert bios.people(1)[0] == bios.Person(
        "Reuben Jordan Wheeler", "he", "June 13, 2096", "Duluth, MN", "New York University",
        "Chemistry", "Micron", "Boise, ID",
    )
    assert next(arithmetic.draw("train", 1)) == ("177+67=", "244")


def test_documents_are_the_same_in_every_process():
    code = (
        "import hashlib; from data import arithmetic, bios; digest = hashlib.md5();"
        "[digest.update(t.encode()) for m in (bios, arithmetic) for s in ('train', 'val')"
        " for t, _ in m.documents(s, **({'multi': 2} if m is bios else {'n': 50}))];"
        "print(digest.hexdigest())"
    )
    for seed in "12":
        env = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        digest = hashlib.md5()
        for module, size in (bios, {"multi": 2}), (arithmetic, {"n": 50}):
            for split in "train", "val":
                for piece, _ in module.documents(split, **size):
                    digest.update(piece.encode())
        assert out.stdout.strip() == digest.hexdigest(), out.stderr


def test_the_lists_of_the_world_hold_no_entry_twice():
    for entries in bios.WOMEN, bios.MEN, bios.MIDDLE, bios.LAST, bios.CITIES, bios.UNIVERSITIES, bios.MAJORS:
        assert all(entries) and len(set(entries)) == len(entries)
    assert not set(bios.WOMEN) & set(bios.MEN)
    assert sum(len(entries) for _, entries in bios.rows(bios_source("COMPANIES"))) == len(bios.COMPANIES)


def bios_source(name):
    """The text of a list as it stands in the file."""
    return Path(bios.__file__).read_text().split(f'\n{name} = """', 1)[1].split('"""', 1)[0]


def test_full_names_are_unique_also_across_held_out_people():
    trained, held_out = bios.people(3000), bios.held_out(3000)
    assert len({person.name for person in trained + held_out}) == 6000


def test_a_smaller_world_begins_a_larger_one():
    assert bios.people(50) == bios.people(100)[:50]


def test_no_training_document_names_a_held_out_person(trained_on):
    everything = "\n".join(trained_on)
    assert not any(person.name in everything for person in bios.held_out(200))


def test_the_company_determines_its_city():
    assert all(bios.COMPANIES[p.company] == p.company_city for p in bios.people(500))


def test_a_template_names_the_person_once_and_before_the_value():
    for a, templates in bios.TEMPLATES.items():
        assert len(set(templates)) == len(templates) >= 8
        for template in templates:
            said = bios.sentence(bios.people(1)[0], template, "VALUE", named=True)
            assert said.count("Reuben Jordan Wheeler") == 1 == said.count("VALUE")
            assert said.index("Reuben") < said.index("VALUE")
        assert templates[0].endswith(" {value}.")


def test_a_biography_states_each_attribute_once():
    for person in bios.people(30):
        said = bios.biography(person, random.Random("any"), permute=True, fullname=True)
        assert all(getattr(person, a) in said for a in bios.ATTRIBUTES)
        assert said.count(person.name) == 6


def test_fullname_replaces_every_pronoun():
    pronouns = {"she", "her", "he", "him", "his"}
    for person in bios.people(50):
        for fullname in True, False:
            said = bios.biography(person, random.Random(person.name), fullname=fullname)
            words = said.lower().replace(".", "").split()
            assert sum(word in pronouns for word in words) == (0 if fullname else 5)
            assert said.count(person.name) == (6 if fullname else 1)


def test_permute_changes_the_order_and_its_absence_keeps_it():
    person = bios.people(1)[0]
    orders = {True: set(), False: set()}
    for permute in orders:
        for i in range(60):
            said = bios.biography(person, random.Random(str(i)), permute=permute, fullname=True)
            orders[permute].add(tuple(sorted(bios.ATTRIBUTES, key=lambda a: said.index(getattr(person, a)))))
    assert orders[False] == {bios.ATTRIBUTES}
    assert len(orders[True]) > 30


def test_multi_gives_that_many_different_renderings_of_each_person():
    said = texts(bios.documents("train", n_people=7, multi=5))
    assert len(set(said)) == len(said) == 35
    for person in bios.people(7):
        assert sum(person.name in biography for biography in said) == 5


def test_validation_has_the_same_people_in_unseen_renderings(trained_on):
    said = texts(bios.documents("val"))
    assert not set(said) & set(trained_on)
    assert all(any(person.name in biography for biography in said) for person in bios.people(bios.N_PEOPLE))


def test_every_recall_check_is_answered_in_a_training_document(trained_on):
    everything = "\n".join(trained_on)
    rows = bios.checks()["recall"]
    assert len(rows) == 6 * bios.N_PEOPLE == len({row["prompt"] for row in rows})
    assert all(row["prompt"] + row["answer"] in everything for row in rows)


def test_questions_train_on_one_half_of_the_people_and_test_the_other():
    asked = {split: [row["messages"][0]["content"] for row in bios.qa(split)] for split in ("train", "test")}
    names = {
        split: {p.name for p in bios.people(bios.N_PEOPLE) if any(p.name in q for q in asked[split])}
        for split in asked
    }
    assert len(names["train"]) == len(names["test"]) == bios.N_PEOPLE // 2
    assert not names["train"] & names["test"]
    assert len(asked["test"]) == 3 * bios.N_PEOPLE


def test_questions_are_not_in_the_pretraining_documents(trained_on):
    assert not any("?" in biography for biography in trained_on)


def test_a_question_has_the_attribute_as_its_answer():
    person = bios.people(1)[0]
    assert [answer for _, answer in bios.questions(person)] == list(person[2:])
    assert all(person.name in question for question, _ in bios.questions(person, random.Random("any")))


# -----------------------------------------------------------------------------
# arithmetic


def test_arithmetic_answers_are_right():
    for split in "train", "val":
        for document in texts(arithmetic.documents(split, n=200, operations="+-*")):
            lines = document.splitlines(keepends=True)
            assert len(lines) == arithmetic.LINES
            for line in lines:
                question, answer = line.split("=")
                assert eval(question) == int(answer) >= 0 and line.endswith("\n")


def test_no_held_out_problem_is_in_training_in_either_order():
    seen = {line.split("=")[0] for document in texts(arithmetic.documents("train")) for line in document.split()}
    held_out = [row["prompt"][:-1] for row in arithmetic.checks()["accuracy"]]
    held_out += [question[:-1] for question, _ in arithmetic.draw("val", 2000)]
    for question in held_out:
        op = "+" if "+" in question else "-"
        a, b = question.split(op)
        assert question not in seen and f"{b}{op}{a}" not in seen


def test_two_hundred_different_held_out_problems_are_checked():
    rows = arithmetic.checks()["accuracy"]
    assert len({row["prompt"] for row in rows}) == len(rows) == 200
    assert all(row["answer"] == f"{eval(row['prompt'][:-1])}\n" for row in rows)


def test_problems_ask_in_question_form_about_their_own_split():
    for split in "train", "val":
        for row in arithmetic.problems(split, n=100):
            question, end = row["prompt"][:-2], row["prompt"][-2:]
            assert end == "=?" and str(eval(question)) == row["answer"]
            op = "+" if "+" in question else "-"
            a, b = map(int, question.split(op))
            assert arithmetic.split_of(a, op, b) == split


@pytest.mark.parametrize("operations", ["+", "-", "*", "+-*"])
def test_even_the_smallest_world_of_problems_has_both_splits(operations):
    assert arithmetic.checks(digits=1, operations=operations)["accuracy"]
    assert list(arithmetic.problems("train", n=20, digits=1, operations=operations))


# -----------------------------------------------------------------------------
# text


def test_pieces_are_bounded_join_to_the_text_and_do_not_depend_on_the_blocks():
    rng = random.Random("pieces")
    words = [rng.choice(["word", " ", "\n", "\n\n", "x" * 50, "é"]) for _ in range(300_000)]
    whole = "".join(words)
    assert len(whole) > 2 * text.LIMIT
    by_word = list(text.pieces(words))
    assert by_word == list(text.pieces([whole]))
    assert "".join(texts(by_word)) == whole
    assert max(map(len, texts(by_word))) <= text.LIMIT
    assert [starts for _, starts in by_word] == [True] + [False] * (len(by_word) - 1)


@pytest.mark.parametrize("unit, end, begin", [
    ("some words\nand more\n\n  code\n  ", "words\n", "and"),  # a single newline between non-spaces
    ("paragraph\n\n", "\n", "p"),  # any newline
    ("word ", "d", " "),  # before a space
    ("x", "x", "x"),
])
def test_a_long_document_is_cut_at_the_best_place_there_is(unit, end, begin):
    pieces = texts(text.pieces([unit * (3 * text.LIMIT // len(unit))]))
    assert len(pieces) >= 3
    assert all(piece.endswith(end) for piece in pieces[:-1])
    assert all(piece.startswith(begin) for piece in pieces[1:])


def test_cutting_a_document_does_not_change_its_tokens():
    import tiktoken

    # the public split pattern of GPT-2 over single bytes: no download
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = {bytes([i]): i for i in range(256)} | {b"\n\n": 256, b"  ": 257, b"on": 258, b"e\n": 259}
    encoder = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    lines = "def one():\n    return 1\n\n\nprint(one)\nend\n" * 30_000
    whole = encoder.encode_ordinary(lines)
    cut = [token for piece in texts(text.pieces([lines])) for token in encoder.encode_ordinary(piece)]
    assert cut == whole


def test_the_last_tenth_of_a_file_is_validation(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("é" * 50 + "\r\n" + "z" * 48, newline="")
    assert joined("train", path) == "é" * 50 + "\r\n" + "z" * 38
    assert list(text.documents("val", path)) == [("z" * 10, True)]


def test_the_splits_join_to_the_text_wherever_pieces_and_files_end(tmp_path):
    for name, length in ("a", 10), ("b", 2 * text.LIMIT), ("c", text.LIMIT), ("d", text.LIMIT // 3):
        (tmp_path / f"{name}.txt").write_text(name * length)
    train, val = (list(text.documents(split, tmp_path)) for split in ("train", "val"))
    whole = "".join(sorted("".join(texts(train + val))))
    assert "".join(texts(train + val)) == whole and len(whole) == 10 + 10 * text.LIMIT // 3
    assert sum(map(len, texts(train))) == int(0.9 * len(whole))
    assert train[0][1] and val[0][1]
    assert sum(starts for _, starts in train + val) == 4 + 1  # one document is split at the border


@pytest.mark.parametrize("packing, opened", [(".gz", gzip.open), (".xz", lzma.open)])
def test_a_packed_file_equals_the_plain_one(tmp_path, packing, opened):
    lines = "".join(f"line {i} – ünïcode\n" for i in range(60_000))
    for name, content in ("a.txt", lines), ("a.jsonl", json.dumps({"text": lines}) + "\n"):
        (tmp_path / name).write_text(content)
        with opened(tmp_path / (name + packing), "wt", encoding="utf-8") as file:
            file.write(content)
        for split in "train", "val":
            plain, packed = (list(text.documents(split, tmp_path / n)) for n in (name, name + packing))
            assert plain == packed and plain


def test_each_jsonl_row_is_a_document_in_any_of_the_known_forms(tmp_path):
    rows = [
        {"text": "plain\u2028text"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "Say ", "completion": "yes"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n\n".join(lines))
    (tmp_path / "val.txt").write_text("x")
    assert list(text.documents("train", tmp_path)) == [
        ("plain\u2028text", True),
        ("User: Hi\n\nAssistant: Hello", True),
        ("1+1=\n2", True),
        ("Say yes", True),
        ("User: Hi\n\nAssistant: Yo", True),
    ]
    assert list(text.documents("val", tmp_path)) == [("x", True)]


def test_bytes_that_are_not_utf8_are_replaced_and_reported(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgood \xff text" + b"." * 50)
    (tmp_path / "b.md").write_text("a real \ufffd is no fault" + "." * 50)
    (tmp_path / "c.jsonl").write_text('{"text": "half a pair \\ud800"}\n')
    train = joined("train", tmp_path)
    assert train.startswith("good \ufffd text.") and "2 of 3 files" in capsys.readouterr().err
    (train + joined("val", tmp_path)).encode()
    assert capsys.readouterr().err == ""  # said once


def test_a_character_across_two_blocks_stays_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a" + "é" * text.LIMIT)
    assert "\ufffd" not in joined("train", path) + joined("val", path)


def test_files_that_are_not_text_are_left_out_of_a_folder(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("words " * 10)
    (tmp_path / "train.bin").write_bytes(bytes(2000))
    (tmp_path / "val.bin").write_bytes(bytes(2000))
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.py").write_text("print()\n" * 10)
    assert joined("train", tmp_path) + joined("val", tmp_path) == "words " * 10 + "print()\n" * 10
    assert "left out 2 of 4" in capsys.readouterr().err


def test_checks_lie_beside_the_splits(tmp_path):
    bios_rows, sums = bios.checks(n_people=2), arithmetic.checks()
    for name in "train.txt", "val.txt":
        (tmp_path / name).write_text("words")
    assert text.checks(tmp_path) == text.checks(tmp_path / "train.txt") == text.checks() == {}
    text.write_checks(tmp_path / "checks.jsonl", bios_rows | sums)
    assert text.checks(tmp_path) == bios_rows | sums
    assert joined("train", tmp_path) == "words"


def peak_memory(path):
    """Bytes held at most while both splits are read."""
    tracemalloc.start()
    for split in "train", "val":
        for _ in text.documents(split, path):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def write_long(path, megabytes):
    block = "".join(f"line {i}\n" for i in range(90_000))[: 2**20]
    with open(path, "w") as file:
        for _ in range(megabytes):
            file.write(block)


def test_memory_does_not_grow_with_the_text(tmp_path):
    write_long(tmp_path / "a.txt", 60)
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"row {i} " * 200}) + "\n" for i in range(5_000))
    assert peak_memory(tmp_path / "a.txt") < 4 * 2**20
    assert peak_memory(tmp_path / "a.jsonl") < 4 * 2**20


@pytest.mark.slow
def test_memory_does_not_grow_with_a_text_of_one_gigabyte(tmp_path):
    write_long(tmp_path / "a.txt", 1024)
    assert peak_memory(tmp_path / "a.txt") < 4 * 2**20


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    packed = gzip.compress(random.Random(1).randbytes(100_000).hex().encode())
    for path, expected in [
        (None, "--input FILE"),
        (tmp_path / "missing.txt", "missing.txt: no such file"),
        (file("empty.txt", b""), "0 characters"),
        (file("empty.jsonl", b"\n\n"), "0 characters"),
        (file("short.txt", b"tiny"), "4 characters"),
        (file("picture.txt", b"\x89PNG\0\0\0"), "picture.txt: not UTF-8 text"),
        (file("wide.txt", "words".encode("utf-16")), "wide.txt: not UTF-8 text"),
        (file("cut.txt.gz", packed[:50_000]), "cut.txt.gz is cut short"),
        (file("flipped.txt.gz", packed[:60_000] + b"!!!!" + packed[60_004:]), "flipped.txt.gz is"),
        (file("plain.txt.gz", b"not packed at all"), "plain.txt.gz is"),
        (file("plain.txt.xz", b"not packed at all"), "plain.txt.xz is"),
        (file("cut.txt.xz", lzma.compress(packed)[:5_000]), "cut.txt.xz is cut short"),
        (file("bad.jsonl", b'{"text": "a"}\n\n{"text": \n'), "bad.jsonl, line 3: not a JSON object"),
        (file("list.jsonl", b"[1]\n"), "list.jsonl, line 1: not a JSON object"),
        (file("deep.jsonl", b"[" * 200_000), "deep.jsonl, line 1: not a JSON object"),
        (file("keys.jsonl", b'{"txt": "a"}\n'), 'keys.jsonl, line 1: the row needs "text"'),
        (file("turn.jsonl", b'{"messages": [{"role": "user"}]}\n'), "turn.jsonl, line 1: the row needs"),
        (file("half.jsonl", b'{"prompt": "a", "completion": [1]}\n'), "half.jsonl, line 1: the row needs"),
    ]:
        for split in "train", "val":
            assert expected in refusal(text.documents, split, path)


def test_a_folder_with_nothing_to_read_is_refused(tmp_path):
    assert "0 characters" in refusal(text.documents, "train", tmp_path)
    (tmp_path / "train.txt").write_text("words")
    (tmp_path / "val.txt").write_text("")
    assert joined("train", tmp_path) == "words"
    assert "0 characters for val" in refusal(text.documents, "val", tmp_path)


def test_a_bad_line_of_checks_is_refused(tmp_path):
    (tmp_path / "checks.jsonl").write_text('{"metric": "m", "prompt": "p"}\n')
    assert "checks.jsonl, line 1" in refusal(text.checks, tmp_path)


# -----------------------------------------------------------------------------
# the modules as scripts


def test_a_written_world_reads_back_as_text(tmp_path):
    flags = "--n_people", 12, "--multi", 2, "--no-permute"
    done = run_module("data.bios", "--out", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    for split, multi in ("train", 2), ("val", None):
        made = list(bios.documents(split, n_people=12, multi=multi, permute=False))
        assert list(text.documents(split, tmp_path)) == made
    assert text.checks(tmp_path) == bios.checks(n_people=12)
    for split in "train", "test":
        lines = (tmp_path / f"qa_{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == list(bios.qa(split, 12))


def test_written_problems_read_back_as_text(tmp_path):
    done = run_module("data.arithmetic", "--out", tmp_path, "--n", 20, "--digits", 2, "--operations", "*")
    assert done.returncode == 0, done.stderr
    made = list(arithmetic.documents("train", n=20, digits=2, operations="*"))
    assert list(text.documents("train", tmp_path)) == made
    assert text.checks(tmp_path) == arithmetic.checks(digits=2, operations="*")


@pytest.mark.parametrize("module, flags, named", [
    ("data.bios", ["--n_people", "0"], "--n_people 0"),
    ("data.bios", ["--n_people", "9999999"], "--n_people 9999999"),
    ("data.bios", ["--multi", "0"], "--multi 0"),
    ("data.arithmetic", ["--digits", "0"], "--digits 0"),
    ("data.arithmetic", ["--operations", "/"], "--operations /"),
    ("data.arithmetic", ["--n", "0"], "--n 0"),
])
def test_a_bad_flag_ends_in_one_sentence_and_status_two(tmp_path, module, flags, named):
    done = run_module(module, "--out", tmp_path / "w", *flags)
    assert done.returncode == 2 and named in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.jsonl"))


def test_an_unwritable_or_interrupted_file_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(BadInput, match="--out"):
        text.write_jsonl(tmp_path / "file" / "train.jsonl", [{}])
    with pytest.raises(KeyError):
        text.write_jsonl(tmp_path / "train.jsonl", ({}[key] for key in "a"))
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("source", [bios, arithmetic, stdlib])
def test_a_source_that_needs_no_file_says_where_files_go(source):
    assert "--data text --input" in refusal(source.documents, "train", input="book.txt")


# -----------------------------------------------------------------------------
# shakespeare and stdlib


def test_tinyshakespeare_is_split_as_in_nanogpt(capsys):
    path = need("tinyshakespeare.txt")
    for split, characters in ("train", 1_003_854), ("val", 111_540):
        pieces = list(shakespeare.documents(split, path))
        assert sum(map(len, texts(pieces))) == characters
        assert sum(starts for _, starts in pieces) == 1
    assert capsys.readouterr().err == ""


def test_another_text_than_tinyshakespeare_is_accepted_with_a_note(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("To be, or not to be")
    assert texts(shakespeare.documents("train", tmp_path / "a.txt")) == ["To be, or not to "]
    assert texts(shakespeare.documents("val", tmp_path / "a.txt")) == ["be"]
    assert capsys.readouterr().err.count("\n") == 1


class Answer:
    """What requests.get() returns, as far as it is used."""

    def __init__(self, content):
        self.content = content

    def raise_for_status(self):
        pass


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "PATH", tmp_path / "shakespeare" / "input.txt")
    monkeypatch.setattr(shakespeare.time, "sleep", lambda seconds: None)
    return shakespeare.PATH


def test_without_network_shakespeare_says_where_the_file_goes(empty_cache, monkeypatch):
    def offline(*args, **kwargs):
        raise shakespeare.requests.ConnectionError("no network")

    monkeypatch.setattr(shakespeare.requests, "get", offline)
    sentence = refusal(shakespeare.documents, "train")
    assert str(empty_cache) in sentence and "--input FILE" in sentence


def test_a_download_with_a_wrong_checksum_is_never_kept(empty_cache, monkeypatch):
    monkeypatch.setattr(shakespeare.requests, "get", lambda *args, **kwargs: Answer(b"sign in here"))
    assert "another text" in refusal(shakespeare.documents, "train")
    assert not empty_cache.exists()


def test_a_failed_download_is_tried_again_and_then_kept(empty_cache, monkeypatch):
    right = need("tinyshakespeare.txt").read_bytes()
    answers = [Answer(right[:1000]), Answer(right)]
    monkeypatch.setattr(shakespeare.requests, "get", lambda *args, **kwargs: answers.pop(0))
    for split, characters in ("train", 1_003_854), ("val", 111_540):
        assert sum(map(len, texts(shakespeare.documents(split)))) == characters
    assert os.listdir(empty_cache.parent) == ["input.txt"]


def test_a_changed_copy_is_neither_used_nor_overwritten(empty_cache):
    empty_cache.parent.mkdir()
    empty_cache.write_text("my own play")
    assert "is another text" in refusal(shakespeare.documents, "train")
    assert empty_cache.read_text() == "my own play"


def test_stdlib_gives_each_file_to_one_split_by_its_path():
    train, val = set(stdlib.files("train")), set(stdlib.files("val"))
    assert train and val and not train & val
    assert 0.03 < len(val) / len(train | val) < 0.2
    assert not any(stdlib.LEFT_OUT & set(path.parts[-3:]) for path in train | val)


def test_stdlib_documents_are_the_files():
    path = next(stdlib.files("val"))
    piece, starts = next(stdlib.documents("val"))
    assert starts and path.read_text(encoding="utf-8").startswith(piece)
