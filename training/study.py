"""The comparison of methods: the same as `emssl study`."""

import sys

from emssl_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
