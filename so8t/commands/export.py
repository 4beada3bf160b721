"""`so8t export`: writes a trained agent as a plain checkpoint with its gates absorbed, or as its adapter."""

import argparse
from pathlib import Path

from rich.console import Console

HELP = "write a trained agent as a plain checkpoint, or as its adapter"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "--to",
        choices=("hf", "adapter"),
        required=True,
        help="hf: a checkpoint that transformers loads, gates absorbed, with the safety head; adapter: gates and head alone",
    )
    parser.add_argument("folder", type=Path, help="what to write; must not be there yet, or be empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of a checkpoint's weights (default float32: the agent's own logits; bfloat16: half the size, rounded)",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this (private) model repository afterwards")


def run(args: argparse.Namespace) -> None:
    """The command."""
    import torch

    from so8t.adapter import load_agent
    from so8t.export import PROBES, export_adapter, export_hf
    from so8t.files import check_free
    from so8t.hub import push_to_hub

    console = Console(soft_wrap=True)
    check_free(args.folder)
    if args.to == "adapter":
        export_adapter(args.run, args.folder)
    else:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
        told = export_hf(load_agent(args.run), args.folder, dtype=dtype)
        console.print(
            f"compared with the gated agent on {len(PROBES)} prompts: task logits differ by at most {told.logits:.2g} "
            f"({told.relative:.2g} relative), probabilities by {told.probabilities:.2g}, {told.decisions} decisions"
        )
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    console.print(f"{args.folder}: {size / 2**20:.1f} MiB", highlight=False)
    if args.push:
        console.print(push_to_hub(args.folder, args.push))
