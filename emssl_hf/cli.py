"""The command line: `emssl COMMAND`. Parsing only; every job is a function of emssl_hf.api."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from emssl_hf import __version__
from emssl_hf.engine.config import FinetuneConfig, PretrainConfig, StudyConfig
from emssl_hf.errors import EmsslError
from emssl_hf.recipes import find_recipe, recipe_folder

Run = Callable[[Any], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (the job failed, one sentence why) or 2 (bad arguments)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _quieten()
    parser, commands = _parsers()
    try:
        settings = parser.instantiate(parser.parse_args(_with_recipes(arguments)))
        command = settings.command
        if command is None:
            parser.print_help()
            return 2
        _COMMANDS[command][1](settings[command])
    except ArgumentError as error:
        return _misunderstood(str(error), arguments, commands)
    except EmsslError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("Stopped. What was saved is good; the same command goes on from there.")
    return 0


def _fail(message: str, code: int = 1) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"emssl: {message}", file=sys.stderr)
    return code


def _misunderstood(problem: str, arguments: list[str], commands: dict[str, ArgumentParser]) -> int:
    """One sentence about an argument, with the nearest name that exists, instead of pages of usage."""
    name = next((word for word in arguments if word in commands), "")
    options = [option for parser in commands.values() for option in parser._option_string_actions]
    known = list(commands[name]._option_string_actions) if name else options
    words = [word.partition("=")[0] for word in problem.replace("'", " ").split() if word.startswith("--")]
    nearest = [match for word in words for match in get_close_matches(word, known, n=1) if word not in known]
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return _fail(f"{' '.join(problem.split()).rstrip('.')}.{hint} See emssl {name + ' ' if name else ''}--help.", 2)


def _quieten() -> None:
    """No advice of libraries between a run's own lines; errors still come through."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # bars are for people who watch
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _with_recipes(arguments: list[str]) -> list[str]:
    """`--config NAME` may name a recipe that comes with the package."""
    found = list(arguments)
    for place, word in enumerate(arguments):
        if word == "--config" and place + 1 < len(arguments):
            found[place + 1] = str(find_recipe(arguments[place + 1]))
        elif word.startswith("--config="):
            found[place] = f"--config={find_recipe(word.removeprefix('--config='))}"
    return found


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser of `emssl`, and those of its commands by name."""
    parser = ArgumentParser(
        prog="emssl",
        exit_on_error=False,
        description="Self-supervised learning on electron micrographs.",
        epilog="Example: emssl pretrain --config mff_vit_small --data.path ~/micrographs --output_dir runs/mff",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command", required=False, metavar="COMMAND")
    made = {name: make(name) for name, (make, _) in _COMMANDS.items()}
    for name, command in made.items():
        commands.add_subcommand(name, command, help=command.description)
    return parser, made


def _new_parser(**options: Any) -> ArgumentParser:
    """A parser that raises ArgumentError rather than print its usage and leave."""
    return ArgumentParser(exit_on_error=False, **options)


def _job_parser(kind: type[Any], description: str, example: str) -> Callable[[str], ArgumentParser]:
    def make(name: str) -> ArgumentParser:
        names = ", ".join(sorted(path.stem for path in recipe_folder().glob("*.yaml")))
        parser = _new_parser(prog=f"emssl {name}", description=description, epilog=f"Example: {example}")
        parser.add_argument(
            "--config", action="config", help=f"Recipe: a YAML file, or one that comes with the package: {names}."
        )
        parser.add_class_arguments(kind, as_group=False)
        return parser

    return make


def _predict_parser(name: str) -> ArgumentParser:
    classes = name == "predict"
    parser = _new_parser(
        prog=f"emssl {name}",
        description="Classify every micrograph of a folder."
        if classes
        else "Features of every micrograph of a folder.",
        epilog=f"Example: emssl {name} runs/mff-classes/{'classifier' if classes else 'backbone'} ~/new "
        f"--output {'predictions.csv' if classes else 'features.parquet'}",
    )
    parser.add_argument("model", type=str, help="A folder, or a model on the Hub.")
    parser.add_argument("folder", type=str, help="Micrographs, also in sub-folders.")
    parser.add_argument("--output", type=str, required=True, help="The CSV file." if classes else "The Parquet file.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images at a time.")
    parser.add_argument("--tiles", type=bool, default=False, help="Average over squares instead of squashing to one.")
    parser.add_argument("--databar", type=Literal["crop", "keep"], default="crop", help="The data bar.")
    if not classes:
        parser.add_argument("--pool", type=Literal["cls", "mean"], default="cls", help="CLS token or patch mean.")
    return parser


def _convert_parser(name: str) -> ArgumentParser:
    parser = _new_parser(
        prog="emssl convert",
        description="Turn a checkpoint of the original MAE, MoCo v3 or mmpretrain into models of this package.",
        epilog="Example: emssl convert mae_pretrain_vit_base_full.pth runs/mae-imagenet --channels 1",
    )
    parser.add_argument("file", type=str, help="The checkpoint, .pth or .safetensors.")
    parser.add_argument("out", type=str, help="The folder to make.")
    parser.add_argument("--channels", type=int | None, default=None, help="1 folds RGB patch embeddings to grey.")
    parser.add_argument("--num_attention_heads", type=int | None, default=None, help="Where not the paper's number.")
    parser.add_argument("--decoder_num_attention_heads", type=int | None, default=None, help="As above.")
    parser.add_argument("--image_size", type=int | None, default=None, help="Where the positions do not tell it.")
    parser.add_argument(
        "--fused_layers", type=list[int] | None, default=None, help="MFF's blocks, where not the paper's."
    )
    return parser


def _stores_parser(name: str) -> ArgumentParser:
    parser = _new_parser(
        prog="emssl stores",
        description="List the stores of decoded pixels, or delete those that were not used for a while.",
        epilog="Example: emssl stores --prune true --unused_days 30",
    )
    parser.add_argument("--root", type=Path | None, default=None, help="Their folder; by default the user's cache.")
    parser.add_argument("--prune", type=bool, default=False, help="Delete unused stores.")
    parser.add_argument("--unused_days", type=float, default=30.0, help="Days without use before a store goes.")
    return parser


def _bench_parser(name: str) -> ArgumentParser:
    parser = _new_parser(
        prog="emssl bench",
        description="Images per second of pretraining, beside transformers' Trainer on the same files.",
        epilog="Example: emssl bench --json bench.json",
    )
    parser.add_argument("--json", type=Path | None, default=None, help="Write the figures here.")
    parser.add_argument("--steps", type=int, default=6, help="Optimizer steps per round and side.")
    parser.add_argument("--rounds", type=int, default=3, help="Turns of both sides; medians are reported.")
    return parser


def _run_pretrain(settings: Any) -> None:
    from emssl_hf.api import run_pretrain

    run_pretrain(_config(PretrainConfig, settings))


def _run_finetune(settings: Any) -> None:
    from emssl_hf.api import run_finetune

    run_finetune(_config(FinetuneConfig, settings))


def _run_study(settings: Any) -> None:
    from emssl_hf.api import run_study

    run_study(_config(StudyConfig, settings))


def _run_predict(settings: Any) -> None:
    from emssl_hf.api import predict

    predict(**settings.as_dict())


def _run_embed(settings: Any) -> None:
    from emssl_hf.api import embed

    embed(**settings.as_dict())


def _run_convert(settings: Any) -> None:
    from emssl_hf.hub.convert import convert

    written = convert(**settings.as_dict())
    for name, path in written.items():
        print(f"{name}: {path}")
    print(written["readme"].read_text(encoding="utf-8").strip().splitlines()[-1])  # the licence that stays on them


def _run_bench(settings: Any) -> None:
    from emssl_hf.engine.bench import bench

    bench(settings.json, steps=settings.steps, rounds=settings.rounds)


def _run_stores(settings: Any) -> None:
    from emssl_hf.data.store import list_stores, prune_stores

    found = (
        prune_stores(settings.root, unused_days=settings.unused_days) if settings.prune else list_stores(settings.root)
    )
    for store in found:
        print(f"{store.bytes / 1e6:10.1f} MB  {store.path}{'  deleted' if settings.prune else ''}")
    print(f"{len(found)} stores{' deleted' if settings.prune else ''}")


def _config(kind: type[Any], settings: Any) -> Any:
    values = {key: value for key, value in vars(settings).items() if key not in ("config", "__path__")}
    return kind(**values)


_COMMANDS: dict[str, tuple[Callable[[str], ArgumentParser], Run]] = {
    "pretrain": (
        _job_parser(
            PretrainConfig,
            "Pretrain a vision transformer on micrographs without labels.",
            "emssl pretrain --config mff_vit_small --data.path ~/micrographs --output_dir runs/mff",
        ),
        _run_pretrain,
    ),
    "finetune": (
        _job_parser(
            FinetuneConfig,
            "Train a classifier on labelled micrographs, from pretrained weights or from scratch.",
            "emssl finetune --config finetune_vit_small --model.init runs/mff/backbone --data.path ~/labelled "
            "--output_dir runs/mff-classes",
        ),
        _run_finetune,
    ),
    "study": (
        _job_parser(
            StudyConfig,
            "Compare pretraining methods with training from scratch, and write a report.",
            "emssl study --config study_vit_tiny --data.path ~/labelled --output_dir runs/study",
        ),
        _run_study,
    ),
    "predict": (_predict_parser, _run_predict),
    "embed": (_predict_parser, _run_embed),
    "convert": (_convert_parser, _run_convert),
    "stores": (_stores_parser, _run_stores),
    "bench": (_bench_parser, _run_bench),
}


if __name__ == "__main__":
    sys.exit(main())
