"""The Triton source of products with 4-bit weights that are read as words of eight codes and decoded two at a time.

Decoding codes one by one takes ten instructions and more for each, several times what a GPU can spare while it reads
them: one H200 core (132, 1.8 GHz) gets 36 NVFP4 weights a clock and starts 128 instructions. Here it takes two to
three, and no weight is moved between threads: a byte holds two neighbours of k, which tensor cores want in one
register, and of each eight columns, columns 2p and 2p + 1 are multiplied together, with the same of x (plane p).

The assembly is PTX (sm_90); the interpreter, which has none, takes the same values from `triton_code.values`. Tests
run the assembly's text by the PTX manual's rules (`tests/kernels/ptx.py`).
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

from .triton_code import block_scales, dot, finish_tile, load_cols, scale_float, spread, tile_of, values


def _assembly(scaled: int, each: list[str], *before: str) -> str:
    """Eight bfloat16 outputs from word $8; `each` makes register r of those two codes whose bytes `prmt` puts there.

    u: the word turned by a nibble, so that its byte p + 1 begins with the second code of byte p.
    scaled: 1 where $9 is a float32 scale, which becomes s, two bfloat16.
    """
    text = ["{", ".reg .b32 u, r, s;", "shf.l.wrap.b32 u, $8, $8, 4;", *before]
    text += ["cvt.rn.bf16x2.f32 s, $9, $9;"] * scaled
    for p in range(4):
        # r: byte p, eight copies of the sign of its low code, byte p + 1 of u, of the sign of its high code
        selector = p | (8 | 4 + p) << 4 | (4 + (p + 1) % 4) << 8 | (8 | p) << 12
        text += [f"prmt.b32 r, $8, u, {selector:#06x};", *each, f"mov.b32 {{${2 * p}, ${2 * p + 1}}}, r;"]
    return "\n".join([*text, "}"])


# exponent and mantissa to bits 6 to 8 of a bfloat16, which is then the value times 2^-126
_E2M1 = ["shl.b32 r, r, 6;", "and.b32 r, r, 0x81C081C0;"]
E2M1_SCALED = tl.constexpr(_assembly(1, [*_E2M1, "mul.rn.bf16x2 r, r, s;"]))
E2M1_POWER = tl.constexpr(  # by 2^126 first: the scale may be as small as 2^-127 and as large as 2^127
    _assembly(1, [*_E2M1, "mul.rn.bf16x2 r, r, t;", "mul.rn.bf16x2 r, r, s;"], ".reg .b32 t;", "mov.b32 t, 0x7E807E80;")
)
E2M1_PLAIN = tl.constexpr(_assembly(0, [*_E2M1, "mul.rn.bf16x2 r, r, s;"], "mov.b32 s, 0x77807780;"))  # by 2^112
# the code, its sign bit turned over, as the last bits of 128 ... 143; then less 136, or 128
INT4 = tl.constexpr(
    _assembly(0, ["lop3.b32 r, r, 0x000F000F, 0x43084308, 0x6A;", "add.rn.bf16x2 r, r, s;"], "mov.b32 s, 0xC308C308;")
)
UINT4 = tl.constexpr(
    _assembly(0, ["lop3.b32 r, r, 0x000F000F, 0x43004300, 0xEA;", "add.rn.bf16x2 r, r, s;"], "mov.b32 s, 0xC300C300;")
)
EIGHT = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h")
BF16_8 = tl.constexpr((tl.bfloat16,) * 8)
LIFTED = tl.constexpr(2.0**118)  # a scale of e4m3 times this is a bfloat16; codes times 2^-126 then leave 2^-8


@triton.jit
def turned(v, R: tl.constexpr, C: tl.constexpr):
    """Columns of words [R, C], of each eight first the even ones: a thread's words, 0 and 4 of them, become neighbours
    in memory."""
    return tl.reshape(tl.permute(tl.reshape(v, (R, C // 8, 4, 2)), (0, 1, 3, 2)), (R, C))


@triton.jit
def word_scales(s, R: tl.constexpr, C: tl.constexpr, COUNT: tl.constexpr):
    """Stored scales [R, COUNT] -> [R, C], one for each word, as `turned` puts those."""
    if COUNT * 2 == C:  # one for two words, which `turned` puts four apart: so written the loads stay asynchronous
        v = tl.reshape(tl.broadcast_to(tl.reshape(s, (R, C // 8, 1, 4)), (R, C // 8, 2, 4)), (R, C))
    else:
        v = turned(spread(s, R, C, COUNT), R, C)
    return v


@triton.jit
def word_values(
    q, s, R: tl.constexpr, C: tl.constexpr, COUNT: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Words [R, C] as `turned` puts them, stored scales [R, COUNT] -> eight bfloat16 arrays, code i of each word.

    As `values`, which leave out the same power of two.
    """
    if WIDE:
        stored = word_scales(s, R, C, COUNT) if SCALE != "none" else s
        v0 = values((q & 15).to(tl.uint8), stored, R, C, C, ELEMENT, SCALE)
        v1 = values(((q >> 4) & 15).to(tl.uint8), stored, R, C, C, ELEMENT, SCALE)
        v2 = values(((q >> 8) & 15).to(tl.uint8), stored, R, C, C, ELEMENT, SCALE)
        v3 = values(((q >> 12) & 15).to(tl.uint8), stored, R, C, C, ELEMENT, SCALE)
        v4 = values(((q >> 16) & 15).to(tl.uint8), stored, R, C, C, ELEMENT, SCALE)
        v5 = values(((q >> 20) & 15).to(tl.uint8), stored, R, C, C, ELEMENT, SCALE)
        v6 = values(((q >> 24) & 15).to(tl.uint8), stored, R, C, C, ELEMENT, SCALE)
        v7 = values(((q >> 28) & 15).to(tl.uint8), stored, R, C, C, ELEMENT, SCALE)
    elif SCALE == "none":
        ASM: tl.constexpr = E2M1_PLAIN if ELEMENT == "e2m1" else INT4 if ELEMENT == "int4" else UINT4
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            ASM, EIGHT + ",r", [q], dtype=BF16_8, is_pure=True, pack=1
        )
    else:
        tl.static_assert(ELEMENT == "e2m1")
        ASM: tl.constexpr = E2M1_SCALED if SCALE == "e4m3" else E2M1_POWER
        f = scale_float(s, SCALE) * LIFTED if SCALE == "e4m3" else scale_float(s, SCALE)
        f = word_scales(f, R, C, COUNT)
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            ASM, EIGHT + ",r,f", [q, f], dtype=BF16_8, is_pure=True, pack=1
        )
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def plane_dot(
    low, high, x_rows, cols, live, acc, LIMIT: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc + one plane of the weights, its even and its odd columns, times these columns of x; rows not live are 0.

    x is the sum of PARTS arrays, PART columns apart.
    """
    w = tl.interleave(low, high)
    for i in tl.static_range(PARTS):
        if LIMIT % STEP == 0:
            x = tl.load(x_rows + (i * PART + cols)[None, :], mask=live, other=0.0)
        else:
            x = tl.load(x_rows + (i * PART + cols)[None, :], mask=live & (cols < LIMIT)[None, :], other=0.0)
        acc = dot(w, x, acc, WIDE)
    return acc


@triton.jit
def words(
    x_ptr, w_ptr, ws_ptr, ls_ptr, rs_ptr, b_ptr, M, o_ptr,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, PLANE: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, OUTSIDE: tl.constexpr, LS: tl.constexpr, RS: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`triton_code.product` for bfloat16 x and 4-bit weights, k a multiple of 8 and BK of 64.

    x: [m, PARTS, k], to be added up. PLANE: 0, or the columns of a plane of x [m, PARTS, 4, PLANE], in the order of
    `triton_dot.in_planes`.
    """
    pn, pm = tile_of(M, N, BM, BN, GROUP)
    pk = tl.program_id(1)
    rn, rm = pn * BN + tl.arange(0, BN), pm * BM + tl.arange(0, BM)
    row_n = tl.minimum(rn, N - 1).to(tl.int64)[:, None]
    KW: tl.constexpr = K // 8
    CW: tl.constexpr = BK // 8
    w_rows = w_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + row_n * KW
    ws_rows = ws_ptr + (row_n // BLOCK_ROWS) * ((K + BLOCK - 1) // BLOCK)
    SUB: tl.constexpr = BLOCK if BLOCK < BK else BK
    IN: tl.constexpr = "none" if OUTSIDE else SCALE

    live = (rm < M)[:, None]
    i = tl.arange(0, BK // 4)
    if PLANE == 0:
        word = i // 16 * 8 + i // 2 % 4 * 2 + i // 8 % 2  # as `turned` puts them
        first = tl.max_contiguous(tl.multiple_of(8 * word + i % 2, 2), 2)
        x_rows = x_ptr + rm.to(tl.int64)[:, None] * (PARTS * K)
        PART: tl.constexpr = K
        STEP: tl.constexpr = BK
        LIMIT: tl.constexpr = K
        NEXT: tl.constexpr = 2
    else:
        first = i
        x_rows = x_ptr + rm.to(tl.int64)[:, None] * (PARTS * 4 * PLANE)
        PART: tl.constexpr = 4 * PLANE
        STEP: tl.constexpr = BK // 4
        LIMIT: tl.constexpr = PLANE
        NEXT: tl.constexpr = PLANE

    acc = tl.zeros((BN, BM), tl.float32)
    STEPS: tl.constexpr = (K + BK * SPLIT - 1) // (BK * SPLIT)
    start = pk * STEPS * BK
    for k in tl.range(start, tl.minimum(start + STEPS * BK, K), BK, num_stages=STAGES):
        q = turned(load_cols(w_rows, k // 8 + tl.arange(0, CW), KW, CW), BN, CW)
        s = q
        if IN != "none":
            s = block_scales(ws_rows, k, K, BK, BLOCK, SUB)
        v0, v1, v2, v3, v4, v5, v6, v7 = word_values(q, s, BN, CW, BK // SUB, ELEMENT, IN, WIDE)
        cols = k // BK * STEP + first
        base = tl.zeros((BN, BM), tl.float32) if OUTSIDE else acc
        base = plane_dot(v0, v1, x_rows, cols, live, base, LIMIT, STEP, PARTS, PART, WIDE)
        base = plane_dot(v2, v3, x_rows + NEXT, cols, live, base, LIMIT, STEP, PARTS, PART, WIDE)
        base = plane_dot(v4, v5, x_rows + 2 * NEXT, cols, live, base, LIMIT, STEP, PARTS, PART, WIDE)
        base = plane_dot(v6, v7, x_rows + 3 * NEXT, cols, live, base, LIMIT, STEP, PARTS, PART, WIDE)
        if OUTSIDE:
            acc += base * scale_float(tl.load(ws_rows + k // BLOCK), SCALE)
        else:
            acc = base
    finish_tile(acc, ls_ptr, rs_ptr, b_ptr, o_ptr, rn, rm, pk, M, N, LS, RS, UNIT, BIAS, ACTIVATION)
