"""The Triton source of the products, and the one place where codes and scale bits are decoded on a GPU.

Imported only by functions that launch it: it needs the package triton, which a machine without a GPU need not have.

Rows of a weight that do not exist are read as the last one and not stored, so that only a ragged k costs masks. Row
offsets are 64-bit, offsets along k 32-bit. Sizes are compile-time constants (they give Triton the alignment of rows),
except for the number of activations' rows.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def code_half(q, ELEMENT: tl.constexpr):
    """uint8 codes -> float16 values, exactly; of e2m1 times 2^-14. For 4-bit elements the high nibble is ignored."""
    if ELEMENT == "e2m1":  # its exponent and mantissa where a float16's lowest exponents are: 0.5 is a subnormal there
        v = (((q & 8).to(tl.uint16) << 12) | ((q & 7).to(tl.uint16) << 9)).to(tl.float16, bitcast=True)
    elif ELEMENT == "e4m3":
        v = q.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif ELEMENT == "e5m2":  # the upper byte of a float16
        v = (q.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif ELEMENT == "int4":
        v = (((q & 15) ^ 8).to(tl.int8, bitcast=True) - 8).to(tl.float16)
    elif ELEMENT == "uint4":
        v = (q & 15).to(tl.float16)
    else:
        tl.static_assert(ELEMENT == "int8")
        v = q.to(tl.int8, bitcast=True).to(tl.float16)
    return v


@triton.jit
def scale_float(s, KIND: tl.constexpr):
    """Stored scales -> float32."""
    if KIND == "e4m3":
        v = s.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif KIND == "e8m0":  # the exponent of a float32; 0 is its subnormal 2^-127, 255 inf, which 0 times inf makes NaN
        v = tl.maximum(s.to(tl.int32) << 23, 0x00400000).to(tl.float32, bitcast=True)
        v = tl.fma(v, tl.zeros_like(v), v)
    else:
        v = s.to(tl.float32)
    return v


@triton.jit
def load_cols(rows, cols, LIMIT: tl.constexpr, STEP: tl.constexpr):
    """Tile at row pointers [r, 1] and columns [c], zero from column LIMIT on; STEP: what LIMIT must divide by."""
    if LIMIT % STEP == 0:
        v = tl.load(rows + cols[None, :])
    else:
        v = tl.load(rows + cols[None, :], mask=cols[None, :] < LIMIT, other=0.0)
    return v


@triton.jit
def block_scales(rows, k, K: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr):
    """Stored scales or zero points [r, BK / SUB] of the columns k ... k + BK, one for each SUB of them."""
    COUNT: tl.constexpr = BK // SUB
    if BLOCK == SUB or COUNT == 1:  # a spelling in which Triton sees that they lie side by side, and copies them ahead
        v = load_cols(rows, k // BLOCK + tl.arange(0, COUNT), (K + BLOCK - 1) // BLOCK, COUNT)
    else:
        first = k + tl.arange(0, COUNT) * SUB
        if K % BK == 0:
            v = tl.load(rows + (first // BLOCK)[None, :])
        else:
            v = tl.load(rows + (first // BLOCK)[None, :], mask=first[None, :] < K, other=0)
    return v


@triton.jit
def spread(s, R: tl.constexpr, C: tl.constexpr, COUNT: tl.constexpr):
    """[R, COUNT] -> [R, C], each column repeated."""
    if COUNT == 1:
        v = tl.broadcast_to(s, (R, C))
    else:
        v = tl.reshape(tl.broadcast_to(s[:, :, None], (R, COUNT, C // COUNT)), (R, C))
    return v


@triton.jit
def values(q, s, R: tl.constexpr, C: tl.constexpr, COUNT: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr):
    """Codes [R, C] times stored block scales [R, COUNT] -> bfloat16, which holds the products of all `IN_ELEMENT`.

    Left out is the power of two `triton_dot.unit` of the pair. SCALE "none": the codes alone.
    """
    v = code_half(q, ELEMENT)
    if ELEMENT == "e2m1" and SCALE == "e4m3":
        # (code 2^-14) (scale 2^6): multiples of 2^-18 below 2^11 with six significant bits, so float16 holds them
        v = v * spread((scale_float(s, SCALE) * 64.0).to(tl.float16), R, C, COUNT)
        w = v.to(tl.float32).to(tl.bfloat16)
    elif SCALE == "none":
        w = v.to(tl.float32).to(tl.bfloat16)
    else:
        f = v.to(tl.float32)
        if ELEMENT == "e2m1":
            f = f * 16384.0
        w = (f * spread(scale_float(s, SCALE), R, C, COUNT)).to(tl.bfloat16)
    return w


@triton.jit
def dot(w, x, acc, WIDE: tl.constexpr):
    """acc [n, m] + w [n, c] @ x[m, c].T. WIDE: in float32, for Triton's interpreter, whose bfloat16 dot is wrong."""
    if WIDE:
        acc = tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), acc, input_precision="ieee")
    else:
        acc = tl.dot(w, tl.trans(x), acc)
    return acc


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """f32 -> f32, as `epilogue.ACTIVATIONS`; "none" for none. NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the logistic function of 2 u
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    else:
        tl.static_assert(ACTIVATION == "none")
    return y


@triton.jit
def tile_of(M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile, (of the weight's rows, of the activation's).

    Neighbours read GROUP tiles of weights again and again before going on: they stay in L2.
    """
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    tiles_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_m)
    wide = tl.minimum(tiles_n - group * GROUP, GROUP)
    return group * GROUP + (pid % (GROUP * tiles_m)) % wide, (pid % (GROUP * tiles_m)) // wide


@triton.jit
def finish_tile(
    acc, ls_ptr, rs_ptr, b_ptr, o_ptr, rn, rm, pk, M, N: tl.constexpr, LS: tl.constexpr, RS: tl.constexpr,
    UNIT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Sums [n, m] times row scales, with bias and activation, to part pk of y [SPLIT, m, n].

    LS, RS: 0 no row scale, 1 one for all, 2 one a row.
    """
    row_n, row_m = tl.minimum(rn, N - 1).to(tl.int64)[:, None], tl.minimum(rm, M - 1).to(tl.int64)[:, None]
    acc = acc * UNIT
    if RS == 1:
        acc = acc * tl.load(rs_ptr)
    elif RS == 2:
        acc = acc * tl.load(rs_ptr + row_n)
    y = tl.trans(acc)
    if LS == 1:
        y = y * tl.load(ls_ptr)
    elif LS == 2:
        y = y * tl.load(ls_ptr + row_m)
    if BIAS:
        y = y + tl.load(b_ptr + tl.minimum(rn, N - 1)).to(tl.float32)[None, :]
    y = activated(y, ACTIVATION)
    o = o_ptr + (pk.to(tl.int64) * M + rm.to(tl.int64)[:, None]) * N + rn[None, :]
    tl.store(o, y.to(o_ptr.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def product(
    x_ptr, xs_ptr, w_ptr, ws_ptr, ls_ptr, rs_ptr, b_ptr, M, o_ptr,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
    X_ELEMENT: tl.constexpr, X_SCALE: tl.constexpr, X_BLOCK: tl.constexpr, X_OUTSIDE: tl.constexpr,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    OUTSIDE: tl.constexpr, LS: tl.constexpr, RS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y [SPLIT, m, n] = x [m, k] @ decoded(w [n, k]).T on tensor cores, as w @ x.T: weights stay in registers.

    x: bfloat16 [m, PARTS, k], to be added up, or codes one a byte. OUTSIDE: block scales multiply the sums of a block
    (BK must divide it) and not the values. HALVES: x is cut into even and odd columns, else the two nibbles of a weight
    are interleaved.
    FP8: the codes of both are multiplied as they are. LS, RS: see `finish_tile`.
    """
    pn, pm = tile_of(M, N, BM, BN, GROUP)
    pk = tl.program_id(1)
    rn, rm = pn * BN + tl.arange(0, BN), pm * BM + tl.arange(0, BM)
    row_n, row_m = tl.minimum(rn, N - 1).to(tl.int64)[:, None], tl.minimum(rm, M - 1).to(tl.int64)[:, None]
    KW: tl.constexpr = (K * BITS + 7) // 8
    CW: tl.constexpr = BK * BITS // 8
    if FP8:  # so typed they go from shared memory to the tensor cores as they are
        w_ptr = w_ptr.to(tl.pointer_type(tl.float8e4nv if ELEMENT == "e4m3" else tl.float8e5), bitcast=True)
        x_ptr = x_ptr.to(tl.pointer_type(tl.float8e4nv if X_ELEMENT == "e4m3" else tl.float8e5), bitcast=True)
    w_rows, x_rows = w_ptr + row_n * KW, x_ptr + row_m * (PARTS * K)
    ws_rows = ws_ptr + (row_n // BLOCK_ROWS) * ((K + BLOCK - 1) // BLOCK)
    xs_rows = xs_ptr + row_m * ((K + X_BLOCK - 1) // X_BLOCK)
    SUB: tl.constexpr = BLOCK if BLOCK < BK else BK
    X_SUB: tl.constexpr = X_BLOCK if X_BLOCK < BK else BK
    IN: tl.constexpr = "none" if OUTSIDE else SCALE
    X_IN: tl.constexpr = "none" if X_OUTSIDE else X_SCALE

    # one scale for all rows of this tile's weights: it multiplies the activation's scales, not every sum
    ONE: tl.constexpr = OUTSIDE and X_OUTSIDE and BLOCK_ROWS % BN == 0
    ws_one = ws_ptr + (pn * BN // BLOCK_ROWS).to(tl.int64) * ((K + BLOCK - 1) // BLOCK) + tl.zeros_like(row_m)

    acc = tl.zeros((BN, BM), tl.float32)
    STEPS: tl.constexpr = (K + BK * SPLIT - 1) // (BK * SPLIT)
    start = pk * STEPS * BK
    for k in tl.range(start, tl.minimum(start + STEPS * BK, K), BK, num_stages=STAGES):
        q = load_cols(w_rows, k // (8 // BITS) + tl.arange(0, CW), KW, CW)
        base = tl.zeros((BN, BM), tl.float32) if OUTSIDE or X_OUTSIDE else acc
        if FP8:
            base = dot(q, load_cols(x_rows, k + tl.arange(0, BK), K, BK), base, WIDE)
        else:
            s = q
            if IN != "none":
                s = block_scales(ws_rows, k, K, BK, BLOCK, SUB)
            low = values(q, s, BN, CW, BK // SUB, ELEMENT, IN)
            high = low
            if BITS == 4:
                high = values(q >> 4, s, BN, CW, BK // SUB, ELEMENT, IN)
            for i in tl.static_range(PARTS):
                x = load_cols(x_rows + i * K, k + tl.arange(0, BK), K, BK)
                if X_ELEMENT != "float":
                    xs = x
                    if X_IN != "none":
                        xs = block_scales(xs_rows, k, K, BK, X_BLOCK, X_SUB)
                    x = values(x, xs, BM, BK, BK // X_SUB, X_ELEMENT, X_IN)
                if BITS == 8:
                    base = dot(low, x, base, WIDE)
                elif HALVES:
                    even, odd = tl.split(tl.reshape(x, (BM, CW, 2)))
                    base = dot(low, even, base, WIDE)
                    base = dot(high, odd, base, WIDE)
                else:
                    base = dot(tl.interleave(low, high), x, base, WIDE)
        if OUTSIDE and not ONE:
            base = base * scale_float(tl.load(ws_rows + k // BLOCK), SCALE)
        if X_OUTSIDE:
            xs = scale_float(tl.load(xs_rows + k // X_BLOCK), X_SCALE)
            if ONE:
                xs = xs * scale_float(tl.load(ws_one + k // BLOCK), SCALE)
            base = base * tl.trans(xs)
        if OUTSIDE or X_OUTSIDE:
            acc += base
        else:
            acc = base

    finish_tile(acc, ls_ptr, rs_ptr, b_ptr, o_ptr, rn, rm, pk, M, N, LS, RS, UNIT, BIAS, ACTIVATION)


@triton.jit
def block_sums(
    low, high, s, x_row, k, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, COUNT: tl.constexpr,
    PLANES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """[BN, COUNT] f32: s UNIT times sums over blocks of weights (in two planes: even and odd k) times one row of x."""
    C: tl.constexpr = BK // PLANES
    cols = k + tl.arange(0, BK)
    x = tl.load(x_row + cols) if K % BK == 0 else tl.load(x_row + cols, mask=cols < K, other=0)
    if PLANES == 2:
        even, odd = tl.split(tl.reshape(x, (C, 2)))
        p = low * even.to(tl.float32)[None, :] + high * odd.to(tl.float32)[None, :]
    else:
        p = low * x.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(p, (BN, COUNT, C // COUNT)), 2) * UNIT * s


@triton.jit
def store_row(o_ptr, row: tl.constexpr, rn, acc, rs, bias, N: tl.constexpr, ACTIVATION: tl.constexpr):
    """One row of the result from its sums by block [BN, COUNT]."""
    y = activated(tl.sum(acc, 1) * rs + bias, ACTIVATION)
    tl.store(o_ptr + row * N + rn, y.to(o_ptr.dtype.element_ty), mask=rn < N)


@triton.jit
def gemv(
    x_ptr, w_ptr, ws_ptr, wz_ptr, rs_ptr, b_ptr, o_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    ZERO: tl.constexpr, RS: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y [m, n] = x [m, k] @ decoded(w [n, k]).T for up to four rows, in float32: block sums first, then their scale.

    SUB: columns summed before the scale, a divisor of BLOCK. RS: 0 no row scale, 1 one for all, 2 one a row.
    """
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1).to(tl.int64)[:, None]
    KW: tl.constexpr = (K * BITS + 7) // 8
    CW: tl.constexpr = BK * BITS // 8
    COUNT: tl.constexpr = BK // SUB
    PLANES: tl.constexpr = 8 // BITS
    w_rows = w_ptr + row * KW
    scale_cols = (row // BLOCK_ROWS) * ((K + BLOCK - 1) // BLOCK)
    acc0 = tl.zeros((BN, COUNT), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for k in tl.range(0, K, BK, num_stages=STAGES):
        q = load_cols(w_rows, k // (8 // BITS) + tl.arange(0, CW), KW, CW)
        low = code_half(q, ELEMENT).to(tl.float32)
        high = low
        if PLANES == 2:
            high = code_half(q >> 4, ELEMENT).to(tl.float32)
        if ZERO:
            zero = spread(block_scales(wz_ptr + scale_cols, k, K, BK, BLOCK, SUB), BN, CW, COUNT)
            low = low - zero
            high = high - zero
        s = tl.full((1, 1), 1.0, tl.float32)
        if SCALE != "none":
            s = scale_float(block_scales(ws_ptr + scale_cols, k, K, BK, BLOCK, SUB), SCALE)
        acc0 += block_sums(low, high, s, x_ptr, k, K, BN, BK, COUNT, PLANES, UNIT)
        if M > 1:
            acc1 += block_sums(low, high, s, x_ptr + K, k, K, BN, BK, COUNT, PLANES, UNIT)
        if M > 2:
            acc2 += block_sums(low, high, s, x_ptr + 2 * K, k, K, BN, BK, COUNT, PLANES, UNIT)
        if M > 3:
            acc3 += block_sums(low, high, s, x_ptr + 3 * K, k, K, BN, BK, COUNT, PLANES, UNIT)
    rs = tl.full((1,), 1.0, tl.float32)
    if RS == 1:
        rs = rs * tl.load(rs_ptr)
    elif RS == 2:
        rs = tl.load(rs_ptr + tl.minimum(rn, N - 1))
    bias = tl.full((1,), 0.0, tl.float32)
    if BIAS:
        bias = tl.load(b_ptr + tl.minimum(rn, N - 1)).to(tl.float32)
    store_row(o_ptr, 0, rn, acc0, rs, bias, N, ACTIVATION)
    if M > 1:
        store_row(o_ptr, 1, rn, acc1, rs, bias, N, ACTIVATION)
    if M > 2:
        store_row(o_ptr, 2, rn, acc2, rs, bias, N, ACTIVATION)
    if M > 3:
        store_row(o_ptr, 3, rn, acc3, rs, bias, N, ACTIVATION)


@triton.jit
def tiled_scales(ptr, row, i, R: tl.constexpr, C: tl.constexpr, COUNT: tl.constexpr, KIND: tl.constexpr):
    """Block scales [R, C] in tiles of 128x4, from row R * row and column C * i on; zero from column COUNT on.

    Loaded as rows of whole tiles and turned by views alone: by this Triton knows them as what the tensor cores' memory
    is filled with straight from shared memory.
    """
    WIDTH: tl.constexpr = (COUNT + 3) // 4 * 512
    down = row * (R // 128) + tl.arange(0, R // 128)
    ptr = ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True) if KIND == "e4m3" else ptr
    v = load_cols(ptr + down.to(tl.int64)[:, None] * WIDTH, i * (C * 128) + tl.arange(0, C * 128), WIDTH, C * 128)
    return tl.reshape(tl.trans(tl.reshape(v, (R // 128, C // 4, 32, 4, 4)), (0, 3, 2, 1, 4)), (R, C))


@triton.jit
def scaled(
    x_ptr, xs_ptr, w_ptr, ws_ptr, g_ptr, b_ptr, M, o_ptr,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, GLOBAL: tl.constexpr,
    X_TILED: tl.constexpr, TILED: tl.constexpr,
    X_ELEMENT: tl.constexpr, ELEMENT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y [m, n] = x [m, k] @ w [n, k].T of packed MX or NVFP4 codes with their scales, on Blackwell's tensor cores.

    X_TILED, TILED: scales of x, of w come in tiles of 128x4, padded with zeros.
    """
    pn, pm = tile_of(M, N, BM, BN, GROUP)
    rn, rm = pn * BN + tl.arange(0, BN), pm * BM + tl.arange(0, BM)
    row_n, row_m = tl.minimum(rn, N - 1).to(tl.int64)[:, None], tl.minimum(rm, M - 1).to(tl.int64)[:, None]
    KW: tl.constexpr = K * BITS // 8
    CW: tl.constexpr = BK * BITS // 8
    KS: tl.constexpr = K // BLOCK
    CS: tl.constexpr = BK // BLOCK
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range((K + BK - 1) // BK):
        cols, blocks = i * CW + tl.arange(0, CW), i * CS + tl.arange(0, CS)
        x = load_cols(x_ptr + row_m * KW, cols, KW, CW)
        w = load_cols(w_ptr + row_n * KW, cols, KW, CW)
        if X_TILED:
            xs = tiled_scales(xs_ptr, pm, i, BM, CS, KS, SCALE)
        else:
            xs = load_cols(xs_ptr + row_m * KS, blocks, KS, CS)
            xs = xs.to(tl.float8e4nv, bitcast=True) if SCALE == "e4m3" else xs
        if TILED:
            ws = tiled_scales(ws_ptr, pn, i, BN, CS, KS, SCALE)
        else:
            ws = load_cols(ws_ptr + row_n * KS, blocks, KS, CS)
            ws = ws.to(tl.float8e4nv, bitcast=True) if SCALE == "e4m3" else ws
        if BITS == 8:
            x = x.to(tl.float8e4nv, bitcast=True) if X_ELEMENT == "e4m3" else x.to(tl.float8e5, bitcast=True)
            w = w.to(tl.float8e4nv, bitcast=True) if ELEMENT == "e4m3" else w.to(tl.float8e5, bitcast=True)
        acc = tl.dot_scaled(x, xs, X_ELEMENT, tl.trans(w), ws, ELEMENT, acc)
    if GLOBAL:
        acc = acc * tl.load(g_ptr)
    if BIAS:
        acc = acc + tl.load(b_ptr + tl.minimum(rn, N - 1)).to(tl.float32)[None, :]
    o = o_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :]
    keep = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(o, activated(acc, ACTIVATION).to(o_ptr.dtype.element_ty), mask=keep)
