"""The whole pipeline as one file that runs without diffusers: ONNX, a torch.export program or an AOTInductor package.

    python scripts/export.py MODEL OUTPUT.onnx [--height 720 --width 1280] [--num_inference_steps N] [--batch_size B]
    python scripts/export.py MODEL OUTPUT.pt2 --format torch_export|aotinductor [...]

Inputs are `blurry`, [B, 3, H, W] in [0, 1], and `noise`, [B, N, D] standard normal; the output is `restored`, [B, 3, H, W] in
[0, 1]. Without --height and --width, which AOTInductor needs, any multiples of 8 from 16 upwards will do. The file appears
only once its pictures were compared with the pipeline's. ONNX needs `pip install "diffusers-hidiff[export]"`, AOTInductor
a C++ compiler.
"""

import argparse
import sys
from pathlib import Path

from diffusers_hidiff.cli import CommandError, at_least
from diffusers_hidiff.cli.pipeline import load_pipeline
from diffusers_hidiff.export import LOADING, SUFFIXES, ExportError, export_pipeline


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="pipeline folder or Hub id")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="file to write, .onnx or .pt2")
    parser.add_argument("--format", choices=SUFFIXES, default="onnx", help="default: onnx")
    parser.add_argument("--height", type=int, help="height of the images, a multiple of 8 (default: any)")
    parser.add_argument("--width", type=int, help="width of the images, a multiple of 8 (default: any)")
    parser.add_argument("--batch_size", type=at_least(1), default=1, help="number of images (default: 1)")
    parser.add_argument("--num_inference_steps", type=at_least(1), help="steps of the reverse chain (default: all)")
    parser.add_argument(
        "--device", default="cpu", help="what an AOTInductor package is compiled for (default: cpu; others are untried)"
    )
    options = parser.parse_args(arguments)
    if (options.height is None) != (options.width is None):
        parser.error("--height and --width must be given together")
    size = None if options.height is None else (options.height, options.width)
    try:
        difference = export_pipeline(
            load_pipeline(options.model).to(options.device),
            *(options.output, options.format, size, options.batch_size, options.num_inference_steps),
        )
    except (CommandError, ExportError, ValueError, ImportError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"Written to {options.output}; it differs from the pipeline by {difference:.1e} at most. Run it with")
    print("  " + LOADING[options.format].format(path=str(options.output)).replace("\n", "\n  "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
