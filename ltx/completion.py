"""`ltx completion SHELL`: a script by which a shell completes commands, settings and their values.

The scripts ask `ltx completion query LINE`. Static like `ltx.help`, whose table it reads, so that a key press is quick.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence

from ltx.help import ACTIVATION_NAMES, FILE, SETTINGS

SCRIPTS = {
    "bash": """\
_ltx() {
    local line="${COMP_LINE:0:COMP_POINT}" word found
    word="${line##*[!\\\\][[:space:]]}"
    if [[ $COMP_WORDBREAKS == *=* && $word == *=* ]]; then word="${word%=*}="; else word=""; fi  # a = ends bash's words
    COMPREPLY=()
    while IFS= read -r found; do
        found="${found#"$word"}"
        [[ $found == *[!A-Za-z0-9_./=,+-]* ]] && found="$(printf %q "$found")"
        COMPREPLY+=("$found")
    done < <(ltx completion query "$line" 2>/dev/null)
    case "${COMPREPLY[0]}" in *= | */) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _ltx ltx
""",
    "zsh": """\
_ltx() {
    local -a found
    found=("${(@f)$(ltx completion query "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    compadd -S '' -- ${(M)found:#*[=/]}
    compadd -- ${found:#*[=/]}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _ltx ltx
""",
    "fish": "complete -c ltx -f -a '(ltx completion query (commandline -cp) 2>/dev/null)'\n",
}
_FLAGS = {"--help": (), "--multirun": (), "--cfg": ("job", "hydra", "all"), "--config-dir": ()}
_VALUE = re.compile(r"(?!positive|odd)[a-z]\w*|2L|L\+1")  # where a row of the table names one, not of what kind it is


def candidates(line: str, commands: Iterable[str], experiments: Sequence[str]) -> list[str]:
    """What may stand in place of the last word of `line`, which is all from `ltx` to the cursor."""
    *before, word = (re.sub(r"\\(.)", r"\1", w) for w in re.split(r"(?<!\\) ", line))
    before = [w for w in before if w]
    if len(before) < 2:
        return _starting(word, (*commands, "completion"))
    command, last = before[1], before[-1]
    if command == "completion":
        return _starting(word, SCRIPTS) if len(before) == 2 else []
    if behind := _FLAGS.get(last):
        return _starting(word, behind)
    if last == "--config-dir":
        return _paths(word)
    values = {key: values for key, _, values, _, who in SETTINGS if command in who}
    key, equals, value = word.partition("=")
    if not equals and word.startswith("-"):
        return _starting(word, _FLAGS)
    if not equals:
        return _starting(word, (f"{key}=" for key in values)) + (_paths(word) if command in FILE else [])
    start, key = f"{key}=", key.lstrip("+")
    if key == "--config-dir" or values.get(key) in ("FILE", "DIR"):
        return [start + path for path in _paths(value)]
    if listed := value.rpartition(",")[0]:  # of a sweep: A,B,
        start += f"{listed},"
    choices = values.get(key, "").split(", ")
    if key in values and key in ("activation", "experiment"):  # of which the table names some
        choices = ACTIVATION_NAMES if key == "activation" else experiments
    return _starting(word, (start + choice for choice in choices if _VALUE.fullmatch(choice)))


def _paths(start: str) -> list[str]:
    """Files and folders, these with a / behind."""
    found = sorted(glob.glob(glob.escape(os.path.expanduser(start)) + "*"))
    return [path + "/" if os.path.isdir(path) else path for path in found]


def _starting(word: str, all_of_them: Iterable[str]) -> list[str]:
    return [one for one in all_of_them if one.startswith(word)]
