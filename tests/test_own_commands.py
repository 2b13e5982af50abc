"""The commands on a network of the user's own, target.module=PACKAGE.MODULE:FACTORY."""

import json
import sys

import pandas as pd
import pytest
import torch
from conftest import one_line
from torch.nn.utils import prune

from ltx import data, theory
from ltx.errors import ConstructionError
from ltx.graph import fold_batch_norm, trace
from ltx.targets import imported
from ltx.ticket import Ticket


@pytest.mark.slow
def test_the_command(own, ltx, tmp_path):
    given = ["target=digits", f"target.module={own}:make", "head=construct", "m=20", "scaling=layer_max"]
    status, out, err = ltx("construct", *given, "construction=2L")
    assert status == 0, err
    path = tmp_path / out.splitlines()[-1]
    ticket = Ticket.load(path)
    assert ticket.activation == "relu"
    for command in ("verify", "eval", "certify"):
        status, out, err = ltx(command, *given, "construction=2L", *(["certify.starts=4"] * (command == "certify")))
        assert status == 0, err
    assert json.loads(path.with_name("result.json").read_text())["network"] == f"{own}:make"
    graph = trace(imported(f"{own}:make"))
    theorem = theory.ticket_error(
        graph, dict.fromkeys(graph.layers, 0.01), dict.fromkeys(graph.layers, 20), construction="2L", head="construct",
        scaling="layer_max", input_range=data.dataset_spec("digits").input_range,
    )  # fmt: skip
    assert json.loads(path.with_name("certificate.json").read_text())["theorem"] == theorem
    again = [str(path), "target=digits", f"target.module={own}:make"]
    assert ltx("verify", *again)[0] == 0


def test_bounds_are_of_the_network_that_is_approximated(own, ltx):
    """Batch norm is a layer of it, or folded into the convolution."""
    given = ("bounds", "target=digits", f"target.module={own}:normalised", "scaling=layer_max", "m=20")
    graph, allowed = trace(imported(f"{own}:normalised")), []
    for kind, approximated in (("keep", graph), ("fold", fold_batch_norm(graph))):
        status, out, err = ltx(*given, f"batch_norm={kind}")
        assert status == 0, err
        table = pd.read_csv(out.splitlines()[-1])
        assert table.columns[0] == "layer"
        assert (table.used_width > 0).all()
        found = theory.guarantee(
            approximated, 0.1, 0.05, construction="L+1", input_range=data.dataset_spec("digits").input_range,
            head="keep", scaling="layer_max",
        )  # fmt: skip
        assert table.allowed.tolist() == pytest.approx([layer.allowed for layer in found.layers])
        allowed.append(table.allowed[0])
    assert allowed[0] != pytest.approx(allowed[1], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "masks", "prune", "parallel", "called module"])
def test_checkpoints_with_masks(own, kind, ltx, tmp_path):
    name = f"{own}:{'Wrapped' if kind == 'called module' else 'make'}"
    whole = imported(name)
    model = whole.module if kind == "called module" else whole
    with torch.no_grad():
        for n in (0, 5, 9):
            mask = (torch.rand(model[n].weight.shape, generator=torch.Generator().manual_seed(n)) < 0.5).float()
            if kind == "prune":
                prune.custom_from_mask(model[n], "weight", mask)
            elif kind == "masks":
                model[n].register_buffer("weight_mask", mask)
            else:
                model[n].weight.mul_(mask)
    state = {f"module.{key}" if kind == "parallel" else key: value for key, value in whole.state_dict().items()}
    torch.save(state, tmp_path / "own.pt")
    given = ["target=digits", f"target.module={name}", f"target.checkpoint={tmp_path / 'own.pt'}", "head=construct",
             "m=20", "scaling=layer_max", "construction=2L"]  # fmt: skip
    status, out, err = ltx("construct", *given)
    assert status == 0, err
    ticket = Ticket.load(tmp_path / out.splitlines()[-1])
    if kind == "masks":  # which forward does not apply
        with pytest.raises(ConstructionError, match=r"module '0' \(Conv2d\): its buffer weight_mask is not applied"):
            trace(whole)
        with torch.no_grad():
            for n in (0, 5, 9):
                model[n].weight.mul_(model[n].weight_mask)
    assert ticket.target_sha256 == trace(whole).digest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("target.module=nothing_here:make", "target.module=nothing_here:make: ModuleNotFoundError: No module named"),
        ("target.module=OWN:none", "has no attribute 'none'"),
        ("target.module=OWN", "must be PACKAGE.MODULE:FACTORY, e.g. torchvision.models:resnet18"),
        ("target.module=OWN:number", "makes a int, not a torch.nn.Module"),
        ("target.module=OWN:attention", "ltx: "),
        ("target.module=OWN:leaves", "OWN:leaves: SystemExit: 0"),
        ("target.module=OWN:attention_behind_a_mean", "module 'attention' (MultiheadAttention): not supported"),
        (
            "activation=tanh target.module=OWN:make",
            "activation=tanh has no meaning for target.module=OWN:make, which has relu; leave it out",
        ),
        (
            "activation=relu target.module=OWN:two_functions",
            "activation=relu has no meaning for target.module=OWN:two_functions, which has relu,tanh; leave it out",
        ),
        ("target.module=torch.nn:ReLU", "ends with 'relu', which is no linear layer, so that there is no head to keep"),
        ("target.module=OWN:empty", "module '1' (Linear): has no values, it lies on the device 'meta'"),
    ],
)
def test_bad_modules(given, message, own, ltx, tmp_path):
    status, out, err = ltx("construct", "target=digits", *given.replace("OWN", own).split())
    assert (status, out) == (1, "")
    assert message.replace("OWN", own) in err.strip().splitlines()[-1]
    assert not list(tmp_path.glob("tickets"))


@pytest.mark.slow
def test_modules_that_have_no_meaning(own, ltx, tmp_path):
    for command, given, message in (
        ("train-target", [], "train-target: target.module names a network of your own"),
        ("construct", ["construction=sampled"], "construction=sampled perturbs the paper's targets alone"),
        ("construct", ["target.input_range=[1,0]"], "must be [LOW, HIGH] with LOW < HIGH, or null"),
    ):
        status, _, err = ltx(command, "target=digits", f"target.module={own}:make", *given)
        assert status == 1
        assert message in one_line(err)


def test_what_a_factory_prints_is_no_path(own, ltx, tmp_path):
    (tmp_path / "printing_network.py").write_text(
        f"import {own}\ndef make():\n    print('made')\n    return {own}.make()\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        status, out, err = ltx("construct", "target=digits", "target.module=printing_network:make", "m=20")
    finally:
        sys.path.remove(str(tmp_path))
    assert status == 0, err
    assert "made" not in out
    assert "made\n" in err


@pytest.mark.slow
def test_data_that_do_not_fit(own, ltx, tmp_path):
    given = [f"target.module={own}:make", "head=construct", "m=20", "scaling=layer_max", "construction=2L"]
    status, out, err = ltx("construct", "target=digits", *given)
    assert status == 0, err
    path = tmp_path / out.splitlines()[-1]
    there = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for command, more in (
        ("eval", [str(path)]),
        ("certify", [str(path)]),
        ("construct", ["selection=feedback", "construction=L+1"]),
        ("export", [str(path), "format=onnx"]),
    ):
        status, _, err = ltx(command, "target=resnet22", *given, *more)
        assert status == 1
        said = "the ticket" if command == "export" else f"target.module={own}:make:"
        images = "(3, 32, 32)" if command == "export" else "of cifar10, (3, 32, 32)"
        assert f"{said} cannot take images {images}" in err.strip().splitlines()[-1]
        assert "Traceback" not in err
    wide = ["target=digits", *given, "target.input_range=[-9,9]"]  # beyond what the ticket was made for
    status, _, err = ltx("certify", str(path), *wide)
    assert status == 1
    assert "inputs: made for [-0.811752, 1.84712], digits has [-9, 9]" in err.strip().splitlines()[-1]
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == there


@pytest.mark.slow
def test_results_on_other_data_are_others(own, ltx, tmp_path, monkeypatch):
    """No file says which data a network of one's own is for."""
    monkeypatch.setitem(data.DATASETS, "elsewhere", data.DATASETS["digits"])
    given = [f"target.module={own}:make", "head=construct", "m=20", "scaling=layer_max", "construction=2L", "limit=20"]
    made = []
    for name in ("digits", "elsewhere"):
        where = ["target=digits", f"data.name={name}", *given]
        assert ltx("construct", *where)[0] == 0
        status, out, err = ltx("eval", *where)
        assert (status, "there already" in err) == (0, False)
        made.append(tmp_path / out.splitlines()[-1])
        assert json.loads(made[-1].read_text())["data"] == name
        assert "there already" in ltx("eval", *where)[2]
    assert made[0] != made[1]
    for name in ("digits", "elsewhere"):
        status, _, err = ltx("tables", "target=digits", f"data.name={name}", *given)
        assert status == 0, err
        rows = pd.read_csv(tmp_path / "tables" / f"results-make-{name}-construct-layer_max-m20-eps0.01.csv")
        assert rows.data.tolist() == [name]
    ticket = made[0].with_name("ticket.safetensors")  # as a file, which its folder's name says nothing of
    for command in ("eval", "certify"):
        for name, there in (("digits", command == "eval"), ("elsewhere", False), ("elsewhere", True)):
            where = ["target=digits", f"data.name={name}", *given, "certify.starts=0"]
            status, _, err = ltx(command, str(ticket), *where)
            assert (status, "there already" in err) == (0, there), (command, name)


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["make", "two_functions"])
def test_tables_of_a_network_of_ones_own(own, ltx, tmp_path, monkeypatch, factory):
    """They are not the paper's networks, whatever their data: its values do not stand beside theirs."""
    monkeypatch.setitem(data.DATASETS, "mnist", data.DATASETS["digits"])
    given = ["target=mnist", f"target.module={own}:{factory}", "head=construct", "m=20", "scaling=layer_max"]
    given += ["construction=2L", "limit=20"]
    for seed in ("seed=0", "seed=1"):
        assert ltx("construct", *given, seed)[0] == 0
        assert ltx("eval", *given, seed)[0] == 0
    accounts = [json.loads(path.read_text()) for path in tmp_path.glob("tickets/*/*/construction.json")]
    functions = {"make": "relu", "two_functions": "relu,tanh"}[factory]
    assert [account["activation"] for account in accounts] == [functions, functions]
    assert not any("activation" in account["settings"] for account in accounts)  # none was asked for
    status, _, err = ltx("tables", *given)
    assert status == 0, err
    table = pd.read_csv(tmp_path / "tables" / f"table1-{factory}-mnist-construct-layer_max-m20-eps0.01.csv")
    assert table.activation.tolist() == [{"make": "ReLU", "two_functions": "relu,tanh"}[factory]]
    assert table.n.tolist() == [2]
    assert not [column for column in table if "paper" in column]
    assert (
        "mnist, 20 test images"
        in (tmp_path / "tables" / f"table1-{factory}-mnist-construct-layer_max-m20-eps0.01.md").read_text()
    )
    said = ltx("tables", *given, "epsilon=0.02")[2].splitlines()[-1]
    assert f"for target.module={own}:{factory} m=20" in said
    assert "paper-tables" not in said
    status, _, err = ltx("tables", *given, "target.module=nowhere:make")
    assert status == 1
    assert "nowhere" in err.strip().splitlines()[-1]


@pytest.mark.slow
def test_outputs_that_are_images(own, ltx, tmp_path):
    given = ["target=digits", f"target.module={own}:spatial", "head=construct", "m=20", "scaling=layer_max"]
    status, out, err = ltx("construct", *given)
    assert status == 0, err
    path = str(tmp_path / out.splitlines()[-1])
    assert ltx("verify", path, *given)[0] == 0
    for command in ("eval", "certify"):
        status, _, err = ltx(command, path, *given)
        assert status == 1
        assert "its output for an image is (3, 4, 4), not a vector of classes" in err.strip().splitlines()[-1]
        assert "Traceback" not in err


def test_float64_is_rounded(own, ltx, tmp_path):
    given = [
        "target=digits",
        f"target.module={own}:double",
        "head=construct",
        "m=20",
        "scaling=layer_max",
        "construction=2L",
    ]
    status, _, err = ltx("construct", *given)
    assert status == 0, err
    assert "its float64 parameters are rounded to float32" in err
    assert ltx("eval", *given)[0] == 0


@pytest.mark.parametrize("command", ["construct", "eval", "bounds", "tables"])
def test_folding_without_batch_norm_has_no_meaning(own, command, ltx, tmp_path):
    """Its ticket would be that of batch_norm=keep, in a folder of another name, and count twice."""
    status, out, err = ltx(command, "target=digits", f"target.module={own}:large", "batch_norm=fold")
    assert (status, out) == (1, "")
    assert "batch_norm=fold has no meaning" in err.strip().splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]


@pytest.mark.slow
def test_how_to_give_the_target_of_a_ticket_is_said(own, ltx, tmp_path):
    given = ["target=digits", "head=construct", "m=20", "scaling=layer_max", "construction=2L"]
    status, out, err = ltx("construct", *given, f"target.module={own}:make")
    assert status == 0, err
    path = str(tmp_path / out.splitlines()[-1])
    for command, expected in (("verify", 0), ("eval", 1), ("certify", 1)):
        status, _, err = ltx(command, path)
        assert status == expected
        assert "is not known here" in err
        assert "one of your own with target.module=PACKAGE.MODULE:FACTORY" in err


def test_a_factory_that_draws_anew_has_another_target_each_time(own, ltx):
    given = ["target=digits", f"target.module={own}:unseeded", "construction=2L", "head=construct"]
    status, _, err = ltx("construct", *given)
    assert status == 0, err
    status, _, err = ltx("verify", *given)
    assert status == 1
    assert "its parameters are other ones each time" in err.strip().splitlines()[-1]
