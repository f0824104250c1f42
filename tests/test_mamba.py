"""corey.mamba against transformers: logits, decoding, prompts in pieces, policies; loading; sessions and graphs."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="the models are compared with transformers'")

import transformers
from safetensors.torch import load_file, save_file

from corey import mamba, mamba_session
from corey.checkpoints import load_checkpoint
from corey.equivalence import compare_logits
from corey.mamba import MambaConfig
from corey.mamba_session import BLOCK, MOST_GRAPHS, Session
from corey.mamba_weights import SHAPES, load_mamba, random_mamba, read_config, tensor_shapes
from corey.paths import CHECKPOINTS
from corey.routing import pytorch_on_cpu, route
from corey.schedulers import get_scheduler

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
TEXT = b"def add(a, b):\n    return a + b\n\nclass Foo:\n    def __init__(self, x):\n        self.x = x\n" * 20
TINY = MambaConfig(d_model=32, n_layer=3, vocab_size=40, d_inner=64, dt_rank=2)
f32, bf16 = torch.float32, torch.bfloat16


def text_ids(length, *, start=0, device="cpu"):
    return torch.tensor([list(TEXT[start : start + length])], device=device)


def tiny_ids(batch, length, *, seed=0, device="cpu"):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def same_bits(a, b):
    return compare_logits(a, b).bitwise_equal


@pytest.fixture(scope="module")
def theirs():
    if not (CHECKPOINTS / "corey-mini" / "config.json").is_file():
        pytest.skip("data/checkpoints/corey-mini is not in this checkout")
    return load_checkpoint()[0]


@pytest.fixture(scope="module")
def truth(theirs):
    """transformers' float32 logits of 200 bytes."""
    with pytorch_on_cpu(), torch.inference_mode():
        return theirs(text_ids(200)).logits


@pytest.fixture(scope="module")
def mini(theirs):
    return load_mamba()


@pytest.fixture(scope="module")
def tiny():
    return random_mamba(TINY, seed=1)


def save_theirs(folder, **changes):
    """A small transformers model of unusual shape with random weights, saved; returns it."""
    shape = {
        "vocab_size": 37,
        "hidden_size": 24,
        "state_size": 5,
        "num_hidden_layers": 3,
        "conv_kernel": 3,
        "expand": 3,
    }
    torch.manual_seed(3)
    config = transformers.MambaConfig(**shape | {"time_step_rank": 7, "layer_norm_epsilon": 1e-3} | changes)
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".D", "conv1d.bias", "norm.weight", "norm_f.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))  # initialised to a constant, which hides a mix-up
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


# ---- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_those_of_transformers(truth, device):
    logits = load_mamba(device=device)(text_ids(200, device=device)).cpu()
    assert logits.dtype == f32 and logits.shape == (1, 200, 264)
    assert (logits - truth).abs().max() < 1e-4 * truth.abs().max()
    assert torch.equal(logits.argmax(-1), truth.argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_as_close_to_the_truth_as_transformers_is(theirs, truth, device):
    with pytorch_on_cpu(), torch.inference_mode():
        their_error = theirs.to(device, bf16)(text_ids(200, device=device)).logits.cpu() - truth
    theirs.to("cpu", f32)  # the checkpoint is bf16, so nothing is lost
    logits = load_mamba(device=device, dtype=bf16)(text_ids(200, device=device)).cpu()
    error = logits - truth
    assert error.norm() < 1.2 * their_error.norm() and error.abs().max() < 2 * their_error.abs().max()
    gaps = truth.topk(2).values.diff().abs()[..., 0]  # (1, L)
    decided = gaps > 2 * error.abs().amax(-1)
    assert decided.float().mean() > 0.8
    assert torch.equal(logits.argmax(-1)[decided], truth.argmax(-1)[decided])


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_another_shape_in_several_files(tied, tmp_path):
    model = save_theirs(tmp_path, tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = torch.randint(37, (2, 50))
    with pytorch_on_cpu(), torch.inference_mode():
        expected = model(ids).logits
    ours = load_mamba(str(tmp_path))
    assert ours.config.dt_rank == 7 and ours.config.d_state == 5 and ours.config.d_conv == 3
    assert (ours(ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    half = load_mamba(str(tmp_path), dtype=torch.float16)
    assert (half(ids) - expected).abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_the_last_token_alone_is_the_last_of_all(tiny, device):
    model = random_mamba(TINY, seed=1, device=device)
    ids = tiny_ids(3, 20, device=device)
    last = model(ids, last_only=True)
    assert last.shape == (3, 1, 40)
    torch.testing.assert_close(last, model(ids)[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_alone_is_the_row_of_a_batch(device):
    model = random_mamba(TINY, seed=1, device=device)
    ids = tiny_ids(4, 150, device=device)
    together = model(ids)
    for i in range(4):
        torch.testing.assert_close(model(ids[i : i + 1])[0], together[i], rtol=0, atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_prefill_and_steps_are_one_forward(truth, device):
    model = load_mamba(device=device)
    ids = text_ids(200, device=device)
    for length in (1, 2, 3, 150):  # also shorter than the convolution
        state = model.new_state(1)
        logits = [model(ids[:, :length], state)]
        for t in range(length, length + 20):
            logits.append(model.step(ids[:, t], state)[:, None])
        joined = torch.cat(logits, dim=1).cpu()
        assert (joined - truth[:, : length + 20]).abs().max() < 1e-4 * truth.abs().max()


def by_rows(x, weight):
    """F.linear one row at a time, so that a row's bits do not depend on how many rows there are."""
    rows = torch.stack([weight @ row for row in x.reshape(-1, x.shape[-1]).contiguous()])
    return rows.view(*x.shape[:-1], len(weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", (129, 256, 300, 513))
def test_pieces_give_the_bits_of_one_prefill(length, device, monkeypatch):
    """Everything but the matrix products, whose rounding of a row may depend on the number of rows."""
    monkeypatch.setattr(F, "linear", by_rows)
    model = random_mamba(TINY, seed=1, device=device)
    ids, state, whole_state = tiny_ids(1, length, device=device), model.new_state(1), model.new_state(1)
    whole = model(ids, whole_state)
    for piece in (128, 384):
        state.zero_()
        pieces = [model(part, state) for part in ids.split(piece, dim=1)]
        assert same_bits(torch.cat(pieces, dim=1), whole)
        assert torch.equal(state.conv, whole_state.conv) and torch.equal(state.ssm, whole_state.ssm)


@pytest.mark.parametrize("device", DEVICES)
def test_pieces_with_the_real_matrix_products(truth, device):
    model = load_mamba(device=device)
    ids = text_ids(200, device=device)
    for cut in (128, 77):  # a multiple of the tile, and none
        state = model.new_state(1)
        joined = torch.cat([model(ids[:, :cut], state), model(ids[:, cut:], state)], dim=1).cpu()
        assert (joined - truth).abs().max() < 1e-4 * truth.abs().max()


def test_a_call_without_a_state_starts_afresh_and_keeps_nothing(tiny):
    ids = tiny_ids(2, 30)
    first = tiny(ids)
    assert same_bits(tiny(ids), first)
    assert same_bits(tiny(ids, tiny.new_state(2)), first)


def test_a_forward_that_fails_leaves_the_state(tiny):
    state = tiny.new_state(1)
    tiny(tiny_ids(1, 10), state)
    before = state.conv.clone(), state.ssm.clone()
    with pytest.raises(ValueError, match="chunk_size"):
        tiny(tiny_ids(1, 10), state, chunk_policy=lambda u, layer: 100 if layer == 2 else None)
    assert torch.equal(state.conv, before[0]) and torch.equal(state.ssm, before[1])


# ---- chunk policies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (f32, bf16))
def test_chunk_policies_never_change_a_bit(dtype, device):
    model = load_mamba(device=device, dtype=dtype)
    ids = text_ids(700, device=device)
    whole = model(ids)
    by_layer = lambda u, layer: (None, 128, 256)[layer % 3]  # noqa: E731
    policies = [get_scheduler("static", chunk_size=size) for size in (128, 384, 2048)] + [by_layer]
    policies += [get_scheduler(name) for name in ("hist", "device-hist", "shape", "random", "token-hist", "table")]
    if device == "cuda":
        policies.append(lambda u, layer: torch.tensor(256, dtype=torch.int32, device=u.device))
    for policy in policies:
        assert same_bits(model(ids, chunk_policy=policy), whole)


def test_a_policy_sees_what_each_scan_receives(mini, theirs):
    ids = text_ids(40)
    seen, expected = [], []
    mini(ids, chunk_policy=lambda u, layer: seen.append((layer, u)))
    with route(theirs, chunk_size=lambda u, layer: expected.append((layer, u))), torch.inference_mode():
        theirs(ids)
    assert [layer for layer, _ in seen] == [layer for layer, _ in expected] == list(range(8))
    for (_, ours), (_, reference) in zip(seen, expected):
        assert ours.shape == (1, 512, 40) and ours.stride(1) == 1  # (B, D, L), token-major
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_what_a_policy_answers_reaches_the_scan_of_its_layer(tiny, monkeypatch):
    chunks = []

    def scan(*arguments, chunk_size, **options):
        chunks.append(chunk_size)
        return scan_itself(*arguments, chunk_size=chunk_size, **options)

    scan_itself = mamba.selective_scan
    monkeypatch.setattr(mamba, "selective_scan", scan)
    tiny(tiny_ids(1, 10), chunk_policy=lambda u, layer: 128 * (layer + 1))
    tiny(tiny_ids(1, 10))
    assert chunks == [128, 256, 384, None, None, None]


# ---- generation ------------------------------------------------------------------------------------------------------


@pytorch_on_cpu()
def their_tokens(theirs, ids, count):
    found = theirs.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_are_those_of_generate(theirs, device):
    ids = torch.cat([text_ids(60), text_ids(60, start=33)])
    expected = their_tokens(theirs, ids, 40)
    session = Session(load_mamba(device=device), 2)
    for _ in range(3):  # on CUDA the first is eager, the others replay graphs
        assert session.generate(ids.tolist(), 40) == expected
    assert session.generate(ids, 1) == [row[:1] for row in expected]
    alone = Session(session.model)
    assert alone.generate(ids[:1], 40) == expected[:1]


def test_rows_end_after_their_end_token(mini):
    ids = torch.cat([text_ids(60), text_ids(60, start=33)])
    session = Session(mini, 2)
    free = session.generate(ids, 2 * BLOCK + 5)
    assert [len(row) for row in free] == [2 * BLOCK + 5] * 2
    end = next(token for token in free[0] if token in free[1] and free[0].index(token) != free[1].index(token))
    found = session.generate(ids, 2 * BLOCK + 5, eos_token_id=end)
    assert found == [row[: row.index(end) + 1] for row in free]
    first = free[0][0]
    assert Session(mini).generate(ids[:1], 50, eos_token_id=first) == [[first]]


def test_generation_in_pieces_and_with_a_policy(mini):
    ids = text_ids(300)
    session = Session(mini)
    whole = session.generate(ids, 5)
    assert session.generate(ids, 5, piece=128) == whole
    assert session.generate(ids, 5, chunk_policy=get_scheduler("hist")) == whole


def test_decode_goes_on_from_the_last_token(mini):
    session = Session(mini)
    logits = session.prefill(text_ids(60))
    assert session.token.tolist() == logits.argmax(-1).tolist()
    tokens = session.token.tolist() + session.decode(3)[0].tolist() + session.decode(2)[0].tolist()
    assert [tokens] == session.generate(text_ids(60), 6)


def test_progress_is_drawn_when_asked_for(tiny, capsys):
    session = Session(tiny)
    session.generate([[1, 2, 3]], 40)
    assert capsys.readouterr().err == ""
    session.generate([[1, 2, 3]], 40, progress=True)
    assert "40/40" in capsys.readouterr().err


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in one file, to be spoilt."""
    transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=37, hidden_size=16, num_hidden_layers=2)
    ).save_pretrained(tmp_path)
    return tmp_path


def with_config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def with_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def with_text(name, text):
    return lambda folder: (folder / name).write_bytes(text)


A_LOG = "backbone.layers.1.mixer.A_log"
SPOILT = {
    "falcon_mamba": ("model_type", with_config(model_type="falcon_mamba")),
    "mamba2": ("model_type", with_config(model_type="mamba2")),
    "no type": ("model_type", with_config(model_type=None)),
    "gelu": ("hidden_act", with_config(hidden_act="gelu")),
    "projection bias": ("use_bias", with_config(use_bias=True)),
    "no conv bias": ("use_conv_bias", with_config(use_conv_bias=False)),
    "residual in the model's dtype": ("residual_in_fp32", with_config(residual_in_fp32=False)),
    "conv width 5": ("conv_kernel", with_config(conv_kernel=5)),
    "257 states": ("state_size", with_config(state_size=257)),
    "no layers": ("num_hidden_layers", with_config(num_hidden_layers=0)),
    "layers a float": ("num_hidden_layers", with_config(num_hidden_layers=2.0)),
    "vocabulary true": ("vocab_size", with_config(vocab_size=True)),
    "rank a word": ("time_step_rank", with_config(time_step_rank="large")),
    "another inner size": ("intermediate_size", with_config(intermediate_size=33)),
    "epsilon zero": ("layer_norm_epsilon", with_config(layer_norm_epsilon=0.0)),
    "tied a word": ("tie_word_embeddings", with_config(tie_word_embeddings="yes")),
    "config of another shape": ("backbone.embeddings.weight", with_config(hidden_size=32, intermediate_size=64)),
    "more layers than tensors": ("backbone.layers.2.norm.weight", with_config(num_hidden_layers=3)),
    "fewer layers than tensors": ("backbone.layers.1.mixer.A_log", with_config(num_hidden_layers=1)),
    "untied without a head": ("lm_head.weight", with_config(tie_word_embeddings=False)),
    "config no JSON": ("config.json", with_text("config.json", b"{")),
    "config no text": ("config.json", with_text("config.json", b"\xff\xfe\x00")),
    "config a list": ("config.json", with_text("config.json", b"[]")),
    "tensor missing": (A_LOG, with_tensors(lambda tensors: tensors.pop(A_LOG))),
    "tensor unknown": (
        "backbone.extra",
        with_tensors(lambda tensors: tensors.update({"backbone.extra": torch.ones(1)})),
    ),
    "tensor of another shape": (A_LOG, with_tensors(lambda tensors: tensors.update({A_LOG: torch.ones(32, 8)}))),
    "tensor of integers": (A_LOG, with_tensors(lambda tensors: tensors.update({A_LOG: tensors[A_LOG].to(torch.int8)}))),
    "weights cut off": ("model.safetensors", with_text("model.safetensors", b"\x08\x00\x00")),
    "weights pickled": ("model.safetensors", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")),
    "index climbs out": (
        "weight_map",
        with_text("model.safetensors.index.json", b'{"weight_map": {"x": "../model.safetensors"}}'),
    ),
    "index names a pickle": (
        "weight_map",
        with_text("model.safetensors.index.json", b'{"weight_map": {"x": "pytorch_model.bin"}}'),
    ),
    "index without a map": ("weight_map", with_text("model.safetensors.index.json", b"{}")),
}


@pytest.mark.parametrize("case", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_checkpoint_is_refused_by_name(case, folder):
    name, spoil = case
    load_mamba(str(folder))
    spoil(folder)
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        load_mamba(str(folder))
    assert str(error.value).startswith(f"{name}: got ")


@pytest.mark.parametrize(
    "arguments, name",
    [
        pytest.param({"model": "corey-none"}, "model", id="no_such_folder"),
        pytest.param({"model": 3}, "model", id="number"),
        pytest.param({"model": "../owner/name"}, "model", id="climbing_name"),
        pytest.param({"model": "state-spaces/mamba-130m-hf"}, "revision", id="hub_without_revision"),
        pytest.param({"model": "state-spaces/mamba-130m-hf", "revision": "main"}, "revision", id="hub_branch"),
        pytest.param({"model": "state-spaces/mamba-130m-hf", "revision": "A" * 40}, "revision", id="hub_upper_case"),
        pytest.param({"model": "corey-mini", "revision": "0" * 40}, "revision", id="folder_with_revision"),
        pytest.param({"dtype": torch.float64}, "dtype", id="float64"),
        pytest.param({"dtype": "bfloat16"}, "dtype", id="dtype_name"),
    ],
)
def test_checkpoints_that_are_not_pinned_or_not_there_are_refused(arguments, name, theirs):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got"):
        load_mamba(**arguments)


def test_a_hub_checkpoint_is_read_at_its_commit_and_without_pickles(folder, monkeypatch):
    calls = []

    def download(model, *, revision, allow_patterns):
        calls.append((model, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_mamba("state-spaces/mamba-130m-hf", revision="0123456789" * 4)
    ((model, revision, patterns),) = calls
    assert model == "state-spaces/mamba-130m-hf" and revision == "0123456789" * 4
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in patterns)


def test_the_published_config_is_read(tmp_path):
    published = {
        "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 2048, "d_model": 1024,
        "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.1, "intermediate_size": 2048, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
        "n_layer": 48, "num_hidden_layers": 48, "pad_token_id": 0, "residual_in_fp32": True, "rms_norm": True,
        "ssm_cfg": {}, "state_size": 16, "time_step_rank": 64, "torch_dtype": "float32", "use_bias": False,
        "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_config(tmp_path) == SHAPES["370m"]


def test_weights_of_the_recurrence_stay_in_float32(folder):
    layer = load_mamba(str(folder), dtype=bf16).layers[1]
    stored = {
        name.removeprefix("backbone.layers.1.mixer."): x for name, x in load_file(folder / "model.safetensors").items()
    }
    assert torch.equal(layer.A, -stored["A_log"].exp()) and not torch.equal(layer.A, layer.A.to(bf16).float())
    assert torch.equal(layer.dt_bias, stored["dt_proj.bias"]) and torch.equal(layer.D, stored["D"])
    assert {x.dtype for x in (layer.norm, layer.in_proj, layer.conv_weight, layer.x_proj, layer.out_proj)} == {bf16}


# ---- random weights --------------------------------------------------------------------------------------------------


def test_shapes_have_the_published_numbers_of_parameters():
    found = {name: sum(torch.Size(s).numel() for s in tensor_shapes(c).values()) for name, c in SHAPES.items()}
    assert found == {"130m": 129135360, "370m": 371516416, "1.4b": 1372178432, "2.8b": 2768345600}


def test_random_weights_follow_their_seed(tiny):
    ids = tiny_ids(1, 20)
    assert same_bits(random_mamba(TINY, seed=1)(ids), tiny(ids))
    assert not same_bits(random_mamba(TINY, seed=2)(ids), tiny(ids))


def test_random_weights_have_the_scale_of_a_model(tiny):
    for layer in tiny.layers:
        step = F.softplus(layer.dt_bias)
        assert step.min() > 0.99e-3 and step.max() < 1.01e-1
        torch.testing.assert_close(layer.A[0], -torch.arange(1.0, 17))
    model = random_mamba(MambaConfig(d_model=128, n_layer=16, vocab_size=64, d_inner=256, dt_rank=8))
    sums = []
    norm = mamba.add_rms_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba, "add_rms_norm", lambda *a: sums.append(norm(*a)) or sums[-1])
        logits = model(torch.randint(64, (1, 100)))
    assert logits.isfinite().all() and logits.std() > 0.1
    first, last = (sums[i][1].square().mean().sqrt() for i in (0, -1))
    assert 1 < last / first < 100  # the residual stream: layers add to it, and do not drown it


def test_the_unknown_shape_and_seed_are_refused_by_name():
    for arguments, name in (({"shape": "7b"}, "shape"), ({"shape": 370}, "shape"), ({"seed": 1.0}, "seed")):
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: got"):
            random_mamba(**{"shape": TINY} | arguments)


# ---- bad calls -------------------------------------------------------------------------------------------------------


class Unhashable:
    __hash__ = None

    def __call__(self, u, layer):
        return None


CALLS = {
    "ids a list": ("ids", lambda m: m([[1, 2]])),
    "ids int32": ("ids", lambda m: m(torch.ones(1, 2, dtype=torch.int32))),
    "ids of one dimension": ("ids", lambda m: m(torch.ones(2, dtype=torch.int64))),
    "no tokens": ("ids", lambda m: m(torch.ones(1, 0, dtype=torch.int64))),
    "ids on another device": ("ids", lambda m: m(tiny_ids(1, 2, device="meta"))),
    "state a tuple": ("state", lambda m: m(tiny_ids(1, 2), (1, 2))),
    "state of another batch": ("state", lambda m: m(tiny_ids(1, 2), m.new_state(2))),
    "state of another dtype": (
        "state",
        lambda m: m(tiny_ids(1, 2), random_mamba(TINY, dtype=bf16).new_state(1)),
    ),
    "last_only an int": ("last_only", lambda m: m(tiny_ids(1, 2), last_only=1)),
    "policy an int": ("chunk_policy", lambda m: m(tiny_ids(1, 2), chunk_policy=128)),
    "policy's answer": ("chunk_size", lambda m: m(tiny_ids(1, 2), chunk_policy=lambda u, layer: 100)),
    "step of two dimensions": ("ids", lambda m: m.step(tiny_ids(1, 2), m.new_state(1))),
    "step without a state": ("state", lambda m: m.step(tiny_ids(1, 2)[0], None)),
    "batch zero": ("batch", lambda m: m.new_state(0)),
    "batch a float": ("batch", lambda m: m.new_state(1.0)),
    "session of another model": ("model", lambda m: Session(torch.nn.Linear(1, 1))),
    "session without sequences": ("batch", lambda m: Session(m, 0)),
    "graphs a word": ("graphs", lambda m: Session(m, graphs="yes")),
    "graphs on a CPU": ("graphs", lambda m: Session(m, graphs=True)),
    "text": ("token_ids", lambda m: Session(m).prefill("ab")),
    "a list of text": ("token_ids", lambda m: Session(m).prefill(["ab"])),
    "one list": ("token_ids", lambda m: Session(m).prefill([1, 2])),
    "rows of two lengths": ("token_ids", lambda m: Session(m, 2).prefill([[1, 2], [3]])),
    "ids of floats": ("token_ids", lambda m: Session(m).prefill([[1.0]])),
    "another batch": ("token_ids", lambda m: Session(m, 2).prefill([[1, 2]])),
    "an empty prompt": ("token_ids", lambda m: Session(m).prefill([[]])),
    "an id beyond the vocabulary": ("token_ids", lambda m: Session(m).prefill([[40]])),
    "a negative id": ("token_ids", lambda m: Session(m).prefill(torch.tensor([[-1]]))),
    "int32": ("token_ids", lambda m: Session(m).prefill(torch.ones(1, 2, dtype=torch.int32))),
    "piece off the tile": ("piece", lambda m: Session(m).prefill([[1]], piece=100)),
    "piece zero": ("piece", lambda m: Session(m).prefill([[1]], piece=0)),
    "piece a float": ("piece", lambda m: Session(m).prefill([[1]], piece=128.0)),
    "policy not hashable": ("chunk_policy", lambda m: Session(m).prefill([[1]], chunk_policy=Unhashable())),
    "policy no callable": ("chunk_policy", lambda m: Session(m).prefill([[1]], chunk_policy=128)),
    "no steps": ("count", lambda m: Session(m).decode(0)),
    "no new tokens": ("max_new_tokens", lambda m: Session(m).generate([[1]], 0)),
    "new tokens true": ("max_new_tokens", lambda m: Session(m).generate([[1]], True)),
    "end token a word": ("eos_token_id", lambda m: Session(m).generate([[1]], 1, eos_token_id="</s>")),
    "progress an int": ("progress", lambda m: Session(m).generate([[1]], 1, progress=1)),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_a_bad_call_is_refused_by_name(case, tiny):
    name, call = case
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got "):
        call(tiny)


# ---- graphs ----------------------------------------------------------------------------------------------------------


class Recorded:
    """In place of a graph where there is no CUDA: calls the function again."""

    made: list = []  # noqa: RUF012

    def __init__(self, function, inputs, pool, device):
        self.function = function
        Recorded.made.append(tuple(x.shape for x in inputs))

    def replay(self, inputs):
        return self.function(*inputs)


@pytest.fixture
def recording(tiny, monkeypatch):
    """A session that keeps its books as on CUDA."""
    monkeypatch.setattr(mamba_session, "_Graph", Recorded)
    Recorded.made = []
    session = Session(tiny)
    session.graphs = True
    return session


def test_a_shape_is_captured_when_it_comes_again(recording, tiny):
    expected = Session(tiny).generate(tiny_ids(1, 20), 5)
    assert recording.generate(tiny_ids(1, 20), 5) == expected
    assert Recorded.made == [()]  # the second step of decoding
    assert recording.generate(tiny_ids(1, 20), 5) == recording.generate(tiny_ids(1, 20), 5) == expected
    assert Recorded.made == [(), ((1, 20),)]
    policy = get_scheduler("static", chunk_size=128)
    for _ in range(3):
        recording.prefill(tiny_ids(1, 20), chunk_policy=policy)
    assert len(Recorded.made) == 3


def test_pieces_share_a_graph(recording):
    recording.prefill(tiny_ids(1, 128 * 5 + 7), piece=128)
    assert Recorded.made == [((1, 128),)]


def test_the_latest_graphs_are_kept(recording):
    for length in range(1, MOST_GRAPHS + 3):
        for _ in range(2):
            recording.prefill(tiny_ids(1, length))
    assert len(recording._captured) == MOST_GRAPHS
    assert list(recording._captured) == [(length, None) for length in range(3, MOST_GRAPHS + 3)]
    recording.prefill(tiny_ids(1, 3))  # is now the latest
    recording.prefill(tiny_ids(1, 1))
    assert (3, None) in recording._captured and (4, None) not in recording._captured


def test_a_policy_that_waits_for_the_device_is_refused_where_graphs_are(recording):
    waiting = (
        get_scheduler("hist"),
        lambda u, layer: 128 if u.sum() > 0 else 256,
        lambda u, layer: 128 * (1 + u.max().int().item()),
        lambda u, layer: 128 * len(u.nonzero()),
    )
    for policy in waiting:
        with pytest.raises(ValueError, match=r"^chunk_policy: got one that waits for the device"):
            recording.prefill(tiny_ids(1, 20), chunk_policy=policy)
    recording.prefill(tiny_ids(1, 20), chunk_policy=get_scheduler("shape"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (f32, bf16))
@pytest.mark.parametrize("name", (None, "static", "shape", "device-hist"))
def test_graphs_give_the_bits_of_eager_calls(name, dtype):
    model = load_mamba(device="cuda", dtype=dtype)
    policy = None if name is None else get_scheduler(name)
    eager, replayed = Session(model, 2, graphs=False), Session(model, 2)
    for start in range(4):  # other tokens at every replay
        for length, piece in ((60, None), (700, None), (700, 256), (1, None), (2, None)):
            ids = torch.cat([text_ids(length, start=start), text_ids(length, start=start + 100)])
            logits = [s.prefill(ids, piece=piece, chunk_policy=policy) for s in (eager, replayed)]
            assert same_bits(*logits)
            assert torch.equal(eager.decode(5), replayed.decode(5))
            assert same_bits(eager.state.conv, replayed.state.conv) and same_bits(eager.state.ssm, replayed.state.ssm)
    assert eager._captured == {}
    assert set(replayed._captured) == {"step", *((tokens, policy) for tokens in (60, 700, 256, 188, 1, 2))}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("device-hist", "guarded-device-hist"))
@pytest.mark.parametrize("given", ({}, {"stride": 8}, {"stride": 8, "every": 4, "otherwise": 256}))
def test_a_decision_on_the_way_is_the_one_of_the_policy(name, given, monkeypatch):
    model = load_mamba(device="cuda", dtype=bf16)
    policy, asked, used = get_scheduler(name, range=(-1.0, 3.0), **given), [], []
    scan = mamba.selective_scan

    def spy(u, *args, chunk_size, **options):
        asked.append(int(policy(u, layer=len(asked))))
        used.append(int(chunk_size))
        return scan(u, *args, chunk_size=chunk_size, **options)

    expected = model(text_ids(700).cuda())
    monkeypatch.setattr(mamba, "selective_scan", spy)
    assert same_bits(model(text_ids(700).cuda(), chunk_policy=policy), expected)
    assert used == asked and len(used) == model.config.n_layer


@pytest.mark.gpu
def test_graphs_that_were_dropped_are_captured_again():
    model = load_mamba(device="cuda", dtype=bf16)
    eager, replayed = Session(model, graphs=False), Session(model)
    for _ in range(2):
        for length in range(10, 10 + MOST_GRAPHS + 3):
            for start in range(3):
                assert same_bits(*(s.prefill(text_ids(length, start=start)) for s in (eager, replayed)))


@pytest.mark.gpu
def test_decoding_does_not_wait_for_the_device():
    session = Session(load_mamba(device="cuda", dtype=bf16), 3)
    session.prefill(torch.cat([text_ids(60)] * 3))
    session.decode(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.decode(2 * BLOCK)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_every_way_to_read_the_device_is_refused_and_does_no_harm():
    session = Session(load_mamba(device="cuda"))
    expected = session.prefill(text_ids(60))
    for policy in (
        get_scheduler("hist"),
        lambda u, layer: 128 if u.sum().cpu() > 0 else 256,
        lambda u, layer: u.tolist(),
    ):
        with pytest.raises(ValueError, match=r"^chunk_policy: got one that waits for the device"):
            session.prefill(text_ids(60), chunk_policy=policy)
    for _ in range(2):
        assert same_bits(session.prefill(text_ids(60)), expected)
    waiting = Session(session.model, graphs=False)
    assert same_bits(waiting.prefill(text_ids(60), chunk_policy=get_scheduler("hist")), expected)
