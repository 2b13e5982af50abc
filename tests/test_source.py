"""The source is a function of seed and indices: Random123's known answers, one value per index on every device."""

import hashlib
from dataclasses import replace

import pytest
import torch
from numba.core.dispatcher import Dispatcher

from ltx import compiled as compiling
from ltx import source
from ltx.source import SourceLayer

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, words):
    got = source.philox4x32_10(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in got) == words


def _in_float64(seed, layer, rows, offsets):
    block = offsets >> 2
    words = torch.stack(
        source.philox4x32_10((block & FULL, block >> 32, rows, torch.full_like(rows, layer)), (seed & FULL, seed >> 32))
    )
    bits = words.gather(0, (offsets & 3)[None])[0]
    return 2 * ((bits >> 8).double() * 2.0**-24) - 1


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_compiled_and_tensor_paths_give_the_same_bits(seed):
    """A GPU takes the path of tensors."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 2**20, (1000,), generator=generator)
    offsets = torch.randint(0, 2**36, (1000,), generator=generator)
    compiled = source.uniform(seed, 5, rows, offsets)
    assert torch.equal(compiled.double(), _in_float64(seed, 5, rows, offsets))
    assert torch.equal(source._uniform_by_tensors(seed, 5, rows, offsets), compiled)


@pytest.mark.gpu
def test_gpu_gives_the_same_bits():
    rows, offsets = torch.arange(4096), torch.arange(4096) * 7919
    for law in source.LAWS:
        layer = SourceLayer("a", 2, "linear", (4096, 4096 * 7919), 1, law=law, sigma=0.3, bias=True)
        on_gpu = source.weights(layer, 3, rows.cuda(), offsets.cuda()).cpu()
        assert torch.equal(on_gpu, source.weights(layer, 3, rows, offsets))
        assert torch.equal(source.biases(layer, 3, rows.cuda()).cpu(), source.biases(layer, 3, rows))


def test_uniform_on_minus_one_to_one():
    values = source.uniform(0, 0, torch.zeros(200_000, dtype=torch.int64), torch.arange(200_000)).double()
    assert values.min() >= -1
    assert values.max() < 1
    assert abs(values.mean()) < 4 * (1 / 3 / 200_000) ** 0.5
    assert abs(values.var() - 1 / 3) < 0.005


def test_normal_numbers_are_the_same_with_every_library():
    """All 2^24 of them, and none is so near to where float32 rounds the other way that another ndtri could."""
    values = source.normal((torch.arange(2**24) - 2**23).float() * 2.0**-23)
    digest = hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "61d7c94ad4127b04b41174d22dec15ebdd82705e0c920b013bbc8f579b4e8cca"
    assert torch.equal(values, -values.flip(0))
    assert (values[1:] >= values[:-1]).all()
    assert 0 <= source.LAWS["normal"].largest - values.max() < 1e-4
    low = values[: 2**23]
    exact = torch.special.ndtri((torch.arange(2**23, dtype=torch.float64) + 0.5) * 2.0**-24)
    for side in (-torch.inf, torch.inf):
        tie = (low.double() + torch.nextafter(low, torch.tensor(side)).double()) / 2
        assert ((exact - tie).abs() / exact.abs()).min() > 20 * 2.0**-52


@pytest.mark.parametrize("law", source.LAWS)
def test_a_law_maps_the_same_numbers(law):
    layer = SourceLayer("a", 3, "conv", (500, 40, 3, 3), 9, bias=True, sigma=0.7, opposite="rows", law=law)
    rows, offsets = torch.arange(500).repeat_interleave(360), torch.arange(360).repeat(500)
    plain = replace(layer, law="uniform", sigma=1.0)
    for found, uniform in (
        (source.weights(layer, 5, rows, offsets), source.weights(plain, 5, rows, offsets)),
        (source.biases(layer, 5, rows[::360]), source.biases(plain, 5, rows[::360])),
    ):
        u = (uniform.double() + 1) / 2 + 2.0**-25 * torch.tensor([1.0, -1.0]).repeat(250).repeat_interleave(
            len(uniform) // 500  # opposite rows: also their middles
        )
        expected = uniform.double() if law == "uniform" else torch.special.ndtri(u)
        torch.testing.assert_close(found.double(), 0.7 * expected, rtol=1e-6, atol=1e-9)
        assert found.abs().max() <= layer.largest
    weight = source.weights(layer, 5, rows, offsets).double()[:180_000:2]
    assert abs(weight.mean()) < 0.02
    assert abs(weight.std() / 0.7 - {"uniform": 3**-0.5, "normal": 1}[law]) < 0.01


def test_seeds_layers_rows_and_biases_differ():
    layer = SourceLayer("a", 1, "conv", (8, 4, 3, 3), 9, bias=True)
    rows, offsets = torch.arange(8).repeat_interleave(36), torch.arange(36).repeat(8)
    tensors = [
        source.weights(layer, 0, rows, offsets),
        source.weights(layer, 1, rows, offsets),
        source.weights(replace(layer, index=2), 0, rows, offsets),
        source.weights(layer, 0, rows + 8, offsets),
        source.biases(layer, 0, rows + offsets),
    ]
    for i, a in enumerate(tensors):
        for b in tensors[:i]:
            assert not torch.equal(a, b)


def test_widening_a_layer_changes_nothing_before_it():
    narrow = SourceLayer("a", 0, "conv", (3, 5, 3, 3), 9)
    wide = replace(narrow, shape=(300, 5, 3, 3))
    rows, offsets = torch.arange(3).repeat_interleave(45), torch.arange(45).repeat(3)
    assert torch.equal(source.weights(narrow, 9, rows, offsets), source.weights(wide, 9, rows, offsets))


def test_looks_linear_rows_and_columns_are_opposites():
    rows, offsets = torch.arange(6).repeat_interleave(36), torch.arange(36).repeat(6)
    by_row = SourceLayer("a", 0, "conv", (6, 4, 3, 3), 9, opposite="rows", bias=True, sigma=0.5)
    weight = source.weights(by_row, 4, rows, offsets).view(6, 4, 9)
    assert torch.equal(weight[0::2], -weight[1::2])
    bias = source.biases(by_row, 4, torch.arange(6))
    assert torch.equal(bias[0::2], -bias[1::2])
    weight = source.weights(replace(by_row, opposite="columns"), 4, rows, offsets).view(6, 4, 9)
    assert torch.equal(weight[:, 0::2], -weight[:, 1::2])
    assert weight.abs().max() <= 0.5


def test_compiled_where_no_folder_takes_the_code(monkeypatch, caplog):
    """numba refuses at the decoration; the function works nevertheless, and it is said once."""

    def nowhere(*_):
        raise RuntimeError("cannot cache function 'twice': no locator available for file 'x.py'")

    monkeypatch.setattr(Dispatcher, "enable_caching", nowhere)
    compiling._say_so.cache_clear()

    @compiling.compiled()
    def twice(x):
        return 2 * x

    @compiling.compiled(fastmath=True)
    def thrice(x):
        return 3 * x

    assert (twice(21), thrice(2)) == (42, 6)
    (said,) = caplog.messages
    assert "NUMBA_CACHE_DIR" in said
