"""What a notebook does: trainings one after the other in one process, and one in a thread. Prints their exit codes."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import toy

from armillary.engine.train.start import run_to_exit_code
from armillary.engine.user_code import trust


def train(name: str, stage: int) -> None:
    run = toy.toy_run(Path(os.environ["TOY_OUT"]), Path(os.environ["TOY_SURVEY"]), steps=2, zero_stage=stage)
    code = run_to_exit_code(replace(run, name=name), open_loader=toy.open_toy_loader)
    print(f"{name} ended with {code}", flush=True)


if __name__ == "__main__":
    trust("toy")
    for name, stage in (("first", 2), ("second", 3), ("third", 3)):
        train(name, stage)
    thread = threading.Thread(target=train, args=("threaded", 1))
    thread.start()
    thread.join()
