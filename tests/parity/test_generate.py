"""generate of the transformers package: the same texts by beams and greedily, the same logits after every processor."""
import itertools

import pytest
import torch

from conftest import package
from model import GPT, process_logits
from sample import beam_search

SETTINGS = list(itertools.product(range(4), (2, 4), (0.0, 1.0, 2.0), (False, True, "never"), (4, 9, 16)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Four random models of 13 words, peaked enough to end texts: theirs, ours, three prompts."""
    tf, threads = package("transformers"), torch.get_num_threads()
    torch.set_num_threads(1)  # such small products only wait for each other
    made = []
    for seed in range(4):
        torch.manual_seed(seed)
        theirs = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=13, n_positions=32, n_embd=16, n_layer=2, n_head=2,
                                                  bos_token_id=0, eos_token_id=0)).eval()
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(torch.randn_like(p) * 0.3)
            theirs.transformer.wte.weight[0] *= 2
        folder = tmp_path_factory.mktemp("theirs")
        theirs.save_pretrained(folder)
        made.append((theirs, GPT.from_pretrained(folder).eval(), torch.randint(1, 13, (3, 5))))
    yield made
    torch.set_num_threads(threads)


def generate(theirs, prompts, mask=None, **how):
    mask = torch.ones_like(prompts) if mask is None else mask
    return theirs.generate(prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **how)


def ends(row):
    return row[:row.index(0)] if 0 in row else row


def test_there_are_216_settings():
    assert len(SETTINGS) == 216


@pytest.mark.parametrize("seed, beams, alpha, early, new", SETTINGS)
def test_beam_search_finds_the_texts_and_scores_of_transformers(models, seed, beams, alpha, early, new):
    theirs, ours, prompts = models[seed]
    out = generate(theirs, prompts, num_beams=beams, num_return_sequences=beams, length_penalty=alpha,
                   early_stopping=early, max_new_tokens=new, output_scores=True, return_dict_in_generate=True)
    found = beam_search(ours, prompts.tolist(), new, beams, [0], alpha, early)
    assert [ids for row in found for _, ids in row] == [ends(row) for row in out.sequences[:, 5:].tolist()]
    assert [score for row in found for score, _ in row] == pytest.approx(out.sequences_scores.tolist(), abs=1e-4)


def test_the_settings_reach_early_ends_and_full_lengths(models):
    lengths = {len(row[0][1]) for _, ours, prompts in models for row in beam_search(ours, prompts.tolist(), 16, 2, [0])}
    assert 16 in lengths and min(lengths) < 8 and len(lengths) > 2


def test_beam_search_with_two_stop_tokens(models):
    for theirs, ours, prompts in models:
        out = generate(theirs, prompts, num_beams=3, num_return_sequences=3, max_new_tokens=12, eos_token_id=[0, 7])
        texts = [[t for t in itertools.takewhile(lambda t: t not in (0, 7), row)] for row in out[:, 5:].tolist()]
        assert [ids for row in beam_search(ours, prompts.tolist(), 12, 3, [0, 7]) for _, ids in row] == texts


def test_ragged_beam_search_is_that_of_each_prompt_alone(models):
    _, ours, prompts = models[0]
    ragged = [prompts[0].tolist(), prompts[1, :2].tolist(), prompts[2, :4].tolist()]
    together = beam_search(ours, ragged, 10, 3, [0])
    for prompt, row in zip(ragged, together):
        alone = beam_search(ours, [prompt], 10, 3, [0])[0]
        assert [ids for _, ids in row] == [ids for _, ids in alone]
        assert [score for score, _ in row] == pytest.approx([score for score, _ in alone], abs=1e-5)


def test_one_beam_is_greedy(models):
    for theirs, ours, prompts in models:
        greedy = [ends(row) for row in generate(theirs, prompts, max_new_tokens=12)[:, 5:].tolist()]
        assert ours.generate(prompts, 12, [0], temperature=0)[0] == greedy
        assert [row[0][1] for row in beam_search(ours, prompts.tolist(), 12, 1, [0], early_stopping=True)] == greedy


def processed(theirs, logits, ids, **flags):
    """Their processors in the order in which their generate runs them."""
    import transformers as tf
    made = {"repetition_penalty": tf.RepetitionPenaltyLogitsProcessor, "temperature": tf.TemperatureLogitsWarper,
            "top_k": tf.TopKLogitsWarper, "top_p": tf.TopPLogitsWarper, "min_p": tf.MinPLogitsWarper,
            "typical_p": tf.TypicalLogitsWarper}
    for name, processor in made.items():
        if name in flags:
            logits = processor(flags[name])(ids, logits)
    return logits


PROCESSORS = [{"temperature": 0.7}, {"top_k": 1}, {"top_k": 5}, {"top_p": 0.1}, {"top_p": 0.5}, {"top_p": 0.99},
              {"min_p": 0.02}, {"min_p": 0.3}, {"typical_p": 0.2}, {"typical_p": 0.9}, {"repetition_penalty": 1.3},
              {"repetition_penalty": 0.7}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
              {"repetition_penalty": 1.2, "temperature": 0.6, "top_k": 30, "top_p": 0.95, "min_p": 0.05},
              {"repetition_penalty": 1.1, "temperature": 2.0, "top_p": 0.9, "typical_p": 0.8}]


@pytest.mark.parametrize("flags", PROCESSORS, ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items()))
def test_processed_logits_are_those_of_transformers(flags):
    tf, g = package("transformers"), torch.Generator().manual_seed(0)
    logits = torch.randn(8, 50, generator=g) * 3
    ids = torch.randint(0, 50, (8, 12), generator=g)
    seen = torch.zeros(8, 50, dtype=torch.long).scatter_add_(1, ids, torch.ones_like(ids))
    torch.testing.assert_close(process_logits(logits, seen, **flags), processed(tf, logits, ids, **flags))


def test_ties_at_the_kth_place_stay_as_in_transformers():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    expected = package("transformers").TopKLogitsWarper(1)(None, logits)
    assert torch.equal(process_logits(logits, top_k=1), expected) and expected.isfinite().sum() == 3


def test_top_p_keeps_as_many_as_transformers_at_the_boundary():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for p, kept in (0.5, 1), (0.75, 2), (0.7500001, 3):
        theirs = package("transformers").TopPLogitsWarper(p)(None, logits)
        assert process_logits(logits, top_p=p).isfinite().sum() == theirs.isfinite().sum() == kept


def test_presence_penalty_is_subtracted_once_from_what_was_seen():
    """OpenAI's definition; transformers has none. Between the repetition penalty and the temperature."""
    logits, seen = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[3, 1, 0]])
    out = process_logits(logits, seen, temperature=0.5, presence_penalty=0.5, repetition_penalty=2.0)
    assert torch.allclose(out, torch.tensor([[(1.0 - 0.5) / 0.5, (-2.0 - 0.5) / 0.5, 1.0]]))


def test_penalized_greedy_text_is_that_of_transformers(models):
    for theirs, ours, prompts in models:
        expected = generate(theirs, prompts, max_new_tokens=12, repetition_penalty=1.5)[:, 5:].tolist()
        assert ours.generate(prompts, 12, [0], temperature=0, repetition_penalty=1.5)[0] == [*map(ends, expected)]
