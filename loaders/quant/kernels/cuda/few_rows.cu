// A few rows times a quantised weight: out[m][n] = x[m][k] W^T + bias for m <= 8, k a multiple of 256.
//
// Compiled by NVRTC for each type, type of x and cut; the host is ../few_rows.py. Without a GPU the same source is
// compiled by g++ with tests/cuda_on_cpu.h in the place of few_rows_machine.h.
//
// [Note: Work] A program takes some hundred neighbouring rows of the weight, a multiprocessor's share, in tiles of 16
// rows. COPIERS warps copy tile after tile into a ring of shared memory, each row by one instruction, past registers
// and first-level cache and at any distance ahead. WARPS others have a slice of 256 columns each: they hold x for it in
// registers, in the order of the matrix instruction, from the first tile to the last, and leave what their slice gives
// for each tile in shared memory. The last warp sums over the slices of a tile as soon as it has them all, always in
// the same order. Where a row has more slices than there are warps, the program goes over its tiles again for the next
// ones, for which it asks for x a go before; or a cluster of SPLIT programs shares the slices of the same rows, and
// each sums up some tiles, with what the others have for them. Otherwise there is room for the sums of SLOTS tiles
// only, over the scratch in which x was put in order.
//
// [Note: Copies] A warp begins a copy every 90 cycles: enough for a short program, but not for a long one, which has
// three such warps. x comes behind whatever was asked for before: a short program asks for one tile, for x, and for the
// other tiles; a long one never has more than AHEAD tiles on their way.
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
#define Q2_K 10
#define Q3_K 11
#define Q4_K 12
#define Q5_K 13
#define Q6_K 14
#define IQ4_NL 20
#define IQ4_XS 23

// TYPE, X_IS_F16 (or bfloat16), OUT_IS_F32 (or as x), WARPS (that multiply), SPLIT, ONCE (whether one go over the tiles
// is enough), SLOTS (tiles whose sums are kept, 0 for all), ODD (whether rows have an odd number of slices, where that
// matters), PITCH (bytes from a row of a tile to the next), COPIERS (warps that copy) and AHEAD (tiles on their way at
// once, 0 for all) are the host's. The program may be started before the kernel in front of it has ended: it copies the
// weight, which
// must not be what that kernel writes, and waits before it reads anything else or writes.
#define SUPER_MINIMA (TYPE == Q4_K || TYPE == Q5_K)
#define BY_16 (TYPE == Q2_K || TYPE == Q3_K || TYPE == Q6_K)  // groups of 16 elements
#define HALVES (TYPE == Q3_K || TYPE == Q6_K)                 // superblocks that begin with half a word
#define KQUANT (SUPER_MINIMA || BY_16)
#define CODES (TYPE == IQ4_NL || TYPE == IQ4_XS)  // nibbles that stand for bytes
#define BLOCK_MINIMA (TYPE == Q4_1 || TYPE == Q5_1)
#define PAIRED (TYPE == Q4_0 || TYPE == Q5_0 || TYPE == Q8_0 || TYPE == IQ4_NL)  // two blocks lie on whole words

constexpr int BLOCK_BYTES = TYPE == Q4_0   ? 18
                            : TYPE == Q4_1 ? 20
                            : TYPE == Q5_0 ? 22
                            : TYPE == Q5_1 ? 24
                            : TYPE == Q8_0 ? 34
                            : TYPE == Q2_K ? 84
                            : TYPE == Q3_K ? 110
                            : TYPE == Q4_K ? 144
                            : TYPE == Q5_K ? 176
                            : TYPE == Q6_K ? 210
                            : TYPE == IQ4_NL ? 18
                                             : 136;
constexpr int SLICE = 256;  // columns of a warp
constexpr int RUNS = 16;    // of a slice: matrix instructions
constexpr int SLICE_BYTES = BLOCK_BYTES * (KQUANT || TYPE == IQ4_XS ? 1 : 8);
constexpr int GROUPS = BY_16 ? 16 : 8;  // of a slice
constexpr int PORTION = BY_16 ? 128 : 64;  // columns of x that a warp puts in order at once
constexpr int X_PITCH = PORTION * 2 + 16;
constexpr int PARTS = X_IS_F16 ? 2 : 1;
constexpr int TILE = 16;  // rows
constexpr int STAGE = TILE * PITCH;
constexpr int DEPTH = 14;   // tiles in a ring, at most
constexpr int HEAD = 512;  // bytes for barriers: two for each stage, and one for each tile or two for each slot
constexpr int SCALES_PITCH = BY_16 ? 112 : SUPER_MINIMA || TYPE == IQ4_XS ? 48 : 0;  // of a row: `spread_scales`
constexpr int MINIMA = TYPE == Q2_K ? 4 : BY_16 ? 6 : SUPER_MINIMA ? 2 : 1;
constexpr int SUMS = 8 * 16;  // of a slot
constexpr int OVER_X = TILE * SCALES_PITCH + SLOTS * SUMS * 4;  // bytes that lie where x was put in order
constexpr int SCRATCH = 8 * X_PITCH > OVER_X ? 8 * X_PITCH : OVER_X;
constexpr int ZEROS = KQUANT ? 0 : GROUPS * 32;
constexpr int PER_WARP = SCRATCH + ZEROS;
constexpr int THREADS = (WARPS + COPIERS + 1) * 32;

#ifdef __CUDACC__
#include "few_rows_machine.h"
#endif
#include "few_rows_inputs.h"
#include "few_rows_types.h"
#include "few_rows_types_16.h"

#if defined(__CUDACC__) && SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

// The row of a tile that is in place `at`. Rows of an odd number of eights of bytes begin in the middle of sixteen
// bytes every other time: those that one load touches, eight, are then of one kind.
DEVICE int row_at_place(int at) { return HALVES ? at % 8 * 2 + at / 8 : at; }

// Where that row begins in a stage, the tile's first at `begins` in global memory.
DEVICE int place_at(int at, u64 begins, u64 row_bytes) {
    return at * PITCH + (u32)((begins + row_at_place(at) * row_bytes) & 15);
}

DEVICE void next_stage(int& stage, u32& parity, int depth) {
    if (++stage == depth)
        stage = 0, parity ^= 1;
}

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
    u64* done = empty + DEPTH;  // of each tile, or of each slot
    u64* taken = done + SLOTS;  // of each slot
    u8* stages = shared + HEAD;
    u8* own = stages + depth * STAGE;
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
    // Sums: from one warp's of a tile to the next one's, from tile to tile.
    int of_warp = SLOTS ? PER_WARP / 4 : columns * 16, of_tile = SLOTS ? SUMS : WARPS * columns * 16;
    float* partial = (float*)(own + (SLOTS ? TILE * SCALES_PITCH : WARPS * PER_WARP));
    u64 row_bytes = (u64)all_slices * SLICE_BYTES;
    data += first * row_bytes + (u64)before_own * SLICE_BYTES;
    x += before_own * SLICE;
    int stage = 0;
    u32 parity = 0;
    if (warp >= WARPS && warp < WARPS + COPIERS) {
        if (warp == WARPS && one_lane()) {  // lanes make barriers in turn: here those alone that the first copy needs
            for (int i = 0; i < depth; ++i)
                barrier_init(full + i, COPYING);
            barriers_ready();
        }
        sync_copiers();
        int arrived = 0;  // the stage of the tile AHEAD tiles ago
        u32 arrived_parity = 0;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            int left = slices - chunk * WARPS;
            u32 nbytes = (left < 0 ? 0 : left < WARPS ? left : WARPS) * SLICE_BYTES;
            for (int tile = 0; tile < tiles; ++tile) {
                if (chunk * tiles + tile >= depth)
                    barrier_wait(empty + stage, parity ^ 1);
                if (AHEAD && chunk * tiles + tile >= AHEAD) {
                    barrier_wait(full + arrived, arrived_parity);
                    next_stage(arrived, arrived_parity, depth);
                }
                __syncwarp();
                int row = tile * TILE + row_at_place(l.lane);
                const u8* from = data + row * row_bytes + (u64)chunk * (WARPS * SLICE_BYTES);
                u32 before = (u32)(u64)from & 15;
                u32 copied = row < rows && nbytes ? (before + nbytes + 15) & ~15u : 0;
                if (l.lane < TILE && l.lane % COPIERS == warp - WARPS)
                    copy_row(stages + stage * STAGE + l.lane * PITCH, from - before, copied, full + stage, l.lane);
                if (chunk + tile == 0)
                    sync_cluster();  // the others may look at the barriers; x was asked for before the other tiles
                next_stage(stage, parity, depth);
            }
        }
    } else if (warp < WARPS) {
        u8* scratch = own + warp * PER_WARP;
        Floats2* zeros = (Floats2*)(scratch + SCRATCH);
        // Slices of odd number take more instructions where rows begin with half a word. A quarter of the warps shares
        // a scheduler, so not all of them should be in the same quarters.
        int from = HALVES && (warp & 4) && (warp ^ 1) < WARPS ? warp ^ 1 : warp;
        Words4 raw[X_WORDS];
        if (AHEAD)
            sync_cluster();
        wait_for_previous();
        if (from < slices)
            request_x(raw, x + from * SLICE, k, m, l);
        if (!AHEAD)
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
            int row_at = place_at(l.g, begins, row_bytes) + from * SLICE_BYTES;
            int low_at = place_at(l.g + 8, begins, row_bytes) + from * SLICE_BYTES;
            int head_at = place_at(l.lane / 2, begins, row_bytes) + from * SLICE_BYTES;
            l.shift = (row_at & 2) * 8, l.shift_low = (low_at & 2) * 8, l.shift_head = (head_at & 2) * 8;
            bool shifted = HALVES && (ODD || (row_at & 2));
            row_at = kept(stages - shared + row_at), head_at = kept(stages - shared + head_at);
            low_at = kept(stages - shared + low_at + l.c * 4);
            int own_at = kept(row_at + l.c * (SUPER_MINIMA ? 8 : 4)), zeros_at = kept((u8*)zeros - shared + l.c * 8);
            int scales_at = kept(scratch - shared + l.g * SCALES_PITCH);
            int scales_to = kept(scratch - shared + l.lane / 2 * SCALES_PITCH + l.lane % 2 * (BY_16 ? 32 : 16));
            int sums_at = warp * of_warp + l.c * 2 * 16 + (l.g ^ (l.c & 1) * 8);
            sums_at = kept((u8*)(partial + sums_at) - shared);
            int lower = kept(l.c & 1 ? -8 : 8);  // from row g to row g + 8
            int wanted = kept(l.c * 2 < columns), again = ONCE ? 0 : kept(wanted && chunk);
            int last = ONCE ? 1 : kept(chunk == chunks - 1), elected = kept(l.lane == 0);
            for (int tile = 0; tile < tiles; ++tile) {
                int slot = SLOTS ? tile % SLOTS : tile;
                float* sums = (float*)(shared + sums_at) + slot * of_tile;
                float total[4] = {0, 0, 0, 0};
                if (again) {
                    total[0] = sums[0], total[1] = sums[16];
                    total[2] = sums[lower], total[3] = sums[lower + 16];
                }
                barrier_wait(full + stage, parity);
                if (busy) {
                    const u8* in_stage = shared + stage * STAGE;
                    Places in = {in_stage + row_at,
                                 in_stage + own_at,
                                 in_stage + low_at,
                                 in_stage + head_at,
                                 (const Floats2*)(shared + zeros_at),
                                 shared + scales_at,
                                 shared + scales_to};
                    if (shifted)
                        add_slice<true>(total, in, inputs, l);
                    else
                        add_slice<false>(total, in, inputs, l);
                }
                __syncwarp();
                if (elected)
                    barrier_arrive(empty + stage);
                next_stage(stage, parity, depth);
                if (SLOTS && tile >= SLOTS)
                    barrier_wait(taken + slot, (tile / SLOTS - 1) & 1);
                if (wanted) {
                    sums[0] = total[0], sums[16] = total[1];
                    sums[lower] = total[2], sums[lower + 16] = total[3];
                }
                __syncwarp();
                if (elected && last)
                    barrier_arrive_in(done + slot, tile % SPLIT);
            }
        }
    } else {  // a lane sums up four rows of a column
        int column = l.lane / 4, four = l.lane % 4 * 4;
        if (l.lane < depth)
            barrier_init(empty + l.lane, WARPS);
        for (int i = l.lane; i < (SLOTS ? SLOTS : tiles); i += 32) {
            barrier_init(done + i, WARPS * SPLIT);
            if (SLOTS)
                barrier_init(taken + i, 1);
        }
        barriers_ready();
        sync_cluster();
        wait_for_previous();
        for (int tile = rank; tile < tiles; tile += SPLIT) {
            float y[4] = {0, 0, 0, 0};
            u32 plus[4] = {0, 0, 0, 0};  // asked for before the sums are there
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = tile * TILE + row_at_place(four + i);
                if (row < rows && bias_is == 1)
                    plus[i] = ((const u32*)bias)[first + row];
                else if (row < rows && bias_is == 2)
                    plus[i] = ((const u16*)bias)[first + row];
            }
            int slot = SLOTS ? tile % SLOTS : tile;
            const float* sums = partial + slot * of_tile + column * 16 + (four ^ (column & 2) * 4);
            barrier_wait(done + slot, SLOTS ? tile / SLOTS & 1 : 0);
            if (column < m)
                for (int part = 0; part < SPLIT; ++part)
#pragma unroll
                    for (int w = 0; w < WARPS; ++w) {
                        Floats4 more = read_in((const Floats4*)(sums + w * of_warp), part);
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            y[i] += more.at[i];
                    }
            __syncwarp();
            if (SLOTS && l.lane == 0)
                barrier_arrive(taken + slot);
            if (column < m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int row = tile * TILE + row_at_place(four + i);
                    float more = bias_is == 1 ? number(plus[i]) : X_IS_F16 ? f16_low(plus[i]) : number(plus[i] << 16);
                    if (row < rows)
                        store(out, column * (u64)n + first + row, fmaf(y[i], 0x1p69f, more));
                }
            }
        }
    }
    if (SPLIT > 1)
        sync_cluster();  // no program of a cluster ends while another reads its sums
}
