"""Tokens per second and memory of ``nextlat data text``, beside Hugging Face ``datasets`` with the same tokenizer.

Both read the same text files, one document each, and tokenise with as many processes; both write tokens to disk. Run it
with ``datasets`` importable, for example from a folder of its own on PYTHONPATH:

    python benchmarks/data.py --megabytes 100 --workers 2

Every measurement is a process of its own, and the two take turns. Memory is the largest resident set of the process
that writes (anonymous and file pages, which the kernel counts together).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

DOCUMENT = 100_000
"""Most characters of a document; longer modules are cut."""


def make_text(folder: Path, megabytes: float) -> None:
    """Python's standard library, its modules cut to documents, repeated until there is enough."""
    from nextlat.data.corpora import python_source

    left = int(megabytes * 1e6)
    folder.mkdir(parents=True)
    for number, text in enumerate(cycle(list(python_source()))):
        # a first line of its own makes every copy another document
        document = f"# {number}\n{text[:DOCUMENT]}"[:left]
        (folder / f"{number:06d}.txt").write_text(document, encoding="utf-8")
        left -= len(document)
        if left <= 0:
            return


def ours(text: Path, out: Path, tokenizer: Path, workers: int) -> int:
    from nextlat.data.shards import ShardedTokens
    from nextlat.data.text import find_files, hold_out, read_documents, tokenise
    from nextlat.data.tokenizer import load_tokenizer
    from nextlat.data.writer import ShardWriter

    chosen = load_tokenizer(tokenizer)
    with ShardWriter(out, chosen.vocab_size, chosen.end_token, 100_000_000, chosen) as writer:
        tokenise(hold_out(read_documents(find_files([text])), 0.0), writer, chosen, workers)
        writer.finish("train")
    return ShardedTokens.open(out).tokens("train")


def theirs(text: Path, out: Path, tokenizer: Path, workers: int) -> int:
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    engine = Tokenizer.from_file(str(tokenizer))
    end = engine.token_to_id("<|eos|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"tokens": [[end, *e.ids] for e in engine.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    files = sorted(map(str, text.iterdir()))
    rows = datasets.load_dataset("text", data_files=files, sample_by="document", split="train", cache_dir=str(out))
    done = rows.map(encode, batched=True, batch_size=100, num_proc=workers, remove_columns=["text"])
    done.save_to_disk(out / "tokens")
    return sum(len(tokens) for tokens in done.with_format("numpy")["tokens"])


ARMS = {"ours": ours, "datasets": theirs}


def measure(arm: str, text: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Run one arm in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="data-") as out:
        words = [sys.executable, __file__, "--arm", arm, "--text", text, "--out", out, "--tokenizer", tokenizer]
        said = subprocess.run(
            [*map(str, words), "--workers", str(workers)], capture_output=True, text=True, env=os.environ
        )
    if said.returncode:
        raise SystemExit(f"{arm} failed:\n{said.stderr[-3000:]}")
    found: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return found


def run_arm(arguments: argparse.Namespace) -> None:
    import resource

    began = time.monotonic()
    tokens = ARMS[arguments.arm](arguments.text, arguments.out, arguments.tokenizer, arguments.workers)
    seconds = time.monotonic() - began
    own, below = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime
    rss = {"rss": own.ru_maxrss / 1024, "rss_below": below.ru_maxrss / 1024}
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu": cpu, **rss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    for hidden in ("--arm", "--text", "--out", "--tokenizer"):
        parser.add_argument(hidden, type=str if hidden == "--arm" else Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        run_arm(arguments)
        return
    from nextlat.data.corpora import pydoc_topics
    from nextlat.data.tokenizer import train_bpe

    with tempfile.TemporaryDirectory(prefix="data-") as place:
        folder = Path(place)
        train_bpe(list(pydoc_topics()), 1000).save(folder / "tokenizer.json")
        make_text(folder / "large", arguments.megabytes)
        make_text(folder / "small", arguments.megabytes / 10)
        rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
        busy: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(arguments.repeat):
            for arm, rate in rates.items():
                found = measure(arm, folder / "large", folder / "tokenizer.json", arguments.workers)
                rate.append(found["tokens"] / found["seconds"])
                busy[arm].append(found["tokens"] / found["cpu"])
                memory = f"{found['rss']:,.0f} MB, below {found['rss_below']:,.0f} MB"
                print(
                    f"{arm:<9} {found['tokens']:>12,.0f} tokens  {rate[-1]:>10,.0f} tokens/s  "
                    f"{busy[arm][-1]:>10,.0f} tokens/CPU-s  {memory}",
                    flush=True,
                )
        for what, found_rates in (("tokens/s", rates), ("tokens/CPU-s", busy)):
            pairs = zip(found_rates["ours"], found_rates["datasets"], strict=True)
            ratio = sorted(mine / other for mine, other in pairs)[arguments.repeat // 2]
            print(f"ours / datasets, {what}: {ratio:.2f} (median of {arguments.repeat} pairs; target 1.0 or more)")
        small, large = (
            measure("ours", folder / size, folder / "tokenizer.json", arguments.workers) for size in ("small", "large")
        )
        for name, size in (("the process that writes", "rss"), ("the largest that tokenises", "rss_below")):
            print(
                f"resident set of {name}: {small[size]:.0f} MB for {arguments.megabytes / 10:g} MB of text, "
                f"{large[size]:.0f} MB for {arguments.megabytes:g} MB"
            )
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
