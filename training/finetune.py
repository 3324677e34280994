"""Fine-tuning under `accelerate launch` or `torchrun`: the same as `emssl finetune`."""

import sys

from emssl_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
