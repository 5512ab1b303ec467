"""The command line: a mistake is one clear line and an exit code; output is where it belongs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from duck import cli
from duck.keys import ClusterKey
from duck.model.weights import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.perfetto import check_schema


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=3)


def run(capfd: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    return code, out, err


IDS = ("--prompt-ids", "5,6,7")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), "required: COMMAND"),
        (("swim",), "swim"),
        (("generate",), "MODEL"),
        (("generate", "MODEL"), "--prompt"),
        (("generate", "MODEL", "--prompt", "a", "--prompt-ids", "1"), "not allowed with"),
        (("generate", "no/such/folder", *IDS), "no such folder: no/such/folder"),
        (("generate", "MODEL", "--prompt-ids", "1,x"), "want token ids as 1,2,3"),
        (("generate", "MODEL", "--prompt-ids", "1,9999"), "vocabulary has ids 0..287"),
        (("generate", "MODEL", "--prompt-ids", ""), "the prompt is empty"),
        (("generate", "MODEL", "--prompt", ""), "the prompt is empty"),
        (("generate", "MODEL", "--prompt-file", "none.txt"), "none.txt: No such file"),
        (("generate", "MODEL", "--chat", *IDS), "--chat needs text"),
        (("generate", "MODEL", *IDS, "--max-tokens", "0"), "max_tokens=0"),
        (("generate", "MODEL", *IDS, "--max-tokens", "many"), "invalid int value"),
        (("generate", "MODEL", *IDS, "--temperature", "-1"), "temperature=-1.0"),
        (("generate", "MODEL", *IDS, "--ducks", "local:0"), "local:N with N of 1..64"),
        (("generate", "MODEL", *IDS, "--ducks", "nowhere"), "want local:N, HOST:PORT"),
        (("generate", "MODEL", *IDS, "--ducks", "a:1,a:1"), "appears twice"),
        (("generate", "MODEL", *IDS, "--ducks", "none.toml"), "none.toml: No such file"),
        (
            ("generate", "MODEL", *IDS, "--transport", "pigeon"),
            "want one of auto, loopback, shm, tcp, multicast",
        ),
        (("generate", "MODEL", *IDS, "--schedule", "tide"), "want one of auto, serial, batch"),
        (("generate", "MODEL", *IDS, "--placement", "whole"), "--placement whole is not built"),
        (("generate", "MODEL", *IDS, "--placement", "weighted"), "weighted needs weights: use a f"),
        (("generate", "MODEL", *IDS, "--trace", "no/dir/t.json"), "no such folder: no/dir"),
        (("generate", "MODEL", *IDS, "--trace", "."), "--trace '.' is no file"),
        (("trace",), "WHAT"),
        (("generate", "MODEL", *IDS, "--transport", "loopback", "--ducks", "h:1"), "inside this"),
        (("generate", "MODEL", *IDS, "--max-len", "0"), "--max-len 0: the model's context is 2560"),
        (("generate", "MODEL", *IDS, "--max-len", "64k"), "'64k': want a whole number of tokens"),
        (
            ("generate", "MODEL", *IDS, "--trace", "t.json", "--memory-trace", "./t.json"),
            "--trace and --memory-trace t.json: want two files",
        ),
        (("generate", "MODEL", *IDS, "--max-len", "3"), "a session holds 3 tokens (--max-len)"),
        (("generate", "MODEL", *IDS, "--kv", "int4"), "--kv 'int4': want one of auto, bf16, fp8"),
        (("generate", "MODEL", *IDS, "--indexer", "on"), "want one of auto, exact, fp8"),
        (("generate", "MODEL", *IDS, "--ducks", "127.0.0.1:1"), "--model DIR (or --store DIR)"),
        (("score", "MODEL", "--prompt-ids", "1"), "at least two"),
        (("score", "MODEL", *IDS, "--logits-out", "no/dir/x"), "no such folder: no/dir"),
        (("serve", "MODEL"), "serve is not built yet"),
        (("bench",), "WHAT"),
        (("bench", "kernel", "--isa", "mmx", "--memory-gib", "0.34"), "isa 'mmx'"),
        (("generate", "MODEL", *IDS, "--experts", "int3"), "--experts 'int3': want one of exact, "),
        (("pack", "MODEL", "--out", "x", "--experts", "fp8"), "--experts: invalid choice: 'fp8'"),
        (("bench", "kernel", "--experts", "exact,bf16"), "--experts 'bf16': want exact, int8"),
        (("bench", "kernel", "--rows", "1,0"), "--rows '1,0': want numbers of 1 to 8192"),
        (("bench", "kernel", "--rows", "99999999999"), "--rows '99999999999': want numbers"),
        (("bench", "kernel", "--threads", "1025"), "--threads '1025': want numbers of 1 to 1024"),
        (("bench", "kernel", "--threads", "all"), "--threads 'all'"),
        (("bench", "kernel", "--memory-gib", "9e9"), "free, want less"),
        (("bench", "kernel", "--repeats", "0"), "--repeats 0: want more than 0"),
        (("bench", "transport", "--transport", "shm,pigeon"), "want some of shm, tcp, multicast"),
        (("bench", "transport", "--ducks", "1,65"), "--ducks '1,65': want numbers of 1 to 64"),
        (("bench", "transport", "--rows", "0"), "--rows '0'"),
        (("bench", "transport", "--rows", "1025"), "--rows '1025': want numbers of 1 to 1024"),
        (("bench", "transport", "--loss", "60%"), "--loss '60%': want shares up to 50%"),
        (("bench", "transport", "--loss", "much"), "--loss 'much'"),
        (("bench", "transport", "--loss", "1%", "--rows", "5"), "--loss: asks of more than 4 rows"),
        (("bench", "transport", "--key", "--transport", "shm"), "--key: tcp and multicast are"),
        (("bench", "transport", "--key", "--rows", "5,328"), "--key: tcp and multicast are"),
        (("bench", "transport", "--faults", "reorder"), "--faults 'reorder': want drop,"),
        (("bench", "transport", "--faults", "drop=60%"), "--faults 'drop=60%'"),
        (("bench", "transport", "--faults", "seed=1,kill=1%"), "--faults 'kill=1%'"),
        (("bench", "transport", "--faults", "drop=1%"), "--faults drop: only multicast stands it"),
        (
            ("bench", "transport", "--transport", "shm,tcp", "--loss", "1%"),
            "--loss 1%: only multicast has datagrams of ours to drop",
        ),
        (("bench", "transport", "--seconds", "nan"), "--seconds nan"),
        (("bench", "transport", "--seconds", "0"), "--seconds 0.0: want more than 0, up to 3600"),
        (("generate", "MODEL", *IDS, "--ducks", "a:0"), "want HOST:PORT with a port of 1..65535"),
        (("bench", "transport", "--plot", "x.png"), "--plot draws latency over loss"),
        (("bench", "transport", "--plot", "x.xyz"), "--plot 'x.xyz': pictures are PNG"),
        (("bench", "transport", "--plot", ""), "--plot '' is no file"),
        (("generate", "MODEL", *IDS, "--trace", "x" * 300), "xxx': File name too long"),
        (("node", "--listen", "0.0.0.0:1", "--model", "MODEL"), "--insecure"),
        (("node", "--listen", "0.0.0.0:1", "--model", "MODEL", "--key-file", "x"), "duck key x"),
        (
            ("node", "--listen", "0.0.0.0:1", "--model", "M", "--key-file", "x", "--insecure"),
            "--insecure: not allowed with argument --key-file",
        ),
        (("generate", "MODEL", *IDS, "--key-file", "none.key"), "none.key: No such file"),
        (("generate", "MODEL", *IDS, "--key-file", ""), "--key-file is empty"),
        (("generate", "MODEL", *IDS, "--key-file", __file__), "chmod 600"),
        (
            ("generate", "MODEL", *IDS, "--transport", "loopback", "--key-file", "x"),
            "inside this process, and no wire to seal: leave out --key-file",
        ),
        (
            ("generate", "MODEL", *IDS, "--tail"),
            "unrecognized arguments: --tail (see duck generate ",
        ),
        (("bench", "transport", "--tail"), "--tail (see duck bench transport --help)"),
        (
            ("node", "--listen", "[fe80::1%pond7]:1", "--model", "MODEL"),
            "cannot listen on [fe80::1%pond7]:1: ",
        ),
        (("key", ""), "FILE is empty"),
        (("key", __file__), "exists already"),
        (("node", "--listen", "127.0.0.1", "--model", "MODEL"), "want HOST:PORT"),
        (("node", "--listen", "127.0.0.1:0", "--model", "no/such"), "no such folder"),
        (("node", "--listen", "127.0.0.1:0", "--store", "x", "--threads", "-1"), "--threads -1"),
        (("node", "--listen", "127.0.0.1:0", "--store", __file__), "manifest.json: Not a dir"),
        (("node", "--listen", "127.0.0.1:0", "--store", ""), "--store is empty: give the path"),
        (("node", "--listen", "127.0.0.1:0", "--model", ""), "--model is empty: give the path"),
        (("node", "--listen", "127.0.0.1:0", "--store", "x", "--threads", "1025"), "to 1024"),
        (("node", "--listen", "127.0.0.1:0", "--store", "x", "--spin-us", "9" * 9), "--spin-us 99"),
        (("pack", "MODEL", "--out", ""), "--out is empty: give the path of a folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_line(
    capfd: pytest.CaptureFixture[str], folder: Path, words: tuple[str, ...], found: str
) -> None:
    code, out, err = run(capfd, *(str(folder) if word == "MODEL" else word for word in words))
    assert found in err
    assert err.startswith("duck: ")
    assert err.count("\n") == 1
    assert out == ""
    assert code == (3 if "cannot reach" in err else 2)


def test_generate_json(capfd: pytest.CaptureFixture[str], folder: Path) -> None:
    words = ("generate", folder, *IDS, "--max-tokens", "6", "--ignore-eos", "--json")
    code, out, err = run(capfd, *words, "--transport", "loopback")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert set(answer) == {"token_ids", "text", "finish_reason", "stats"}
    assert len(answer["token_ids"]) == answer["stats"]["completion_tokens"] == 6
    code, again, _ = run(capfd, *words, "--transport", "tcp", "--logprobs", "2")
    assert code == 0
    told = json.loads(again)
    assert told["token_ids"] == answer["token_ids"]
    assert [chances["token"] for chances in told["logprobs"]] == answer["token_ids"]


def test_a_key_is_made_and_used(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pond.key"
    code, out, err = run(capfd, "key", path)
    assert (code, err) == (0, "")
    fingerprint = ClusterKey.read(path).fingerprint
    assert out == f"key {fingerprint} written to {path}\n"
    code, out, _ = run(capfd, "key", tmp_path / "other.key", "--json")
    assert code == 0
    told = json.loads(out)
    assert set(told) == {"key_file", "fingerprint"}
    assert told["fingerprint"] != fingerprint
    words = ("generate", folder, *IDS, "--max-tokens", "6", "--ignore-eos", "--json")
    plain = json.loads(run(capfd, *words, "--transport", "tcp")[1])
    for transport in ("tcp", "shm"):
        code, out, err = run(capfd, *words, "--transport", transport, "--key-file", path)
        assert (code, err) == (0, "")
        assert json.loads(out)["token_ids"] == plain["token_ids"]


@pytest.mark.parametrize("schedule", ["serial", "batch", "wave"])
def test_trace_of_an_answer(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, schedule: str
) -> None:
    path = tmp_path / "out.json"
    words = ("generate", folder, *IDS, "--max-tokens", "6", "--ignore-eos", "--json")
    plain = run(capfd, *words, "--schedule", schedule)
    traced = run(capfd, *words, "--schedule", schedule, "--trace", path)
    assert plain[0] == traced[0] == 0
    answer = json.loads(traced[1])
    assert json.loads(plain[1])["token_ids"] == answer["token_ids"]
    document = json.loads(path.read_text())
    check_schema(document)
    assert document["otherData"]["ducks"] == ["duck 0", "duck 1"]
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    asks = [event for event in spans if event["cat"] == "net"]
    answers = [event for event in spans if event["cat"] in ("duck 0", "duck 1")]
    assert len(answers) == 2 * len(asks) > 0
    code, out, err = run(capfd, "trace", "summarize", path, "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert figures["schedule"] == schedule
    assert figures["steps"] == answer["stats"]["steps"]
    # The first token comes from the prompt.
    assert figures["settled"] == answer["stats"]["completion_tokens"] - 1
    assert all(duck["gb_s"] > 0 for duck in figures["ducks"])
    assert figures["common_experts"] == pytest.approx(answer["stats"]["expert_overlap"])


@pytest.mark.parametrize("transport", ["loopback", "shm", "tcp"])
def test_what_was_loaded(capfd: pytest.CaptureFixture[str], folder: Path, transport: str) -> None:
    words = ("generate", folder, *IDS, "--max-tokens", "2", "--transport", transport, "-v")
    code, out, _ = run(capfd, *words, "--json")
    assert code == 0
    load = json.loads(out)["load"]
    stored = Checkpoint.open(folder)
    held = [name for name in stored.tensors if ".experts." not in name]
    host = sum(category["source_bytes"] for category in load["host"])
    assert host == sum(stored.info(name).nbytes for name in held)  # scales too
    assert load["kv_bytes_per_token"] == 4 * (32 + 8) * 4  # layers, latent and rope, float32
    memory = load["memory"]
    assert (memory["max_len"], memory["kv"], memory["indexer"]) == (2560, "float32", None)
    assert memory["kv_bytes"] == 2560 * load["kv_bytes_per_token"]
    assert memory["weights_bytes"] == sum(c["resident_bytes"] for c in load["host"])
    assert memory["free_bytes"] > 0
    first, second = load["ducks"]
    assert (first["start"], first["stop"], second["stop"]) == (0, 128, 192)
    assert first["theory_bytes"] + second["theory_bytes"] == first["source_bytes"]
    assert first["resident_bytes"] >= first["theory_bytes"]
    assert first["read_bytes"] == first["resident_bytes"]
    assert not first["warm"]
    code, _, err = run(capfd, *words)
    assert code == 0
    assert re.search(r"^weights \d+ MiB, KV 2 MiB at 2,560 tokens, free [\d,]+ MiB$", err, re.M)
    for word in ("linears, fp8 -> float32", "KV cache, float32", "theory:", "0:128", "all"):
        assert word in err
    (row,) = [line for line in err.splitlines() if "0:128" in line]  # in 80 columns, unbroken
    assert row.split()[:3] == ["duck", "0", "0:128"]
    assert row.rstrip().endswith(" s")


def test_text_goes_to_stdout_and_figures_to_stderr(
    capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    words = ("generate", folder, "--prompt", "duck", "--max-tokens", "6", "--ignore-eos")
    code, out, err = run(capfd, *words, "--transport", "loopback")
    _, whole, _ = run(capfd, *words, "--transport", "loopback", "--json")
    assert code == 0
    assert out == json.loads(whole)["text"] + "\n"
    assert "tok/s" in err


def test_score(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "logits.safetensors"
    words = ("score", folder, "--prompt-ids", "5,6,7,8", "--transport", "loopback")
    code, out, _ = run(capfd, *words, "--mtp", "--logits-out", file, "--json")
    assert code == 0
    told, tensors = json.loads(out), load_file(file)
    assert tensors["logits"].shape == (4, 288)
    assert tensors["mtp_logits"].shape == (3, 288)
    rows = tensors["logits"][:-1].astype(np.float64)
    chances = [
        row[id_] - np.log(np.exp(row).sum()) for row, id_ in zip(rows, (6, 7, 8), strict=True)
    ]
    assert told["log_likelihood"] == pytest.approx(sum(chances), abs=1e-6)
    assert told["perplexity"] == pytest.approx(np.exp(-sum(chances) / 3), rel=1e-6)
    text = tmp_path / "text.txt"
    text.write_text("a duck")
    code, out, _ = run(capfd, "score", folder, "--text-file", text, "--transport", "loopback")
    assert code == 0
    assert "perplexity" in out


def test_flock_toml(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "flock.toml"
    for text, found in (
        ("[host]\n", "no [[duck]]"),
        ('[[duck]]\nname = "a"\n', "address"),
        ('[[duck]]\naddress = "127.0.0.1:1"\nspeed = 3\n', "speed"),
        ('[[duck]]\naddress = "127.0.0.1:1"\nweight = 0\n', "weight 0: want a number above 0"),
        (
            '[host]\nkey_file = "k"\n[[duck]]\naddress = "127.0.0.1:1"\n',
            "flock.toml: [host] key_file",
        ),
        ("not toml", "flock.toml"),
        ('[[duck]]\nname = "kitchen"\naddress = "127.0.0.1:1"\n', "cannot reach duck 0 (kitchen"),
    ):
        file.write_text(text)
        _code, _out, err = run(capfd, "generate", folder, *IDS, "--ducks", file)
        assert found in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("score", "MODEL", "--text-file", ""), "name is empty"),
        (("score", "MODEL", *IDS, "--logits-out", ""), "is no file"),
        (("score", "MODEL", *IDS, "--logits-out", "/dev/null"), "is no file"),
        (("score", "MODEL", *IDS, "--logits-out", "/"), "is no file"),
        (("generate", "MODEL", *IDS, "--ducks", "local:" + "9" * 5000), "N of 1..64"),
        (("generate", "MODEL", *IDS, "--ducks", "h:" + "9" * 5000), "want HOST:PORT"),
        (("generate", "x" * 5000, *IDS), "File name too long"),
        (("generate", "", *IDS), "MODEL is empty"),
        (("generate", "MODEL", *IDS, "--logprobs", "2"), "add --json"),
    ],
    ids=range(9),
)
def test_stranger_mistakes_too(
    capfd: pytest.CaptureFixture[str], folder: Path, words: tuple[str, ...], found: str
) -> None:
    test_mistakes_are_one_line(capfd, folder, words, found)


def test_what_files_say_does_nothing_to_the_terminal(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "flock.toml"
    file.write_text('[[duck]]\nname = "a\\u001b[31m\\nb"\naddress = "127.0.0.1:1"\n')
    code, _, err = run(capfd, "generate", folder, *IDS, "--ducks", file)
    assert (code, err.count("\n"), "\x1b" in err) == (3, 1, False)


def test_bench_transport(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    words = ("--ducks", "2", "--rows", "1,5", "--loss", "1%", "--seconds", "0.05")
    code, out, err = run(capfd, "bench", "transport", *words, "--plot", picture, "--json")
    assert code == 0, err
    report = json.loads(out)
    cells = [(row["transport"], row["rows"], row["loss"]) for row in report["rows"]]
    plain = [(transport, rows, 0) for transport in ("shm", "tcp") for rows in (1, 5)]
    # Asks of five rows go by TCP, where nothing is dropped here.
    assert cells == [*plain, ("multicast", 1, 0), ("multicast", 1, 0.01), ("multicast", 5, 0)]
    for row in report["rows"]:
        assert row["ducks"] == 2
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert row["ratio"] > 0
    calls = {row["transport"]: row["calls"] for row in report["rows"] if row["rows"] == 1}
    assert calls["shm"] < calls["tcp"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_transport_with_faults(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--ducks", "2", "--rows", "1", "--seconds", "0.05", "--json")
    harmless = "duplicate=10%,reorder=20%,delay=0.2,seed=7"
    for transport, faults in (("tcp,shm", harmless), ("multicast", f"drop=5%,{harmless}")):
        code, out, err = run(
            capfd, "bench", "transport", "--transport", transport, "--faults", faults, *words
        )
        assert code == 0, err
        names = [name for name in transport.split(",") for _ in range(2)]
        rows = json.loads(out)["rows"]
        assert [(row["transport"], row["faulty"]) for row in rows] == [
            (name, number % 2 == 1) for number, name in enumerate(names)
        ]


def test_bench_transport_with_a_key(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--ducks", "2", "--rows", "1,2,5", "--key", "--seconds", "0.05", "--json")
    code, out, err = run(capfd, "bench", "transport", *words)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["transport"], row["rows"]) for row in rows if row["keyed"]] == [
        (name, size) for name in ("tcp", "multicast") for size in (1, 2)
    ]
    assert len([row for row in rows if not row["keyed"]]) == 9
    for row in rows:
        assert row["to_plain"] > 0 if row["keyed"] else row["to_plain"] is None


def test_bench_transport_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--transport", "shm", "--ducks", "1", "--rows", "1", "--seconds", "0.05")
    code, out, _ = run(capfd, "bench", "transport", *words)
    assert code == 0
    assert out.splitlines()[-1].split()[:3] == ["shm", "1", "1"]


def test_bench_kernel(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("bench", "kernel", "--isa", "scalar", "--rows", "1", "--threads", "1", "--json")
    code, out, err = run(
        capfd, *words, "--shape", "slice", "--memory-gib", "0.34", "--repeats", "1"
    )
    assert (code, err) == (0, "")
    (row,) = json.loads(out)["rows"]
    assert (row["isa"], row["threads"], row["rows"]) == ("scalar", 1, 1)
    assert row["ratio"] == pytest.approx(row["gb_s"] / row["stream_gb_s"])
