"""bench/peers: each says how to get it, calls what its package has, and computes our op.

A package that is installed is read (its functions' parameters, by ast, without importing it), and run where it runs on
a CPU; one that is not is skipped with its install command.
"""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import ops
import peer_facts
import pytest
import torch
import torch.nn.functional as F
from attention_forms import forms
from harness import Contestant, plain
from lineup import PEERS, Lineup, checked, contestants, results
from op_inputs import Setting

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def tiny(op: str, **options: Any) -> Setting:
    return cases.setting(op, "tiny", device=CPU, dtype=torch.float32, **options)


def verdicts(op: str, found: dict[str, Contestant]) -> dict[str, float | str]:
    """Against the specification, as bench/ops.py checks."""
    lineup = Lineup({"eager": plain(cases.specification(op)), **found})
    return {name: verdict for name, verdict in checked(op, tiny(op), lineup).items() if name != "eager"}


# ---- what they say ----


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_says_its_ops_and_how_to_get_it(peer: str):
    said = peer_facts.facts(peer)
    assert said.ops and set(said.ops) <= set(cases.CASES)
    assert ("==" in said.requires or "checkout" in said.requires) != (peer == "pytorch")
    (row,) = [line for line in (ROOT / "bench/README.md").read_text().splitlines() if line.startswith(f"| `{peer}` |")]
    assert all(op in row for op in said.ops)
    assert all(version in row for version in re.findall(r"(?:==|against )([\w.]+)", said.requires))


def test_a_missing_peer_s_row_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    for package in ("quack", "flash_attn"):
        monkeypatch.setitem(sys.modules, package, None)
    for peer in ("quack_kernels", "flash_attention_4"):
        monkeypatch.delitem(sys.modules, f"peers.{peer}", raising=False)
    asked = ["quack_kernels", "flash_attention_4"]
    absent = contestants("norm", tiny("norm"), asked, compiled=False).absent
    assert absent.keys() == {"quack_kernels"}  # the other has no norm, so it is not missed
    assert absent["quack_kernels"].startswith("not installed (") and "quack-kernels[cu13]==" in absent["quack_kernels"]
    absent = contestants("attention", tiny("attention"), asked, compiled=False).absent
    assert "pip install --pre 'flash-attn-4" in absent["flash_attention_4"]


def test_a_forward_only_peer_has_no_backward_time():
    """Not one of nothing: its forward timed twice and subtracted."""
    whole, forward = plain(cases.specification("norm")), plain(lambda r, w, b: r.detach())
    assert ops.calls_of(whole, "norm", tiny("norm"), 1).keys() == {"forward", "both"}
    assert ops.calls_of(forward, "norm", tiny("norm"), 1).keys() == {"forward"}


# ---- what their packages have ----

TE = "transformer_engine/pytorch"
CALLS = {  # peer: distribution, {"file: function or Class.method": parameters that are passed by place or by name}
    "liger": ("liger-kernel", {
        "liger_kernel/ops/layer_norm.py: LigerLayerNormFunction.forward": "ctx X W B eps",
        "liger_kernel/ops/fused_linear_cross_entropy.py: LigerFusedLinearCrossEntropyFunction.forward":
            "ctx _input weight target bias ce_weight ignore_index lse_square_scale label_smoothing reduction softcap "
            "return_z_loss accum_dtype",
    }),
    "quack_kernels": ("quack-kernels", {
        "quack/rmsnorm.py: layernorm_fwd": "x weight bias eps return_rstd return_mean",
        "quack/rmsnorm.py: layernorm_bwd": "x weight dout rstd mean has_bias",
        "quack/mlp.py: mlp_func": "x weight1 weight2 activation bias1 .. tuned",
        "quack/linear_cross_entropy.py: chunked_linear_cross_entropy": "x weight target .. ignore_index reduction",
    }),
    "flash_attention_2": ("flash-attn", {
        "flash_attn/flash_attn_interface.py: flash_attn_qkvpacked_func": "qkv .. causal",
    }),
    "flash_attention_3": ("flash-attn-3", {"flash_attn_interface.py: flash_attn_qkvpacked_func": "qkv .. causal"}),
    "flash_attention_4": ("flash-attn-4", {"flash_attn/cute/interface.py: flash_attn_func": "q k v .. causal"}),
    "cudnn_frontend": ("nvidia-cudnn-frontend", {
        "cudnn/ops/norm/layernorm.py: layer_norm": "input normalized_shape weight bias eps",
        "cudnn/sdpa/fwd/torch_op.py: sdpa": "query key value .. is_causal .. return_lse",
    }),
    "apple_cce": ("cut-cross-entropy", {
        "cut_cross_entropy/linear_cross_entropy.py: linear_cross_entropy":
            "e c targets ignore_index .. reduction .. filter_eps impl",
    }),
    "transformer_engine": ("transformer-engine", {
        f"{TE}/module/layernorm.py: LayerNorm.__init__": "self normalized_shape eps .. kwargs",
        f"{TE}/ops/basic/layer_norm.py: LayerNorm.__init__": "self normalized_shape eps device dtype",
        f"{TE}/attention/dot_product_attention/dot_product_attention.py: DotProductAttention.__init__":
            "self num_attention_heads kv_channels .. attention_dropout qkv_format attn_mask_type",
        f"{TE}/attention/dot_product_attention/dot_product_attention.py: DotProductAttention.forward":
            "self query_layer key_layer value_layer",
        f"{TE}/cross_entropy.py: parallel_cross_entropy": "inp target .. reduce_loss .. ignore_idx .. overwrite_input",
        f"{TE}/optimizers/fused_adam.py: FusedAdam.__init__": "self params lr betas eps .. adam_w_mode capturable",
    }),
    "nvidia_apex": ("apex", {
        "apex/normalization/fused_layer_norm.py: fused_layer_norm_affine": "input weight bias normalized_shape eps",
        "apex/optimizers/fused_adam.py: FusedAdam.__init__": "self params lr .. betas eps adam_w_mode .. capturable",
    }),
}  # fmt: skip


def parameters(source: str, name: str) -> list[str]:
    """Of the function or Class.method of that name in a file's text."""
    nodes: list[Any] = list(ast.parse(source).body)
    for part in name.split("."):
        (found,) = [node for node in nodes if getattr(node, "name", None) == part]
        nodes = found.body
    said = found.args
    named = [*said.posonlyargs, *said.args, *said.kwonlyargs, *filter(None, [said.vararg, said.kwarg])]
    return [argument.arg for argument in named]


def matches(expected: list[str], found: list[str]) -> bool:
    """In that order; ".." stands for any parameters between, and whatever follows is passed by nobody."""
    at, gap = 0, False
    for name in expected:
        if name == "..":
            gap = True
        elif name not in found[at:] or (not gap and found[at] != name):
            return False
        else:
            at, gap = found.index(name, at) + 1, False
    return True


@pytest.mark.parametrize("peer,function", [(peer, function) for peer in CALLS for function in CALLS[peer][1]])
def test_a_call_fits_the_installed_package(peer: str, function: str):
    (distribution, functions), how = CALLS[peer], peer_facts.facts(peer).requires
    file, _, name = function.partition(": ")
    try:
        path = Path(str(importlib.metadata.distribution(distribution).locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(how)
    if peer == "nvidia_apex" and not path.is_file():
        pytest.skip(f"this apex is another package; {how}")
    found = parameters(path.read_text(), name)
    assert matches(functions[function].split(), found), f"it takes {found}"


def test_every_peer_s_calls_are_listed():
    """torch's own run here; Helion's are files of a checkout, run below."""
    assert CALLS.keys() | {"pytorch", "helion_pretuned"} == set(PEERS)
    assert matches(["a", "..", "c"], ["a", "b", "c", "d"]) and matches(["a", "b"], ["a", "b", "c"])
    assert not matches(["a", "c"], ["a", "b", "c"]) and not matches(["a", "..", "x"], ["a", "b", "c"])


# ---- what they compute ----

RUN = """
import sys
sys.path[:0] = ["bench", "tests/helpers"]
import json, cases, harness, torch
from lineup import Lineup, checked, peer_contestants
peer, found = sys.argv[1], {}
for op in sys.argv[2:]:
    at = cases.setting(op, "tiny", device=torch.device("cpu"), dtype=torch.float32)
    lineup = Lineup({"eager": harness.plain(cases.specification(op))})
    lineup.add(peer, lambda: peer_contestants(peer, op))
    found |= {"absent " + name: why for name, why in lineup.absent.items()}
    found |= {op + ": " + name: verdict for name, verdict in checked(op, at, lineup).items() if name != "eager"}
print(json.dumps(found))
"""


def run_apart(peer: str, *asked: str, **environment: str) -> dict[str, float | str]:
    """The verdicts of a peer on the CPU in a process of its own, whose mode these variables choose at import."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", RUN, peer, *asked]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_liger_computes_our_loss_interpreted():
    """Its LayerNorm does not run in the interpreter: it asks a float for .to."""
    pytest.importorskip("liger_kernel", reason=peer_facts.facts("liger").requires)
    found = run_apart("liger", "linear_cross_entropy", TRITON_INTERPRET="1")
    assert found.keys() == {"linear_cross_entropy: Liger", "linear_cross_entropy: Liger, float32 dw"}
    assert all(isinstance(verdict, float) and verdict < 1e-5 for verdict in found.values()), found


@pytest.mark.slow
def test_helion_s_pretuned_kernels_compute_ours_interpreted():
    pytest.importorskip("helion", reason=peer_facts.facts("helion_pretuned").requires)
    if "HELION_DIR" not in os.environ:
        pytest.skip(peer_facts.facts("helion_pretuned").requires)
    found = run_apart("helion_pretuned", "norm", "linear_cross_entropy", HELION_INTERPRET="1")
    assert len(found) == 2 and all(isinstance(verdict, float) and verdict < 1e-5 for verdict in found.values()), found


@pytest.fixture
def eagerly() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_cut_cross_entropy_s_torch_path_is_our_loss(eagerly: None):
    """Its Triton path needs a GPU: the interpreter cannot take its absent pointers."""
    pytest.importorskip("cut_cross_entropy", reason=peer_facts.facts("apple_cce").requires)
    found = importlib.import_module("peers.apple_cce").contestants("linear_cross_entropy")
    assert not any(contestant.capturable for contestant in found.values())
    name = "cut-cross-entropy, torch.compile"
    assert verdicts("linear_cross_entropy", {name: found[name]})[name] < 1e-5  # type: ignore[operator]


def sdpa(heads_first: bool) -> Any:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x if heads_first else x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attention


@pytest.mark.parametrize("heads_first", [True, False])
def test_attention_in_both_forms_and_layouts_is_ours(heads_first: bool):
    found = verdicts("attention", forms("peer", sdpa(heads_first), heads_first))
    assert found.keys() == {"peer", "peer, q k v apart"}
    assert all(isinstance(verdict, float) and verdict < 1e-5 for verdict in found.values()), found


def described(monkeypatch: pytest.MonkeyPatch, peer: str, **modules: dict[str, Any]) -> ModuleType:
    """bench/peers/PEER.py beside modules that do in torch what the package's documentation says: so the glue, the order
    and shape of arguments and gradients, is checked where no such GPU is."""
    for name in modules:
        dotted = name.replace("__", ".")
        for end in range(1, dotted.count(".") + 2):
            parent = ".".join(dotted.split(".")[:end])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    for name, members in modules.items():
        vars(sys.modules[name.replace("__", ".")]).update(members)
    monkeypatch.delitem(sys.modules, f"peers.{peer}", raising=False)
    module = importlib.import_module(f"peers.{peer}")
    monkeypatch.delitem(sys.modules, f"peers.{peer}")
    return module


def layernorm_fwd(x: Any, weight: Any, bias: Any, eps: float, return_rstd: bool, return_mean: bool) -> Any:
    assert x.dim() == 2 and return_rstd and return_mean
    y, mean, rstd = torch.native_layer_norm(x, [x.size(-1)], weight, bias, eps)
    return y, rstd[:, 0], mean[:, 0]


def layernorm_bwd(x: Any, weight: Any, dout: Any, rstd: Any, mean: Any, has_bias: bool) -> Any:
    mask, bias = [True, True, has_bias], torch.zeros_like(weight) if has_bias else None
    return torch.ops.aten.native_layer_norm_backward(
        dout, x, [x.size(-1)], mean[:, None], rstd[:, None], weight, bias, mask
    )


def mlp_func(x: Any, weight1: Any, weight2: Any, activation: str, bias1: Any, tuned: bool) -> Any:
    assert activation == "gelu_tanh_approx"
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2)


def chunked_linear_cross_entropy(x: Any, weight: Any, target: Any, ignore_index: int, reduction: str) -> Any:
    assert x.dim() == 2 and target.dim() == 1
    return F.cross_entropy(x @ weight.t(), target, ignore_index=ignore_index, reduction=reduction)


@pytest.mark.parametrize("bias", [True, False])
def test_quack_s_functions_are_joined_to_our_ops(monkeypatch: pytest.MonkeyPatch, bias: bool):
    module = described(
        monkeypatch,
        "quack_kernels",
        quack__rmsnorm={"layernorm_fwd": layernorm_fwd, "layernorm_bwd": layernorm_bwd},
        quack__mlp={"mlp_func": mlp_func},
        quack__linear_cross_entropy={"chunked_linear_cross_entropy": chunked_linear_cross_entropy},
    )
    assert {op for op in cases.CASES if module.contestants(op)} == set(module.OPS)
    for op in module.OPS:
        at = tiny(op, bias=bias)
        lineup = Lineup({"eager": plain(cases.specification(op)), **module.contestants(op)})
        found = checked(op, at, lineup)
        assert found.keys() > {"eager"} and all(isinstance(verdict, float) for verdict in found.values()), found
        gradients = results(next(iter(module.contestants(op).values())), op, at)[1]
        assert len(gradients) == len(results(plain(cases.specification(op)), op, at)[1])


def test_packed_and_separate_attentions_of_peers_are_ours(monkeypatch: pytest.MonkeyPatch):
    def packed(qkv: Any, causal: bool) -> Any:
        assert causal
        return sdpa(False)(*qkv.unbind(2))

    def apart(q: Any, k: Any, v: Any, causal: bool) -> Any:
        assert causal and q.size(1) == 17  # [B, T, H, D]
        return sdpa(False)(q, k, v), None

    def by_heads(q: Any, k: Any, v: Any, is_causal: bool, return_lse: bool) -> Any:
        assert is_causal and return_lse and q.size(2) == 17  # [B, H, T, D]
        return sdpa(True)(q, k, v).transpose(1, 2), None

    modules = {
        "flash_attention_2": {"flash_attn__flash_attn_interface": {"flash_attn_qkvpacked_func": packed}},
        "flash_attention_3": {"flash_attn_interface": {"flash_attn_qkvpacked_func": packed}},
        "flash_attention_4": {"flash_attn__cute": {"flash_attn_func": apart}},
        "cudnn_frontend": {
            "cudnn__ops__norm": {"layer_norm": F.layer_norm},
            "cudnn__sdpa__fwd__torch_op": {"sdpa": by_heads},
        },
    }  # fmt: skip
    for peer, documented in modules.items():
        module = described(monkeypatch, peer, **documented)
        assert {op for op in cases.CASES if module.contestants(op)} == set(module.OPS)
        for op in module.OPS:
            found = verdicts(op, module.contestants(op))
            assert found and all(isinstance(v, float) and v < 1e-5 for v in found.values()), (peer, op, found)


def test_a_fused_adam_updates_our_buffers():
    """By a class of the interface that apex and Transformer Engine share, on torch's AdamW."""
    import fused_adam

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, groups: Any, lr: float, betas: Any, eps: float, adam_w_mode: bool, capturable: bool):
            assert adam_w_mode and capturable
            super().__init__(groups, lr=lr, betas=betas, eps=eps, foreach=False)

        def step(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["step"] = group["step"].float()[0]
            super().step()

    found = verdicts("adamw_", {"peer": fused_adam.contestant(FusedAdam)})
    assert isinstance(found["peer"], float) and found["peer"] < 1e-5, found
