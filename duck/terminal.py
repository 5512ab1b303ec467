"""The commands that run a model, as people see them: streaming text, progress bars, tables,
chat.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from duck.bars import bars
from duck.bars import console as _console
from duck.budget import Budget
from duck.cli import write_json
from duck.config import model_folder
from duck.engine import Engine, Piece, logits_to_logprobs
from duck.errors import ConfigError
from duck.prompts import Prompts
from duck.sampling import Sampling


@contextlib.contextmanager
def _runner() -> Iterator[asyncio.Runner]:
    """An event loop for one command, uvloop's where there is one."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):  # not on every platform; asyncio's own does the same
        import uvloop

        factory = uvloop.new_event_loop
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the runner then replaces
    runner = asyncio.Runner(loop_factory=factory)
    try:
        yield runner
    finally:
        # All is said: a Ctrl-C from here on has nothing to stop, and would tear the loop's closing.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        runner.close()
        signal.signal(signal.SIGINT, previous)


def _tell_memory(budget: Budget, *, verbose: bool = False) -> None:
    """What memory is for, before it is taken: for people, and for all when it is too little."""
    if verbose or budget.shortened or sys.stderr.isatty():
        _console.print(f"[dim]{budget}[/dim]", highlight=False, soft_wrap=True)


def _write(text: str) -> None:
    """Text as it comes, also into a pipe."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


# generate


def generate(
    model: str,
    prompt: str | Sequence[int],
    sampling: Sampling,
    options: Mapping[str, Any],
    *,
    chat: bool,
    as_json: bool,
    verbose: bool,
) -> int:
    """`duck generate`; returns the exit code."""
    with _runner() as runner:
        runner.run(
            _generate(model, prompt, sampling, options, chat=chat, as_json=as_json, verbose=verbose)
        )
    return 0


async def _generate(
    model: str,
    prompt: str | Sequence[int],
    sampling: Sampling,
    options: Mapping[str, Any],
    *,
    chat: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        prompts = Prompts(model_folder(model), options.get("max_len"))
        prompts.encode(prompt, chat=chat)  # a bad one costs no loading
        tell = partial(_tell_memory, verbose=verbose)
        with bars("loading") as progress:
            opening = Engine.open(model, progress=progress, planned=tell, **options)
            engine = await stack.enter_async_context(opening)
        if as_json:
            done = await engine.generate(prompt, sampling, chat=chat)
            answer: dict[str, Any] = {
                "token_ids": done.token_ids,
                "text": done.text,
                "finish_reason": done.finish_reason,
                "stats": done.stats,
            }
            if verbose:
                answer["load"] = engine.load.to_json()
            if sampling.logprobs is not None:
                answer["logprobs"] = [
                    {"token": c.token, "logprob": c.logprob, "top": [list(t) for t in c.top]}
                    for c in done.logprobs
                ]
            write_json(answer)
            return
        if verbose:
            show_load(engine)
        piece = Piece("", [])
        try:
            async for piece in engine.stream(prompt, sampling, chat=chat):
                _write(piece.text if engine.tokenizer else f"{piece.token_ids[0]} ")
        finally:
            _write("\n")  # whatever follows, an error too, begins on a line of its own
        _console.print(stats_table(piece.stats, piece.finish_reason or ""))


def show_load(engine: Engine) -> None:
    """What the host and the ducks hold, on stderr."""
    for table in engine.load.tables():
        _console.print(table)
        _console.print()


def stats_table(stats: Mapping[str, Any], finish_reason: str) -> Table:
    """The statistics of one answer as a table for people."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    drafts, accepted = stats["drafts_proposed"], stats["drafts_accepted"]
    ducks = f"{stats['ducks']} duck{'s' * (stats['ducks'] > 1)}"
    share = f"{accepted} of {drafts} ({accepted / drafts:.0%})" if drafts else "none"
    rows = (
        ("prompt", f"{stats['prompt_tokens']} tokens, {stats['prefill_tok_s']:.1f} tok/s"),
        ("answer", f"{stats['completion_tokens']} tokens, ended by {finish_reason}"),
        ("first token", f"{stats['ttft_s'] * 1e3:.0f} ms"),
        ("decode", f"{stats['decode_tok_s']:.1f} tok/s, {stats['tpot_s'] * 1e3:.1f} ms a token"),
        ("drafts accepted", f"{share}, {stats['steps']} steps"),
        (
            "flock",
            f"{ducks}, {stats['transport']}, schedule {stats['schedule']}",
        ),
        ("busy", f"device {stats['device_busy']:.0%}, ducks {stats['ducks_busy']:.0%}"),
    )
    for name, value in rows:
        table.add_row(f"[dim]{name}[/dim]", value)
    return table


# score


def score(
    model: str,
    prompt: str | Sequence[int],
    options: Mapping[str, Any],
    *,
    mtp: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    """`duck score`; returns the exit code."""
    with _runner() as runner:
        runner.run(_score(model, prompt, options, mtp=mtp, out=out, as_json=as_json))
    return 0


async def _score(
    model: str,
    prompt: str | Sequence[int],
    options: Mapping[str, Any],
    *,
    mtp: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        prompts = Prompts(model_folder(model), options.get("max_len"))
        ids = prompts.encode(prompt, answer=False)
        if len(ids) < 2:
            raise ConfigError("one token has no likelihood: give at least two")
        with bars("loading") as progress:
            opening = Engine.open(model, progress=progress, planned=_tell_memory, **options)
            engine = await stack.enter_async_context(opening)
        scored = await engine.score(ids, mtp=mtp)
        logits, tensors = (scored[0] if mtp else scored), {}
        tensors["logits"] = logits
        if mtp:
            tensors["mtp_logits"] = scored[1]
    if out is not None:
        _save(tensors, out)
    chances = logits_to_logprobs(logits, ids)
    total = float(chances.sum())
    perplexity = math.exp(-total / len(chances))
    if as_json:
        write_json(
            {
                "tokens": len(ids),
                "scored_tokens": len(chances),
                "log_likelihood": total,
                "perplexity": perplexity,
                "token_logprobs": chances.tolist(),
            }
        )
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("tokens", f"{len(ids)} ({len(chances)} scored)")
    table.add_row("log-likelihood", f"{total:.4f}")
    table.add_row("perplexity", f"{perplexity:.4f}")
    Console().print(table)


def _save(tensors: dict[str, np.ndarray], out: Path) -> None:
    from safetensors.numpy import save

    try:
        out.write_bytes(save(tensors))
    except OSError as error:
        raise ConfigError(f"--logits-out {out}: {error.strerror}") from error


# chat

_HELP = "/stats  figures of the last answer     /reset  forget the conversation     /exit  leave"


def chat(model: str, sampling: Sampling, options: Mapping[str, Any], *, system: str | None) -> int:
    """`duck chat`; returns the exit code.

    The event loop runs only while an answer is made, so that the line editor has the terminal, and
    Ctrl-C
    means "stop the answer" there and "clear the line" here.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    with _runner() as runner:
        stack = contextlib.AsyncExitStack()
        try:
            with bars("loading") as progress:
                opening = Engine.open(model, progress=progress, planned=_tell_memory, **options)
                engine = runner.run(stack.enter_async_context(opening))
            _Chat(runner, engine, sampling, system).loop()
        finally:
            runner.run(stack.aclose())
    return 0


class _Chat:
    """One conversation at a terminal."""

    def __init__(
        self, runner: asyncio.Runner, engine: Engine, sampling: Sampling, system: str | None
    ) -> None:
        self._runner, self._engine, self._sampling = runner, engine, sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self._stats: Table | None = None
        self._reset()

    def _reset(self) -> None:
        self._messages: list[dict[str, str]] = list(self._system)
        self._session = self._engine.session()

    def loop(self) -> None:
        """Read lines and answer them until /exit or the end of the input."""
        _console.print(f"[dim]{_HELP}[/dim]")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                _console.print("\n[dim]/exit or Ctrl-D leaves[/dim]")
                continue
            if line == "/exit":
                return
            if line == "/reset":
                self._reset()
                _console.print("[dim]forgotten[/dim]")
            elif line == "/stats":
                _console.print(self._stats or "[dim]no answer yet[/dim]")
            elif line.startswith("/"):
                _console.print(f"[dim]{_HELP}[/dim]")
            elif line:
                self._turn(line)

    def _turn(self, line: str) -> None:
        asked = [*self._messages, {"role": "user", "content": line}]
        said: list[str] = []
        try:
            self._runner.run(self._answer(asked, said))
        except KeyboardInterrupt:
            _console.print(" [dim](stopped)[/dim]")
        except ConfigError as error:  # too long, say: the conversation goes on
            _console.print(f"[red]{error}[/red]")
            return
        if said:  # what was said before Ctrl-C stays part of the conversation
            self._messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    async def _answer(self, messages: Sequence[Mapping[str, Any]], said: list[str]) -> None:
        piece = Piece("", [])
        answer = self._engine.stream(messages, self._sampling, session=self._session)
        async with contextlib.aclosing(answer):
            async for piece in answer:
                said.append(piece.text)
                _write(piece.text)
        _write("\n")
        self._stats = stats_table(piece.stats, piece.finish_reason or "")
