"""Real pairs -> Parquet shards of patches, as the paper cuts GoPro: 512 pixels, overlapping by 256, and central crops of 256.

    python scripts/prepare_data.py GOPRO_Large gopro_patches [--num_workers 8]
    python training/train_stage1.py --config training/configs/gopro_stage1.yaml --dataset_name gopro_patches …

SOURCE may have any layout of GoPro, HIDE and RealBlur as published, blurry/ and sharp/, or input/ and target/. A run that
is stopped goes on with the same command. Pairs without a partner, of two sizes, or damaged are left out and reported.
Without it `--train_pairs_dir GOPRO_Large --train_tile_size 512 --train_tile_overlap 256` draws from the same patches.
"""

import argparse
import os
import sys
from pathlib import Path

import datasets

from diffusers_hidiff.data.pair_shards import Patches, prepare_shards, summary


def main(arguments: list[str] | None = None) -> int:
    defaults = Patches()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="folder or list of pairs")
    add("output", type=Path, help="folder to make")
    add("--patch_size", type=int, default=defaults.size, help="of training patches (default: %(default)s)")
    add("--overlap", type=int, default=defaults.overlap, help="of neighbouring patches (default: %(default)s)")
    add("--validation_size", type=int, default=defaults.validation_size, help="of the crops (default: %(default)s)")
    add("--pairs_per_shard", type=int, default=defaults.pairs_per_shard, help="default: %(default)s")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="threads (default: one for each core)")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    try:
        patches = Patches(options.patch_size, options.overlap, options.validation_size, options.pairs_per_shard)
        report = prepare_shards(options.source, options.output, patches, options.num_workers)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"Stopped: {error}. The same command goes on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return 130
    print("\n".join(summary(report)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
