"""Tables 1 to 4: the paper's values beside measured ones, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from ltx.report import paper
from ltx.report.variants import LEAST_SEEDS, on_same_images, usual_size, variant, with_variants

ACTIVATIONS = {  # those of the paper, in its order, and the others
    "relu": "ReLU", "leaky_relu": "Leaky ReLU", "tanh": "tanh", "sigmoid": "sigmoid", "elu": "ELU", "celu": "CELU",
    "selu": "SELU", "gelu": "GELU", "silu": "SiLU", "softplus": "softplus", "hardtanh": "hardtanh",
    "identity": "identity",
}  # fmt: skip
PM = "±"


def label_of(activation: str) -> str:
    """What an activation is called in tables; of a network of one's own, which may have several, their names."""
    return ACTIVATIONS.get(activation, activation)


@dataclass(frozen=True)
class Table:
    """A table in the forms in which it is written."""

    title: str
    note: str
    numbers: pd.DataFrame  # one row per activation and construction, plain numbers
    shown: pd.DataFrame  # the same as text

    @property
    def csv(self) -> str:
        return self.numbers.to_csv(index=False)

    @property
    def markdown(self) -> str:
        return self.shown.to_markdown(index=False, disable_numparse=True, colalign=self._align)

    @property
    def markdown_page(self) -> str:
        return f"**{self.title}**\n\n{self.markdown}\n\n{self.note}\n"

    @property
    def latex(self) -> str:
        shown = self.shown.map(_tex).rename(columns=_tex)
        body = shown.to_latex(index=False, column_format="ll" + "r" * (len(shown.columns) - 2), escape=False)
        caption = _tex(f"{self.title} {self.note}")
        return f"% needs \\usepackage{{booktabs}}\n\\begin{{table}}\n\\caption{{{caption}}}\n{body}\\end{{table}}\n"

    @property
    def _align(self) -> tuple[str, ...]:
        return ("left", "left") + ("right",) * (len(self.shown.columns) - 2)


_TEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "%&#_${}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
        PM: r"$\pm$", "–": "--", "λ": r"$\lambda$", "≤": r"$\leq$",
    }
)  # fmt: skip


def _tex(text: str) -> str:
    return text.translate(_TEX)


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean and half width 1.96 s / sqrt(n) of the 95 % interval in the paper's form; NaN for a single value."""
    n = len(values)
    numbers = values.to_numpy(dtype=float)
    return numbers.mean(), 1.96 * numbers.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan


def accuracy_table(results: pd.DataFrame) -> Table:
    """Table 1: test accuracy of targets and tickets. The paper's column is its L+1 construction."""
    return _table(
        results, paper.values(1), "target_accuracy", "ticket_accuracy", "difference",
        lambda ticket, target: ticket - target, digits=2, sign="+z",  # z: no -0.00
        title="Table 1. Test accuracy in % of tickets and their targets.",
    )  # fmt: skip


def parameter_table(results: pd.DataFrame) -> Table:
    """Table 2: prunable parameters of targets (above epsilon) and tickets."""
    return _table(
        results, paper.values(2), "target_parameters", "ticket_parameters", "ratio",
        _ratio, digits=0, sign="",
        title="Table 2. Number of prunable parameters of tickets and their targets.",
    )  # fmt: skip


def _ratio(ticket: float, target: float) -> float:
    """NaN where all of the target's parameters are within epsilon of 0."""
    return ticket / target if target else math.nan


def _table(results, published, target_column, ticket_column, relation, relate, *, digits, sign, title) -> Table:
    numbers, shown, images = [], [], []
    first = results.iloc[0]
    on_paper = (first.data, first.network, first["head"]) == ("mnist", "mnist_cnn", "keep")  # as the paper does
    on_paper = on_paper and paper.in_its_setting(results)
    places = f".{digits}f"
    for activation, construction, mine in _variants(results):
        label = label_of(activation)
        theirs = published[published.row == activation].set_index("column")
        target, (mean, half) = float(mine[target_column].iloc[0]), interval(mine.loc[:, ticket_column])
        row = {"activation": label, "construction": construction}
        number: dict[str, str | float] = dict(row)
        text = dict(row)
        if on_paper:
            number |= dict.fromkeys(("paper_target", "paper_ticket", "paper_ci95", f"paper_{relation}"), math.nan)
            text |= dict.fromkeys(("paper: target", "paper: ticket"), "–")
        if on_paper and len(theirs):  # of its four activations
            paper_target = float(theirs.loc["target", "mean"])
            number["paper_target"], text["paper: target"] = paper_target, f"{paper_target:g}"
            if construction == "L+1":  # the paper reports this one only
                paper_mean, paper_half = (float(theirs.loc["ticket", c]) for c in ("mean", "ci95"))
                number["paper_ticket"], number["paper_ci95"] = paper_mean, paper_half
                number[f"paper_{relation}"] = relate(paper_mean, paper_target)
                text["paper: ticket"] = f"{paper_mean:g} {PM} {paper_half:g}"
        related = relate(mean, target)
        number |= {"target": target, "ticket": mean, "ci95": half, relation: related, "n": len(mine), **_made(mine)}
        text["target"] = f"{target:{places}}"
        text["ticket"] = f"{mean:{places}} {PM} {half:{places}}" if len(mine) > 1 else f"{mean:{places}}"
        text[relation] = "–" if math.isnan(related) else f"{related:{sign}.2f}"
        text["n"] = str(len(mine))
        numbers.append(number)
        shown.append(text)
        images.append(number["images"])
    if len(set(images)) > 1:
        for text, many in zip(shown, images, strict=True):
            text["images"] = str(many)
    on = f"{images[0]} test images" if len(set(images)) == 1 else "fixed random test images, where not all are"
    note = (
        f"Mean {PM} 1.96 s / sqrt(n) over n seeds of the source; m = {usual_size(results)}, epsilon = "
        f"{first.epsilon:g}, {_subsets(results)}, head: {first['head']}{_built(results)}; {first.data}, {on}"
        f"{_trained(results)}. {_kinds(results)}"
    )
    return Table(title, note, pd.DataFrame(numbers), pd.DataFrame(shown))


def deep_accuracy_table(results: pd.DataFrame) -> Table:
    """Table 3: test accuracy for ResNet-22. The paper's columns are of the sampled protocol."""
    numbers, shown = [], []
    for activation, kind, mine, theirs in _deep_rows(results, paper.values(3)):
        accuracy = mine.ticket_accuracy
        target, (mean, half) = float(mine.target_accuracy.mean()), interval(accuracy)
        row = {"activation": ACTIVATIONS[activation], "ticket": kind if kind == "sampled" else f"explicit {kind}"}
        number: dict[str, str | float] = dict(row)
        text = dict(row)
        for column in ("target", "ticket", "ticket_best_half"):
            name = column.replace("_", " ").replace("ticket ", "")
            number[f"paper_{column}"] = number[f"paper_{column}_ci95"] = math.nan
            text[f"paper: {name}"] = "–"
            if kind == "sampled" and len(theirs):
                paper_mean, paper_half = (float(theirs.loc[column, c]) for c in ("mean", "ci95"))
                number[f"paper_{column}"], number[f"paper_{column}_ci95"] = paper_mean, paper_half
                text[f"paper: {name}"] = _pm(paper_mean, paper_half, "g")
        number |= {"target": target, "mean": mean, "ci95": half, "difference": mean - target}
        text |= {"target": f"{target:.2f}", "mean": _pm(mean, half, ".2f"), "difference": f"{mean - target:+z.2f}"}
        number["best_half"], number["best_half_ci95"], text["best half"] = math.nan, math.nan, "–"
        if kind == "sampled" and len(mine) > 1:
            best, best_half = interval(accuracy.sort_values(ascending=False).iloc[: len(mine) // 2])
            number["best_half"], number["best_half_ci95"], text["best half"] = (
                best,
                best_half,
                _pm(best, best_half, ".2f"),
            )
        number |= {"agreement": float(mine.agreement.mean()), "n": len(mine), **_made(mine)}
        text |= {"agreement": f"{mine.agreement.mean():.1f}", "n": str(len(mine)), "images": _unique(mine.examples)}
        text["training"] = _unique(mine.target_training)
        numbers.append(number)
        shown.append(text)
    return Table(
        f"Table 3. Test accuracy in % of ResNet-22 on {_data(results)}.", _deep_note(results), pd.DataFrame(numbers),
        pd.DataFrame(shown),
    )  # fmt: skip


def deep_parameter_table(results: pd.DataFrame) -> Table:
    """Table 4: prunable parameters for ResNet-22. The paper's columns are of the sampled protocol."""
    numbers, shown = [], []
    for activation, kind, mine, theirs in _deep_rows(results, paper.values(4)):
        target, (mean, half) = float(mine.target_parameters.iloc[0]), interval(mine.ticket_parameters)
        ratio = _ratio(mean, target)
        source = float(mine.source_parameters.mean()) if kind != "sampled" else math.nan
        row = {"activation": ACTIVATIONS[activation], "ticket": kind if kind == "sampled" else f"explicit {kind}"}
        number: dict[str, str | float] = dict(row)
        text = dict(row)
        number |= dict.fromkeys(("paper_target", "paper_ticket", "paper_ticket_ci95", "paper_ratio"), math.nan)
        text |= dict.fromkeys(("paper: target", "paper: ticket", "paper: ratio"), "–")
        if kind == "sampled" and len(theirs):
            paper_target, paper_mean, paper_half = (
                float(theirs.loc[c, v]) for c, v in (("target", "mean"), ("ticket", "mean"), ("ticket", "ci95"))
            )
            number |= {"paper_target": paper_target, "paper_ticket": paper_mean, "paper_ticket_ci95": paper_half,
                       "paper_ratio": paper_mean / paper_target}  # fmt: skip
            text |= {"paper: target": f"{paper_target:.0f}", "paper: ticket": _pm(paper_mean, paper_half, ".0f"),
                     "paper: ratio": f"{paper_mean / paper_target:.2f}"}  # fmt: skip
        number |= {"target": target, "mean": mean, "ci95": half, "ratio": ratio, "source": source, "n": len(mine),
                   **_made(mine)}  # fmt: skip
        text |= {
            "target": f"{target:.0f}", "mean": _pm(mean, half, ".0f"),
            "ratio": "–" if math.isnan(ratio) else f"{ratio:.2f}",
            "source": "–" if math.isnan(source) else f"{source / 1e6:.0f} million", "n": str(len(mine)),
        }  # fmt: skip
        numbers.append(number)
        shown.append(text)
    return Table(
        f"Table 4. Number of prunable parameters of ResNet-22 on {_data(results)}.", _deep_note(results),
        pd.DataFrame(numbers), pd.DataFrame(shown),
    )  # fmt: skip


def _variants(results: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(activation, variant, results of that row, on the same images), in the order of the tables."""
    named = on_same_images(with_variants(results))
    others = dict.fromkeys(name for name in named.activation if name not in ACTIVATIONS)  # of one's own: several
    for activation in (*ACTIVATIONS, *others):
        mine = named.loc[named.activation == activation]
        for name in dict.fromkeys(mine.variant):
            yield activation, name, mine.loc[mine.variant == name]


def _made(mine: pd.DataFrame) -> dict[str, str | float]:
    """For the CSV file, what a row was measured on and made with."""
    first = mine.iloc[0]
    law = first.get("law")
    return {
        "images": int(first.examples), "training": _unique(mine.target_training) if "target_training" in mine else "–",
        "m": int(first.base_set_size), "epsilon": float(first.epsilon), "selection": first.selection,
        "head": first["head"], "law": "uniform" if pd.isna(law) else law, "target_sha256": first.get("target_sha256"),
    }  # fmt: skip


def _trained(results: pd.DataFrame) -> str:
    """How the targets were trained, for a note; nothing where no file says it."""
    if "target_training" not in results or results.target_training.isna().all():
        return ""
    labels = results.activation.map(label_of).groupby(results.target_training.fillna("unknown")).unique()
    of = {how: "" if len(labels) == 1 else f" ({', '.join(sorted(who))})" for how, who in labels.items()}
    return f"; training of the targets: {'; '.join(f'{how}{who}' for how, who in of.items())}"


def left_out(results: pd.DataFrame) -> str:
    """For a note, how many results were on other images than those of their row."""
    named = with_variants(results)
    many = len(named) - len(on_same_images(named))
    return f" Results on another number of images than most of their row, left out: {many}." if many else ""


def _built(results: pd.DataFrame) -> str:
    """What of the source is not as usual, for a note; scaling of those with feedback stands in their rows."""
    explicit = results.loc[results.kind == "explicit"]
    plain = explicit.loc[explicit.selection != "feedback"]
    if explicit.empty:
        return ""
    first, parts = (plain if len(plain) else explicit).iloc[0].dropna(), []
    if len(plain) and first.get("scaling", "unit") != "unit":
        parts.append(f"scaling: {first.scaling}")
    if first.get("law", "uniform") != "uniform":
        parts.append(f"law: {first.law}")
    if first.get("pair_kernel", 1) != 1 or first.get("pair_stride", "second") != "second":
        parts.append(f"pairs: kernel {first.pair_kernel}, stride in the {first.pair_stride} layer")
    return "".join(f", {part}" for part in parts)


def _kinds(results: pd.DataFrame, how: str = "") -> str:
    """What rows are, for a note."""
    laws = set() if "law" not in results else set(results.law.dropna()) - {"uniform"}
    of = "".join(f" of a {law} source" for law in sorted(laws))
    parts = {
        "sampled": "Sampled: no ticket is built, the target's parameters get the errors of random subset-sum "
        f"problems{of}, and an L+1 ticket's parameters are estimated; that is the paper's protocol for ResNet-22.",
        "explicit": f"Explicit: masks on a random source, each verified against its source and its target{how}.",
    }
    return " ".join(text for kind, text in parts.items() if (results.kind == kind).any())


def _subsets(results: pd.DataFrame) -> str:
    """How subsets were chosen, for a note."""
    plain = [name for name in results.selection.unique() if name != "feedback"]
    parts = [f"{' and '.join(plain)} subsets"] if plain else []
    if (results.selection == "feedback").any():
        parts.append(
            f"with feedback {'those' if plain else 'subsets'} that lower the error of their row on calibration images, "
            "whose parameters are not within epsilon of the target's but where there is a bound (λ: share of the "
            f"variance by which a parameter has to lower the error; variants with at least {LEAST_SEEDS} seeds)"
        )
    return "; ".join(parts)


def _deep_rows(results: pd.DataFrame, published: pd.DataFrame):
    """(activation, kind, results of that row, the paper's values for the activation)."""
    for activation, name, mine in _variants(results):
        on_paper = (mine.data == "cifar10").all() and (mine["head"] == "construct").all() and paper.in_its_setting(mine)
        yield activation, name, mine, published[(published.row == activation) & on_paper].set_index("column")


def _data(results: pd.DataFrame) -> str:
    name = str(results.data.iloc[0])
    return {"cifar10": "CIFAR-10", "mnist": "MNIST"}.get(name, name)


def _deep_note(results: pd.DataFrame) -> str:
    first = results.iloc[0]
    normalised = results[results.kind == "explicit"].batch_norm
    shortcuts = "; errors are not sampled for the projection shortcuts" * int((results.kind == "sampled").any())
    how = f" (head: {first['head']}, batch norm: {_unique(normalised)}{_built(results)})"
    many = "10000" if results.data.iloc[0] == "cifar10" else "all"
    return (
        f"Mean {PM} 1.96 s / sqrt(n) over n seeds; m = {usual_size(results)}, epsilon = {first.epsilon:g}, "
        f"{_subsets(results)}. {_kinds(results, how)} Fewer than {many} images are "
        "a fixed random subset, for the target too; the target's parameters are those above epsilon of the layers that "
        f"are approximated{shortcuts}."
    )


def failure_note(failures: list[dict], base_set_size: int) -> str:
    """Which tickets could not be constructed, and why; nothing where all could.

    Args:
        base_set_size: that which goes without saying, `usual_size` of the results.
    """
    lines = [
        f" Not constructed, and not in the means: {label_of(f['activation'])}, {variant(f, base_set_size)}, "
        f"seed {f['seed']} ({f['error']})."
        for f in failures
    ]
    return "".join(lines)


def _pm(mean: float, half: float, form: str) -> str:
    return f"{mean:{form}}" if math.isnan(half) else f"{mean:{form}} {PM} {half:{form}}"


def _unique(values: pd.Series) -> str:
    return ", ".join(str(value) for value in values.dropna().unique()) or "–"
