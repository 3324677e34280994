"""Every job in turn, as `torchrun two_processes.py OUT` or as one process: results go to OUT."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from emssl_hf.engine.finetune import Finetuning, finetune
from emssl_hf.engine.pretrain import pretrain
from tests.engine.tiny import Killed, finetune_config, pretrain_config


def main(home: Path) -> None:
    """MAE, MFF (killed and resumed), MoCo v3, then fine-tuning (killed and resumed)."""
    end = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # the process group must outlive the first job
    for method in ("mae", "mff", "mocov3"):
        pretrain(pretrain_config(method, home / method, train={"epochs": 2}))
    init = {"init": str(home / "mae" / "pretraining")}
    plain = {"mixup": 0.0, "cutmix": 0.0}
    config = finetune_config(home / "whole", model=init, augment=plain, train={"epochs": 2, "drop_path": 0.0})
    finetune(config)
    config = finetune_config(home / "killed", model=init, augment=plain, train={"epochs": 2, "drop_path": 0.0})
    original, steps = Finetuning.after_step, 0

    def after_step(self: Any, progress: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 13:
            raise Killed

    Finetuning.after_step = after_step
    with contextlib.suppress(Killed):
        finetune(config)
    Finetuning.after_step = original
    finetune(config)
    accelerator = Accelerator(cpu=True)
    accelerator.wait_for_everyone()
    end(accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
