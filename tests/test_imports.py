"""Imports go down, never up or sideways."""

import ast
import subprocess
import sys
from pathlib import Path

import diffusers_hidiff

ROOT = Path(diffusers_hidiff.__file__).parent
# Lowest first. A module may import from rows below its own, and within `models` from the shared files.
ROWS = [
    ["utils"],
    ["models", "schedulers", "sampling", "image_processor", "image_files", "data", "metrics"],
    ["pipelines", "losses", "conversion"],
    ["_classes"],
    ["evaluation", "experiments", "export"],
    ["cli"],
    ["__main__"],
]
MAY_USE_BESIDE = {"image_files": {"image_processor"}, "data": {"image_files"}}


def row_of(name):
    return next(i for i, row in enumerate(ROWS) if name in row)


def imported_rooms(file):
    """First component below the package of everything that `file` imports from the package."""
    package = ("diffusers_hidiff", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            path = (*base, *(node.module or "").split("."))
            if path[0] == "diffusers_hidiff" and len(path) > 1 and path[1]:
                yield path[1]


def test_imports_go_down():
    for file in ROOT.rglob("*.py"):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in set(imported_rooms(file)) - {room} - MAY_USE_BESIDE.get(room, set()):
            assert row_of(other) < row_of(room), f"{file.relative_to(ROOT)} imports {other}"


def test_networks_do_not_know_each_other():
    networks = {"transformer_hidiff", "latent_encoder", "denoiser"}
    for name in networks:
        tree = ast.parse((ROOT / "models" / f"{name}.py").read_text())
        used = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
        assert not used & (networks - {name})


def test_the_package_needs_nothing_of_the_extras():
    extras = ("cv2", "datasets", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pyiqa", "skimage")
    program = f"import sys, diffusers_hidiff.cli.main; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
