"""Choosing ops: --kernels, and that TRITON has what REFERENCE has."""

import dataclasses
import inspect

import pytest
from kernel_case import DEVICE
from nanogpt_kernels import reference

from nanogpt_fast import ops
from nanogpt_fast.errors import ConfigError, DeviceError
from nanogpt_fast.ops import OP_FILES, OP_NAMES, REFERENCE, select_ops


def test_files_and_ops_cover_each_other():
    assert sorted(name for names in OP_FILES.values() for name in names) == sorted(OP_NAMES)


@pytest.mark.parametrize("name", OP_NAMES)
def test_triton_takes_what_the_reference_takes(name: str):
    """Names, order and defaults of every parameter."""
    ours, theirs = getattr(ops.TRITON, name), getattr(reference, name)
    assert ours is not theirs
    want = {n: p.default for n, p in inspect.signature(theirs).parameters.items()}
    assert {n: p.default for n, p in inspect.signature(ours).parameters.items()} == want
    assert list(inspect.signature(ours).parameters) == list(want)


@pytest.mark.parametrize("spec", ["auto", "reference", "reference,norm=reference"])
def test_reference(spec: str):
    assert select_ops(spec, "cpu") == REFERENCE


@pytest.mark.parametrize(
    "spec, from_reference",
    [
        ("triton", set()),
        ("triton,attention=reference", {"qkv_attention", "cached_attention"}),
        ("triton, add_norm=reference, adamw=reference", {"add_norm", "grad_norm", "adamw_"}),
        ("reference,mlp=triton", set(OP_NAMES) - {"mlp"}),
    ],
)
def test_single_ops(spec: str, from_reference: set[str], monkeypatch: pytest.MonkeyPatch):
    chosen = select_ops(spec, "cuda")
    for field in dataclasses.fields(chosen):
        source = REFERENCE if field.name in from_reference else ops.TRITON
        assert getattr(chosen, field.name) is getattr(source, field.name), field.name


@pytest.mark.parametrize("spec", ["tritn", "triton,atention=reference", "triton,attention", "triton,mlp=cuda", ""])
def test_unknown_names(spec: str, monkeypatch: pytest.MonkeyPatch):
    """Said before a GPU is asked for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="unknown kernels") as caught:
        select_ops(spec, "cpu")
    assert ("did you mean 'attention'" in caught.value.what) == (spec == "triton,atention=reference")


def test_triton_without_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match="need a CUDA device"):
        select_ops("triton", "cpu")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about the interpreter")
def test_the_interpreter_may_take_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_ops("triton", "cpu") is ops.TRITON
