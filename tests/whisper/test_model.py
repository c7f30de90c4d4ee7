from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from servers.hub import Hub
from servers.loopback import free_port
from toy_whisper import END, NO_TIMESTAMPS, START, SWEDISH, TRANSCRIBE

from pipelines import recipes
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.whisper import mirror
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

ROOT = Path(__file__).parents[2]
PROMPT = [SWEDISH, TRANSCRIBE, NO_TIMESTAMPS]
COMMIT = "c0ffee" + 34 * "0"
RESOLVE = """
import json, sys, time
from pathlib import Path
from pipelines.infra import errors
from pipelines.whisper import mirror, model

mirrored, *uris = sys.argv[1:]
mirror.fetch = lambda name, cache, **kwargs: Path(mirrored)
told = []
for uri in uris:
    started = time.monotonic()
    try:
        ref = model.resolve(uri)
        found = {"name": ref.name, "folder": str(ref.folder), "origin": ref.origin, "revision": ref.revision}
        found["context"] = ref.context
    except errors.LabError as error:
        found = {"error": str(error)}
    told.append({**found, "seconds": time.monotonic() - started})
print(json.dumps(told))
"""


def resolve_elsewhere(endpoint: str, home: Path, mirrored: Path, *uris: str, **variables: str) -> list[dict]:
    """What a process of its own finds for `uris` when `endpoint` is the Hub and `home` its cache."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "LAB_"))}
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, str(mirrored), *uris],
        cwd=ROOT,
        env={**inherited, **ours, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def served_toy(toy_model: Path) -> Hub:
    server = Hub()
    server.add("model", "lab/toy", toy_model, COMMIT)
    return server


@pytest.fixture
def hub(toy_model):
    server = served_toy(toy_model)
    yield server
    server.close()


@pytest.fixture(scope="module")
def mirrored(toy_model, tmp_path_factory) -> Path:
    """The toy as the registry mirror would leave it."""
    folder = tmp_path_factory.mktemp("mirrored") / "toy"
    shutil.copytree(toy_model, folder)
    manifest.write_json(folder / mirror.MANIFEST, {"quantisation": None, "files": {}})
    return folder


@pytest.fixture(params=["refuses", "accepts and is silent"])
def dead_endpoint(request):
    """A Hub that is not there: a port where nobody listens, or a socket that takes a connection and never answers."""
    if request.param == "refuses":
        yield f"http://127.0.0.1:{free_port()}"
    else:
        with socket.socket() as hole:
            hole.bind(("127.0.0.1", 0))
            hole.listen(8)
            yield f"http://127.0.0.1:{hole.getsockname()[1]}"


@pytest.fixture
def toy(toy_model):
    return whisper_model.load(ModelRef("toy", toy_model, "folder", "0"))


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- where a model is found


def test_folder_is_resolved_and_named_by_its_weights(toy_model, monkeypatch):
    monkeypatch.setattr(whisper_model, "_from_hub", lambda *args: pytest.fail("the Hub was asked for a folder"))
    ref = whisper_model.resolve(str(toy_model))
    digest = hashlib.sha256((toy_model / "model.safetensors").read_bytes()).hexdigest()
    assert (ref.folder, ref.origin, ref.revision, ref.context) == (toy_model, "folder", digest[:12], "full")
    assert whisper_model.identity(ref) == {"weights_sha256": digest, "quantisation": "none"}


@pytest.mark.slow
def test_hub_model_is_fetched_once(hub, mirrored, toy_model, tmp_path):
    first, again = resolve_elsewhere(hub.endpoint, tmp_path, mirrored, "lab/toy", "hub://lab/toy@main")
    assert (first["origin"], first["revision"], again["origin"]) == ("hub", COMMIT[:12], "hub cache")
    assert first["folder"] == again["folder"]
    assert COMMIT in first["folder"]
    weights = Path(first["folder"]) / "model.safetensors"
    assert weights.read_bytes() == (toy_model / "model.safetensors").read_bytes()
    whisper_model.load_processor(ModelRef("toy", weights.parent, "hub", COMMIT), "sv")

    asked = len(hub.requests)
    assert asked > 5
    (cached,) = resolve_elsewhere(hub.endpoint, tmp_path, mirrored, "lab/toy")
    assert cached["origin"] == "hub cache"
    assert len(hub.requests) == asked


@pytest.mark.slow
def test_published_model_keeps_its_context(toy_model, mirrored, tmp_path):
    server = Hub()
    server.add("model", "lab/tuned", sealed_copy(toy_model, tmp_path / "m"), COMMIT)
    first, cached = resolve_elsewhere(server.endpoint, tmp_path, mirrored, "hub://lab/tuned", "hub://lab/tuned")
    server.close()
    assert (first["origin"], cached["origin"]) == ("hub", "hub cache")
    assert (first["context"], first["revision"]) == (cached["context"], cached["revision"]) == ("clip", COMMIT[:12])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "kb-small"])
def test_baselines_of_recipes_are_fetched_from_the_hub(name, toy_model, mirrored, tmp_path):
    base = recipes.load(name).model.base
    published = tmp_path / "published"
    shutil.copytree(toy_model, published)
    others = ("onnx/encoder.onnx", "ggml-model.bin", "pytorch_model.bin", "model.fp16.safetensors", "tf_model.h5")
    for other in (*others, "checkpoint-500/model.safetensors", "checkpoint-500/config.json", "flax_model.msgpack"):
        (published / other).parent.mkdir(exist_ok=True)
        (published / other).write_bytes(b"not for us")
    server = Hub()
    server.add("model", base, published, COMMIT)
    home = tmp_path / "home"
    first, cached = resolve_elsewhere(server.endpoint, home, mirrored, f"hub://{base}@{COMMIT}", f"{base}@{COMMIT}")
    server.close()
    assert (first["origin"], cached["origin"]) == ("hub", "hub cache")
    assert (first["revision"], first["context"]) == (COMMIT[:12], "full")
    folder = Path(first["folder"])
    assert not [
        path for path in folder.rglob("*") if path.is_dir() or path.suffix in (".onnx", ".bin", ".h5", ".msgpack")
    ]
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    ref = ModelRef(first["name"], folder, "hub", first["revision"])
    assert whisper_model.load(ref).config.d_model == 32
    assert whisper_model.identity(ref)["weights_sha256"] == manifest.sha256(toy_model / "model.safetensors")


@pytest.mark.slow
def test_published_model_with_card_is_whole(toy_model, mirrored, tmp_path):
    (folder := tmp_path / "m").mkdir()
    for path in toy_model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "README.md").write_text("# the card")
    manifest.seal(folder, kind="model", digest="d1", name="toy-d1", context="clip")
    server = Hub()
    server.add("model", "lab/tuned", folder, COMMIT)
    first, cached = (resolve_elsewhere(server.endpoint, tmp_path, mirrored, "hub://lab/tuned")[0] for _ in range(2))
    server.close()
    assert (first["origin"], first["context"]) == ("hub", "clip")
    assert (cached["origin"], cached["context"]) == ("hub cache", "clip")


@pytest.mark.slow
def test_refusal_of_the_hub_is_one_line(hub, mirrored, tmp_path):
    uris = ("lab/other", "hub://lab/toy@no-such-branch", "a b/c")
    errors = [result["error"] for result in resolve_elsewhere(hub.endpoint, tmp_path, mirrored, *uris)]
    assert errors[0] == "hub://lab/other does not exist, or is private: check owner/name, or set HF_TOKEN"
    assert errors[1] == "hub://lab/toy@no-such-branch does not exist: correct the branch, tag or commit"
    assert errors[2].startswith("the Hub could not do that with hub://a b/c (Repo id must use alphanumeric")
    assert "\n" not in errors[2]


@pytest.mark.slow
def test_interrupted_download_leaves_no_model(toy_model, mirrored, tmp_path):
    server = served_toy(toy_model)
    server.fault("GET .*/model.safetensors", "truncate", times=None)
    (found,) = resolve_elsewhere(server.endpoint, tmp_path, mirrored, "lab/toy")
    server.close()
    assert found["error"].startswith("the connection to the Hub broke off at hub://lab/toy")
    assert "\n" not in found["error"]
    whole = served_toy(toy_model)
    (found,) = resolve_elsewhere(whole.endpoint, tmp_path, mirrored, "lab/toy")
    whole.close()
    assert found["origin"] == "hub"
    assert (Path(found["folder"]) / "model.safetensors").stat().st_size == (
        toy_model / "model.safetensors"
    ).stat().st_size


@pytest.mark.slow
def test_sharded_model_is_refused_before_the_download(toy_model, mirrored, tmp_path):
    published = Path(shutil.copytree(toy_model, tmp_path / "published"))
    (published / "model.safetensors").rename(published / "model-00001-of-00002.safetensors")
    server = Hub()
    server.add("model", "lab/sharded", published, COMMIT)
    (found,) = resolve_elsewhere(server.endpoint, tmp_path / "home", mirrored, "lab/sharded")
    server.close()
    assert "hub://lab/sharded: it has model-00001-of-00002.safetensors and no model.safetensors.index" in found["error"]
    assert not [request for request in server.requests if "/resolve/" in str(request) and "00001" in str(request)]


@pytest.mark.slow
def test_bin_of_the_hub_is_fetched_if_it_is_the_only_one(toy_model, mirrored, tmp_path):
    from safetensors.torch import load_file

    published = Path(shutil.copytree(toy_model, tmp_path / "published"))
    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    (published / "flax_model.msgpack").write_bytes(b"not for us")
    server = Hub()
    server.add("model", "lab/bin", published, COMMIT)
    variables = {"LAB_CACHE": str(tmp_path / "cache")}
    first, cached = resolve_elsewhere(
        server.endpoint, tmp_path / "home", mirrored, "lab/bin", "hub://lab/bin", **variables
    )
    server.close()
    assert (first["origin"], cached["origin"], first["folder"]) == ("hub", "hub cache", cached["folder"])
    assert not [request for request in server.requests if "flax_model" in str(request)]
    assert whisper_model.load(ModelRef("bin", Path(first["folder"]), "hub", COMMIT)).config.d_model == 32


def flip_last_bit(path: Path) -> None:
    path = Path(os.path.realpath(path))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.slow
def test_damaged_copy_of_a_hub_model_is_fetched_again(toy_model, mirrored, tmp_path):
    server = served_toy(toy_model)
    server.repos["model", "lab/toy"].lfs.add("model.safetensors")
    (first,) = resolve_elsewhere(server.endpoint, tmp_path, mirrored, "lab/toy")
    weights = Path(first["folder"]) / "model.safetensors"
    for name in ("model.safetensors", "tokenizer.json"):  # named by its sha256, and by git's sha1
        flip_last_bit(weights.with_name(name))
    (again,) = resolve_elsewhere(server.endpoint, tmp_path, mirrored, "lab/toy")
    assert (again["origin"], again["folder"]) == ("hub", first["folder"])
    assert weights.read_bytes() == (toy_model / "model.safetensors").read_bytes()
    flip_last_bit(weights)
    (offline,) = resolve_elsewhere(server.endpoint, tmp_path, mirrored, "lab/toy", HF_HUB_OFFLINE="1")
    assert "model.safetensors of lab/toy is damaged in" in offline["error"]
    server.close()


@pytest.mark.slow
def test_file_that_arrives_damaged_is_refused(toy_model, mirrored, tmp_path):
    server = served_toy(toy_model)
    server.fault("GET .*/model.safetensors", "corrupt", times=None)
    (found,) = resolve_elsewhere(server.endpoint, tmp_path, mirrored, "lab/toy")
    server.close()
    assert "model.safetensors of hub://lab/toy arrived damaged twice" in found["error"]


@pytest.mark.slow
def test_silent_hub_is_asked_once_then_the_mirror(dead_endpoint, mirrored, tmp_path):
    uris = ["openai/whisper-tiny", "lab/unknown", "openai/whisper-tiny@q8"]
    tiny, unknown, q8 = resolve_elsewhere(dead_endpoint, tmp_path, mirrored, *uris)
    assert (tiny["origin"], tiny["name"], tiny["folder"]) == ("registry mirror", "openai/whisper-tiny", str(mirrored))
    assert q8["origin"] == "registry mirror"
    assert unknown["error"].startswith("lab/unknown is not on this machine, and 127.0.0.1 did not answer within 3 s")
    assert "Give a folder, connect to the Hub, or take one of" in unknown["error"]
    assert "\n" not in unknown["error"]
    assert "openai/whisper-tiny" in unknown["error"]
    # importing the Hub's client falls into the first look-up; a second wait of 3 s would not fit
    assert tiny["seconds"] < environment.HUB_TIMEOUT_S + 2.5
    assert unknown["seconds"] < 1


@pytest.mark.slow
def test_offline_mode_sends_no_request(hub, mirrored, tmp_path):
    (found,) = resolve_elsewhere(hub.endpoint, tmp_path, mirrored, "openai/whisper-tiny", HF_HUB_OFFLINE="1")
    assert found["origin"] == "registry mirror"
    assert hub.requests == []


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(LabError, match="expected a folder with config"):
        whisper_model.resolve(str(tmp_path))
    with pytest.raises(LabError, match="no model in"):
        whisper_model.resolve("./nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LabError, match=r"no model.safetensors in .*save_pretrained"):
        whisper_model.resolve(str(tmp_path))


def sealed_copy(toy_model: Path, folder: Path, **facts) -> Path:
    shutil.copytree(toy_model, folder)
    manifest.seal(folder, kind="model", digest="d1", name="toy-d1", quantisation="q8", context="clip", **facts)
    return folder


def test_manifest_describes_a_sealed_model(toy_model, tmp_path):
    ref = whisper_model.resolve(str(sealed_copy(toy_model, tmp_path / "m", base="b")))
    assert (ref.name, ref.revision, ref.quantisation, ref.context) == ("toy-d1", "d1", "q8", "clip")
    assert ref.title == "toy-d1 (q8) @ d1"
    assert ref.facts["base"] == "b"
    assert "files" not in ref.facts


def test_damaged_sealed_model_is_refused(toy_model, tmp_path):
    folder = sealed_copy(toy_model, tmp_path / "m")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(LabError, match=r"model .* cannot be used: model.safetensors is damaged .* Make it again"):
        whisper_model.resolve(str(folder))


def test_missing_weights_are_refused(toy_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(toy_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.decoder.layers.1.fc2.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LabError, match=r"lacks weights of a Whisper model \(model.decoder.layers.1.fc2.weight"):
        whisper_model.load(ModelRef("toy", folder, "folder", "0"))


def test_weights_of_another_shape_are_refused(toy_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(toy_model, folder)
    config = json.loads((folder / "config.json").read_text())
    manifest.write_json(folder / "config.json", {**config, "encoder_ffn_dim": 48})
    with pytest.raises(LabError, match=r"does not load as a Whisper model: .* Fetch the model again"):
        whisper_model.load(ModelRef("toy", folder, "folder", "0"))


def test_truncated_weights_are_refused(toy_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(toy_model, folder)
    os.truncate(folder / "model.safetensors", 1_000_000)
    with pytest.raises(LabError, match="model.safetensors has 1000000 bytes, not"):
        whisper_model.load(ModelRef("toy", folder, "folder", "0"))


def test_folder_without_tokenizer_is_one_line(toy_model, tmp_path):
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copyfile(toy_model / name, tmp_path / name)
    with pytest.raises(LabError, match="has no usable tokenizer and feature extractor") as caught:
        whisper_model.load_processor(ModelRef("toy", tmp_path, "folder", "0"), "sv")
    assert "\n" not in str(caught.value)


# ---- what is loaded


def test_dropout_and_spec_augment_reach_the_model(toy_model):
    ref = ModelRef("toy", toy_model, "folder", "0")
    tuned = whisper_model.load(ref, dropout=0.25, spec_augment=True)
    assert tuned.config.dropout == tuned.model.encoder.dropout == tuned.model.decoder.layers[0].dropout == 0.25
    assert tuned.config.apply_spec_augment
    plain = whisper_model.load(ref)
    assert plain.config.dropout == 0
    assert not plain.config.apply_spec_augment
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}


def test_sinusoids_are_not_trainable(toy):
    frozen = [name for name, parameter in toy.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.encoder.embed_positions.weight"]


def test_language_is_saved_with_the_model(toy, toy_model, tmp_path):
    from transformers import GenerationConfig

    whisper_model.set_language(toy, "sv")
    whisper_model.save(toy, whisper_model.load_processor(ModelRef("toy", toy_model, "folder", "0"), "sv"), tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.language, saved.task, saved.forced_decoder_ids) == ("sv", "transcribe", None)
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
    } <= {path.name for path in tmp_path.iterdir()}
    processor = whisper_model.load_processor(ModelRef("toy", tmp_path, "folder", "0"), "sv")
    assert processor.tokenizer("").input_ids[:4] == [START, SWEDISH, TRANSCRIBE, NO_TIMESTAMPS]


# ---- short context


def features(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 80, frames, generator=torch.Generator().manual_seed(seed))


def whole(model) -> torch.Tensor:
    """The sinusoids, after a look at the three places in which their number is kept."""
    encoder = model.model.encoder
    table = encoder.embed_positions.weight
    assert len(table) == encoder.embed_positions.num_embeddings == encoder.config.max_source_positions == 1500
    return table


def stock_encoder(folder: Path, positions: int):
    """transformers' own encoder whose window is `positions` from the start, without our hooks."""
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype="float32", attn_implementation="sdpa").eval()
    encoder = model.model.encoder
    kept = encoder.embed_positions.weight.data[:positions].clone()
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(kept)
    encoder.config.max_source_positions = positions
    return encoder


@pytest.mark.parametrize("frames", [2, 56, 998, 3000])
def test_short_encoder_equals_a_stock_encoder_of_that_size(toy, toy_model, frames):
    stock = stock_encoder(toy_model, frames // 2)
    with torch.inference_mode():
        ours = toy.eval().model.encoder(features(frames))[0]
        assert torch.equal(ours, stock(features(frames))[0])
    assert ours.shape == (2, frames // 2, 32)


def test_encoder_output_depends_on_positions(toy):
    """The test above would not notice positions that are ignored: the same frames in reverse order differ."""
    with torch.inference_mode():
        forwards = toy.eval().model.encoder(features(80))[0]
        backwards = toy.model.encoder(features(80).flip(-1))[0].flip(1)
    assert not torch.allclose(forwards, backwards, atol=1e-2)


def test_position_table_is_restored_and_saved_whole(toy, toy_model, tmp_path):
    from safetensors.torch import load_file

    before = whole(toy).clone()
    for frames in (80, 8, 3000, 200):
        toy.eval().model.encoder(features(frames))
        assert torch.equal(whole(toy), before)
    toy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_source_positions"] == 1500
    saved, stock = (load_file(folder / "model.safetensors") for folder in (tmp_path, toy_model))
    assert saved.keys() == stock.keys()
    assert all(torch.equal(saved[name], stock[name]) for name in stock)


def test_second_allow_short_context_has_no_effect(toy):
    encoder = toy.eval().model.encoder
    once = encoder(features(80))[0]
    whisper_model.allow_short_context(toy)
    assert len(encoder._forward_pre_hooks) == len(encoder._forward_hooks) == 1
    assert torch.equal(encoder(features(80))[0], once)
    whole(toy)


@pytest.mark.parametrize("frames", [0, 1, 81, 3001, 3002, 6000])
def test_invalid_numbers_of_frames_are_refused(toy, frames):
    with pytest.raises(ValueError, match=f"even number of frames from 2 to 3000, got {frames}"):
        toy.model.encoder(features(frames))
    whole(toy)


def test_encoder_error_restores_the_position_table(toy):
    before = whole(toy).clone()

    def fail(*args):
        raise RuntimeError("out of memory")

    handle = toy.model.encoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        toy.model.encoder(features(80))
    assert torch.equal(whole(toy), before)
    handle.remove()
    assert toy.model.encoder(features(1200))[0].shape[1] == 600


def test_training_steps_change_all_but_the_sinusoids(toy):
    before = {name: parameter.detach().clone() for name, parameter in toy.named_parameters()}
    optimizer = torch.optim.SGD([p for p in toy.parameters() if p.requires_grad], lr=1.0)
    toy.train()
    for frames in (400, 56, 400):
        labels = torch.tensor([[*PROMPT, 400, END], [*PROMPT, 500, END]])
        toy(input_features=features(frames), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole(toy)
    unmoved = [name for name, parameter in toy.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == ["model.encoder.embed_positions.weight"]


def test_weights_without_a_manifest_are_read_once(toy_model, tmp_path, monkeypatch):
    folder = shutil.copytree(toy_model, tmp_path / "base", ignore=shutil.ignore_patterns("manifest.json"))
    ref, read = ModelRef("base", folder, "folder", "1"), []
    sha256 = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path) or sha256(path))
    first = whisper_model.identity(ref)
    assert whisper_model.identity(ref) == first and len(read) == 1
    (folder / "model.safetensors").write_bytes(b"other")
    assert whisper_model.identity(ref) != first
