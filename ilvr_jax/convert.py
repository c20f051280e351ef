"""python -m ilvr_jax.convert: published checkpoints in (from-hf SRC DST), runs out (to-hf WORKDIR DST)."""

import sys
from collections.abc import Sequence

from ilvr_jax.checkpoints.export import export
from ilvr_jax.checkpoints.pretrained import open_pretrained
from ilvr_jax.checkpoints.weights import save_converted
from ilvr_jax.command import DONE, ArgumentParser, command, path_flag
from ilvr_jax.config.schema import DTYPES


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a folder that cannot be completed is emptied again."""
    parser = ArgumentParser(prog="python -m ilvr_jax.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("from-hf", help="convert a published Qwen2.5-VL into a folder for model.init_from")
    into.add_argument(
        "source", metavar="SRC", help="a folder with config.json and *.safetensors, a hub name, or ADAPTER[@BASE]"
    )
    into.add_argument("destination", metavar="DST", type=path_flag, help="a new folder")
    out = commands.add_parser("to-hf", help="convert a run into a folder that transformers, PEFT and vLLM open")
    out.add_argument(
        "source", metavar="WORKDIR", type=path_flag, help="a run's workdir, a folder from from-hf, or ADAPTER[@BASE]"
    )
    out.add_argument("destination", metavar="DST", type=path_flag, help="a new folder")
    out.add_argument("--stage", help="the stage whose checkpoint is used (default: the last that has one)")
    out.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of the initial checkpoint)")
    out.add_argument("--teacher", action="store_true", help="convert the teacher's weights instead of the student's")
    lora_flags = out.add_mutually_exclusive_group()
    lora_flags.add_argument("--merge-lora", action="store_true", help="merge LoRA adapters into the weights")
    lora_flags.add_argument("--adapter", action="store_true", help="write only the LoRA adapters, as PEFT does")
    options = parser.parse_args(arguments)
    if options.command == "from-hf":
        save_converted(open_pretrained(options.source), options.destination)
    else:
        lora = "merge" if options.merge_lora else "adapter" if options.adapter else None
        export(options.source, options.destination, options.stage, options.dtype, options.teacher, lora)
    print(f"Checkpoint written to {options.destination}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
