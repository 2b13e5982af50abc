"""`ltx COMMAND --help`: every setting, its default, what it may be, and what it does. Static, so that it is quick."""

from __future__ import annotations

import re

ALL = ("train-target", "construct", "eval", "verify", "certify", "export", "tables", "bounds")
SUMS = ("subset-sum", "figures", "bench")
PLAIN = (*SUMS, "page")  # those that look at no target
TRAIN = ("train-target",)
TICKET = ("construct", "eval", "verify", "certify", "export", "tables")
BUILD = (*TICKET, "bounds")
FILE = ("eval", "verify", "certify", "export")
ACTIVATION_NAMES = (
    "relu", "leaky_relu", "tanh", "sigmoid", "identity", "elu", "celu", "selu", "gelu", "silu", "softplus", "hardtanh",
)  # fmt: skip
SEE_HELP = "ltx COMMAND --help lists the settings"  # behind messages of settings that there are none of

# key, default, values, meaning, commands that look at it
SETTINGS = (
    ("target", "mnist", "mnist, resnet22, digits", "network, data and densities together", ALL),
    ("data", "mnist", "mnist, cifar10, digits", "images; else those of target=", ALL),
    ("activation", "relu", "relu, leaky_relu, tanh, sigmoid, gelu, ...", "of the target", ALL),
    ("protocol", "quick", "paper, quick, smoke", "12 x 50, 12 x 2, 2 x 1 rounds x epochs of training", ALL),
    ("protocol.rounds", "12", "1 or more", "pruning steps", TRAIN),
    ("protocol.epochs", "2", "1 or more", "of training after each pruning step", TRAIN),
    ("target.density", "0.1", "(0, 1], null", "share that pruning keeps; null: the activation's", TRAIN),
    ("target.crop", "0", "0 to 16", "pixels by which training images are shifted at random", TRAIN),
    ("target.flip", "false", "true, false", "mirror training images at random", TRAIN),
    ("target.scope", "local", "local, global", "prune every layer to the density, or all together", TRAIN),
    ("target.seed", "0", "0 to 2**32 - 1", "of initialisation and training", TRAIN),
    ("target.batch_size", "256", "1 or more", "images of a training step", TRAIN),
    ("target.learning_rate", "0.01", "positive", "largest of a round", TRAIN),
    ("target.weight_decay", "0.1", "0 or more", "AdamW's", TRAIN),
    ("target.bound", "0.99", "(0, 1e38), null", "parameters are kept within it", TRAIN),
    ("target.checkpoint", "null", "FILE", "a given target: .safetensors, or Synaptic-Flow's .pt", BUILD),
    ("target.module", "null", "PACKAGE.MODULE:FACTORY", "a network of your own", BUILD),
    ("target.input_range", "null", "[LOW, HIGH], null", "of an input element; null: that of the data", BUILD),
    ("construction", "L+1", "2L, L+1, sampled", "two source layers for a target layer, or one; sampled errors", TICKET),
    ("construction", "L+1", "2L, L+1", "two source layers for a target layer, or one", ("bounds",)),
    (
        "law",
        "uniform",
        "uniform, product, normal, normal_product",
        "of the base sets",
        ("subset-sum", "bench"),
    ),
    ("law", "uniform", "uniform, normal", "of the source's parameters", (*BUILD, "figures")),
    ("m", "15", "1 to 32", "base set size (bounds: any)", (*BUILD, "subset-sum", "figures")),
    ("epsilon", "0.01", "positive", "allowed error of one parameter", (*BUILD, *SUMS)),
    (
        "selection",
        "smallest",
        "smallest, best, feedback",
        "smallest subset within epsilon, best of all, or by what rows compute",
        TICKET,
    ),
    ("selection", "smallest", "smallest, best", "smallest subset within epsilon, or best of all", ("subset-sum",)),
    ("feedback.samples", "4000", "1 or more", "positions of activations at which a row's error is looked at", TICKET),
    ("feedback.images", "128", "1 or more", "for calibration, unlabelled, of the training split", TICKET),
    ("feedback.sweeps", "4", "1 to 100", "later ones take each subset out and choose again", TICKET),
    ("feedback.refine", "3", "0 to 100", "then passes in which each entry may give way to any other", TICKET),
    ("feedback.max_subset", "3", "1 to 7", "elements of a subset", TICKET),
    (
        "feedback.penalty",
        "5.0e-8",
        "0 or more",
        "share of variance by which a parameter has to lower an error",
        TICKET,
    ),
    ("feedback.bound", "null", "positive, null", "on the error of every single parameter", TICKET),
    ("feedback.reject", "1.5", "1 or more, null", "give up rows with so many times the usual error", TICKET),
    ("feedback.spread", "0.5", "0 to 1", "L+1: more slots where channels are few; 0: m everywhere", TICKET),
    ("feedback.order", "random", "random, largest", "of a row's parameters", TICKET),
    ("bounds.error", "0.1", "positive", "largest deviation of an output, over all inputs", ("bounds",)),
    ("bounds.delta", "0.05", "(0, 1)", "probability that the source holds no such ticket", ("bounds",)),
    (
        "bounds.form",
        "norms",
        "norms, theorem",
        "with the target's norms, or the paper's counts of parameters",
        ("bounds",),
    ),
    (
        "bounds.single",
        "null",
        "positive, null",
        "C of Corollary 2.2, parameters; null: measured",
        ("bounds",),
    ),
    ("bounds.product", "null", "positive, null", "the same for products of two", ("bounds",)),
    ("format", "masks", "masks, prune, onnx", "dense parameters and masks, torch.nn.utils.prune's, ONNX", ("export",)),
    ("certify.starts", "100", "0 to 10**6", "of gradient ascent on the deviation", ("certify",)),
    ("certify.steps", "100", "1 to 10**5", "of each", ("certify",)),
    ("theta", "null", "-1e100 to 1e100, null", "one target for all problems, or uniform on [-1, 1)", ("subset-sum",)),
    ("problems", "100000", "2 to 10**8", "random problems", ("subset-sum", "figures")),
    ("seconds", "2", "positive", "how long to measure each solver at each m", ("bench",)),
    (
        "head",
        "keep",
        "keep, construct",
        "take the classifier from the target, or approximate it (resnet22: construct)",
        BUILD,
    ),
    ("scaling", "unit", "unit, layer_max", "draw from [-1, 1], or as far as a layer reaches", BUILD),
    ("batch_norm", "keep", "keep, fold", "take batch norm from the target, or fold it into its weights", BUILD),
    ("pair.kernel", "1", "odd", "of the first layer of a pair; a row keeps one entry of it", BUILD),
    ("pair.stride", "second", "second, first", "the layer of a pair that has the target's stride", BUILD),
    ("seed", "0", "0 to 2**64 - 1", "of the source network, of random problems", (*BUILD, *SUMS)),
    ("ticket", "null", "FILE", "a ticket file, also as plain argument; so also several", FILE),
    ("limit", "null", "1 or more", "a fixed random subset of the test images", ("eval", "certify", "tables")),
    (
        "data.root",
        "null",
        "DIR",
        "of the data; else LTX_DATA, else ~/.cache/ltx",
        ("train-target", "construct", "eval", "verify", "certify"),
    ),
    ("device", "auto", "auto, cpu, cuda", "", (*ALL, *SUMS)),
    ("compile", "false", "true, false", "train through torch.compile; needs a C++ compiler or a GPU", TRAIN),
    ("output_dir", "outputs", "DIR", "where artefacts go and are found", (*ALL, *PLAIN)),
    ("use_reference", "true", "true, false", "use the targets kept in outputs/reference", ALL),
    (
        "force",
        "false",
        "true, false",
        "do the work again although its result is there",
        (*TRAIN, "construct", "eval", "certify", "export", "bounds", "subset-sum", "figures"),
    ),
    (
        "experiment",
        "null",
        "names in conf/experiment",
        "a ready-made sweep, with --multirun",
        TICKET,
    ),
)

_TRAINED = (  # where a trained target is looked for
    "a trained target is found by the settings that it was trained with: where ltx train-target was given others than",
    "the usual (target.seed, target.density, protocol.epochs, ...), say them here too.",
    "",
)


def override(key: str, value: object, *, always: bool = False) -> str:
    """`KEY=VALUE` as Hydra reads it back: in quotes where VALUE has more than letters, or `always`."""
    text = str(value)
    if not always and re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return f"{key}={text}"
    escaped = re.sub(r"(\\+)(?=$|')", r"\1\1", text).replace("'", "\\'")
    return f"{key}='{escaped}'"


def command_help(command: str, summary: str) -> str:
    """The page of one command."""
    rows = [(f"{key}={default}", values, text) for key, default, values, text, who in SETTINGS if command in who]
    widths = [max(len(row[n]) for row in rows) for n in (0, 1)]
    file = " [TICKET ...]" if command in FILE else ""
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join(
        [
            f"usage: ltx {command}{file} [KEY=VALUE ...] [--multirun KEY=A,B,C]",
            "",
            summary,
            "",
            f"settings{'' if command in PLAIN else ' (with target=mnist)'}, what they may be, and what they do:",
            *lines,
            "",
            *(_TRAINED if command in BUILD else ()),
            "--multirun runs every combination of listed values; --cfg job prints the resolved settings;",
            "--info, --hydra-help and --experimental-rerun are Hydra's.",
        ]
    )
