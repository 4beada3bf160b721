"""`so8t export`: writes a trained agent as a plain checkpoint or a GGUF file with its gates absorbed, or as its adapter."""

import argparse
from pathlib import Path

from rich.console import Console

from so8t.errors import SO8TError

HELP = "write a trained agent as a plain checkpoint, as GGUF for llama.cpp, or as its adapter"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "--to",
        choices=("hf", "gguf", "adapter"),
        required=True,
        help="hf: a checkpoint that transformers loads, gates absorbed, with the safety head; gguf: the same for llama.cpp; "
        "adapter: gates and head alone",
    )
    parser.add_argument(
        "folder", type=Path, help="what to write; must not be there yet, or be empty. With --to gguf also FOLDER/NAME.gguf"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of an hf checkpoint's weights (default float32: the agent's own logits; bfloat16: half the size, rounded)",
    )
    parser.add_argument(
        "--gguf-type",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="of a GGUF file's matrices (default f32: the agent's own logits; the others are rounded)",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this (private) model repository afterwards")


def run(args: argparse.Namespace) -> None:
    """The command."""
    import torch

    from so8t.adapter import load_agent
    from so8t.export import PROBES, export_adapter, export_gguf, export_hf
    from so8t.files import check_free
    from so8t.hub import push_to_hub

    console = Console(soft_wrap=True)
    for option, value, to in (("--dtype", args.dtype, "hf"), ("--gguf-type", args.gguf_type, "gguf")):
        if value and args.to != to:
            raise SO8TError(f"{option} belongs to --to {to}, not to --to {args.to}")
    folder, kind = args.folder, args.gguf_type or "f32"
    file = f"model-{kind}.gguf"
    if args.to == "gguf" and folder.suffix == ".gguf":
        folder, file = folder.resolve().parent, folder.name
    check_free(folder)
    if args.to == "adapter":
        export_adapter(args.run, folder)
    else:
        agent = load_agent(args.run)
        if args.to == "hf":
            told = export_hf(agent, folder, dtype=torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)
        else:
            told = export_gguf(agent, folder / file, kind=kind)
        console.print(
            f"compared with the gated agent on {len(PROBES)} prompts: task logits differ by at most {told.logits:.2g} "
            f"({told.relative:.2g} relative), probabilities by {told.probabilities:.2g}, {told.decisions} decisions"
        )
    size = sum(part.stat().st_size for part in folder.rglob("*") if part.is_file())
    console.print(f"{folder}: {size / 2**20:.1f} MiB", highlight=False)
    if args.push:
        console.print(push_to_hub(folder, args.push))
