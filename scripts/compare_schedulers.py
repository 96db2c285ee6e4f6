"""Schedulers x steps x seeds on a data set: a table, a figure and raw figures. The same as `hidiff compare-schedulers`.

python scripts/compare_schedulers.py --dataset PAIRS --output OUT [--model M] [--schedulers ddim euler] [--steps 1 4 8]
"""

import sys

from diffusers_hidiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare-schedulers", *sys.argv[1:]]))
