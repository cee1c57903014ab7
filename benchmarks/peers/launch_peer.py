"""Runs a peer's own command line with the step timer in it. Started with the Python of the peer's environment.

usage: python launch_peer.py llamafactory CONFIG.yaml OUT.json
       python launch_peer.py swift OUT.json -- ARGUMENTS OF `swift rlhf`
"""

import sys

from step_timer import StepTimer
from transformers import trainer


def run_llamafactory(config: str, output: str) -> None:
    from llamafactory.cli import main

    add_timer(output)
    sys.argv = ["llamafactory-cli", "train", config]
    main()


def run_swift(output: str, separator: str, *arguments: str) -> None:
    # The first import puts a list of its own in the place of transformers' default callbacks, so that the timer has to
    # come after it. `swift rlhf` would start the second in a process of its own, where the timer would not be.
    import swift.trainers.patcher  # noqa: F401  (for what its import does)
    from swift.pipelines import rlhf_main

    add_timer(output)
    sys.argv = ["rlhf.py", *arguments]
    rlhf_main()


def add_timer(output: str) -> None:
    """Every Trainer of this process gets the timer as one of its callbacks."""
    trainer.DEFAULT_CALLBACKS.append(StepTimer(output))


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    {"llamafactory": run_llamafactory, "swift": run_swift}[name](*arguments)
