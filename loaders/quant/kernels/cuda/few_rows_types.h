// The products of a slice by the first COUNT sixteens of rows of a stage, for each type: see the notes in few_rows.cu.
// Several sixteens at once hide each other's latencies. Layouts: the decoders in loaders/quant.

// total += a group's sum times its scale in rows g and g + 8
DEVICE void scale(float (&total)[4], const float (&sum)[4], float upper, float lower) {
    total[0] = fmaf(upper, sum[0], total[0]);
    total[1] = fmaf(upper, sum[1], total[1]);
    total[2] = fmaf(lower, sum[2], total[2]);
    total[3] = fmaf(lower, sum[3], total[3]);
}

// The same by block `b` of a pair in each row, whose scales the first and a middle word of the pair have.
DEVICE void scale_of_pair(float (&total)[4], const float (&sum)[4], int b, const u32* first, const u32* middle) {
    scale(total, sum, b ? f16_high(middle[0]) : f16_low(first[0]), b ? f16_high(middle[1]) : f16_low(first[1]));
}

// The run of which `upper` and `lower` are rows g and g + 8: fields of the four bytes where they stand.
DEVICE void add_fields(float (&sum)[4], u32 upper, u32 lower, u32 field, const Inputs& x, int run) {
    u32 mask = field * 0x10001u;
    add_run(sum, upper & mask, lower & mask, upper >> 8 & mask, lower >> 8 & mask, x, run);
}

// The bits of `w` that the mask has, and for the others those of `high`, in one instruction.
DEVICE u32 merged(u32 w, u32 high, u32 mask) { return high ^ ((w ^ high) & mask); }

DEVICE void begin(float (&sum)[4], const Floats2* zeros, int group) {
    Floats2 z = zeros[group * 4];
    sum[0] = sum[2] = z.a, sum[1] = sum[3] = z.b;
}

#if TYPE == Q8_0
template <bool SHIFTED, int COUNT>
DEVICE void add_slice(float (*total)[4], const Places& in, const Inputs& x, const Lane& l) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        u32 first[2 * COUNT], middle[2 * COUNT], w[2 * COUNT][4];
#pragma unroll
        for (int r = 0; r < 2 * COUNT; ++r) {
            const u8 *at = in.row + r * 8 * PITCH + pair * 68, *own = in.own + r * 8 * PITCH + pair * 68;
            first[r] = word(at);
            middle[r] = word(at + 32);
            w[r][0] = word(own + 4);
            w[r][1] = permuted(word(own + 20), first[r], l.hybrid);
            w[r][2] = word(own + 36);
            w[r][3] = word(own + 52);
        }
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                float sum[4];
                begin(sum, in.zeros, pair * 2 + b);
#pragma unroll
                for (int j = 0; j < 2; ++j) {  // 128 added to signed bytes
                    u32 upper = w[2 * i][2 * b + j], lower = w[2 * i + 1][2 * b + j];
                    u32 mask = 0x00ff00ffu, flip = 0x00800080u;
                    add_run(sum, flipped(upper, mask, flip), flipped(lower, mask, flip),
                            flipped(upper >> 8, mask, flip), flipped(lower >> 8, mask, flip), x,
                            pair * 4 + b * 2 + j);
                }
                scale_of_pair(total[i], sum, b, first + 2 * i, middle + 2 * i);
            }
    }
}
#endif

#if CODES
// The bytes, 128 added, that eight nibbles stand for: those of bytes 0 and 1 of `w`, low before high, and of 2 and 3.
DEVICE Words2 looked_up(u32 w) {
    u32 low = w & 0x77777777u, high = (w >> 1 & 0x44444444u) | 0x32103210u;
    Words2 y;
    y.a = permuted(permuted(0x3f2d1801u, 0x766a5d4fu, low), permuted(0xa6998d81u, 0xf1d9c5b5u, low), high);
    low >>= 16, high >>= 16;
    y.b = permuted(permuted(0x3f2d1801u, 0x766a5d4fu, low), permuted(0xa6998d81u, 0xf1d9c5b5u, low), high);
    return y;
}

// 32 elements, whose nibbles are `upper` and `lower`; a run's pairs are neighbours.
DEVICE void add_codes(float (&sum)[4], u32 upper, u32 lower, const Inputs& x, int run) {
    Words2 up = looked_up(upper), low = looked_up(lower);
    u32 mask = 0x00ff00ffu;
    add_run(sum, up.a & mask, low.a & mask, up.b & mask, low.b & mask, x, run);
    add_run(sum, permuted(up.a, 0, 0x4341), permuted(low.a, 0, 0x4341), permuted(up.b, 0, 0x4341),
            permuted(low.b, 0, 0x4341), x, run + 1);
}
#endif

#if TYPE == IQ4_XS
// Lane 2 r + h leaves d times scales 4 h to 4 h + 3 of row r in float32.
DEVICE void spread_scales(const Places& in, int half, int i) {
    Words2 head = *(const Words2*)(in.head + i * 16 * PITCH);
    u32 low = head.b >> half * 16, high = head.a >> (16 + half * 8);
    u32 scales = permuted(low & 0x0f0fu, low >> 4 & 0x0f0fu, 0x5140);
    scales |= (high & 0x03) << 4 | (high & 0x0c) << 10 | (high & 0x30) << 16 | (high & 0xc0) << 22;
    Floats4 y;
#pragma unroll
    for (int at = 0; at < 4; ++at)
        y.at[at] = (number(permuted(scales, 0x47000000u, 0x7404 | at << 4)) - 32800.0f) * f16_low(head.a);
    *(Floats4*)(in.scales_to + i * 16 * SCALES_PITCH) = y;
}

template <bool SHIFTED, int COUNT>
DEVICE void add_slice(float (*total)[4], const Places& in, const Inputs& x, const Lane& l) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        spread_scales(in, l.lane % 2, i);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8 * COUNT; ++j) {
        int group = j / COUNT, i = j % COUNT;
        const u8* scales = in.scales + i * 16 * SCALES_PITCH + group * 4;
        const u8* own = in.own + i * 16 * PITCH + 8 + group * 16;
        float sum[4];
        begin(sum, in.zeros, group);
        add_codes(sum, word(own), word(own + 8 * PITCH), x, group * 2);
        scale(total[i], sum, *(const float*)scales, *(const float*)(scales + 8 * SCALES_PITCH));
    }
}
#endif

#if TYPE == Q4_0 || TYPE == IQ4_NL
template <bool SHIFTED, int COUNT>
DEVICE void add_slice(float (*total)[4], const Places& in, const Inputs& x, const Lane& l) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        u32 first[2 * COUNT], middle[2 * COUNT], w[2 * COUNT][2];
#pragma unroll
        for (int r = 0; r < 2 * COUNT; ++r) {
            const u8 *at = in.row + r * 8 * PITCH + pair * 36, *own = in.own + r * 8 * PITCH + pair * 36;
            first[r] = word(at);
            middle[r] = word(at + 16);
            w[r][0] = permuted(word(own + 4), first[r], l.hybrid);
            w[r][1] = word(own + 20);
        }
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                float sum[4];
                begin(sum, in.zeros, pair * 2 + b);
#if CODES
                add_codes(sum, w[2 * i][b], w[2 * i + 1][b], x, pair * 4 + b * 2);
#else
                add_fields(sum, w[2 * i][b], w[2 * i + 1][b], 0x0f, x, pair * 4 + b * 2);
                add_fields(sum, w[2 * i][b], w[2 * i + 1][b], 0xf0, x, pair * 4 + b * 2 + 1);
#endif
                scale_of_pair(total[i], sum, b, first + 2 * i, middle + 2 * i);
            }
    }
}
#endif

#if TYPE == Q5_0 || TYPE == Q5_1
// The four bits of `bits` from 0 on as bit 4 of four bytes, which have the nibbles `w`.
DEVICE u32 five_bits(u32 w, u32 bits) { return ((bits & 15) * 0x02040810u & 0x10101010u) | w; }
#endif

#if TYPE == Q5_0
template <bool SHIFTED, int COUNT>
DEVICE void add_slice(float (*total)[4], const Places& in, const Inputs& x, const Lane& l) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        u32 first[2 * COUNT], middle[2 * COUNT], w[2][2][2 * COUNT];
#pragma unroll
        for (int r = 0; r < 2 * COUNT; ++r) {
            const u8 *at = in.row + r * 8 * PITCH + pair * 44, *own = in.own + r * 8 * PITCH + pair * 44;
            first[r] = word(at);
            middle[r] = word(at + 20);
            u32 second = word(at + 4), odd = word(at + 24), bits[2] = {permuted(first[r], second, 0x5432), odd};
            u32 quants[2] = {permuted(word(own + 8), second, l.hybrid), word(own + 28)};
#pragma unroll
            for (int b = 0; b < 2; ++b) {  // the even block's lane has bits from 4 c + 2 on, and round again
                int from = l.c * 4 + (b ? 0 : 2);
                u32 low = permuted(bits[b], 0, 0x1010) >> from, high = permuted(bits[b], 0, 0x3232) >> from;
                w[b][0][r] = five_bits(quants[b] & 0x0f0f0f0fu, low);
                w[b][1][r] = five_bits(quants[b] >> 4 & 0x0f0f0f0fu, high);
            }
        }
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                float sum[4];
                begin(sum, in.zeros, pair * 2 + b);
                add_fields(sum, w[b][0][2 * i], w[b][0][2 * i + 1], 0x1f, x, pair * 4 + b * 2);
                add_fields(sum, w[b][1][2 * i], w[b][1][2 * i + 1], 0x1f, x, pair * 4 + b * 2 + 1);
                scale_of_pair(total[i], sum, b, first + 2 * i, middle + 2 * i);
            }
    }
}
#endif

#if BLOCK_MINIMA
template <bool SHIFTED, int COUNT>
DEVICE void add_slice(float (*total)[4], const Places& in, const Inputs& x, const Lane& l) {
#pragma unroll
    for (int j = 0; j < 8 * COUNT; ++j) {
        int block = j / COUNT, i = j % COUNT;
        u32 head[2], w[2], bits[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int at = (2 * i + r) * 8 * PITCH + block * BLOCK_BYTES;
            head[r] = word(in.row + at);
            bits[r] = TYPE == Q5_1 ? word(in.row + at + 4) >> l.c * 4 : 0;
            w[r] = word(in.own + at + BLOCK_BYTES - 16);
        }
        float sum[4] = {0, 0, 0, 0}, sum_of_x[4];
        int run = block * 2;
#if TYPE == Q4_1
        add_fields(sum, w[0], w[1], 0x0f, x, run);
        add_fields(sum, w[0], w[1], 0xf0, x, run + 1);
#else
        add_fields(sum, five_bits(w[0] & 0x0f0f0f0fu, bits[0]), five_bits(w[1] & 0x0f0f0f0fu, bits[1]), 0x1f, x, run);
        add_fields(sum, five_bits(w[0] >> 4 & 0x0f0f0f0fu, bits[0] >> 16),
                   five_bits(w[1] >> 4 & 0x0f0f0f0fu, bits[1] >> 16), 0x1f, x, run + 1);
#endif
        scale(total[i], sum, f16_low(head[0]), f16_low(head[1]));
        begin(sum_of_x, in.zeros, block);
        scale(total[i], sum_of_x, f16_high(head[0]), f16_high(head[1]));
    }
}
#endif

#if SUPER_MINIMA
// Lane 2 r + h reads the header of row r and leaves d times scales 4 h to 4 h + 3 in float32, exactly, the minima and
// minus dmin where all lanes find them.
DEVICE void spread_scales(const Places& in, int h, int i) {
    Words4 head = *(const Words4*)(in.head + i * 16 * PITCH);
    u8* to = in.scales_to + i * 16 * SCALES_PITCH;
    float d = f16_low(head.a), from = d * -32768.0f;
    u32 scales = h ? (head.d & 0x0f0f0f0fu) | (head.b >> 2 & 0x30303030u) : head.b & 0x3f3f3f3fu;
    u32 minima = h ? (head.d >> 4 & 0x0f0f0f0fu) | (head.c >> 2 & 0x30303030u) : head.c & 0x3f3f3f3fu;
    Floats4 y;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        y.at[i] = fmaf(number(permuted(scales, 0x47000000u, 0x7404 | i << 4)), d, from);  // (32768 + scale) d - 32768 d
    *(Floats4*)to = y;
    *(u32*)(to + 32 - h * 12) = minima;
    *(float*)(to + 40 - h * 16) = -f16_high(head.a);
}

template <bool SHIFTED, int COUNT>
DEVICE void add_slice(float (*total)[4], const Places& in, const Inputs& x, const Lane& l) {
    constexpr int QUANTS = TYPE == Q4_K ? 16 : 48;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        spread_scales(in, l.lane % 2, i);
    __syncwarp();
#if TYPE == Q5_K
    Words2 bits[2 * COUNT];
#pragma unroll
    for (int r = 0; r < 2 * COUNT; ++r)
        bits[r] = *(const Words2*)(in.own + r * 8 * PITCH + 16);
#endif
#pragma unroll
    for (int u = 0; u < 4; ++u)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const u8* upper = in.scales + i * 16 * SCALES_PITCH + u * 8;
            Floats2 up = *(const Floats2*)upper, low = *(const Floats2*)(upper + 8 * SCALES_PITCH);
            const u8* own = in.own + i * 16 * PITCH + QUANTS + u * 32;
            Words2 w0 = *(const Words2*)own, w1 = *(const Words2*)(own + 8 * PITCH);
#pragma unroll
            for (int high = 0; high < 2; ++high) {
                float sum[4] = {0, 0, 0, 0};
                int run = u * 4 + high * 2;
#if TYPE == Q4_K
                add_fields(sum, w0.a, w1.a, high ? 0xf0 : 0x0f, x, run);
                add_fields(sum, w0.b, w1.b, high ? 0xf0 : 0x0f, x, run + 1);
#else
                int from = 2 * u + high;
                Words2 b0 = bits[2 * i], b1 = bits[2 * i + 1];
                u32 v[4] = {b0.a, b1.a, b0.b, b1.b}, w[4] = {w0.a, w1.a, w0.b, w1.b};
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    v[j] = merged(high ? w[j] >> 4 : w[j], from < 4 ? v[j] << (4 - from) : v[j] >> (from - 4),
                                  0x0f0f0f0fu);
                add_fields(sum, v[0], v[1], 0x1f, x, run);
                add_fields(sum, v[2], v[3], 0x1f, x, run + 1);
#endif
                scale(total[i], sum, high ? up.b : up.a, high ? low.b : low.a);
            }
        }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const u8* upper = in.scales + i * 16 * SCALES_PITCH;
        const u8* lower = upper + 8 * SCALES_PITCH;
        float least[4] = {0, 0, 0, 0};
        u32 a0 = permuted(*(const u16*)(upper + 32 + l.c * 2), 0, 0x4140);
        u32 a1 = permuted(*(const u16*)(lower + 32 + l.c * 2), 0, 0x4140);
        mma(least, a0, a1, a0, a1, x.sums[0], x.sums[1]);
        scale(total[i], least, *(const float*)(upper + 40), *(const float*)(lower + 40));
    }
}
#endif
