"""benchmarks/hlo.py: what a compiled program launches, and the bytes that it moves."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compile_gpu
from benchmarks.hlo import Kernel, kernels, size_of

TEXT = """HloModule jit_f
%fused_slice (p0: f32[8,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[8,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %part = f32[1,128]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,128}
}
%fused_update (q0: f32[8,128], q1: f32[1,128], q2: s32[]) -> f32[8,128] {
  %q0 = f32[8,128]{1,0} parameter(0)
  %q1 = f32[1,128]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %new = f32[8,128]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}
%fused_dot (d0: bf16[16,32], d1: bf16[32,64]) -> f32[16,64] {
  %d0 = bf16[16,32]{1,0} parameter(0)
  %d1 = bf16[32,64]{1,0} parameter(1)
  ROOT %dot = f32[16,64]{1,0} dot(%d0, %d1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%body (carry: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %carry = (s32[], /*index=1*/f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%carry), index=1
  %row = f32[1,128]{1,0} fusion(%x, /*index=1*/%i), kind=kLoop, calls=%fused_slice, metadata={op_name="f/row"}
  %y = f32[8,128]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], f32[8,128]{1,0}) tuple(%i, %y)
}
ENTRY %main (a: bf16[16,32], b: bf16[32,64], c: (s32[], f32[8,128])) -> f32[16,64] {
  %a = bf16[16,32]{1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  %c = (s32[], f32[8,128]{1,0}) parameter(2)
  %loop = (s32[], f32[8,128]{1,0}) while(%c), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %i = s32[] get-tuple-element(%loop), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%loop), index=1
  %same = (f32[4]{0}, u8[0]{0}) custom-call(%a, %a), custom_call_target="mosaic_gpu_v2"
  %go = (bf16[16,32]{1,0}, bf16[16,32]{1,0}, u32[]) copy-start(%a)
  %gone = bf16[16,32]{1,0} copy-done(%go)
  %part = ((f32[8,128]{1,0}, s32[]), f32[1,128]{1,0}, u32[]) fusion-start(%x, %i), kind=kLoop, calls=%fused_slice
  %parted = f32[1,128]{1,0} fusion-done(%part)
  ROOT %out = f32[16,64]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_dot
}
"""


def test_a_program_with_a_loop():
    found = {k.name: (k.kind, k.bytes, k.times) for k in kernels(TEXT)}
    assert found == {
        "row": ("fusion", 2 * 512 + 4, 5),  # of x the row alone is read
        "y": ("fusion", 2 * 512 + 4, 5),  # in place
        "same": ("call", 1024 + 16, 1),  # read twice, counted once
        "go": ("fusion", 2 * 1024, 1),
        "part": ("fusion", 2 * 512 + 4, 1),
        "out": ("product", 1024 + 4096 + 4096, 1),
    }
    assert next(k for k in kernels(TEXT) if k.name == "row").source == "f/row"


@pytest.mark.parametrize(
    "shape, size",
    [("f32[2,3]{1,0}", 24), ("bf16[]", 2), ("(s4[4]{0}, pred[3]{0})", 5), ("f8e4m3fn[7]{0}", 7), ("token[]", 0)],
)
def test_size_of(shape, size):
    assert size_of(shape) == size


def test_agrees_with_xla():
    """On a program that reads every operand once and has no loop."""
    x = jnp.ones((64, 128))
    compiled = jax.jit(lambda x, y: jnp.sin(x @ y) + 1).lower(x, x.T).compile()
    assert sum(k.bytes for k in kernels(compiled.as_text())) == compiled.cost_analysis()["bytes accessed"]


def test_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        kernels("nothing")


def test_the_places_of_a_layer():
    kinds = {
        "wkv7": ("call", "att/cond/branch_0_fun/jit(wkv7_pallas_gpu_split)/wkv7_maps"),
        "around its launches": ("fusion", "att/cond/branch_0_fun/jit(wkv7_pallas_gpu_split)/pad"),
        "time mix": ("call", "att/cond/branch_0_fun/jit(run)/time_mix_finish_forward/pallas_call"),
        "products": ("product", "ffn/key/dot_general"),
        "norms, and the residual stream": ("fusion", "add"),
        "shifts by a token": ("fusion", "att/split"),
        "relu squared": ("fusion", "ffn/square"),
        "other": ("fusion", "att/strange"),
    }
    launched = [Kernel("x", kind, 10**7, 1, f"jit(apply)/block_2/{end}") for kind, end in kinds.values()]
    small = Kernel("y", "fusion", 10**6, 1, "jit(apply)/block_2/ffn/square")
    found = compile_gpu.by_place([*launched, small])
    assert found == {"casts of weights and vectors, below 4 MB": [small]} | {
        place: [kernel] for place, kernel in zip(kinds, launched, strict=True)
    }
    assert list(found) == list(compile_gpu.PLACES)
