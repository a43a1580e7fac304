// A few rows times a quantised weight: out[m][n] = x[m][k] W^T + bias for m <= 8, k a multiple of 256.
//
// Compiled by NVRTC for each type, type of x and cut; the host is ../few_rows.py. Without a GPU the same source is
// compiled by g++ with tests/cuda_on_cpu.h in the place of few_rows_machine.h.
//
// [Note: Work] A program takes some hundred neighbouring rows of the weight, a multiprocessor's share, in tiles of 16
// rows or 32. One warp copies tile after tile into a ring of shared memory, each row by one
// instruction, past registers and first-level cache and at any distance ahead. WARPS others have a slice of 256 columns
// each: they hold x for it in registers, in the order of the matrix instruction, from the first tile to the last, and
// leave what their slice gives for each tile in shared memory. The last warp sums over the slices of a tile as soon as
// it has them all, always in the same order. Where a row has more slices than there are warps, the program goes over
// its tiles again for the next ones, for which it asks for x a go before; or a cluster of SPLIT programs shares the
// slices of the same rows, and each sums up some tiles, with what the others have for them.
//
// [Note: Matrix] mma.sync.m16n8k16: lane 4 g + c gives four elements of rows g and g + 8 of the first matrix, the
// weight; four of column g of the second, x; and gets columns 2 c and 2 c + 1 of rows g and g + 8 of the sum. Which
// elements these are matters to nobody, so a lane takes a word as it lies, a *run* of four bytes: 0 and 2 make its
// first pair, 1 and 3 its second. The sum over a quad is that of elements with one scale, a *group*.
//
// [Note: Integers] The bits of an integer below 256 are, as bfloat16, that many times 2^-133, which the instruction
// counts in full. x is multiplied by 2^64 in turn, and the sum by 2^69 at the end. An integer that stands b bits
// higher costs nothing: x is multiplied by 2^(64 - b). The type's zero point is where the sum begins: minus that
// times x. x of float16 is two bfloat16, exactly.
//
// [Note: Hybrids] Blocks of 18, 22 or 34 bytes lie on even addresses, but two of them on whole words: of the first
// one's quants the first two bytes are the upper half of a word and the last two the lower half of one. Lane 3 makes
// a word of these halves; the others read words that begin at the third byte.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) Words2 {
    u32 a, b;
};
struct alignas(16) Words4 {
    u32 a, b, c, d;
};
struct alignas(8) Floats2 {
    float a, b;
};
struct alignas(16) Floats4 {
    float at[4];
};

#define Q4_0 2
#define Q4_1 3
#define Q5_0 6
#define Q5_1 7
#define Q8_0 8
#define Q4_K 12
#define Q5_K 13
#define Q6_K 14

// TYPE, X_IS_F16 (or bfloat16), OUT_IS_F32 (or as x), WARPS (that multiply), SPLIT, SIXTEENS (of rows in a tile),
// ONCE (whether one go over the tiles is enough) and PITCH (bytes from a row of a tile to the next) are the host's. The program may be started before the kernel in front of it has ended: it copies the weight,
// which must not be what that kernel writes, and waits before it reads anything else or writes.
#define KQUANT (TYPE == Q4_K || TYPE == Q5_K || TYPE == Q6_K)
#define SUPER_MINIMA (TYPE == Q4_K || TYPE == Q5_K)
#define BLOCK_MINIMA (TYPE == Q4_1 || TYPE == Q5_1)

constexpr int BLOCK_BYTES = TYPE == Q4_0   ? 18
                            : TYPE == Q4_1 ? 20
                            : TYPE == Q5_0 ? 22
                            : TYPE == Q5_1 ? 24
                            : TYPE == Q8_0 ? 34
                            : TYPE == Q4_K ? 144
                            : TYPE == Q5_K ? 176
                                           : 210;
constexpr int SLICE = 256;  // columns of a warp
constexpr int RUNS = 16;    // of a slice: matrix instructions
constexpr int SLICE_BYTES = BLOCK_BYTES * (KQUANT ? 1 : 8);
constexpr int GROUPS = TYPE == Q6_K ? 16 : 8;  // of a slice
constexpr int PORTION = TYPE == Q6_K ? 128 : 64;  // columns of x that a warp puts in order at once
constexpr int X_PITCH = PORTION * 2 + 16;
constexpr int PARTS = X_IS_F16 ? 2 : 1;
constexpr int TILE = 16 * SIXTEENS;  // rows
constexpr int STAGE = TILE * PITCH;
constexpr int DEPTH = 14;   // tiles in a ring, at most
constexpr int HEAD = 1024;  // bytes for barriers: two for each stage, and one for each tile
constexpr int SCALES_PITCH = TYPE == Q6_K ? 80 : 48;  // bytes: the scales of a row in float32, see `spread_scales`
constexpr int SCRATCH = 8 * X_PITCH > TILE * SCALES_PITCH ? 8 * X_PITCH : TILE * SCALES_PITCH;
constexpr int ZEROS = SUPER_MINIMA ? 0 : GROUPS * 64;
constexpr int PER_WARP = SCRATCH + ZEROS;
constexpr int THREADS = (WARPS + 2) * 32;

#ifdef __CUDACC__
#include "few_rows_machine.h"
#endif
#include "few_rows_inputs.h"
#include "few_rows_types.h"

#if defined(__CUDACC__) && SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

DEVICE void store(void* out, u64 at, float y) {
    if (OUT_IS_F32)
        ((float*)out)[at] = y;
    else
        ((u16*)out)[at] = rounded(y);
}

// `rows` of the weight for a program, which has room for `depth` tiles at once; bias_is: 0 none, 1 float32, 2 as x.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
few_rows(const u8* data, const u16* x, const void* bias, void* out, int n, int k, int m, int rows, int depth,
         int bias_is) {
    u8* shared = shared_memory();
    let_next_start();
    u64* full = (u64*)shared;
    u64* empty = full + DEPTH;
    u64* done = empty + DEPTH;  // of each tile
    u8* stages = shared + HEAD;
    u8* own = stages + depth * STAGE;
    float* partial = (float*)(own + WARPS * PER_WARP);
    int warp = threadIdx.x / 32;
    Lane l;
    l.lane = threadIdx.x % 32, l.g = l.lane / 4, l.c = l.lane % 4;
    l.hybrid = kept(l.c == 3 ? 0x7610 : 0x3210);
    int rank = blockIdx.x % SPLIT, first = blockIdx.x / SPLIT * rows;
    rows = rows < n - first ? rows : n - first;
    int tiles = (rows + TILE - 1) / TILE, all_slices = k / SLICE, slices = (all_slices + SPLIT - 1) / SPLIT;
    int chunks = ONCE ? 1 : (slices + WARPS - 1) / WARPS, before_own = rank * slices;
    slices = slices < all_slices - before_own ? slices : all_slices - before_own;
    int columns = (m + 1) & ~1;  // that sums are kept for
    u64 row_bytes = (u64)all_slices * SLICE_BYTES;
    data += first * row_bytes + (u64)before_own * SLICE_BYTES;
    x += before_own * SLICE;
    int stage = 0;
    u32 parity = 0;
    if (warp == WARPS) {
        if (l.lane < depth) {
            barrier_init(full + l.lane, COPYING);
            barrier_init(empty + l.lane, WARPS);
        }
        for (int tile = l.lane; tile < tiles; tile += 32)
            barrier_init(done + tile, WARPS * SPLIT);
        barriers_ready();
        __syncwarp();
        for (int chunk = 0; chunk < chunks; ++chunk) {
            int left = slices - chunk * WARPS;
            u32 nbytes = (left < 0 ? 0 : left < WARPS ? left : WARPS) * SLICE_BYTES;
            for (int tile = 0; tile < tiles; ++tile) {
                if (chunk * tiles + tile >= depth)
                    barrier_wait(empty + stage, parity ^ 1);
                int row = tile * TILE + l.lane;
                const u8* from = data + row * row_bytes + (u64)chunk * (WARPS * SLICE_BYTES);
                u32 before = (u32)(u64)from & 15;
                bool copies = l.lane < TILE && row < rows && nbytes;
                u32 copied = copies ? (before + nbytes + 15) & ~15u : 0;
                copy_row(stages + stage * STAGE + l.lane * PITCH, from - before, copied, full + stage, l.lane);
                if (chunk + tile == 0)
                    sync_cluster();  // the others may look at the barriers
                if (++stage == depth)
                    stage = 0, parity ^= 1;
            }
        }
    } else if (warp < WARPS) {
        u8* scratch = own + warp * PER_WARP;
        Floats4* zeros = (Floats4*)(scratch + SCRATCH);
        // Slices of odd number take more instructions where rows begin with half a word. A quarter of the warps shares
        // a scheduler, so not all of them should be in the same quarters.
        int from = TYPE == Q6_K && (warp & 4) && (warp ^ 1) < WARPS ? warp ^ 1 : warp;
        Words4 raw[X_WORDS];
        wait_for_previous();
        if (from < slices)
            request_x(raw, x + from * SLICE, k, m, l);
        sync_cluster();
        for (int chunk = 0; chunk < chunks; ++chunk) {
            int slice = chunk * WARPS + from;
            bool busy = slice < slices;
            Inputs inputs;
            if (busy)
                order_x(inputs, raw, l, scratch, zeros);
            if (!ONCE && slice + WARPS < slices)
                request_x(raw, x + (slice + WARPS) * SLICE, k, m, l);
            // Where the slice begins in a row of a stage. Eight rows are a multiple of 16 bytes: all tiles are alike.
            u64 begins = (u64)data + (u64)chunk * (WARPS * SLICE_BYTES);
            int row_at = l.g * PITCH + (u32)((begins + l.g * row_bytes) & 15) + from * SLICE_BYTES;
            int head_at = l.lane / 2 * PITCH + (u32)((begins + l.lane / 2 * row_bytes) & 15) + from * SLICE_BYTES;
            l.shift = (row_at & 2) * 8, l.shift_head = (head_at & 2) * 8;
            bool shifted = TYPE == Q6_K && ((all_slices & 1) || (row_at & 2));
            row_at = kept(stages - shared + row_at), head_at = kept(stages - shared + head_at);
            int own_at = kept(row_at + l.c * (SUPER_MINIMA ? 8 : 4)), zeros_at = kept((u8*)zeros - shared + l.c * 16);
            int scales_at = kept(scratch - shared + l.g * SCALES_PITCH);
            int scales_to = kept(scratch - shared + l.lane / 2 * SCALES_PITCH + l.lane % 2 * (TYPE == Q6_K ? 32 : 16));
            int sums_at = (warp * columns + l.c * 2) * 16 + (l.g ^ (l.c & 1) * 8);
            sums_at = kept((u8*)(partial + sums_at) - shared);
            int lower = kept(l.c & 1 ? -8 : 8);  // from row g to row g + 8
            int sixteen = WARPS * columns * 16;  // from a sum to that of the next sixteen of rows
            int wanted = kept(l.c * 2 < columns), again = kept(!ONCE && wanted && chunk);
            int last = kept(ONCE || chunk == chunks - 1), elected = kept(l.lane == 0);
            for (int tile = 0; tile < tiles; ++tile, sums_at += SIXTEENS * sixteen * 4) {
                float* sums = (float*)(shared + sums_at);
                float total[SIXTEENS][4];
#pragma unroll
                for (int i = 0; i < SIXTEENS; ++i) {
                    const float* so_far = sums + i * sixteen;
                    total[i][0] = again ? so_far[0] : 0, total[i][1] = again ? so_far[16] : 0;
                    total[i][2] = again ? so_far[lower] : 0, total[i][3] = again ? so_far[lower + 16] : 0;
                }
                barrier_wait(full + stage, parity);
                if (busy) {
                    const u8* slot = shared + stage * STAGE;
                    Places in = {slot + row_at, slot + own_at, slot + head_at, (const Floats4*)(shared + zeros_at),
                                 shared + scales_at, shared + scales_to};
                    bool whole = SIXTEENS == 1 || rows - tile * TILE > 16;
                    if (shifted && whole)
                        add_slice<true, SIXTEENS>(total, in, inputs, l);
                    else if (shifted)
                        add_slice<true, 1>(total, in, inputs, l);
                    else if (whole)
                        add_slice<false, SIXTEENS>(total, in, inputs, l);
                    else
                        add_slice<false, 1>(total, in, inputs, l);
                }
                if (wanted) {
#pragma unroll
                    for (int i = 0; i < SIXTEENS; ++i) {
                        float* to = sums + i * sixteen;
                        to[0] = total[i][0], to[16] = total[i][1];
                        to[lower] = total[i][2], to[lower + 16] = total[i][3];
                    }
                }
                __syncwarp();
                if (elected) {
                    barrier_arrive(empty + stage);
                    if (last)
                        barrier_arrive_in(done + tile, tile % SPLIT);
                }
                if (++stage == depth)
                    stage = 0, parity ^= 1;
            }
        }
    } else {  // a lane sums up four rows of a column
        int column = l.lane / 4, four = l.lane % 4 * 4;
        sync_cluster();
        wait_for_previous();
        for (int tile = rank; tile < tiles; tile += SPLIT) {
            float y[SIXTEENS][4], plus[SIXTEENS][4];
#pragma unroll
            for (int i = 0; i < TILE / 4; ++i) {
                int row = tile * TILE + i / 4 * 16 + four + i % 4;
                y[i / 4][i % 4] = plus[i / 4][i % 4] = 0;
                if (row < rows && bias_is == 1)
                    plus[i / 4][i % 4] = ((const float*)bias)[first + row];
                else if (row < rows && bias_is == 2) {
                    u32 b = ((const u16*)bias)[first + row];
                    plus[i / 4][i % 4] = X_IS_F16 ? f16_low(b) : number(b << 16);
                }
            }
            const float* sums = partial + (tile * SIXTEENS * WARPS * columns + column) * 16 + (four ^ (column & 2) * 4);
            barrier_wait(done + tile, 0);
            if (column < m) {
                for (int part = 0; part < SPLIT; ++part)
#pragma unroll
                    for (int w = 0; w < SIXTEENS * WARPS; ++w) {
                        Floats4 more = read_in((const Floats4*)(sums + w * columns * 16), part);
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            y[w / WARPS][i] += more.at[i];
                    }
#pragma unroll
                for (int i = 0; i < TILE / 4; ++i) {
                    int row = tile * TILE + i / 4 * 16 + four + i % 4;
                    if (row < rows)
                        store(out, column * (u64)n + first + row, fmaf(y[i / 4][i % 4], 0x1p69f, plus[i / 4][i % 4]));
                }
            }
        }
    }
    if (SPLIT > 1)
        sync_cluster();  // no program of a cluster ends while another reads its sums
}
