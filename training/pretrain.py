"""Pretraining under `accelerate launch` or `torchrun`: the same as `emssl pretrain`."""

import sys

from emssl_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
