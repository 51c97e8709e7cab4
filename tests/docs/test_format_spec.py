"""docs/format.md and docs/codecs.md are enough to read a store: a reader written from them alone reads a real one.

The reader uses nothing of modelstore. Where this test fails, the pages or the code are wrong: whoever wrote a reader in
another language from the pages reads wrong bits too.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import struct
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from blake3 import blake3
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

import modelstore as ms

Bytes = NDArray[np.uint8]

# ---------------------------------------------------------------------- the reader, from the pages

WIDTHS = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "bool": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}
BLOCK = 131_072


def small(path: Path) -> Any:
    """A small object, whose last member is the digest of what comes before it."""
    data = path.read_bytes()
    head, found, tail = data.rpartition(b',"blake3":"')
    assert found
    assert tail == blake3(head).hexdigest().encode() + b'"}'
    return json.loads(data)


class SpecReader:
    """Reads a store in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        store = small(root / "modelstore.json")
        assert store["format"] == 1
        assert store["id"]

    def resolve(self, reference: str) -> str:
        """The digest of the manifest that a reference names."""
        rest, _, variant = reference.partition(":")
        model, _, at = rest.partition("@")
        versions = self.root / "models" / model / "versions"
        if at in ("", "latest"):
            folders = names(versions)
        elif at.isdigit():
            folders = [f"{99_999_999 - int(at):08d}"]
        else:
            tag = self.first(self.root / "models" / model / "tags" / at)
            assert (tag["model"], tag["tag"]) == (model, at)
            if not tag["version"]:
                raise LookupError(f"tag {at} was removed")
            folders = [f"{99_999_999 - tag['version']:08d}"]
        for folder in folders:
            record = self.first(versions / folder)
            assert (record["model"], record["version"]) == (model, 99_999_999 - int(folder))
            if not record.get("deleted", False):
                digest: str = record["variants"][variant or "original"]["manifest"]
                return digest
        raise LookupError(f"{reference} was deleted")

    def first(self, folder: Path) -> Any:
        name = names(folder)[0]
        record = small(folder / name)
        assert record["format"] == 1
        assert record["number"] == 99_999_999 - int(name.removesuffix(".json"))
        return record

    def open(self, reference: str) -> SpecModel:
        model = reference.partition(":")[0].partition("@")[0]
        return SpecModel(self.root, model, self.resolve(reference))

    def copy(self, reference: str) -> str:
        """The digest of the pack that holds a copy of the newest version's manifest."""
        versions = self.root / "models" / reference / "versions"
        record = self.first(versions / names(versions)[0])
        digest: str = record["variants"]["original"]["copy"]
        return digest


class SpecModel:
    """One variant, by its manifest."""

    def __init__(self, root: Path, model: str, digest: str) -> None:
        self.root = root
        text = unzstd((root / "models" / model / "manifests" / f"{digest}.json.zst").read_bytes())
        assert blake3(text).hexdigest() == digest
        self.manifest = json.loads(text)
        assert self.manifest["format"] == 1
        columns = {name: base64.b64decode(text, validate=True) for name, text in self.manifest["chunks"].items()}
        self.pack = np.frombuffer(columns["pack"], "<u4")
        self.offset = np.frombuffer(columns["offset"], "<u8")
        self.length = np.frombuffer(columns["length"], "<u8")
        self.digests = columns["digest"]
        assert len(self.pack) == len(self.offset) == len(self.length) == len(self.digests) // 32
        base = self.manifest.get("base")
        self.base = SpecModel(root, base["model"], base["manifest"]) if base else None

    def tensors(self) -> dict[str, Bytes]:
        """The raw bytes of every tensor, under all its names."""
        found = {tensor["name"]: self.read(tensor) for tensor in self.manifest["tensors"]}
        return found | {alias: found[name] for alias, name in self.manifest.get("aliases", {}).items()}

    def files(self) -> dict[str, bytes]:
        return {file["name"]: self.read(file).tobytes() for file in self.manifest["files"]}

    def entry(self, name: str) -> Any:
        name = self.manifest.get("aliases", {}).get(name, name)
        return next(tensor for tensor in self.manifest["tensors"] if tensor["name"] == name)

    def read(self, tensor: Any) -> Bytes:
        """A tensor's raw bytes, its digest checked."""
        shape, chunk, width = tensor["shape"], tensor["chunk"], WIDTHS[tensor["dtype"]]
        codec = self.manifest["codecs"][tensor["codec"]]["name"]
        values = np.zeros(shape, f"V{width}")
        base = None
        if codec == "delta":
            assert self.base is not None
            under = self.base.entry(tensor["name"])
            assert (under["shape"], under["dtype"]) == (shape, tensor["dtype"])
            base = self.base.read(under).view(f"V{width}").reshape(shape)
        ((plane, first),) = tensor["planes"]
        assert plane == "data"
        for number, box in enumerate(boxes(shape, chunk)):
            stored = self.stored(first + number)
            if codec == "raw":
                raw = stored
            else:
                under_chunk = None if base is None else np.ascontiguousarray(base[box]).reshape(-1).view(np.uint8)
                raw = decode(stored, tensor["dtype"], values[box].size * width, under_chunk)
            values[box] = raw.view(f"V{width}").reshape(values[box].shape)
        flat = values.reshape(-1).view(np.uint8)
        assert blake3(flat.tobytes()).hexdigest() == tensor["digest"], tensor["name"]
        return flat

    def stored(self, row: int) -> Bytes:
        """A chunk's stored bytes, checked."""
        digest = self.manifest["packs"][self.pack[row]]
        with (self.root / "packs" / digest[:2] / f"{digest}.safetensors").open("rb") as file:
            file.seek(int(self.offset[row]))
            data = file.read(int(self.length[row]))
        assert blake3(data).digest() == self.digests[32 * row : 32 * row + 32]
        return np.frombuffer(data, np.uint8)


def names(folder: Path) -> list[str]:
    """What a folder holds, in the order in which an object store lists it."""
    return sorted(path.name for path in folder.iterdir())


def boxes(shape: list[int], chunk: list[int]) -> list[tuple[slice, ...]]:
    """The regions of all chunks, in their order."""
    along = [[slice(a, min(n, a + c)) for a in range(0, n, c)] for n, c in zip(shape, chunk, strict=True)]
    return list(product(*along))


def unzstd(frame: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(frame)


def unpack(data: Bytes, width: int, count: int) -> Bytes:
    """A chunk of codes of fixed width (docs/codecs.md)."""
    tiles = math.ceil(count / 2048)
    version, bits, stored_width, log = data[:4].tolist()
    assert (version, bits, stored_width, log) == (2, 3, width, 11)
    assert not data[4:8].any()
    sizes = [min(2048, count - 2048 * t) for t in range(tiles)]
    lengths = [math.ceil(n / 64) * 8 for n in sizes]  # m of each tile
    parts, at = [], 16
    for size in (3 * sum(lengths), (width - 1) * count, tiles, 2 * tiles, 2 * tiles):
        parts.append(data[at : at + size])
        at += size
    codes, planes, tops, escapes, whole = (
        parts[0],
        parts[1].reshape(-1, count),
        parts[2],
        *(p.view("<u2") for p in parts[3:]),
    )
    nibbles = data[at : at + sum(math.ceil(int(k) / 2) for k in escapes)]
    rest = data[at + len(nibbles) :]
    assert len(rest) == whole.sum() == int(data[8:16].view("<u8")[0])
    words, first = [], 0
    for t, (n, m) in enumerate(zip(sizes, lengths, strict=True)):
        two, one = codes[first : first + 2 * m], codes[first + 2 * m : first + 3 * m]
        first += 3 * m
        upper = np.concatenate([(two >> (2 * s)) & 3 for s in range(4)])
        code = 2 * upper + np.concatenate([(one >> s) & 1 for s in range(8)])
        top = np.array([(int(tops[t]) - int(c)) % 256 for c in code], np.uint8)
        places = [s * m + j for j in range(m) for s in range(8) if code[s * m + j] == 7]
        assert len(places) == escapes[t]
        for k, place in enumerate(places):
            nibble = int(nibbles[k // 2]) >> 4 * (k % 2) & 15
            if nibble == 15:
                top[place], rest = rest[0], rest[1:]
            else:
                top[place] = 0 if nibble == 14 else (int(tops[t]) + 4 - nibble - (7 if nibble > 3 else 0)) % 256
        nibbles = nibbles[math.ceil(len(places) / 2) :]
        words.append(top[:n].astype(np.uint64))
    w = np.concatenate(words)
    for plane in planes:
        w = w << np.uint64(8) | plane
    above, sign = np.uint64(0xFF << (8 * width - 8)), np.uint64(1 << (8 * width - 9))
    one_bit = np.uint64(1)
    w = (w & above) >> one_bit | (w & sign) << np.uint64(8) | w & (sign - one_bit)
    return w.astype(f"<u{width}").view(np.uint8)


def changed(data: Bytes, width: int, signed: bool, base: Bytes) -> Bytes:
    """A chunk of few changes stored by `delta` (docs/codecs.md), number by number."""
    version, flags, wide, log, words, count = struct.unpack("<BBBBQQ", data[:20].tobytes())
    assert (version, flags, wide, log) == (3, 1, width, 15)
    values = [int(w) for w in base.view(f"<u{width}")]
    assert words == len(values)
    mask, top = (2 ** (8 * width - 1) - 1 if signed else 0), 1 << (8 * width - 1)
    at, word = 20, -1
    for first in range(0, count, 1 << 15):
        n = min(1 << 15, count - first)
        low, coded = struct.unpack("<II", data[at : at + 8].tobytes())
        lengths = struct.unpack(f"<{2 + width}I", data[at + 8 : at + 16 + 4 * width].tobytes())
        at += 16 + 4 * width
        packed = int.from_bytes(data[at : at + (n * low + 7) // 8].tobytes(), "little")
        at += (n * low + 7) // 8
        streams = []
        for length, whole in zip(lengths, (coded, (n + 7) // 8, *[n] * width), strict=True):
            piece = data[at : at + length].tobytes()
            streams.append(piece if length == whole else unzstd(piece))
            assert len(streams[-1]) == whole
            at += length
        upper, (signs, *planes) = iter(streams[0]), streams[1:]
        for i in range(n):
            gap = 0
            while (byte := next(upper)) == 255:
                gap += 255
            word += 1 + ((gap + byte << low) | (packed >> i * low & (1 << low) - 1))
            size = 1 + int.from_bytes(bytes(plane[i] for plane in planes), "big")
            ordinal = values[word] ^ (mask if values[word] & top else 0)
            ordinal = (ordinal + (-size if signs[i // 8] >> i % 8 & 1 else size)) % (2 * top)
            values[word] = ordinal ^ (mask if ordinal & top else 0)
    assert at == len(data)
    return np.array(values, f"<u{width}").view(np.uint8)


def decode(data: Bytes, dtype: str, size: int, base: Bytes | None = None) -> Bytes:
    """A chunk stored by `lossless`, `packed` or `delta` (docs/codecs.md)."""
    if data[0] == 2:
        return unpack(data, WIDTHS[dtype], size // WIDTHS[dtype])
    complex_ = dtype.startswith("complex")
    width = WIDTHS[dtype] // 2 if complex_ else WIDTHS[dtype]
    signed = complex_ or (dtype.startswith(("float", "bfloat")) and dtype not in ("float8_e8m0fnu", "float4_e2m1fn_x2"))
    if data[0] == 3:
        assert base is not None
        return changed(data, width, signed, base)
    bits = 8 * width
    count = size // width
    blocks = math.ceil(count / BLOCK)
    version, flags, planes, log = data[:4].tolist()
    assert (version, planes, log) == (1, width, 17)
    assert flags in (0, 1)
    lengths = data[4 : 4 + 4 * blocks * width].view("<u4").reshape(blocks, width)
    at = 4 + 4 * blocks * width
    kind = np.dtype(f"<u{width}")
    words = np.zeros(count, kind)
    for block in range(blocks):
        n = min(BLOCK, count - block * BLOCK)
        pieces: dict[int, Bytes] = {}
        for plane in range(width):  # raw pieces first
            if lengths[block, plane] == n:
                pieces[plane] = data[at : at + n]
                at += n
        for plane in range(width):
            stored = int(lengths[block, plane])
            if stored < n:
                pieces[plane] = np.frombuffer(unzstd(data[at : at + stored].tobytes()), np.uint8)
                at += stored
            assert len(pieces[plane]) == n
        for plane, piece in pieces.items():
            words[block * BLOCK : block * BLOCK + n] |= piece.astype(kind) << kind.type(8 * (width - 1 - plane))
    assert at == len(data)
    one = kind.type(1)
    if flags:
        assert base is not None
        mask = kind.type(2 ** (bits - 1) - 1 if signed else 0)
        top = kind.type(bits - 1)

        def ordinal(word: Any) -> Any:
            return np.where(word >> top, word ^ mask, word)

        difference = (words >> one) ^ (kind.type(0) - (words & one))
        words = ordinal(ordinal(base.view(kind)) + difference)
    elif signed and (width > 1):
        top, sign = kind.type(0xFF << (bits - 8)), kind.type(1 << (bits - 9))
        words = (words & top) >> one | (words & sign) << kind.type(8) | words & (sign - one)
    return words.view(np.uint8)


# ---------------------------------------------------------------------- a real store

CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 8}).encode()
FILES: dict[str, str | Path | bytes] = {
    "config.json": CONFIG,
    "tokenizer/vocabulary.txt": b"the quick brown fox " * 100_000,  # more than one chunk can be small enough for
    "empty.txt": b"",
}
State = dict[str, torch.Tensor]


def bits(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """A tensor of any bit patterns: NaN payloads, infinities and -0.0 among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "bool":
        return torch.randint(0, 2, shape, generator=generator).bool()
    nbytes = math.prod(shape) * WIDTHS[dtype]
    raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(getattr(torch, dtype)).reshape(shape)


def weights(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Weights as trained ones are."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02)


@pytest.fixture(scope="module")
def base() -> State:
    state = {
        "model.embed_tokens.weight": weights((1030, 1001), 1).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": weights((1024, 1025), 2).bfloat16(),  # cut along rows for ranks
        "model.layers.0.self_attn.o_proj.weight": weights((1025, 1024), 3).half(),  # and along columns
        "deep": weights((5, 201, 703), 4).double(),
        "positions": torch.arange(700_000).reshape(7, -1),
        "long": weights((3_000_001,), 5),
        "scalar": torch.tensor(-0.0),
        "none": torch.empty(0, 3, dtype=torch.bfloat16),
        "a/b~ ü.weight": torch.ones(3),
    }
    state |= {f"bits.{dtype}": bits((3, 35), dtype, i) for i, dtype in enumerate(WIDTHS)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


@pytest.fixture(scope="module")
def second(base: State) -> State:
    """A version with one tensor changed."""
    return {**base, "model.layers.0.self_attn.q_proj.weight": weights((1024, 1025), 6).bfloat16()}


@pytest.fixture(scope="module")
def tuned(second: State) -> State:
    """A fine-tune: floats moved a little, a dtype of every kind changed in places, one tensor of another shape."""
    moved = {}
    for name, tensor in second.items():
        if name.startswith("bits.") and tensor.dtype != torch.bool:
            raw = tensor.clone().view(torch.uint8)
            raw[:, ::5] += 1
            moved[name] = raw.view(tensor.dtype)
        elif tensor.dtype.is_floating_point and tensor.dim() > 1 and tensor.numel():
            moved[name] = (tensor.double() * 1.01).to(tensor.dtype)
    moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
    return {**second, **moved, "scalar": torch.tensor([1.0, 2.0])}


@pytest.fixture(scope="module")
def again(tuned: State) -> State:
    """A step further: few words changed, of a dtype of every kind."""
    moved = {}
    for name, tensor in tuned.items():
        if name.startswith("bits.") and tensor.dtype != torch.bool:
            raw = tensor.clone().view(torch.uint8)
            raw[:, ::160] += 1
            moved[name] = raw.view(tensor.dtype)
    return {**tuned, **moved, "long": tuned["long"] * 1.001}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, base: State, second: State, tuned: State, again: State) -> Path:
    root = tmp_path_factory.mktemp("store")
    store = ms.open(root)
    store.save("acme/llama", base, files=FILES, tag="prod")
    store.save("acme/llama", second, files=FILES)
    store.save("whole", base, codec="raw", grid="whole", files=FILES)
    store.save("raw", base, codec="raw")
    store.save("packed", base, codec="packed")
    store.save("tuned", tuned, codec="delta", parent="acme/llama@2", files=FILES)
    store.save("tuned", again, codec="delta", parent="tuned@1", files=FILES)
    store.save("acme/llama", {"x": torch.ones(1)})
    store.tag("acme/llama@3", "moved")
    store.tag("acme/llama@2", "moved")
    store.tag("acme/llama@2", "gone")
    store.untag("acme/llama", "gone")
    store.delete("acme/llama@3")
    return root


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(model: SpecModel, state: State) -> None:
    found = model.tensors()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        entry = model.entry(name)
        assert (entry["dtype"], tuple(entry["shape"])) == (str(tensor.dtype).removeprefix("torch."), tensor.shape), name
        assert found[name].tobytes() == raw_bytes(tensor), name


@pytest.mark.parametrize(
    ("reference", "fixture"),
    [
        ("acme/llama@1", "base"),
        ("acme/llama@prod", "base"),
        ("acme/llama", "second"),  # version 3 was deleted
        ("acme/llama@latest:original", "second"),
        ("acme/llama@moved", "second"),
        ("whole", "base"),
        ("raw", "base"),
        ("packed", "base"),
        ("tuned@1", "tuned"),
        ("tuned@2", "again"),  # a delta of a delta
    ],
)
def test_every_bit_is_read_from_the_pages_alone(
    root: Path, request: pytest.FixtureRequest, reference: str, fixture: str
) -> None:
    assert_same(SpecReader(root).open(reference), request.getfixturevalue(fixture))


@pytest.mark.parametrize("reference", ["acme/llama", "whole", "tuned"])
def test_files_are_read(root: Path, reference: str) -> None:
    assert SpecReader(root).open(reference).files() == FILES


@pytest.mark.parametrize("reference", ["acme/llama@3", "acme/llama@gone"])
def test_what_is_gone_is_not_found(root: Path, reference: str) -> None:
    with pytest.raises(LookupError):
        SpecReader(root).resolve(reference)


def test_the_store_has_what_the_pages_speak_of(root: Path) -> None:
    """That the tests above saw it all: cuts in both directions, ties, reuse, every codec, differences and values."""
    reader = SpecReader(root)
    one, two, fine = reader.open("acme/llama@1"), reader.open("acme/llama@2"), reader.open("tuned")
    q, o = (one.entry(f"model.layers.0.self_attn.{name}_proj.weight") for name in "qo")
    assert q["chunk"] == [128, 1025]
    assert o["chunk"] == [1025, 128]
    assert len(boxes(one.entry("deep")["shape"], one.entry("deep")["chunk"])) > 1
    assert one.manifest["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(two.manifest["packs"]) & set(one.manifest["packs"])
    assert {codec["name"] for codec in fine.manifest["codecs"]} == {"delta", "lossless"}
    packed = reader.open("packed")
    assert 2 in {int(packed.stored(tensor["planes"][0][1])[0]) for tensor in packed.manifest["tensors"]}
    assert fine.base is not None
    assert fine.base.base is not None
    odd = [t for t in fine.manifest["tensors"] if t["name"].startswith("bits.")]
    assert (3, 1) in {tuple(fine.stored(t["planes"][0][1])[:2].tolist()) for t in odd}, "few words changed"
    assert (1, 1) in {tuple(fine.base.stored(t["planes"][0][1])[:2].tolist()) for t in odd}, "many did"


def test_a_manifest_is_rebuilt_from_its_copy(root: Path) -> None:
    reader = SpecReader(root)
    with safe_open(pack(root, reader.copy("tuned")), "np") as file:
        assert list(file.keys()) == ["manifest"]
        data = file.get_tensor("manifest").tobytes()
        digest = file.metadata()["manifest"]
        assert (file.metadata()["kind"], file.metadata()["model"]) == ("manifest", "tuned")
    assert digest == reader.resolve("tuned")
    assert data == (root / f"models/tuned/manifests/{digest}.json.zst").read_bytes()


# ---------------------------------------------------------------------- packs, by the safetensors library alone


def pack(root: Path, digest: str) -> Path:
    return root / "packs" / digest[:2] / f"{digest}.safetensors"


def test_every_pack_is_a_safetensors_file_named_by_its_bytes(root: Path) -> None:
    paths = sorted((root / "packs").glob("*/*"))
    assert len(paths) > 5
    for path in paths:
        digest = blake3(path.read_bytes()).hexdigest()
        assert path == pack(root, digest)
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["modelstore"])
            assert note["format"] == 1
            seen = set()
            for name in file.keys():  # noqa: SIM118  not a mapping
                tensor = file.get_tensor(name)
                if name != "manifest" and name not in note.get("tensors", {}):
                    assert (tensor.dtype, tensor.dim()) == (torch.uint8, 1)
                    name = name.rsplit("/", 2)[0]
                    assert name in note["tensors"]
                seen.add(name)
            assert seen - {"manifest"} == note.get("tensors", {}).keys()


def test_whole_tensors_are_what_any_loader_reads(root: Path, base: State) -> None:
    found: State = {}
    for digest in SpecReader(root).open("whole").manifest["packs"]:
        found |= load_file(pack(root, digest))
    for name, tensor in base.items():
        if tensor.dtype in (torch.complex32, torch.complex128) or name == "lm_head.weight":
            continue  # without a name in safetensors; tied
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert raw_bytes(found[name]) == raw_bytes(tensor), name


def test_tensors_are_recovered_from_packs_without_a_manifest(root: Path, base: State, tmp_path: Path) -> None:
    """What the note in a pack says is enough to decode its entries and put them in their place."""
    shutil.copytree(root / "packs", tmp_path / "packs")
    wanted = set(SpecReader(root).open("acme/llama@1").manifest["packs"])
    found: dict[str, Bytes] = {}
    for path in sorted((tmp_path / "packs").glob("*/*")):
        if path.stem not in wanted:
            continue
        with safe_open(path, "np") as file:
            for name, note in json.loads(file.metadata()["modelstore"])["tensors"].items():
                assert note["codec"] == {"name": "lossless"}
                width = WIDTHS[note["dtype"]]
                values = found.setdefault(name, np.zeros(note["shape"], f"V{width}"))
                for number, box in enumerate(boxes(note["shape"], note["chunk"])):
                    if f"{name}/data/{number}" not in file.keys():  # noqa: SIM118
                        continue
                    stored = file.get_tensor(f"{name}/data/{number}")
                    raw = decode(stored, note["dtype"], values[box].size * width)
                    values[box] = raw.view(f"V{width}").reshape(values[box].shape)
    assert found["file:config.json"].tobytes() == CONFIG
    for name, tensor in base.items():
        if name in found:
            assert found[name].tobytes() == raw_bytes(tensor), name
    assert base.keys() - found.keys() == {"lm_head.weight", "none"}
