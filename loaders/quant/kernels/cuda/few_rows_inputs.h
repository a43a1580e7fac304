// x in the order of the matrix instruction: see [Note: Matrix] in few_rows.cu.

DEVICE u32 word(const u8* p) { return *(const u32*)p; }

struct Inputs {
    u32 run[PARTS][RUNS][2];
    u32 sums[MINIMA];  // of x over groups, times what a type's scales or minima take off, in several bfloat16
};

struct Lane {
    int lane, g, c;
    u32 hybrid;                        // how lane 3 makes its word of two halves
    u32 shift, shift_low, shift_head;  // 16 where a slice begins with half a word: in rows g, g + 8 and lane / 2
};

// Where a lane finds what it needs of a slice.
struct Places {
    const u8 *row, *own, *low, *head;  // row g, its own first words there and in row g + 8, and row lane / 2
    const Floats2* zeros;              // of its columns
    const u8* scales;                  // of row g, in the warp's scratch
    u8* scales_to;                     // for half lane % 2 of row lane / 2
};

// The element of the slice that is in byte 2 `half` of the run of lane `c`; that in the next byte is the next.
DEVICE int element(int run, int c, int half) {
    int at = 4 * c + 2 * half, pair = run / 4 * 64, i = run % 4;
    if (TYPE == Q8_0)
        return pair + (i < 2 ? (2 + at + 16 * i) % 32 : 32 + at + 16 * (i - 2));
    if (TYPE == Q4_0 || TYPE == Q5_0 || TYPE == IQ4_NL)
        return pair + i % 2 * 16 + (i < 2 ? (2 + at) % 16 : 32 + at);
    if (TYPE == Q4_1 || TYPE == Q5_1 || TYPE == IQ4_XS)
        return pair + i % 2 * 16 + i / 2 * 32 + at;
    if (BY_16)
        return run / 8 * 128 + run % 4 * 32 + run / 4 % 2 * 16 + at;
    return pair + i / 2 * 32 + 8 * c + 4 * (i % 2) + 2 * half;
}

// Bits by which the integers of a run stand higher than they should.
DEVICE constexpr int up(int run) {
    if (TYPE == Q4_0 || TYPE == Q4_1)
        return run % 2 * 4;
    if (TYPE == Q2_K || TYPE == Q3_K)
        return TYPE == Q3_K && run % 4 == 3 ? 4 : run % 4 * 2;
    return TYPE == Q4_K ? run / 2 % 2 * 4 : TYPE == Q6_K && run % 4 == 3 ? 2 : 0;
}

// What a group's sum begins with, times x: minus the zero point; for minima one, as an integer or as 1. For superblocks
// it is a bfloat16, and is taken off all groups at once.
DEVICE constexpr u32 beginning(int run) {
    u32 one = TYPE == Q4_0   ? 8u << up(run)
              : TYPE == Q5_0 ? 16
              : TYPE == Q8_0 ? 128
              : CODES        ? 128
                             : 1u << up(run);
    if (HALVES)  // -32 or -4 times 2^-64, which undoes that of x
        return ((TYPE == Q6_K ? 0xa200u : 0xa080u) + (up(run) << 7)) * 0x10001u;
    if (KQUANT)
        return (0x3f80u + (up(run) << 7)) * 0x10001u;
    return ((BLOCK_MINIMA ? 0 : 0x8000u) | one) * 0x10001u;
}

DEVICE u32 tops(float a, float b) { return permuted(bits_of(a), bits_of(b), 0x7632); }

DEVICE void put_run(Inputs& x, int run, u32 a, u32 b) {
    if (!X_IS_F16) {
        u32 by = (0x5f80u - (up(run) << 7)) * 0x10001u;
        a = times(a, by);
        b = times(b, by);
        x.run[0][run][0] = CODES ? a : permuted(a, b, 0x5410);
        x.run[0][run][1] = CODES ? b : permuted(a, b, 0x7632);
        return;
    }
    float by = number((0x5f80u - (up(run) << 7)) << 16);
    float v[4] = {f16_low(a) * by, f16_low(b) * by, f16_high(a) * by, f16_high(b) * by};
    if (CODES)
        v[1] = f16_high(a) * by, v[2] = f16_low(b) * by;
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            x.run[part][run][i] = tops(v[2 * i], v[2 * i + 1]);
            v[2 * i] -= number(bits_of(v[2 * i]) & 0xffff0000u);
            v[2 * i + 1] -= number(bits_of(v[2 * i + 1]) & 0xffff0000u);
        }
}

DEVICE void add_run(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, const Inputs& x, int run) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
        mma(sum, a0, a1, a2, a3, x.run[part][run][0], x.run[part][run][1]);
}

// The nearest bfloat16, ties away from zero.
DEVICE float nearest(float y) { return number((bits_of(y) + 0x8000u) & 0xffff0000u); }

constexpr int X_LANES = PORTION / 8;       // that have a row of a portion together
constexpr int X_LOADS = 8 * X_LANES / 32;  // of a portion
constexpr int X_WORDS = SLICE / PORTION * X_LOADS;

// The row of x of which a lane has a part in load `i` of a portion.
DEVICE int x_row(int i, const Lane& l) { return i * (32 / X_LANES) + l.lane / X_LANES; }

// Ask for 256 columns of up to eight rows of x, `at` the first of them.
DEVICE void request_x(Words4 (&raw)[X_WORDS], const u16* at, int k, int m, const Lane& l) {
#pragma unroll
    for (int i = 0; i < X_WORDS; ++i) {
        int row = x_row(i % X_LOADS, l);
        raw[i] = Words4{0, 0, 0, 0};
        if (row < m)
            raw[i] = *(const Words4*)(at + (u64)row * k + i / X_LOADS * PORTION + l.lane % X_LANES * 8);
    }
}

// Put them in order; `scratch` and `zeros` are the warp's own.
DEVICE void order_x(Inputs& x, const Words4 (&raw)[X_WORDS], const Lane& l, u8* scratch, Floats2* zeros) {
#pragma unroll
    for (int portion = 0; portion < SLICE / PORTION; ++portion) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < X_LOADS; ++i)
            *(Words4*)(scratch + x_row(i, l) * X_PITCH + l.lane % X_LANES * 16) = raw[portion * X_LOADS + i];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < PORTION / 16; ++i) {
            int run = portion * (PORTION / 16) + i;
            const u8* row = scratch + l.g * X_PITCH - portion * PORTION * 2;
            put_run(x, run, word(row + element(run, l.c, 0) * 2), word(row + element(run, l.c, 1) * 2));
        }
    }
    constexpr int SETS = GROUPS / 8;
    float own[SETS][2] = {};
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int run = group * RUNS / GROUPS; run < (group + 1) * RUNS / GROUPS; ++run) {
            u32 a = beginning(run);
            add_run(sum, a, a, a, a, x, run);
        }
        if (l.g == group % 8) {
            if (KQUANT)
                own[group / 8][0] = sum[0], own[group / 8][1] = sum[1];
            else
                zeros[group * 4 + l.c] = Floats2{sum[0], sum[1]};
        }
    }
    __syncwarp();
    if (KQUANT) {  // [group][column], of which a lane has two groups of each set for its column
        float* sums = (float*)scratch;
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            int at = set * 8 + (BY_16 ? l.g % 4 * 2 + l.g / 4 : l.g);  // in the order of the scales
            sums[at * 8 + 2 * l.c] = own[set][0];
            sums[at * 8 + 2 * l.c + 1] = own[set][1];
        }
        __syncwarp();
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            float a = sums[(set * 8 + 2 * l.c) * 8 + l.g], b = sums[(set * 8 + 2 * l.c + 1) * 8 + l.g];
#pragma unroll
            for (int part = 0; part < MINIMA / SETS; ++part) {
                float a0 = nearest(a), b0 = nearest(b);
                x.sums[part * SETS + set] = tops(a0, b0);
                a -= a0, b -= b0;
            }
        }
        __syncwarp();
    }
}
