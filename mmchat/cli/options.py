"""Arguments and options shared by the commands, each with its name, range and help in one place.

An option without a name here has that of its parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mmchat import limits
from mmchat.cli import console
from mmchat.cli.wrong_names import model_name
from mmchat.input_text import checked
from mmchat.offline import go_offline
from mmchat.quant import schemes

# An option in one of the groups of the help page
of_input = partial(typer.Option, rich_help_panel="Input")
of_model = partial(typer.Option, rich_help_panel="Model")
of_output = partial(typer.Option, rich_help_panel="Output")


def to_file(metavar: str, help: str) -> Any:
    """The option -o, --output; metavar: what it names."""
    return of_output("-o", "--output", metavar=metavar, help=help)


# Filled by --debug on whichever command it is given.
debug_requested: set[bool] = set()


def _request_debug(asked: bool) -> None:
    if asked:
        debug_requested.add(True)


def _go_offline(asked: bool) -> None:
    if asked:
        go_offline()


def _system(text: str | None) -> str | None:
    return None if text is None else checked(text, "--system")


def as_arguments(given: Any, names: Iterable[str]) -> list[str]:
    """What gives those fields of options on a command line; the usual ones are left out."""
    said: list[str] = []
    usual = type(given)()
    for name in names:
        value = getattr(given, name)
        if value == getattr(usual, name) or value is None:
            continue
        option = "--model" if name == "name" else f"--{name.replace('_', '-')}"
        several = value if isinstance(value, tuple | list | frozenset) else (value,)
        said += [part for one in several for part in ([option] if one is True else [option, one])]
    return list(map(str, said))


def complete_scheme(incomplete: str) -> list[str]:
    """Quantisation schemes that begin so."""
    return [name for name in schemes.SCHEMES if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """Names and aliases that begin so, each with the description of the model."""
    from mmchat.catalog.known import known_specs

    return [
        (name, spec.description)
        for spec in known_specs()
        for name in (spec.name, *spec.aliases)
        if name.startswith(incomplete)
    ]


def of_scheme(more: str) -> Any:
    """The option --quantize; more: what else its help says."""
    return of_model(
        metavar="SCHEME",
        help="Weights in int8 (-b32), int6, int4 (-b32, -g32, -g64, -g128), nf4, fp4, fp8 (CUDA)"
        f" or none{more}.",
        autocompletion=complete_scheme,
    )


Debug = Annotated[bool, of_output("--debug", callback=_request_debug, help="Show tracebacks.")]
Color = Annotated[
    console.ColorMode, of_output("--color", callback=console.set_color, help="Colours.")
]
Quiet = Annotated[
    bool, of_output("-q", "--quiet", callback=console.set_quiet, help="No notes on stderr.")
]
Json = Annotated[bool, of_output("--json", help="Print JSON, for programs.")]
RecordFile = Annotated[Path | None, to_file("FILE", "Write JSON to FILE as well.")]

Prompt = Annotated[
    str | None,
    of_input(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="The question. Text on stdin comes before it, or replaces it.",
    ),
]
IMAGE_NAMES = ("-i", "--image-prompt", "--image-prompts", "--image")
Images = Annotated[
    list[str] | None,
    of_input(
        *IMAGE_NAMES,
        metavar="PATH|URL|-",
        help="A picture, or a document, whose pages are pictures: paper.pdf, paper.pdf#3-5."
        " Repeatable. '-' reads its bytes from stdin.",
    ),
]
System = Annotated[
    str | None, of_input("-s", "--system", metavar="TEXT", callback=_system, help="System message.")
]
Raw = Annotated[bool, of_input("--raw", help="No chat format: the prompt as it is (base models).")]
Offline = Annotated[
    bool,
    of_model(
        "--offline", callback=_go_offline, help="Ask no network; HF_HUB_OFFLINE=1 does the same."
    ),
]

ModelName = Annotated[
    str | None,
    of_model(
        "-m",
        "--model",
        metavar="MODEL",
        help="Name, alias or folder of a model.",
        autocompletion=complete_model,
        callback=model_name,
    ),
]
_of_model_name = partial(typer.Argument, autocompletion=complete_model, callback=model_name)
ModelOrFolder = Annotated[
    str,
    _of_model_name(metavar="MODEL|PATH", help="Name, alias, owner/name, folder or weights file."),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL|QUESTION|PICTURE",
        help="A known model or its folder; the question; pictures: PATH, URL, or - for stdin.",
        autocompletion=complete_model,
    ),
]

QuantizeKeep = Annotated[
    list[str] | None,
    of_model(
        metavar="PART", help="With --quantize: leave text, head or vision as it is; repeatable."
    ),
]
Rows = Annotated[
    int | None,
    of_model("--rows", metavar="N", min=1, max=limits.MOST_ROWS, help="Asked at once."),
]

_path = partial(of_model, metavar="PATH")
# Each field of LoadOptions as an option; `progress` is none.
LOADING: Mapping[str, Any] = {
    "name": Annotated[
        str | None,
        _of_model_name(
            metavar="MODEL",
            help="Name, alias or folder; 'tiny', or what 'mmchat config' says, if left out.",
        ),
    ],
    "device": Annotated[str, of_model(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")],
    "dtype": Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        of_model(help="Number format of the weights."),
    ],
    "quantize": Annotated[str, of_scheme("; auto: as stored, or the nearest of these")],
    "quantize_keep": QuantizeKeep,
    "kv": Annotated[
        Literal["auto", "int8"],
        of_model(help="Keys and values in int8: half the memory of long texts; auto: as --dtype."),
    ],
    "max_seq_len": Annotated[int | None, of_model(min=1, help="Context to reserve, positions.")],
    "checkpoint_path": Annotated[
        Path | None, _path(help="Weights: a folder, a .safetensors, GGUF or consolidated.NN.pth.")
    ],
    "vision_tower": Annotated[
        str | None,
        of_model("--vision-tower", metavar="PATH|REPO", help="Vision encoder kept apart."),
    ],
    "adapter": Annotated[
        list[str] | None,
        of_model(
            metavar="PATH|REPO[:SCALE]", help="Merge a LoRA adapter into the weights; repeatable."
        ),
    ],
    "tokenizer_path": Annotated[
        Path | None, _path(help="tokenizer.model, tokenizer.json or qwen.tiktoken.")
    ],
    "params_path": Annotated[Path | None, _path(help="A params JSON of a model.")],
    "text_only": Annotated[bool, of_model("--text-only", help="Leave the vision tower unloaded.")],
    "alpha": Annotated[
        Literal["white", "drop"] | None,
        of_input(help="Transparent pixels: on white, or alpha dropped."),
    ],
    "compile": Annotated[
        Literal["auto", "on", "off"],
        of_model(help="Compile the layers before the first token; auto does so on CUDA."),
    ],
    "parallel": Annotated[
        int | None,
        of_model(min=1, help="Share the model among N processes, or cards."),
    ],
    "parallel_timeout": Annotated[
        float,
        of_model(metavar="S", help="Seconds until one of them that is silent ends the command."),
    ],
}
