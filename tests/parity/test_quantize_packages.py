"""Packages that people quantize with: the same bytes, codes and products from the same weights."""
import logging
import math

import pytest
import torch

import quantize as Q
from conftest import package


def normal(*shape, seed=0, std=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def bnb():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return package("bitsandbytes")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128])
def test_four_bits_are_bitsandbytes_bytes(bnb, kind, block):
    w = normal(512, 1024)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=block, quant_type=kind)
    q = Q.quantize(w, kind, 4, block, double=False)
    assert torch.equal(packed.flatten(), q.parts["codes"].flatten())
    assert torch.equal(state.absmax, q.parts["scale"].flatten())
    theirs = bnb.functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(Q.dequantize(q), theirs, rtol=2e-7, atol=2e-8)  # levels differ in the last bit


def test_double_quantization_differs_by_a_step_at_most(bnb):
    """bitsandbytes takes a neighbouring code for about one scale in a thousand."""
    w = normal(512, 1024)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    q = Q.quantize(w, "nf4", 4, 64)
    assert torch.equal(state.offset.view(1), q.parts["scale8_mean"])
    assert torch.equal(state.state2.absmax, q.parts["scale8_max"])
    off = (state.absmax.flatten().int() - q.parts["scale8"].flatten().int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.003
    assert relative(Q.dequantize(q), bnb.functional.dequantize_4bit(packed, state)) < 1e-3


def test_llm_int8_is_bitsandbytes_product(bnb):
    w, x = normal(256, 512), normal(32, 512, seed=1, std=1)
    x[:, 7] *= 30
    x[3, 100] = 9
    theirs = bnb.nn.Linear8bitLt(512, 256, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bnb.nn.Int8Params(w.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    theirs.eval()  # in training it multiplies by dequantized weights
    with torch.no_grad():
        expected = theirs(x.half()).float()
    q = Q.quantize(w.half(), "llm_int8", 8, 0)
    assert relative(Q.int8_product(x.half(), q.parts).float(), expected) < 3e-4
    assert relative(Q.int8_product(x.half(), q.parts, math.inf).float(), expected) > 0.02


def test_eight_bit_rows_are_torchao_s():
    package("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    w, x = normal(256, 512), normal(32, 512, seed=1, std=1)
    theirs = torch.nn.Sequential(torch.nn.Linear(512, 256, bias=False))
    theirs[0].weight.data.copy_(w)
    quantize_(theirs, Int8WeightOnlyConfig())
    with torch.no_grad():
        expected = theirs(x)
    assert relative(Q.QuantLinear(Q.quantize(w, "symmetric", 8, 0))(x), expected) < 1e-3
    assert relative(Q.QuantLinear(Q.quantize(w, "absmax", 8, 0))(x), expected) > 3e-3  # 127 in place of 127.5


@pytest.mark.parametrize("bits, group", [(8, 64), (4, 64), (4, 128), (3, 64), (2, 64)])
def test_hqq_is_its_package_where_that_is_installed(bits, group):
    """Its wheel is not built from requirements.txt; tests/test_quantize.py holds numbers that it gave."""
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq 0.2.8.post1 is not installed")
    w = normal(256, 512)
    codes, meta = hqq.Quantizer.quantize(w, nbits=bits, group_size=group, axis=1, bitpack=False, device="cpu",
                                         compute_dtype=torch.float32)
    scale, zero = Q.hqq(w.view(-1, group), bits)
    assert torch.equal(Q.encode(w.view(-1, group), scale, zero, bits), codes.view(-1, group).float())
    assert torch.equal(scale, meta["scale"]) and torch.equal(zero, meta["zero"])
