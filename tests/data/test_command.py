"""``nextlat data``: local text, a hub that is a server in this process, damage, and help without torch."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pytest

from nextlat.cli import main
from nextlat.config import load_config
from nextlat.data import command
from nextlat.data.rows import TokenRows
from nextlat.data.shards import ShardedTokens
from nextlat.data.text import sample
from nextlat.files import locked
from nextlat.training.build import build
from tests.data.test_download import Server, listing

TEXTS = [f"Story {i}: the duck walked {i} miles and then it {'slept' if i % 3 else 'sang'}." for i in range(300)]


class Said(NamedTuple):
    code: int
    out: str
    err: str


Data = Callable[..., Said]


@pytest.fixture
def data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Data:
    """Runs ``nextlat data`` in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["nextlat", "data", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return Said(int(caught.value.code or 0), *capsys.readouterr())

    return call


def texts(shards: ShardedTokens, split: str) -> list[str]:
    tokens = shards.read(split, [0], shards.tokens(split))[0].tolist()
    name = shards.tokenizer().decode([shards.end_token])
    return [text.strip() for text in shards.tokenizer().decode(tokens).split(name)[1:]]


def test_lines_become_shards_that_train(data: Data, tmp_path: Path) -> None:
    Path("stories.txt").write_text("\n".join(TEXTS))
    said = data("text", "stories.txt", "--per-line", "--tokenizer", "train:280", "--workers", "1")
    assert said.code == 0, said.err
    shards = ShardedTokens.open(tmp_path / "data/text", verify=True)
    assert sorted(texts(shards, "train") + texts(shards, "validation")) == sorted(TEXTS)
    assert shards.vocab_size == 280 and shards.documents("validation") > 0
    batch = TokenRows(shards, "train", 32, 0).batch(0, 4)
    assert batch.tokens.shape == (4, 32) and int(batch.tokens.max()) < 280
    assert (
        "there already" in data("text", "stories.txt", "--per-line", "--tokenizer", "train:280", "--workers", "1").out
    )


def test_damage_is_named_and_the_named_command_repairs_it(data: Data) -> None:
    Path("stories.txt").write_text("\n%\n".join(TEXTS))
    make = (
        "text",
        "stories.txt",
        "--separator",
        "\\n%\\n",
        "--tokenizer",
        "bytes",
        "--shard-tokens",
        "3000",
        "--workers",
        "1",
        "--out",
        "d",
    )
    assert data(*make).code == 0
    assert "every file is as the manifest says" in data("check", "d").out
    shard = Path("d/train-000002.bin")
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + b"\1" + good[101:])
    said = data("check", "d")
    assert said.code == 1 and "train-000002.bin is damaged" in said.err
    assert "nextlat data text stories.txt --separator '\\n%\\n'" in said.err
    said = data(*make)
    assert said.code == 0 and "making again: d/train-000002.bin" in said.out
    assert shard.read_bytes() == good and data("check", "d").code == 0


def test_other_settings_in_the_same_folder_are_refused(data: Data) -> None:
    Path("a.txt").write_text("\n".join(TEXTS))
    assert data("text", "a.txt", "--per-line", "--tokenizer", "bytes", "--workers", "1").code == 0
    said = data("text", "a.txt", "--per-line", "--tokenizer", "bytes", "--workers", "1", "--max-tokens", "50")
    assert said.code == 1 and "choose another folder" in said.err
    assert "data/text was made with other settings: max_tokens was None and is now 50;" in said.err


def test_another_tokenizer_in_the_same_folder_is_refused_and_a_damaged_one_made_again(data: Data) -> None:
    Path("a.txt").write_text("\n".join(TEXTS))
    make = ("text", "a.txt", "--per-line", "--workers", "1", "--tokenizer")
    assert data(*make, "train:300").code == 0
    said = data(*make, "train:290")
    assert said.code == 1 and "tokenizer was 'train:300' and is now 'train:290'" in said.err
    file = Path("data/text/tokenizer.json")
    good = file.read_text()
    file.write_text(good.replace("merges", "Merges"))
    assert data("check", "data/text").code == 1
    said = data(*make, "train:300")
    assert said.code == 0 and "everything is there already" in said.out, said.err
    assert file.read_text() == good


def test_a_corpus_needs_no_network(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    said = data("corpus", "pydoc", "--tokenizer", "bytes", "--validation-fraction", "0.2", "--workers", "1")
    assert said.code == 0, said.err
    shards = ShardedTokens.open("data/pydoc")
    assert shards.tokens("train") > 3 * shards.tokens("validation") > 0


def test_text_that_changed_is_not_taken_for_the_old_wherever_it_lies(data: Data) -> None:
    Path("here").mkdir()
    Path("here/a.txt").write_text("\n".join(TEXTS))
    make = ("--per-line", "--tokenizer", "bytes", "--workers", "1", "--out", "d")
    assert data("text", "here", *make).code == 0
    Path("here").rename("there")
    assert "everything is there already" in data("text", "there", *make).out
    Path("there/a.txt").write_text("\n".join(TEXTS).replace("duck", "goat"))  # as long as before
    said = data("text", "there", *make)
    assert said.code == 1 and "d was made with other settings: " in said.err and "listing" in said.err


def test_half_characters_and_columns_of_numbers_are_named(data: Data) -> None:
    Path("a.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    said = data("text", "a.jsonl", "--tokenizer", "bytes", "--workers", "1")
    assert said.code == 1 and "a.jsonl, line 2: 'text' holds half a character" in said.err
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": TEXTS[:3], "id": [1, 2, 3]}), "b.parquet")
    said = data("text", "b.parquet", "--column", "id", "--tokenizer", "bytes", "--workers", "1")
    assert said.code == 1 and "b.parquet: column 'id' is int64, not text; name its --column" in said.err


def test_damage_in_compressed_text_is_named(data: Data) -> None:
    packed = gzip.compress("\n".join(TEXTS).encode(), mtime=0)
    for place in range(20, len(packed), len(packed) // 40):
        Path("a.txt.gz").write_bytes(packed[:place] + bytes([packed[place] ^ 1]) + packed[place + 1 :])
        said = data("text", "a.txt.gz", "--tokenizer", "bytes", "--workers", "1", "--out", f"d{place}")
        assert said.code == 1 and ("a.txt.gz cannot be read: " in said.err or "is not utf-8 text" in said.err), said


def test_text_outside_ascii_behind_the_sample_is_not_dropped_either(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.txt").write_text("\n".join([*TEXTS, "Привет мир"]), encoding="utf-8")
    monkeypatch.setattr(command, "sample", lambda pairs, characters: sample(pairs, 2000))
    said = data(
        "text", "a.txt", "--per-line", "--tokenizer", "train:300", "--workers", "1", "--validation-fraction", "0"
    )
    assert said.code == 0, said.err
    assert texts(ShardedTokens.open("data/text"), "train")[-1] == "Привет мир"


def test_text_outside_ascii_is_not_dropped_by_a_trained_tokenizer(data: Data) -> None:
    Path("a.txt").write_text("\n".join(f"caf\u00e9 {text}" for text in TEXTS), encoding="utf-8")
    assert data("text", "a.txt", "--per-line", "--tokenizer", "train:300", "--workers", "1").code == 0
    assert texts(ShardedTokens.open("data/text"), "train")[0].startswith("caf\u00e9 Story")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()


def parquet(rows: list[str]) -> bytes:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = BytesIO()
    writer.write_table(arrow.table({"text": rows}), buffer)
    return buffer.getvalue()


def test_tiny_stories_come_from_the_hub_in_their_own_splits(data: Data, hub: Server) -> None:
    names = {"data/train-0.parquet": parquet(TEXTS[:250]), "data/validation-0.parquet": parquet(TEXTS[250:])}
    listing(hub, "cyrilzhang/TinyStories2-ascii", "", names)
    said = data("tiny_stories", "--dry-run")
    assert said.code == 0 and hub.url in said.out and "2 files" in said.out and not Path("data").exists()
    said = data("tiny_stories", "--tokenizer", "train:300", "--workers", "1")
    assert said.code == 0, said.err
    shards = ShardedTokens.open("data/tiny_stories", verify=True)
    assert texts(shards, "train") == TEXTS[:250] and texts(shards, "validation") == TEXTS[250:]


def test_fineweb_edu_fetches_as_many_files_as_tokens_are_wanted(
    data: Data, hub: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextlat.data.text.BATCH_CHARACTERS", 1000)
    names = {f"sample/10BT/{n}.parquet": parquet(TEXTS[100 * n : 100 * n + 100]) for n in range(3)}
    listing(hub, "HuggingFaceFW/fineweb-edu", "sample/10BT", names)
    said = data("fineweb_edu", "--tokenizer", "bytes", "--max-tokens", "2000", "--workers", "1")
    assert said.code == 0, said.err
    shards = ShardedTokens.open("data/fineweb_edu", verify=True)
    assert (
        texts(shards, "validation") + texts(shards, "train")
        == TEXTS[: shards.documents("train") + shards.documents("validation")]
    )
    assert 200 <= shards.tokens("validation") < 300
    fetched = [path for path, _ in hub.requests if "/resolve/" in path]
    assert fetched == ["/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/0.parquet"]
    assert data("fineweb_edu", "--tokenizer", "bytes", "--subset", "sample-1BT").code == 1


def test_without_a_connection_nothing_is_made_and_the_address_is_named(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = data("tiny_stories")
    assert said.code == 1 and "http://127.0.0.1:9/datasets/cyrilzhang/TinyStories2-ascii" in said.err
    assert not Path("data").exists()


def test_errors_name_the_argument(data: Data) -> None:
    Path("a.txt").write_text("text")
    assert "train:1000" in data("text", "a.txt", "--tokenizer", "train:many").err
    assert "there is no tokenizer none.json" in data("text", "a.txt", "--tokenizer", "none.json").err
    assert "no file or folder none.txt" in data("text", "none.txt").err
    assert (
        "another part to hold out" in data("text", "a.txt", "--tokenizer", "bytes", "--validation-fraction", "0.01").err
    )


def test_two_commands_do_not_write_to_one_folder_at_once(data: Data) -> None:
    Path("a.txt").write_text("\n".join(TEXTS))
    with locked(Path("data/text")):
        said = data("text", "a.txt", "--per-line", "--tokenizer", "bytes")
    assert said.code == 1 and "another process is writing to data/text" in said.err
    assert list(Path("data/text").iterdir()) == []


def test_a_folder_is_not_made_of_itself_and_says_how_to_train_on_it(data: Data) -> None:
    Path("books").mkdir()
    for number, text in enumerate(TEXTS[:60]):
        Path(f"books/{number}.txt").write_text(text)
    make = ("text", "books", "--tokenizer", "bytes", "--validation-fraction", "0.3", "--workers", "1")
    for _ in range(2):
        said = data(*make, "--out", "books/tokens")
        assert said.code == 0 and "60 files" in said.out, said.err
    command = said.out.splitlines()[-1].partition("nextlat train ")[2].split()
    config = load_config(command[0], [*command[1:], "data.length=16"])
    assert build(config).task.rows(0, 0, 2).tokens.shape == (2, 16)


def test_help_and_tokenising_processes_do_not_load_torch() -> None:
    code = """
import sys
from typer.testing import CliRunner
from nextlat.cli import app
for words in (["data", "--help"], ["data", "text", "--help"], ["data", "check", "--help"]):
    assert CliRunner().invoke(app, words).exit_code == 0
print("help", sorted({"torch", "tokenizers", "pyarrow", "numpy"} & sys.modules.keys()))
import nextlat.data.text, nextlat.data.command
print("text", sorted({"torch", "tokenizers", "pyarrow", "huggingface_hub"} & sys.modules.keys()))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == ["help []", "text []"]
