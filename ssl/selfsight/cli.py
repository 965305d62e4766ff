"""The `selfsight` command. torch is imported by the command that needs it, so that `--help` answers at once."""

import argparse
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from selfsight import __version__
from selfsight.errors import DataError, SelfsightError, StorageError, UsageError
from selfsight.eval import DEFAULT, NAMES, require_known
from selfsight.redact import redact

if TYPE_CHECKING:
    from selfsight.recipe import Recipe

FIELD_COMMANDS = ("pretrain", "quickstart", "teacher", "doctor", "bench")  # take recipe fields as options
FLAGS, OPTIONS = ("--help", "--json", "--synthetic", "--compile"), ("--seconds",)  # of them, which are no fields
BARE = ("run_dir", "seed", "track", "plugin", "allow-change")  # words without a section that take a value
EXIT_CODES = (
    "exit codes: 0 done, 2 usage or recipe error, 65 bad data, 70 not finite, 74 disk or checkpoint, "
    "75 stopped on request (run it again), 76 another rank was lost"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the answer is the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # the process is ours
        sys.excepthook = _redacted_trace
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        fields: dict[str, str] = {}
        if words and words[0] in FIELD_COMMANDS:
            fields, words = split_fields(["--train.deterministic=8" if w == "--deterministic" else w for w in words])
        plugins, changes = fields.pop("plugin", None), fields.pop("allow-change", "")
        options, unknown = build_parser().parse_known_args(words)
        if unknown:  # with the usage of the command, not of selfsight
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        options.fields, options.allow_change = fields, tuple(filter(None, changes.split(",")))
        options.plugins = plugins
        if named := plugins or getattr(options, "plugin", None):
            from selfsight.objectives import load_plugin

            sys.path.append(
                str(Path.cwd())
            )  # `python -m selfsight` looks here by itself, the `selfsight` script does not
            for module in named.split(","):
                load_plugin(module)
        return options.run(options) or 0
    except SelfsightError as error:
        return _refused(error, debug)
    except KeyboardInterrupt:
        print("selfsight: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        return 0
    except OSError as error:  # a file that nobody asked about first
        return _refused(StorageError(f"{error.filename or 'a file'}: {error.strerror or error}"), debug)


def _refused(error: SelfsightError, debug: bool) -> int:
    if debug:
        _redacted_trace(*sys.exc_info())
    for line in redact(error.told).splitlines():
        print(f"selfsight: {line}", file=sys.stderr)
    return error.exit_code


def _redacted_trace(*what: Any) -> None:
    print(redact("".join(traceback.format_exception(*what))), end="", file=sys.stderr)


def split_fields(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`--a.b value` and `--a.b=value` as a mapping of dotted names to text, and the words that are neither.

    Raises:
        UsageError: a field without a value, or an option that is misspelt.
    """
    fields: dict[str, str] = {}
    others: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or word in FLAGS:
            others.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if f"--{name}" in OPTIONS:
            others += [word, *left[:1]] if not equals else [word]
            left = left if equals else left[1:]
            continue
        if equals and f"--{name}" in FLAGS:
            raise UsageError(f"--{name} takes no value")
        if "." not in name and name not in BARE and (near := _near(name, words[0])):
            raise UsageError(f"--{name}: no such option; did you mean {near}?")
        if not equals:
            if not left:
                raise UsageError(f"--{name} needs a value")
            value = left.pop(0)
        fields[name] = value
    return fields, others


def _near(name: str, command: str) -> str:
    """The option of a command that is spelt nearly so; nothing if there is none."""
    own = {"bench": (*FLAGS, *OPTIONS), "doctor": ("--help", "--json")}.get(command, ("--help",))
    return "".join(get_close_matches(f"--{name}", [*own, "--deterministic", "--plugin"], 1, 0.8))


def _count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = _Parser(
        prog="selfsight",
        description="Self-supervised pretraining of Vision Transformers.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"selfsight {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = _command(commands, "pretrain", _pretrain, "start or resume a run", takes_fields=True)
    one.usage = "selfsight pretrain RECIPE [--section.key value ...] [--plugin package.module] [--deterministic] [--allow-change KEY,...]"
    one.add_argument("recipe", help="a YAML file, or a packaged recipe such as digits/mae")

    one = _command(commands, "doctor", _doctor, "say what of a run will go wrong or be slow, before it starts", True)
    one.usage = "selfsight doctor RECIPE [--section.key value ...] [--plugin package.module] [--json]"
    one.add_argument("recipe", help="the recipe that is to be run, with the same fields")
    one.add_argument("--json", action="store_true", help="print a list of what was found")

    one = _command(commands, "bench", _bench, "time a recipe on this machine, and the switches that may help", True)
    one.usage = "selfsight bench RECIPE [--section.key value ...] [--plugin package.module] [--seconds N] [--synthetic] [--compile] [--json]"
    one.add_argument(
        "recipe", help="the recipe that is to be run, with the same fields; nothing is written into its run_dir"
    )
    one.add_argument(
        "--seconds",
        type=_count,
        default=60,
        metavar="N",
        help="about so many, besides imports, compiling and starting loaders, some 10 more (default: 60)",
    )
    one.add_argument("--synthetic", action="store_true", help="random images instead of the recipe's data")
    one.add_argument("--compile", action="store_true", help="time train.compile on a CPU, too, which takes a minute")
    one.add_argument("--json", action="store_true", help="print one object (docs/speed.md)")

    one = _command(
        commands, "teacher", _teacher, "store a teacher's outputs beside the shards, for a distill recipe", True
    )
    one.usage = "selfsight teacher RECIPE --objective.stored FOLDER [--section.key value ...]"
    one.add_argument("recipe", help="the recipe that will learn from them, with objective.stored and augmentations")

    one = _command(commands, "eval", _eval, "score encoders beside the floors")
    one.add_argument(
        "encoder",
        nargs="*",
        help="a run folder, an exported encoder, a checkpoint, or the name of a timm model (downloads); several are compared; "
        "none: train and test are files of features",
    )
    one.add_argument(
        "--train",
        action="append",
        nargs="+",
        metavar="SPEC",
        help="labelled shards that probes are fitted on; again, with another --test, for another set",
    )
    one.add_argument(
        "--test", action="append", nargs="+", required=True, metavar="SPEC", help="labelled shards that are scored once"
    )
    one.add_argument(
        "--with",
        dest="evaluators",
        metavar="LIST",
        help=f"evaluators, of {', '.join(NAMES)} (default: {', '.join(DEFAULT)})",
    )
    one.add_argument("--k", metavar="LIST", help="candidate numbers of neighbours (default: 10,20,100,200)")
    one.add_argument("--shots", metavar="LIST", help="labelled samples a class, of fewshot (default: 1,5,10)")
    one.add_argument("--epochs", type=_count, metavar="N", help="passes of finetune (default: 20)")
    _extraction_options(one)
    one.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print what scores.json holds, or write it")
    one.add_argument(
        "--markdown", nargs="?", const="-", metavar="FILE", help="print the tables for a README, or write them"
    )

    one = _command(commands, "embed", _embed, "write the features of a set to a file, which eval takes without a model")
    one.add_argument("encoder", help="as of eval")
    one.add_argument("spec", nargs="+", help="paths with {000..009} braces, globs, folders, digits:train")
    one.add_argument("target", type=Path, metavar="out", help="OUT.safetensors or OUT.npz")
    _extraction_options(one)

    one = _command(
        commands,
        "export",
        _export,
        "write an encoder for timm, transformers, ONNX or torch, checked in a clean process",
    )
    one.add_argument("source", help="a run folder, a checkpoint, an exported encoder, or the name of a timm model")
    one.add_argument("target", type=Path, help="the folder to write")
    one.add_argument("--to", choices=["timm", "transformers", "onnx", "torch"], default="timm", help="(default: timm)")
    one.add_argument("--half", choices=["fp16", "bf16"], help="store weights in 16 bits (timm, transformers)")
    one.add_argument(
        "--weights", choices=["student", "teacher"], help="of a run or checkpoint (default: what was scored)"
    )
    one.add_argument(
        "--average",
        nargs="+",
        metavar="METHOD",
        help="uniform or greedy, then checkpoints to average with SOURCE, or the number of SOURCE's last ones (default: all)",
    )
    one.add_argument(
        "--labels",
        nargs="+",
        metavar="SPEC",
        help="labelled training shards that greedy chooses by (default: eval.train)",
    )
    one.add_argument(
        "--image-size", type=_count, metavar="N", help="resample position embeddings for images of this size"
    )
    one.add_argument(
        "--license",
        default="unknown",
        metavar="SPDX",
        help="of the weights, for the card (default: that of an export that is exported again, or unknown)",
    )
    one.add_argument(
        "--push", metavar="USER/NAME", help="publish the folder as a new repository of the Hugging Face hub"
    )
    one.add_argument("--private", action="store_true", help="with --push, a private one")

    one = _command(
        commands,
        "import-weights",
        _import_weights,
        "read somebody's .pth, .pt or .bin, in a process of its own, as .safetensors",
    )
    one.add_argument("source", type=Path, help="a file that torch.save wrote; only tensors are taken from it")
    one.add_argument("target", type=Path, help="the .safetensors to write, which encoder.weights then takes")
    one.add_argument("--key", help="which part of it, if it holds several (model, teacher, ...; they are listed)")
    one.add_argument("--prefix", default="", help="take the tensors whose names start so, without it (module.)")

    one = _command(commands, "report", _report, "write report.html of a run again, or a page that compares runs")
    one.usage = "selfsight report RUN [RUN ...] [--out FILE] [--plugin MODULE]"
    one.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder; several are compared (up to 8)")
    one.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page to write (default: RUN/report.html; of several runs: compare.html)",
    )
    one.add_argument(
        "--plugin", metavar="MODULE", help="a module with the run's objective, as it was given to pretrain"
    )

    shards = commands.add_parser("shards", help="build, index and check WebDataset shards")
    actions = shards.add_subparsers(dest="action", required=True, metavar="ACTION")
    one = _command(actions, "build", _build, "pack images as shards")
    one.add_argument(
        "source",
        help="a folder of images, tars (.tar, .tar.gz, .tar.xz), a torchvision dataset (CIFAR10), digits:train",
    )
    one.add_argument("target", type=Path, help="a new folder")
    one.add_argument("--root", type=Path, help="where a torchvision dataset lies")
    one.add_argument("--split", default="train", help="its split (default: train)")
    one.add_argument("--download", action="store_true", help="let torchvision fetch it")
    one.add_argument("--unlabelled", action="store_true", help="ignore class folders and labels")
    one.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help=".csv (path,label) or .json ({path: label}) instead of class folders; a label is 3, or a list as 0;3;7",
    )
    one.add_argument(
        "--classes",
        type=Path,
        metavar="SHARDS",
        help="number class folders as these shards do (or a classes.json): of a test set as its training set",
    )
    one.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="masks of the images (.png, .tif, .npy), by their relative paths"
    )
    one.add_argument("--short-side", type=_count, metavar="PIXELS", help="reduce larger images to this shorter side")
    one.add_argument("--format", choices=["jpeg", "png", "webp"], help="store all images so (default: as they are)")
    one.add_argument("--quality", type=_count, default=92, help="of JPEG and WebP, 1-100 (default: 92)")
    one.add_argument(
        "--group-by",
        metavar="RULE",
        help="number the patient, slide or scene that images are parts of: folder, stem, or a regular expression on the path",
    )
    one.add_argument("--clips", action="store_true", help="the images of each folder are the frames of one clip")
    one.add_argument("--tile", type=_count, metavar="PIXELS", help="cut large images into tiles of this size")
    one.add_argument("--stride", type=_count, metavar="PIXELS", help="from a tile to the next (default: its size)")
    one.add_argument(
        "--background",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="leave out tiles with more near-white or empty pixels (default: 0.9; 1: none)",
    )
    one.add_argument(
        "--per-shard", type=_count, default=10_000, metavar="SAMPLES", help="samples in a shard (default: 10000)"
    )
    one = _command(actions, "index", _index, "index existing WebDataset tars, without rewriting them")
    one.add_argument("spec", nargs="+", help="paths with {000..009} braces, globs, folders")
    one.add_argument(
        "--missing", choices=["error", "exclude"], default="error", help="samples without an image (default: error)"
    )
    one = _command(actions, "check", _check, "read, verify and decode every sample again")
    one.add_argument("spec", nargs="+", help="paths with {000..009} braces, globs, folders, digits:train")
    one.add_argument("--json", action="store_true", help="print one object")
    one.add_argument(
        "--stats", action="store_true", help="write mean, std and percentiles of every channel beside the index"
    )
    one.add_argument("--stats-samples", type=_count, metavar="N", help="of N samples, evenly spaced (default: of all)")
    one.add_argument(
        "--volumes",
        action="store_true",
        help="an axis that a file does not name is planes, as a run with frames has it",
    )
    one = _command(actions, "split", _split, "divide shards into training and test shards, each group on one side")
    one.add_argument("spec", help="paths with {000..009} braces, globs, folders")
    one.add_argument("train", type=Path, help="a new folder for the training shards")
    one.add_argument("test_folder", type=Path, metavar="test", help="a new folder for the test shards")
    one.add_argument("--by", choices=["group"], default="group", help="what is never divided (default: group)")
    one.add_argument("--test", type=float, default=0.1, metavar="SHARE", help="of the groups, about (default: 0.1)")
    one.add_argument("--seed", type=int, default=0, help="which groups (default: 0)")
    one = _command(
        actions, "cache", _cache, "store the pixels of small images of one size, so that none is decoded again"
    )
    one.add_argument("spec", nargs="+", help="paths with {000..009} braces, globs, folders, digits:train")
    one.add_argument("--channels", type=_count, default=3, help="as encoder.channels of the recipe (default: 3)")

    one = _command(commands, "recipes", _recipes, "list the packaged recipes, or print the JSON schema for editors")
    one.add_argument("--schema", action="store_true", help="print the JSON schema")
    one = _command(
        commands, "quickstart", _quickstart, "the main job on built-in digits, in at most 3 minutes on 2 cores", True
    )
    return parser


def _extraction_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pools", metavar="LIST", help="features, such as cls,mean (default: all of eval, the own of embed)"
    )
    command.add_argument(
        "--scales", metavar="LIST", help="the image in these multiples of its size, as 1,2 (default: 1)"
    )
    command.add_argument("--merge", type=int, metavar="N", help="tokens that each block merges away (default: 0)")
    command.add_argument("--workers", type=int, default=0, help="loader processes (default: 0)")
    command.add_argument("--no-cache", action="store_true", help="neither use nor keep features of other calls")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str, takes_fields: bool = False
) -> argparse.ArgumentParser:
    text = help[0].upper() + help[1:] + "."
    parser = commands.add_parser(name, help=help, description=text, allow_abbrev=False, add_help=not takes_fields)
    if takes_fields:
        parser.add_argument("-h", "--help", action=_HelpWithFields)
    parser.set_defaults(run=run, parser=parser)
    return parser


class _Parser(argparse.ArgumentParser):
    """Repeats what it did not understand without the secrets in it."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


class _HelpWithFields(argparse.Action):
    """`--help` that goes on with every recipe field."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this and every recipe field")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from selfsight.fields import field_list

        print(parser.format_help() + "\n" + field_list(), end="")
        parser.exit()


def _recipe(options: argparse.Namespace) -> "Recipe":
    """The recipe of a command, before anything imports torch: a misspelt field is told at once."""
    from selfsight.recipe import load

    return load(options.recipe, options.fields)


def _pretrain(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from selfsight.console import show_scores
    from selfsight.train import pretrain

    found = pretrain(recipe, allow_change=options.allow_change)
    if found.get("scores"):
        show_scores(found)
    return 0


def _teacher(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from selfsight.teach import store_teacher

    print(store_teacher(recipe))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from selfsight.doctor import doctor

    return doctor(recipe, as_json=options.json)


def _bench(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from selfsight.bench import Wish, bench

    plugins = {"plugin": options.plugins} if options.plugins else {}
    given = [f"--{name} {shlex.quote(value)}" for name, value in (plugins | options.fields).items()]
    told = " ".join([shlex.quote(options.recipe), *given])
    wish = Wish(options.seconds, options.synthetic, options.compile, told)
    return bench(recipe, wish, as_json=options.json)


def _quickstart(options: argparse.Namespace) -> int:
    from selfsight.quickstart import quickstart

    quickstart(options.fields)
    return 0


def _eval(options: argparse.Namespace) -> int:
    given = _extraction(options) | _chosen(options)
    if options.json == options.markdown == "-":
        raise UsageError("--json --markdown: both on one output; give one of them a file")
    for name in ("json", "markdown"):
        _require_file(getattr(options, name), name)
    from selfsight.console import say
    from selfsight.eval.evaluate import evaluate
    from selfsight.eval.ranks import started

    train, test = _pairs(options)
    with started() as ranks:
        found = evaluate(options.encoder or None, train, test, ranks=ranks, say=say, **given)
    if ranks.main:
        _show_scores(found, options)
    return 0


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    """What of the protocol was asked for; the rest is evaluate's to say."""
    given: dict[str, Any] = {}
    if options.evaluators:
        given["evaluators"] = options.evaluators.split(",")
        require_known(given["evaluators"])
    given |= {name: _numbers(told, f"--{name}") for name in ("k", "shots") if (told := getattr(options, name))}
    return given | ({"epochs": options.epochs} if options.epochs else {})


def _extraction(options: argparse.Namespace) -> dict[str, Any]:
    """How features are to be taken, as eval and embed take it."""
    given: dict[str, Any] = {"workers": options.workers, "cache": not options.no_cache}
    given |= {"pools": options.pools.split(",")} if options.pools else {}
    given |= {"scales": _numbers(options.scales, "--scales")} if options.scales else {}
    return given | ({"merge": options.merge} if options.merge else {})


def _pairs(options: argparse.Namespace) -> tuple[Any, Any]:
    """Training and test sets: one of each as it is, several by the name of the test set."""
    tests: list[Any] = [words[0] if len(words) == 1 else words for words in options.test]
    trains: list[Any] = [words[0] if len(words) == 1 else words for words in options.train or ()]
    if len(trains) not in (0, len(tests)):
        raise UsageError(f"{len(trains)} --train and {len(tests)} --test; each test set goes with its own training set")
    if len(tests) == 1:
        return (trains[0] if trains else None), tests[0]
    from selfsight.eval.asked import unique

    names = unique([redact(word if isinstance(word, str) else " ".join(word)) for word in tests])
    return (dict(zip(names, trains, strict=True)) if trains else None), dict(zip(names, tests, strict=True))


def _require_file(name: str | None, kind: str) -> None:
    """Raise UsageError where an encoder stands behind --json, or a folder that is not there."""
    ending = {"json": ".json", "markdown": ".md"}[kind]
    if not name or name == "-":
        return
    if not name.endswith(ending):
        raise UsageError(f"--{kind}: {name} is no {ending} file; put --{kind} after the encoders")
    if Path(name).is_dir() or not os.access(Path(name).parent, os.W_OK):
        raise UsageError(f"--{kind}: {name} cannot be written; is its folder there?")


def _show_scores(found: dict[str, Any], options: argparse.Namespace) -> None:
    from selfsight.console import say, show_scores
    from selfsight.eval.tables import markdown
    from selfsight.run_folder import write_atomically

    texts = {"json": lambda: json.dumps(found, indent=1), "markdown": lambda: markdown(found).rstrip()}
    targets = {name: getattr(options, name) for name in texts if getattr(options, name)}
    for name in (name for name, target in targets.items() if target == "-"):
        print(texts[name]())
    if "-" not in targets.values():
        show_scores(found)
    for name, target in targets.items():  # last: a disk that is full takes no score from who waits for it
        if target != "-":
            write_atomically(Path(target), texts[name]() + "\n")
            say(f"written: {target}")


def _embed(options: argparse.Namespace) -> int:
    given = _extraction(options)
    from selfsight.eval.embed import embed_to, require_writable_as, stored
    from selfsight.eval.features import Extraction
    from selfsight.eval.ranks import started

    require_writable_as(options.target)
    extraction = Extraction(given.pop("scales", (1,)), given.pop("merge", 0))
    with started() as ranks:
        made = stored(options.encoder, options.spec, given.pop("pools", None), extraction, ranks=ranks, **given)
        told = embed_to(options.target, made, ranks)
    if ranks.main:
        print(told)
    return 0


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"{option}: {text!r} is not a list of whole numbers, such as 10,20") from None


def _export(options: argparse.Namespace) -> int:
    from selfsight.exports.command import Request, run

    wanted = {name: getattr(options, name) for name in Request._fields}
    print(run(Request(**wanted)))
    return 0


def _import_weights(options: argparse.Namespace) -> int:
    from selfsight.console import say
    from selfsight.import_weights import import_weights

    for line in import_weights(options.source, options.target, options.key, options.prefix):
        say(line)
    print(options.target)
    return 0


def _report(options: argparse.Namespace) -> int:
    from selfsight.comparison import compare
    from selfsight.finish import report_again

    if len(options.runs) == 1:
        print(report_again(options.runs[0], options.out))
    else:
        print(compare(options.runs, options.out or "compare.html"))
    return 0


def _build(options: argparse.Namespace) -> int:
    from selfsight.data.build import build
    from selfsight.data.folders import Reading
    from selfsight.data.packing import Encoding
    from selfsight.data.tiles import Cut

    cut = Cut(options.tile, options.stride, options.background) if options.tile else None
    if options.stride and not cut:
        raise UsageError("--stride: is the distance of tiles; add --tile")
    built = build(
        options.source,
        options.target,
        root=options.root,
        split=options.split,
        download=options.download,
        reading=Reading(
            options.unlabelled, options.group_by, options.clips, cut, options.labels, options.masks, options.classes
        ),
        encoding=Encoding(options.short_side, options.format, options.quality),
        per_shard=options.per_shard,
    )
    classes = f"{built.classes} classes" if built.classes else "no labels"
    groups = f", {built.groups:,} groups" if built.groups else ""
    lists = f", {built.lists:,} lists of labels ({built.empty:,} empty)" if built.lists else ""
    masks = f", {built.masks:,} masks" if built.masks else ""
    print(
        f"{built.folder}: {built.samples:,} samples in {built.shards} shards, {classes}{lists}{groups}{masks}, "
        f"{built.bytes / 2**20:,.1f} MiB"
    )
    return 0


def _index(options: argparse.Namespace) -> int:
    from selfsight.console import progress
    from selfsight.data.index import build_index
    from selfsight.data.shards import find_shards

    paths, samples = find_shards(options.spec), 0
    with progress("indexing", len(paths)) as bar:
        for path in paths:
            samples += len(build_index(path, missing=options.missing))
            bar()
    print(f"{samples:,} samples in {len(paths)} shards indexed")
    return 0


def _check(options: argparse.Namespace) -> int:
    from selfsight.console import progress
    from selfsight.data.check import Measure, check, check_table
    from selfsight.data.shards import Shards

    shards = Shards(options.spec)
    wanted = options.stats or options.stats_samples is not None
    with progress("checking", len(shards)) as bar:
        found = check(shards, bar, Measure(options.stats_samples, options.volumes) if wanted else None)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        check_table(found)
    return DataError.exit_code if found["bad"] else 0


def _cache(options: argparse.Namespace) -> int:
    from selfsight.console import progress
    from selfsight.data.decode import Form
    from selfsight.data.pixel_cache import build_cache
    from selfsight.data.shards import Shards

    shards = Shards(options.spec)
    with progress("decoding", len(shards)) as bar:
        made = build_cache(shards, Form(options.channels), bar)
    bad = f", {len(made.bad):,} of them bad" if made.bad else ""
    print(f"{made.path}: {len(made):,} samples of {made.shape}{bad}, {made.path.stat().st_size / 2**20:,.1f} MiB")
    return 0


def _split(options: argparse.Namespace) -> int:
    from selfsight.data.split import split

    halves = split(options.spec, options.train, options.test_folder, options.test, options.seed)
    for folder, half in zip((options.train, options.test_folder), halves, strict=True):
        lists = f", {half.lists:,} lists of labels" if half.lists else ""
        masks = f", {half.masks:,} masks" if half.masks else ""
        print(f"{folder}: {half.samples:,} samples of {half.groups:,} groups{lists}{masks}")
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from selfsight.fields import json_schema
    from selfsight.recipe import packaged_recipes

    if options.schema:
        print(json.dumps(json_schema(), indent=1))
    else:
        for path, summary in packaged_recipes():
            print(f"{path:32} {summary}")
    return 0
