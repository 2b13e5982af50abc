"""Training: an interrupted run ends where an unbroken one ends."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from ltx import data, training
from ltx.errors import CheckpointError, LtxError
from ltx.files import read_tensors, write_tensors
from ltx.onednn import TanhByOneDnn
from ltx.targets import build, prunable
from ltx.targets.masked import MaskedLinear

PROTOCOL = training.Protocol(rounds=3, epochs=1, batch_size=128, learning_rate=0.005)


def fresh(seed=0):
    torch.manual_seed(seed)
    return build("mnist_cnn", "relu", shape=(1, 8, 8), classes=10)


@pytest.fixture(scope="module")
def splits():
    return data.load("digits", train=True), data.load("digits", train=False)


def first_batch(split, protocol, seed):
    return training._batch(split, protocol, *next(training._draws(split, protocol, seed=seed)))


def test_a_seed_of_the_initialisation_leaves_the_generator_alone():
    how = {"shape": (1, 8, 8), "classes": 10}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (build("mnist_cnn", "relu", seed=seed, **how).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])
    drawn = build("mnist_cnn", "relu", **how).state_dict()
    assert torch.equal(drawn["0.weight"], build("mnist_cnn", "relu", seed=7, **how).state_dict()["0.weight"])
    assert not torch.equal(torch.get_rng_state(), before)
    for seed in (-1, 2**64, 1.5, "a"):
        with pytest.raises(LtxError, match="seed"):
            build("mnist_cnn", "relu", seed=seed, **how)


def test_training_within_autocast_is_the_same(splits, monkeypatch):
    """Whose cache of weights in bfloat16 is emptied at the end of the outermost one only."""
    monkeypatch.setattr(training, "fast_bf16", lambda _: True)
    found = []
    for outer in (
        contextlib.nullcontext(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(0)
        plain = nn.Linear(16, 10)  # without a mask: what is computed is the parameter itself
        model = nn.Sequential(nn.Flatten(), MaskedLinear(64, 16), nn.ReLU(), plain)
        with outer:
            training.train(model, *splits, PROTOCOL, 0.5, seed=0)
        found.append(plain.weight.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class Stop(Exception):
    pass


def test_resumed_run_equals_unbroken_run(splits, tmp_path):
    whole = fresh()
    accuracy = training.train(whole, *splits, PROTOCOL, 0.2, seed=3)

    def stop_in_round_three(progress):
        if progress.round == 3:
            raise Stop

    checkpoint = tmp_path / "round.safetensors"
    with pytest.raises(Stop):
        training.train(fresh(), *splits, PROTOCOL, 0.2, seed=3, checkpoint=checkpoint, on_progress=stop_in_round_three)
    seen, resumed = [], fresh(seed=99)  # its own initialisation must not matter
    again = training.train(resumed, *splits, PROTOCOL, 0.2, seed=3, checkpoint=checkpoint, on_progress=seen.append)
    assert [p.round for p in seen] == [3]
    assert again == accuracy
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mnist_cnn", "resnet22"])
def test_a_run_killed_within_a_round_equals_an_unbroken_run(splits, tmp_path, monkeypatch, network):
    """A checkpoint after every epoch holds the optimizer, batch norm's statistics and the place in the schedule."""
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    some = tuple(data.Split(s.images[:128], s.labels[:128]) for s in splits)
    protocol = training.Protocol(rounds=2, epochs=4, batch_size=64, learning_rate=0.005, crop=1, flip=True)

    def model(seed=0):
        torch.manual_seed(seed)
        return build(network, "relu", shape=(1, 8, 8), classes=10)

    whole = model()
    accuracy = training.train(whole, *some, protocol, 0.5, seed=3)

    def stop_in_the_middle(progress):
        if (progress.round, progress.epoch) == (2, 3):
            raise Stop

    checkpoint = tmp_path / "round.safetensors"
    with pytest.raises(Stop):
        training.train(model(), *some, protocol, 0.5, seed=3, checkpoint=checkpoint, on_progress=stop_in_the_middle)
    seen, resumed = [], model(seed=99)
    again = training.train(resumed, *some, protocol, 0.5, seed=3, checkpoint=checkpoint, on_progress=seen.append)
    assert [(p.round, p.epoch) for p in seen] == [(2, 4)]
    assert again == accuracy
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_shifts_and_mirrors_are_of_the_images(splits):
    """Every training image is a shifted, perhaps mirrored, one of the split; without either it is the image itself."""
    images = torch.arange(2 * 3 * 4 * 5).float().view(2, 3, 4, 5) + 1
    split = data.Split(images, torch.tensor([0, 1]))
    plain = training.Protocol(batch_size=2)
    batch, labels = first_batch(split, plain, seed=(0, 1, 1))
    assert torch.equal(batch, images[labels])
    changed = training.Protocol(batch_size=2, crop=2, flip=True)
    seen = set()
    for epoch in range(40):
        batch, labels = first_batch(split, changed, seed=(0, 1, epoch))
        for image, label in zip(batch, labels, strict=True):
            possible = {}
            for mirrored in (False, True):
                wide = torch.nn.functional.pad(images[label].flip(2) if mirrored else images[label], (2,) * 4)
                possible |= {(mirrored, y, x): wide[:, y : y + 4, x : x + 5] for y in range(5) for x in range(5)}
            found = [which for which, shifted in possible.items() if torch.equal(shifted, image)]
            assert len(found) == 1
            seen.add(found[0])
    assert {s[0] for s in seen} == {False, True}
    assert len({s[1:] for s in seen}) > 15


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_gradients_keep_the_layout_of_images(activation, monkeypatch):
    """Convolutions and batch norm are fast over channels-last tensors; one contiguous gradient would spread."""
    torch.manual_seed(0)
    model = build("resnet22", activation, shape=(3, 32, 32), classes=10)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    given: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_full_backward_hook(lambda _, __, outputs, name=name: given.update({name: outputs[0]}))

    def gradients():
        model.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    ours = gradients()
    assert len(given) == 21
    for name, gradient in given.items():
        assert gradient.is_contiguous(memory_format=torch.channels_last), name
    monkeypatch.setattr(nn.functional, "avg_pool2d", lambda x, _: nn.functional.adaptive_avg_pool2d(x, 1))
    for mine, theirs in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not training.fast_bf16("cpu"), reason="float32 here")),
    ],
)
def test_tanh_by_onednn_is_pytorchs(dtype):
    """Every value of bf16 (those below its least normal one may be 0), in every layout, gradients too."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    values = bits[bits.isfinite()].to(dtype)
    layouts = (
        values, values.view(16, 4, 30, 34), values.view(16, 4, 30, 34).contiguous(memory_format=torch.channels_last),
        values.view(30, 2176).t(), values[:0],
    )  # fmt: skip
    for given in layouts:
        ours, theirs = (given.clone().requires_grad_() for _ in range(2))
        with TanhByOneDnn():
            found = nn.Tanh()(ours)
        assert "_Tanh" in found.grad_fn.name()
        wanted = torch.tanh(theirs)
        if given.ndim == 4:
            assert found.stride() == wanted.stride()
        weights = torch.rand_like(wanted)
        (found * weights).sum().backward()
        (wanted * weights).sum().backward()
        least = torch.finfo(dtype).smallest_normal
        close = {"rtol": 0 if dtype == torch.bfloat16 else 2e-7, "atol": least}
        torch.testing.assert_close(found, wanted, **close)
        torch.testing.assert_close(ours.grad, theirs.grad, **(close | {"atol": 1e-6}))


def test_ends_at_the_density_within_the_bound_and_learns(splits):
    model, seen = fresh(), []
    protocol = training.Protocol(rounds=3, epochs=2, batch_size=32, learning_rate=0.005, bound=0.2)
    accuracy = training.train(model, *splits, protocol, 0.2, seed=0, on_progress=seen.append)
    assert accuracy > 80
    assert [(p.round, p.epoch) for p in seen] == [(r, e) for r in (1, 2, 3) for e in (1, 2)]
    assert [p.accuracy is None for p in seen] == [True, False] * 3
    for name, (parameter, mask) in prunable(model).items():
        assert int(mask.sum()) == mask.numel() - int(0.8 * mask.numel()), name
        assert parameter.abs().max() <= 0.2


def test_checkpoint_of_other_settings_is_refused(splits, tmp_path):
    checkpoint = tmp_path / "round.safetensors"
    training.train(fresh(), *splits, PROTOCOL, 0.2, seed=3, checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match="other settings"):
        training.train(fresh(), *splits, PROTOCOL, 0.2, seed=4, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        training.train(fresh(), *splits, PROTOCOL, 0.2, seed=3, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("round"), "'round'"),
        (lambda t, m: m.update(epoch="x"), "'x'"),
        (lambda t, m: m.update(round="9"), "round 9, epoch 2"),
        (lambda t, m: m.update(epoch="3"), "round 1, epoch 3"),
        (lambda t, m: m.update(epoch="1"), "the optimizer's state is not whole"),
        (lambda t, m: t.pop(next(n for n in t if n.startswith("optimizer.step."))), "state is not whole"),
        (lambda t, m: t.update({n: x[:1] for n, x in t.items() if ".exp_avg." in n}), "state is not whole"),
        (lambda t, m: t.update({"optimizer.exp_avg.other": torch.zeros(1)}), "other"),
        (lambda t, m: t.pop(next(n for n in t if n.startswith("model."))), "Error.s. in loading state_dict"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_damaged(splits, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    protocol, checkpoint = replace(PROTOCOL, epochs=2), tmp_path / "round.safetensors"

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        training.train(fresh(), *splits, protocol, 0.2, seed=3, checkpoint=checkpoint, on_progress=stop)
    tensors, metadata = read_tensors(checkpoint)
    assert (metadata["round"], metadata["epoch"]) == ("1", "2")
    change(tensors, metadata)
    write_tensors(checkpoint, tensors, metadata)
    with pytest.raises(CheckpointError, match=rf"damaged \(.*{message}.*\); remove it to start again") as caught:
        training.train(fresh(), *splits, protocol, 0.2, seed=3, checkpoint=checkpoint)
    assert "\n" not in str(caught.value)


def test_order_of_images_depends_on_seed_round_and_epoch(splits):
    def first(*seed):
        return first_batch(splits[0], PROTOCOL, seed=seed)[1]

    assert torch.equal(first(0, 1, 1), first(0, 1, 1))
    assert not torch.equal(first(0, 1, 1), first(1, 1, 1))
    assert not torch.equal(first(0, 1, 1), first(0, 2, 1))
    assert not torch.equal(first(0, 1, 1), first(0, 1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_trains_on_a_gpu(splits, compiled):
    on_gpu = [data.Split(s.images.cuda(), s.labels.cuda()) for s in splits]
    torch.manual_seed(0)
    model = build("resnet22", "relu", shape=(1, 8, 8), classes=10)
    protocol = training.Protocol(rounds=2, epochs=2, batch_size=128, learning_rate=0.005, crop=1)
    assert training.train(model, *on_gpu, protocol, 0.3, seed=0, compiled=compiled) > 60


@pytest.mark.gpu
def test_a_captured_step_gives_the_gradients_of_a_plain_one(splits, monkeypatch):
    """Also after its parameters and masks have changed in place, and batch norm's statistics move by one batch."""
    split = data.Split(splits[0].images.cuda(), splits[0].labels.cuda())
    protocol = training.Protocol(batch_size=128, crop=1, flip=True)
    draws = list(training._draws(split, protocol, seed=(0, 1, 1)))
    found = []
    for captured in (True, False):
        torch.manual_seed(0)
        model = build("resnet22", "relu", shape=(1, 8, 8), classes=10).cuda()
        if not captured:
            monkeypatch.setattr(training, "_Captured", lambda step, *_: step)
        step = training._step(model, model, split, protocol)
        for parameter, mask in prunable(model).values():
            parameter.data.mul_(1.5)
            mask.view(-1)[::3] = 0
        losses = [float(step(*draw)) for draw in draws[:2]]
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((torch.tensor(losses), gradients, model.bn.running_mean, model.bn.num_batches_tracked.float()))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


@pytest.mark.gpu
def test_a_killed_run_ends_near_an_unbroken_one_on_a_gpu(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    on_gpu = [data.Split(s.images.cuda(), s.labels.cuda()) for s in splits]
    protocol = training.Protocol(rounds=2, epochs=4, batch_size=64, learning_rate=0.005)
    whole = training.train(fresh(), *on_gpu, protocol, 0.5, seed=3)

    def stop_in_the_middle(progress):
        if (progress.round, progress.epoch) == (2, 3):
            raise Stop

    checkpoint = tmp_path / "round.safetensors"
    with pytest.raises(Stop):
        training.train(fresh(), *on_gpu, protocol, 0.5, seed=3, checkpoint=checkpoint, on_progress=stop_in_the_middle)
    again = training.train(fresh(seed=99), *on_gpu, protocol, 0.5, seed=3, checkpoint=checkpoint)
    assert whole > 90
    assert abs(again - whole) < 3


@pytest.mark.slow
def test_compiled_training_learns(splits):
    model = fresh()
    protocol = training.Protocol(rounds=1, epochs=2, batch_size=32, learning_rate=0.005)
    try:
        accuracy = training.train(model, *splits, protocol, 0.3, seed=0, compiled=True)
    except LtxError as error:
        pytest.skip(str(error))  # no C++ compiler
    assert accuracy > 80


def test_a_compiler_that_does_not_work_is_named(splits, monkeypatch):
    def broken(_):
        def call(images):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

        return call

    import torch._dynamo.exc

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        LtxError, match=r"compile=true: torch.compile does not work here .no C.. compiler.; use compile=false"
    ):
        training.train(fresh(), *splits, PROTOCOL, 0.2, seed=0, compiled=True)
