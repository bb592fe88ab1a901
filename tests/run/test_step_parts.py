"""Where a step went, from hand-made traces: every number here can be added up by hand (microseconds)."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nanogpt_fast.errors import DataError
from nanogpt_fast.run import trace_events
from nanogpt_fast.run.step_parts import Summary, from_json, summarise
from nanogpt_fast.run.trace_events import Event, nest, parse, pieces, read


def record(name: str, start: float, end: float, cat: str = "cpu_op", tid: object = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": tid, "ts": start, "dur": end - start, "args": args}


def annotated(name: str, start: float, end: float) -> dict[str, Any]:
    return record(name, start, end, "user_annotation")


def kernel(name: str, start: float, end: float, stream: int = 7, cat: str = "kernel", op: int = 0, launch: int = 0):
    args = {"stream": stream, "correlation": launch, "External id": op}
    return {**record(name, start, end, cat, stream), "args": args}


def op(name: str, start: float, end: float, number: int, sequence: int = -1, tid: int = 1) -> dict[str, Any]:
    return {**record(name, start, end, tid=tid), "args": {"External id": number, "Sequence number": sequence}}


def engine(name: str, start: float, end: float, sequence: int) -> dict[str, Any]:
    return op(f"autograd::engine::evaluate_function: {name}", start, end, 0, sequence, tid=2)


def summary(records: list[dict[str, Any]], wall_ms: float = 0.1) -> Summary:
    return summarise(parse(records), wall_ms=wall_ms, facts={})


# One step of 100 us. CPU: data 0-10, forward 10-40 with two ops, backward 40-70, update 70-80; then it waits.
HOST = [
    annotated("window", 0, 100),
    annotated("iteration", 0, 100),
    annotated("data", 0, 10),
    annotated("step", 10, 80),
    annotated("forward", 10, 40),
    annotated("h0.mlp", 12, 24),
    op("aten::linear", 13, 18, 1, sequence=5),
    op("aten::gelu", 18, 22, 2, sequence=6),
    annotated("h0.add_norm", 24, 38),
    op("aten::add", 25, 30, 3, sequence=7),
    annotated("backward", 40, 70),
    engine("AddBackward0", 41, 60, sequence=7),
    op("aten::add_", 42, 50, 4, tid=2),
    engine("X", 61, 66, sequence=5),
    op("aten::mm", 62, 65, 5, tid=2),
    annotated("update", 70, 80),
    op("aten::mul_", 71, 79, 6),
]
# GPU: idle 0-5 (data), copy 5-15, gemm 20-40, gelu 40-45, elementwise 50-60, on others nccl 55-75 and a copy 58-62,
# elementwise (backward) 60-70, gemm (backward) 76-86, elementwise (update) 90-100.
DEVICE = [
    kernel("Memcpy HtoD (Pinned -> Device)", 5, 15, cat="gpu_memcpy"),
    kernel("sm90_xmma_gemm_bf16", 20, 40, op=1),
    kernel("void GeluCUDAKernelImpl", 40, 45, op=2),
    kernel("void vectorized_elementwise_kernel<add>", 50, 60, op=3),
    kernel("ncclDevKernel_AllReduce_Sum_f32", 55, 75, stream=8),
    kernel("Memcpy DtoD", 58, 62, stream=9, cat="gpu_memcpy"),
    kernel("void vectorized_elementwise_kernel<add>", 60, 70, op=4),
    kernel("nvjet_hsh_128x128", 76, 86, op=5),
    kernel("void vectorized_elementwise_kernel<mul>", 90, 100, op=6),
]


def test_a_gpus_time_is_given_to_what_ran_and_to_why_nothing_did():
    found = summary(HOST + DEVICE)
    assert found.device == "cuda" and found.steps == 1
    us = {part: round(ms * 1e3, 6) for part, ms in found.parts.items()}
    assert us == {
        "matrix products": 30.0,  # 20-40, 76-86
        "GELU": 5.0,
        "LayerNorm and residual": 20.0,  # 50-60 by its operator's range, 60-70 by autograd's number
        "AdamW, norm, zeroing": 10.0,
        "casts and copies": 10.0,  # 5-15; 58-62 is hidden
        "communication": 5.0,  # 70-75; the rest is hidden
        "launch gaps": 15.0,  # 15-20, 45-50, 75-76, 86-90
        "data wait": 5.0,
    }
    assert sum(us.values()) == 100.0


def test_hidden_work_gaps_and_streams_are_told():
    found = summary(HOST + DEVICE)
    assert found.streams["busy_ms"] == pytest.approx({"stream 7": 0.075, "stream 8": 0.020, "stream 9": 0.004})
    assert found.streams["overlap_ms"] == pytest.approx(0.015)  # 55-70
    assert found.streams["communication_ms"] == pytest.approx(0.020)
    assert found.gaps["count"] == 5 and found.gaps["median_us"] == pytest.approx(5.0)
    longest = [(gap["us"], gap["after"], gap["in"]) for gap in found.gaps["longest"]]
    assert longest[:2] == [(5.0, "", "data"), (5.0, "Memcpy HtoD (Pinned -> Device)", "h0.mlp")]
    assert longest[3] == (4.0, "nvjet_hsh_128x128", "iteration")


def test_forward_and_backward_of_each_op_and_layer():
    found = summary(HOST + DEVICE)
    rows = {row["name"]: (row["forward_ms"] * 1e3, row["backward_ms"] * 1e3) for row in found.ranges}
    assert rows["mlp"] == pytest.approx((20 + 5 + 5 + 0, 10))  # gemm, gelu, the gap at 15-20; gemm by autograd's number
    assert rows["add_norm"] == pytest.approx((10, 10))
    assert found.layers == {"h0": {"mlp": pytest.approx(0.040), "add_norm": pytest.approx(0.020)}}


def test_two_kernels_at_once_share_the_time():
    found = summary([*HOST, kernel("gemm", 30, 50), kernel("flash_fwd_kernel", 40, 60, stream=8)])
    assert found.parts["matrix products"] == pytest.approx(0.015) and found.parts["attention"] == pytest.approx(0.015)


def test_a_graphs_kernels_belong_where_they_were_launched():
    """They carry no operator; here one graph was launched in an evaluation."""
    host = [*HOST, annotated("evaluation", 81, 95), record("cudaGraphLaunch", 82, 83, "cuda_runtime", correlation=77)]
    found = summary([*host, kernel("sm90_gemm", 90, 99, launch=77)])
    assert found.parts["evaluation"] == pytest.approx(0.009 + 0.009)  # the kernel, and idle inside it at 81-90
    assert found.parts["data wait"] == pytest.approx(0.010)  # the same gap of 90 us, as long as it was in data
    assert "matrix products" not in found.parts


def test_a_cpus_time_is_the_self_time_of_the_thread_that_trains():
    loader = record("aten::index_select", 0, 90, tid=3)  # beside the thread that trains: no time of the step's
    found = summary([*[e for e in HOST if e["tid"] == 1], loader])
    us = {part: round(ms * 1e3, 6) for part, ms in found.parts.items()}
    assert us == {
        "GELU": 4.0,
        "LayerNorm and residual": 5.0,  # aten::add in add_norm
        "AdamW, norm, zeroing": 8.0,
        "Python, autograd, dispatch": 100.0 - 4 - 5 - 8 - 10,  # aten::linear only dispatches
        "data wait": 10.0,
    }
    assert found.device == "cpu" and not found.gaps and not found.streams


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_layer_norm_backward", "LayerNorm and residual"),
        ("aten::gelu_backward", "GELU"),
        ("aten::_log_softmax_backward_data", "cross-entropy"),
        ("aten::index_add_", "embedding"),
        ("aten::_fused_adamw_", "AdamW, norm, zeroing"),
        ("aten::linalg_vector_norm", "AdamW, norm, zeroing"),
        ("aten::copy_", "casts and copies"),
        ("aten::mul", "other elementwise"),
        ("aten::as_strided", "Python, autograd, dispatch"),
        ("AddBackward0", "Python, autograd, dispatch"),
    ],
)
def test_operators_are_known_by_name(name: str, part: str):
    found = summary([annotated("window", 0, 20), annotated("iteration", 0, 20), record(name, 5, 15)])
    assert found.parts[part] >= 0.010


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", "matrix products"),
        ("_gemm_gelu_fwd_kernel", "matrix products"),
        ("_attention_bwd_dkdv_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_knob_3", "attention"),
        ("_norm_bwd_kernel", "LayerNorm and residual"),
        ("triton_per_fused_add_native_layer_norm_3", "LayerNorm and residual"),
        ("_bias_gelu_fwd_kernel", "GELU"),
        ("_cross_entropy_fwd_kernel", "cross-entropy"),
        ("void at::native::nll_loss_forward_reduce_cuda_kernel_2d", "cross-entropy"),
        ("_embedding_bwd_pieces_kernel", "embedding"),
        ("_grad_norm_partial_kernel", "AdamW, norm, zeroing"),
        ("_adamw_kernel", "AdamW, norm, zeroing"),
        ("ncclDevKernel_Broadcast_RING", "communication"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "casts and copies"),
        ("void at::native::vectorized_elementwise_kernel<FillFunctor>", "other elementwise"),
    ],
)
def test_kernels_are_known_by_name(name: str, part: str):
    found = summary([annotated("window", 0, 20), annotated("iteration", 0, 20), kernel(name, 5, 15)])
    assert found.parts[part] == pytest.approx(0.010)


def test_several_steps_are_averaged():
    one = [e for e in HOST if e["tid"] == 1]
    later = [{**e, "ts": e["ts"] + 100} for e in one if e["name"] != "window"]
    found = summary([annotated("window", 0, 200), *one[1:], *later], wall_ms=0.25)
    assert found.steps == 2 and found.traced_ms == pytest.approx(0.100) and found.wall_ms == pytest.approx(0.125)
    assert {row["name"]: row["calls"] for row in found.top}["aten::gelu"] == 1.0


def test_self_times_are_what_is_left_of_a_range():
    tree = nest([Event("a", "cpu_op", 0, 10), Event("b", "cpu_op", 2, 3), Event("c", "cpu_op", 6, 4)])
    assert [(e.name, e.self_time) for e in tree] == [("a", 3.0), ("b", 3.0), ("c", 4.0)]
    assert [e.name for e in tree[1].around()] == ["b", "a"]


def test_pieces_cut_the_time_where_something_begins_or_ends():
    events = [Event("x", "kernel", 1, 4), Event("y", "kernel", 3, 4), Event("z", "cpu_op", 0, 9)]
    cut = [(p.start, p.end, [e.name for e in p.running]) for p in pieces(events, 2, 9)]
    assert cut == [(2, 3, ["x"]), (3, 5, ["x", "y"]), (5, 7, ["y"]), (7, 9, [])]


def test_a_summary_survives_json():
    found = summary(HOST + DEVICE)
    assert from_json(json.loads(json.dumps(found.as_json()))) == found
    with pytest.raises(DataError):
        from_json({"format": 1, "parts": {}})


def test_a_trace_file_is_read_and_anything_else_refused(tmp_path: Path):
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": HOST + DEVICE}).encode()))
    assert len(read(path)) == len(HOST) + len(DEVICE)
    whole = path.read_bytes()
    for bad in (whole[: len(whole) // 2], b"{}", b"no json", json.dumps({"traceEvents": [{"ph": "X"}]}).encode()):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="no trace of torch.profiler"):
            trace_events.read(path)
    with pytest.raises(DataError, match="no traced iterations"):
        summary(DEVICE)
