"""Reading compiled programs: what a chip reads from its memory."""

import pytest

from ilvr_jax.analysis.hlo import memory_reads

# A loop over three matrices, each sliced in a fusion and multiplied with one in fast memory, S(1).
PROGRAM = """HloModule loop

%sliced (p0: f32[3,64,64], p1: s32[]) -> f32[1,64,64] {
  %p0 = f32[3,64,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %same = f32[3,64,64]{2,1,0} bitcast(%p0)
  ROOT %slice = f32[1,64,64]{2,1,0} dynamic-slice(%same, %p1), dynamic_slice_sizes={1,64,64}
}

%cond (s0: (s32[], f32[3,64,64], f32[64,64])) -> pred[] {
  %s0 = (s32[], f32[3,64,64], f32[64,64]) parameter(0)
  %n = s32[] get-tuple-element(%s0), index=0
  LIMIT
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

%body (s1: (s32[], f32[3,64,64], f32[64,64])) -> (s32[], f32[3,64,64], f32[64,64]) {
  %s1 = (s32[], f32[3,64,64], f32[64,64]) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%s1), index=0
  %w = f32[3,64,64]{2,1,0} get-tuple-element(%s1), index=1
  %x = f32[64,64]{1,0:S(1)} get-tuple-element(%s1), index=2
  %taken = f32[1,64,64]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%sliced
  %y = f32[64,64]{1,0:S(1)} dot(%x, %taken), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %next = (s32[], f32[3,64,64], f32[64,64]) tuple(%i, %w, %y)
}

%outer (s2: (s32[], f32[3,64,64], f32[64,64])) -> (s32[], f32[3,64,64], f32[64,64]) {
  %s2 = (s32[], f32[3,64,64], f32[64,64]) parameter(0)
  ROOT %inner = (s32[], f32[3,64,64], f32[64,64]) while(%s2), condition=%cond, body=%body
}

%until (s3: (s32[], f32[3,64,64], f32[64,64])) -> pred[] {
  %s3 = (s32[], f32[3,64,64], f32[64,64]) parameter(0)
  ROOT %stop = pred[] custom-call(%s3), custom_call_target="f"
}

ENTRY %main (a: (s32[], f32[3,64,64], f32[64,64])) -> (s32[], f32[3,64,64], f32[64,64]) {
  %a = (s32[], f32[3,64,64], f32[64,64]) parameter(0)
  ROOT %loop = (s32[], f32[3,64,64], f32[64,64]) while(%a), condition=%until, body=%outer
}
"""
MATRIX = 64 * 64 * 4


@pytest.mark.parametrize(
    ("limit", "iterations"),
    [("%limit = s32[] constant(3)", 3), ("%limit = s32[] get-tuple-element(%s0), index=0", 5)],
)
def test_slices_are_counted_as_often_as_loops_run(limit, iterations):
    """The slice, and the sliced matrix again for the product; a loop inside one of unknown length runs five times."""
    assert memory_reads(PROGRAM.replace("LIMIT", limit), other_trips=5) == iterations * 2 * MATRIX
