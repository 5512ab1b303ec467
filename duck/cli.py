"""The command `duck`: parses options, runs one command, turns errors into a line and an exit code.

Exit codes: 0 ok, 2 bad usage or input, 3 flock failure, 130 Ctrl-C. Answers go to stdout,
everything else to stderr. Heavy modules are imported by the command that needs them: a duck must
not load torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import duck
from duck import bench, files, log
from duck.config import CHOICES, model_folder, output_file, picture_file
from duck.errors import ConfigError, DuckError
from duck.wire import plain

if TYPE_CHECKING:
    from duck.sampling import Sampling

# Commands that design.md names and this version does not have.
PLANNED = ("serve", "plan", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`duck generate ... | head`): nothing is wrong.
        _drop_output()
        return 0
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno == errno.EMFILE:
            why = files.too_many_open()
        else:
            _drop_output()
        _complain(f"cannot go on: {why}")
        return 2


def _drop_output() -> None:
    """Stdout is of no more use; Python would say so once more when it flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    """One line on stderr, whatever a file or a peer put into the text."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"duck: {plain(text)}\n")
        sys.stderr.flush()


def _run(argv: Sequence[str] | None) -> int:
    try:
        words = _joined(sys.argv[1:] if argv is None else argv)
        if words and words[0] in PLANNED:
            raise ConfigError(f"{words[0]} is not built yet; see duck --help for what is")
        arguments = _parser().parse_args(words)
        log.configure(arguments.log_level, json=arguments.json)
        files.allow_open_files()
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except DuckError as error:
        _complain(str(error))
        return error.exit_code


def _joined(words: Sequence[str]) -> list[str]:
    """Join -1,2 to the flag before it, which argparse would take for a flag of its own."""
    joined: list[str] = []
    for word in words:
        if joined and re.fullmatch(r"--[a-z-]+", joined[-1]) and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all our errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is not known here, where --help lists what is: not in `duck` itself."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="duck",
        description="Run mixture-of-experts models far too large for one GPU on cheap machines.",
    )
    parser.add_argument("--version", action="version", version=f"duck {duck.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object for machines")
    common.add_argument(
        "--log-level", default="warning", choices=("debug", "info", "warning", "error"),
        help="events on stderr (default: warning)",
    )  # fmt: skip

    model = _Parser(add_help=False, parents=[common])
    model.add_argument(
        "model", metavar="MODEL", help='a Hugging Face model folder, or "demo": the shipped model'
    )
    _flock_options(model)

    sampling = _Parser(add_help=False)
    _sampling_options(sampling)

    generate = commands.add_parser(
        "generate", parents=[model, sampling], help="answer one prompt",
        description="Answer one prompt; the text streams to stdout, the statistics go to stderr.",
    )  # fmt: skip
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="F", help="read the prompt from a file (-: stdin)")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids, nothing added")
    generate.add_argument("--chat", action="store_true", help="put the prompt in the chat format")
    generate.add_argument(
        "-v", "--verbose", action="store_true", help="also show what the host and the ducks hold"
    )
    generate.set_defaults(command=_generate)

    chat = commands.add_parser(
        "chat", parents=[model, sampling], help="talk to a model",
        description="Talk to a model. /stats, /reset, /exit; Ctrl-C stops an answer.",
    )  # fmt: skip
    chat.add_argument("--system", metavar="TEXT", help="a system message for the conversation")
    chat.set_defaults(command=_chat)

    score = commands.add_parser(
        "score", parents=[model], help="log-likelihood and perplexity of a text",
        description="Teacher-forced log-likelihood and perplexity.",
    )  # fmt: skip
    text = score.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt-ids", metavar="1,2,3")
    text.add_argument("--text-file", metavar="F", help="a UTF-8 text (-: stdin)")
    score.add_argument("--mtp", action="store_true", help="also the MTP layer's logits")
    score.add_argument("--logits-out", metavar="F", help="write the logits as safetensors")
    score.set_defaults(command=_score)

    node = commands.add_parser(
        "node", parents=[common], help="be a duck: hold slices of experts and answer asks",
        description="Be a duck: hold slices of experts and answer asks until stopped.",
    )  # fmt: skip
    node.add_argument("--listen", metavar="ADDR", required=True, help="HOST:PORT (port 0: any)")
    source = node.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", metavar="DIR", help="read this duck's columns from a model folder"
    )
    source.add_argument(
        "--store", metavar="DIR",
        help="read packed layers (duck pack); what the folder lacks is sent by the host, and kept",
    )  # fmt: skip
    security = node.add_mutually_exclusive_group()
    security.add_argument(
        "--key-file", metavar="F", help="the cluster's key: serve only hosts that have it too"
    )
    security.add_argument(
        "--insecure",
        action="store_true",
        help="listen on other addresses than loopback without a key",
    )
    node.add_argument(
        "--threads", type=int, default=0, metavar="N",
        help="threads that compute (default: one for each processor)",
    )  # fmt: skip
    node.add_argument(
        "--spin-us", type=int, default=2000, metavar="N",
        help="how long a thread without work stays awake (default: 2000)",
    )  # fmt: skip
    node.add_argument(
        "--pin", action="store_true",
        help="keep every thread on its processor; for machines that do nothing else",
    )  # fmt: skip
    node.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    node.set_defaults(command=_node)

    pack = commands.add_parser(
        "pack", parents=[common], help="cut a model's experts into one folder for each duck",
        description="Write OUT/duck-000, OUT/duck-001, ...: the slices of all ducks, for "
        "duck node --store. Repeating it completes what was interrupted.",
    )  # fmt: skip
    pack.add_argument("model", metavar="MODEL", help='a model folder, or "demo"')
    pack.add_argument("--ducks", type=int, metavar="N", help="how many ducks (default: 2)")
    pack.add_argument(
        "--weights", metavar="A,B,C", help="one number a duck: slices as wide (default: equal)"
    )
    pack.add_argument("--out", metavar="DIR", required=True)
    pack.add_argument(
        "--experts", default="exact", choices=CHOICES["experts"][0],
        help="int8, int4: rounded; hosts must choose the same (default: %(default)s)",
    )  # fmt: skip
    pack.set_defaults(command=_pack)

    bench.add_parser(commands, common)

    key = commands.add_parser(
        "key", parents=[common], help="make the key that a host and its ducks share",
        description="Write a new random key to FILE. Copy it to the host and to every duck, by a "
        "way that nobody else can read, and give it to them as --key-file.",
    )  # fmt: skip
    key.add_argument("file", metavar="FILE")
    key.set_defaults(command=_key)

    _trace_parser(commands, common)
    for name in PLANNED:
        commands.add_parser(name, help="(planned)", add_help=False)
    return parser


def _trace_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    trace = commands.add_parser("trace", help="what a trace says about overlap")
    kinds = trace.add_subparsers(metavar="WHAT", required=True)
    summarize = kinds.add_parser(
        "summarize", parents=[common], help="who was busy, and who waited for whom",
        description="Busy and idle times, overlap, waits, the slowest duck, and the step that the "
        "measured stages should have made; of the decode steps in a file of --trace.",
    )  # fmt: skip
    summarize.add_argument("file", metavar="FILE")
    summarize.add_argument("--png", metavar="OUT.png", help="also draw some steps")
    summarize.add_argument(
        "--steps", metavar="A:B", help="which steps to draw, from 0 (default: the middle one)"
    )
    summarize.set_defaults(command=_summarize)


def _tokens(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r}: want a whole number of tokens, up to the model's context"
        ) from None


def _flock_options(parser: argparse.ArgumentParser) -> None:
    flock = parser.add_argument_group("flock")
    flock.add_argument(
        "--ducks", default="local:2", metavar="WHO",
        help="local:N, HOST:PORT,HOST:PORT or flock.toml (default: local:2)",
    )  # fmt: skip
    helps = {
        "transport": "auto: shm for local:N, else tcp; multicast: asks by UDP, once for all ducks; "
        "loopback: all ducks in this process",
        "placement": "slices of equal width, or as the weights in flock.toml say (auto: if it has "
        "some); as duck pack --weights cut them",
        "schedule": "how rows are grouped and ordered (auto: by measured times)",
        "draft": "guess the next token with the model's MTP layer (auto: while it pays)",
        "early": "start a wave's sure token while its guess is being made (auto: if it gains)",
        "device": "where attention runs (auto: cuda if there is one)",
        "dtype": "auto: float32 on cpu, bfloat16 on cuda",
        "kv": "what cached latents are held in (auto: dtype)",
        "indexer": "rounding of sparse attention's choice (auto: exact in float32, else fp8)",
        "graphs": "record a layer's kernels once and replay them (auto: on GPUs)",
        "answers": "f32: partial sums travel in float32 even when asks travel in bfloat16",
        "experts": "int8: rounded, faster prefill; int4: half the memory, faster, rougher",
    }
    for name, text in helps.items():
        ready, planned = CHOICES[name]
        shown = "|".join(ready)
        if planned:
            shown += f" (planned: {', '.join(planned)})"
        flock.add_argument(f"--{name}", default=ready[0], metavar="X", help=f"{shown}: {text}")
    flock.add_argument(
        "--max-len", type=_tokens, metavar="N",
        help="tokens a session may hold (default: the model's context, if memory has room)",
    )  # fmt: skip
    flock.add_argument(
        "--key-file", metavar="F",
        help="the cluster's key (duck key F makes one): all ducks must have it too",
    )  # fmt: skip
    flock.add_argument(
        "--trace", metavar="OUT.json",
        help="write what happened when, for ui.perfetto.dev and duck trace summarize (.gz: packed)",
    )  # fmt: skip
    flock.add_argument(
        "--memory-trace", metavar="F",
        help="write what memory is taken when, as lines of JSON",
    )  # fmt: skip


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default 256")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    group.add_argument(
        "--temperature", type=float, default=0.0, help="default 0: the likeliest token"
    )
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0, help="default 0: off")
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="may be repeated"
    )
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: N likeliest tokens too"
    )


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The Engine's options among the command line's."""
    names = "ducks", *CHOICES, "max_len", "trace", "memory_trace"
    options = {name: getattr(arguments, name) for name in names}
    return {**options, "key_file": _path(arguments.key_file, "--key-file")}


def _path(text: str | None, flag: str, kind: str = "file") -> Path | None:
    """A path that was given, or none."""
    if text == "":
        raise ConfigError(f"{flag} is empty: give the path of a {kind}")
    return Path(text) if text else None


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The Sampling that the command line describes."""
    from duck.sampling import Sampling

    return Sampling(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
        logprobs=arguments.logprobs,
    )


def _prompt_of(arguments: argparse.Namespace) -> str | list[int]:
    if arguments.prompt_ids is not None:
        if getattr(arguments, "chat", False):
            raise ConfigError("--chat needs text: use --prompt or --prompt-file, not --prompt-ids")
        return _ids(arguments.prompt_ids)
    if getattr(arguments, "prompt", None) is not None:
        return str(arguments.prompt)
    given = getattr(arguments, "text_file", None)
    return _read_text(arguments.prompt_file if given is None else given)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise ConfigError(f"--prompt-ids {text[:60]!r}: want token ids as 1,2,3") from None


def _read_text(name: str) -> str:
    if not name:
        raise ConfigError("the file's name is empty: give a path, or - for stdin")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode()
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name}: no UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def _generate(arguments: argparse.Namespace) -> int:
    from duck import terminal

    options, sampling = engine_options(arguments), sampling_of(arguments)
    if sampling.logprobs is not None and not arguments.json:
        raise ConfigError("--logprobs is for machines: add --json")
    prompt = _prompt_of(arguments)
    return terminal.generate(
        arguments.model, prompt, sampling, options,
        chat=arguments.chat, as_json=arguments.json, verbose=arguments.verbose,
    )  # fmt: skip


def _chat(arguments: argparse.Namespace) -> int:
    from duck import terminal

    if arguments.json:
        raise ConfigError("duck chat is for people; machines use duck generate --json")
    options, sampling = engine_options(arguments), sampling_of(arguments)
    return terminal.chat(arguments.model, sampling, options, system=arguments.system)


def _score(arguments: argparse.Namespace) -> int:
    from duck import terminal

    out = None if arguments.logits_out is None else output_file("logits-out", arguments.logits_out)
    return terminal.score(
        arguments.model, _prompt_of(arguments), engine_options(arguments),
        mtp=arguments.mtp, out=out, as_json=arguments.json,
    )  # fmt: skip


def _node(arguments: argparse.Namespace) -> int:
    # Numpy's BLAS must not split one row over threads: N ducks on one box would fight over its
    # cores, and a row's bits would depend on the machine. It reads this when numpy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from duck.kernels.experts import MAX_SPIN_US, MAX_THREADS
    from duck.node import Kernel, run_node

    for name, most in (("threads", MAX_THREADS), ("spin_us", MAX_SPIN_US)):
        if not 0 <= getattr(arguments, name) <= most:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(arguments, name)}: want 0 to {most}")
    model = _path(arguments.model, "--model", "folder")
    run_node(
        arguments.listen,
        model=model_folder(model) if model else None,
        store=_path(arguments.store, "--store", "folder"),
        kernel=Kernel(arguments.threads, arguments.spin_us, arguments.pin),
        key_file=_path(arguments.key_file, "--key-file"),
        insecure=arguments.insecure,
        parent=arguments.parent,
        as_json=arguments.json,
    )
    return 0


def _key(arguments: argparse.Namespace) -> int:
    from duck.keys import ClusterKey

    path = _path(arguments.file, "FILE")
    assert path is not None
    key = ClusterKey.create(path)
    if arguments.json:
        write_json({"key_file": str(path), "fingerprint": key.fingerprint})
    else:
        sys.stdout.write(f"key {key.fingerprint} written to {plain(str(path))}\n")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from duck.pack import pack
    from duck.pack import show as show_packed

    weights = _weights(arguments.weights, arguments.ducks)
    out = _path(arguments.out, "--out", "folder")
    assert out is not None
    from duck.bars import bars

    with bars("packing") as note:
        packed = pack(
            model_folder(arguments.model), weights, out,
            lambda done, total: note("slices", done, total), experts=arguments.experts,
            verifying=lambda done, total: note("(what is there, verified)", done, total),
        )  # fmt: skip
    if arguments.json:
        write_json({"ducks": [duck.to_json() for duck in packed]})
    else:
        show_packed(packed)
    return 0


def _summarize(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from duck import picture, recording, summary

    chosen = None if arguments.steps is None else _range(arguments.steps)
    png = None if arguments.png is None else picture_file("png", arguments.png)
    if chosen and not png:
        raise ConfigError("--steps chooses what --png draws: add --png OUT.png")
    found = recording.read(arguments.file)
    if png and png.exists() and png.samefile(arguments.file):
        raise ConfigError(f"--png {png}: that is the trace itself: give another name")
    try:
        figures = summary.summarize(found)
    except ConfigError as error:
        raise ConfigError(f"{arguments.file}: {error}") from None
    if png:
        middle = figures.steps // 2
        picture.draw(found, png, *(chosen or (middle, middle + 1)))
    if arguments.json:
        write_json(summary.to_json(figures))
        return 0
    console = Console()
    for table in summary.tables(figures):
        console.print(table)
        console.print()
    return 0


def _range(text: str) -> tuple[int, int]:
    """Two whole numbers as 3:6."""
    first, colon, stop = text.partition(":")
    if not (colon and _is_count(first) and _is_count(stop)):
        raise ConfigError(f"--steps {text[:60]!r}: want two numbers as 3:6")
    if int(first) >= int(stop):
        raise ConfigError(f"--steps {text}: the first number must be below the second, as 3:6")
    return int(first), int(stop)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _weights(text: str | None, ducks: int | None) -> list[float]:
    """The ducks' weights from --weights and --ducks."""
    if text is None:
        if ducks is not None and ducks < 1:
            raise ConfigError(f"--ducks {ducks}: want 1 or more")
        return [1.0] * (2 if ducks is None else ducks)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text[:60]!r}: want numbers as 2,1,1") from None
    if ducks not in (None, len(weights)):
        raise ConfigError(f"--weights has {len(weights)} numbers for --ducks {ducks}")
    return weights


def write_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
