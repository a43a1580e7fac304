// The products of a slice for types with groups of 16 elements: see few_rows_types.h.

#if BY_16
// Leaves eight scales in float32, those of even groups first.
DEVICE void leave_scales(u8* to, int j, const float (&y)[4]) {
    *(Floats2*)(to + j * 8) = Floats2{y[0], y[2]};
    *(Floats2*)(to + 16 + j * 8) = Floats2{y[1], y[3]};
}

// All runs of four that have bytes in common, once in each half h of 32 bytes: scales of rows g and g + 8.
DEVICE void add_four(float (&total)[4], const u32 (&v)[4][2], const u32 (&fields)[4], const u8* scales, const Inputs& x,
                     int run) {
    Floats4 up = *(const Floats4*)scales, low = *(const Floats4*)(scales + 8 * SCALES_PITCH);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        float sum[4] = {0, 0, 0, 0};
        add_fields(sum, v[k][0], v[k][1], fields[k], x, run + k);
        scale(total, sum, up.at[k], low.at[k]);
    }
}
#endif

#if TYPE == Q2_K
// Lane 2 r + h leaves of half h of row r the scales times d in float32, exactly, the minima, and minus dmin.
DEVICE void spread_scales(const Places& in, int half) {
    const u8* head = in.head;
    u8* to = in.scales_to;
    u32 both = word(head + 80);
    float d = f16_low(both), from = d * -32768.0f;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        u32 scales = word(head + half * 8 + j * 4);
        float y[4];
#pragma unroll
        for (int at = 0; at < 4; ++at)  // (32768 + scale) d - 32768 d
            y[at] = fmaf(above_32768(scales & 0x0f0f0f0fu, at), d, from);
        leave_scales(to, j, y);
        *(u32*)(to + 64 - half * 24 + j * 4) = scales >> 4 & 0x0f0f0f0fu;
    }
    *(float*)(to + 80 - half * 28) = -f16_high(both);
}

template <bool SHIFTED>
DEVICE void add_slice(float (&total)[4], const Places& in, const Inputs& x, const Lane& l) {
    spread_scales(in, l.lane % 2);
    __syncwarp();
    constexpr u32 fields[4] = {0x03, 0x0c, 0x30, 0xc0};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        int n = j / 2, h = j % 2;
        const u8* at = in.own + 16 + n * 32 + h * 16;
        u32 a = word(at), b = word(at + 8 * PITCH), v[4][2] = {{a, b}, {a, b}, {a, b}, {a, b}};
        add_four(total, v, fields, in.scales + n * 32 + h * 16, x, n * 8 + h * 4);
    }
    const u8 *upper = in.scales, *lower = upper + 8 * SCALES_PITCH;
    float least[4] = {0, 0, 0, 0};
    u32 a[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        a[j] = permuted(*(const u16*)((j % 2 ? lower : upper) + 64 + j / 2 * 8 + l.c * 2), 0, 0x4140);
#pragma unroll
    for (int part = 0; part < 2; ++part)
        mma(least, a[0], a[1], a[2], a[3], x.sums[2 * part], x.sums[2 * part + 1]);
    scale(total, least, *(const float*)(upper + 80), *(const float*)(lower + 80));
}
#endif

#if HALVES
constexpr u32 SMALL = 0x1d001d00u;  // 2^-69, twice

// The word at `p` if not SHIFTED, and else the one that begins `shift` bits later: half a word, or in rows of an odd
// number of slices what it is.
template <bool SHIFTED>
DEVICE u32 word_at(const u8* p, u32 shift) {
    if (!SHIFTED)
        return word(p);
    return funnel(word(p), word(p + 4), ODD ? shift : 16);
}

template <bool SHIFTED>
DEVICE int before_shift(u32 shift) {  // bytes
    return !SHIFTED ? 0 : ODD ? shift / 8 : 2;
}

// Scales 4 j to 4 j + 3 of half `half`, and what makes them no less than 0.
template <bool SHIFTED>
DEVICE u32 four_scales(const u8* head, int half, int j, u32 shift) {
#if TYPE == Q6_K
    return word_at<SHIFTED>(head + 192 + half * 8 + j * 4, shift) ^ 0x80808080u;
#else
    u32 low = word_at<SHIFTED>(head + 96 + j * 4, shift) >> half * 4;
    u32 high = word_at<SHIFTED>(head + 104, shift) >> (half * 4 + j * 2);
    return (low & 0x0f0f0f0fu) | (high << 4 & 0x30303030u);
#endif
}

// Lane 2 r + h leaves of half h of row r the scales, times d in float32 and times 2^-69 in bfloat16, exactly, and d.
template <bool SHIFTED>
DEVICE void spread_scales(const Places& in, const Lane& l) {
    const u8* head = in.head;
    u8* to = in.scales_to;
    int half = l.lane % 2;
    float d = f16_low(*(const u16*)(head + BLOCK_BYTES - 2));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        u32 scales = four_scales<SHIFTED>(head - before_shift<SHIFTED>(l.shift_head), half, j, l.shift_head);
        float y[4];
#pragma unroll
        for (int at = 0; at < 4; ++at)  // less 2^15 and what makes it no less than 0
            y[at] = above_32768(scales, at) - (TYPE == Q6_K ? 32896.0f : 32800.0f);
        Words2 small = {times(tops(y[0], y[1]), SMALL), times(tops(y[2], y[3]), SMALL)};
        *(Words2*)(to + 64 - half * 16 + j * 8) = small;
        float by_d[4] = {y[0] * d, y[1] * d, y[2] * d, y[3] * d};
        leave_scales(to, j, by_d);
    }
    *(float*)(to + 96 - half * 28) = d;
}

template <bool SHIFTED>
DEVICE void add_slice(float (&total)[4], const Places& in, const Inputs& x, const Lane& l) {
    spread_scales<SHIFTED>(in, l);
    __syncwarp();
    const u8* rows[2] = {in.own - before_shift<SHIFTED>(l.shift), in.low - before_shift<SHIFTED>(l.shift_low)};
    u32 shifts[2] = {l.shift, l.shift_low};
#if TYPE == Q6_K
    constexpr u32 fields[4] = {0x3f, 0x3f, 0x3f, 0xfc};
#else
    constexpr u32 fields[4] = {0x07, 0x1c, 0x70, 0x70};
#endif
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        int n = j / 2, h = j % 2;
        u32 v[4][2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const u8* at = rows[r] + h * 16;
#if TYPE == Q6_K
            u32 a = word_at<SHIFTED>(at + n * 64, shifts[r]), b = word_at<SHIFTED>(at + n * 64 + 32, shifts[r]);
            u32 high = word_at<SHIFTED>(at + 128 + n * 32, shifts[r]);
            v[0][r] = merged(a, high << 4, 0x0f0f0f0fu);
            v[1][r] = merged(b, high << 2, 0x0f0f0f0fu);
            v[2][r] = merged(a >> 4, high, 0x0f0f0f0fu);
            v[3][r] = merged(b >> 2, high, 0x3c3c3c3cu);  // two bits higher
#else
            u32 a = word_at<SHIFTED>(at + 32 + n * 32, shifts[r]), high = word_at<SHIFTED>(at, shifts[r]);
            u32 beside = n ? high >> 1 : high << 3;
            v[0][r] = merged(a, n ? high >> 2 : high << 2, 0x03030303u);
            v[1][r] = merged(a, beside, 0x0c0c0c0cu);
            v[2][r] = merged(a, n ? high : high << 4, 0x30303030u);
            v[3][r] = merged(a >> 2, beside, 0x30303030u);
#endif
        }
        add_four(total, v, fields, in.scales + n * 32 + h * 16, x, n * 8 + h * 4);
    }
    const u8 *upper = in.scales, *lower = upper + 8 * SCALES_PITCH;
    float least[4] = {0, 0, 0, 0};
    u32 a0 = word(upper + 64 + l.c * 4), a1 = word(lower + 64 + l.c * 4);
    u32 a2 = word(upper + 80 + l.c * 4), a3 = word(lower + 80 + l.c * 4);
#pragma unroll
    for (int part = 0; part < 3; ++part)
        mma(least, a0, a1, a2, a3, x.sums[2 * part], x.sums[2 * part + 1]);
    scale(total, least, *(const float*)(upper + 96), *(const float*)(lower + 96));
}
#endif
