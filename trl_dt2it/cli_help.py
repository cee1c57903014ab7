"""What `trl-dt2it --help` and `trl-dt2it VERB --help` say: examples first, then the flags that matter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from textwrap import wrap
from typing import Any

from .cli_verbs import VERBS, Verb


WIDTH = 110
_FLAG_WIDTH = 30


def overview() -> str:
    """The verbs, and a first command to try."""
    lines = ["Multimodal reward models, from preference pairs to a report.", "", "usage: trl-dt2it VERB [flags]", ""]
    lines += [f"  {name:<11}{verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "From nothing to a trained reward model on real handwriting, in two minutes on 2 cores:", ""]
    lines += ["  trl-dt2it train --config digits", "", "trl-dt2it VERB --help shows examples."]
    return "\n".join(lines) + "\n"


def help_of(name: str, verb: Verb, kinds: Sequence[Any]) -> str:
    """
    The help of a verb.

    Args:
        name (`str`):
            The verb.
        verb ([`Verb`]):
            What is known of it.
        kinds (`Sequence[type]`):
            The dataclasses of its flags.

    Returns:
        `str`: some dozens of lines; of the help of each flag the first sentence.
    """
    known = {one.name: one for kind in reversed(kinds) for one in fields(kind)}
    shown = [one.name for one in fields(kinds[0])] if verb.flags is None else verb.flags
    lines = [f"trl-dt2it {name}: {verb.summary}", "", "Examples:", ""]
    for wanted, command in verb.examples:
        lines += [f"  # {wanted}", *_command(command), ""]
    lines += ["Flags:", ""]
    for flag in shown:
        lines += _flag(flag, known[flag].metadata.get("help", ""))
    lines += _flag("config", "YAML file with such keys, or the name of one that comes with the package.")
    if verb.is_launched:
        lines += ["", "On several processes: --num_processes N, --accelerate_config FILE_OR_NAME, or", ""]
        lines += [f"  accelerate launch --num_processes 8 -m trl_dt2it.cli {name} ..."]
    lines += ["", f"All {len(known)} flags: trl-dt2it {name} --help_all. Where an error came from: --traceback."]
    return "\n".join(lines) + "\n"


def _command(command: str) -> list[str]:
    """A command on lines that fit, each but the last with a backslash at its end; flags stay with their values."""
    lines = [" "]
    for part in re.split(r" (?=--)", command):
        if len(lines[-1]) + len(part) > WIDTH - 2:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {part}"
    return lines


def _flag(name: str, text: str) -> list[str]:
    first = re.match(r".*?[.](?=\s|$)", " ".join(text.split()))
    described = wrap(first[0] if first else text, WIDTH - _FLAG_WIDTH - 4) or [""]
    head = f"  --{name}".ljust(_FLAG_WIDTH + 2)
    return [f"{head} {described[0]}", *(" " * (_FLAG_WIDTH + 3) + line for line in described[1:])]
