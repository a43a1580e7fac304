// The products of a slice by the rows of a stage, for each type: see the notes in few_rows.cu. Layouts: the decoders in
// loaders/quant.

// total += a group's sum times its scale in rows g and g + 8
DEVICE void scale(float (&total)[4], const float (&sum)[4], float upper, float lower) {
    total[0] = fmaf(upper, sum[0], total[0]);
    total[1] = fmaf(upper, sum[1], total[1]);
    total[2] = fmaf(lower, sum[2], total[2]);
    total[3] = fmaf(lower, sum[3], total[3]);
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

// Byte `at` of `bytes`, and 32768.
DEVICE float above_32768(u32 bytes, int at) { return number(permuted(bytes, 0x47000000u, 0x7404 | at << 4)); }

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

#if TYPE == Q5_0 || TYPE == Q5_1
// The four bits of `bits` from 0 on as bit 4 of four bytes, which have the nibbles `w`.
DEVICE u32 five_bits(u32 w, u32 bits) { return ((bits & 15) * 0x02040810u & 0x10101010u) | w; }
#endif

#if PAIRED
// Of two neighbouring blocks in a row, `first` their first word: the lane's quants, WORDS for each block.
#if TYPE == Q8_0
constexpr int WORDS = 2;
DEVICE void load_pair(u32 (&w)[2][WORDS], const u8*, const u8* own, u32 first, const Lane& l) {
    w[0][0] = word(own + 4);
    w[0][1] = permuted(word(own + 20), first, l.hybrid);
    w[1][0] = word(own + 36);
    w[1][1] = word(own + 52);
}
#elif TYPE == Q5_0
constexpr int WORDS = 2;
DEVICE void load_pair(u32 (&w)[2][WORDS], const u8* at, const u8* own, u32 first, const Lane& l) {
    u32 second = word(at + 4), bits[2] = {permuted(first, second, 0x5432), word(at + 24)};
    u32 quants[2] = {permuted(word(own + 8), second, l.hybrid), word(own + 28)};
#pragma unroll
    for (int b = 0; b < 2; ++b) {  // the even block's lane has bits from 4 c + 2 on, and round again
        int from = l.c * 4 + (b ? 0 : 2);
        w[b][0] = five_bits(quants[b] & 0x0f0f0f0fu, permuted(bits[b], 0, 0x1010) >> from);
        w[b][1] = five_bits(quants[b] >> 4 & 0x0f0f0f0fu, permuted(bits[b], 0, 0x3232) >> from);
    }
}
#else
constexpr int WORDS = 1;
DEVICE void load_pair(u32 (&w)[2][WORDS], const u8*, const u8* own, u32 first, const Lane& l) {
    w[0][0] = permuted(word(own + 4), first, l.hybrid);
    w[1][0] = word(own + 20);
}
#endif

// A block of rows g and g + 8.
DEVICE void add_block(float (&sum)[4], const u32 (&upper)[WORDS], const u32 (&lower)[WORDS], const Inputs& x, int run) {
#if TYPE == Q8_0
    u32 mask = 0x00ff00ffu, flip = 0x00800080u;  // 128 added to signed bytes
#pragma unroll
    for (int j = 0; j < 2; ++j)
        add_run(sum, flipped(upper[j], mask, flip), flipped(lower[j], mask, flip), flipped(upper[j] >> 8, mask, flip),
                flipped(lower[j] >> 8, mask, flip), x, run + j);
#elif TYPE == Q5_0
    add_fields(sum, upper[0], lower[0], 0x1f, x, run);
    add_fields(sum, upper[1], lower[1], 0x1f, x, run + 1);
#elif CODES
    add_codes(sum, upper[0], lower[0], x, run);
#else
    add_fields(sum, upper[0], lower[0], 0x0f, x, run);
    add_fields(sum, upper[0], lower[0], 0xf0, x, run + 1);
#endif
}

template <bool SHIFTED>
DEVICE void add_slice(float (&total)[4], const Places& in, const Inputs& x, const Lane& l) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        u32 first[2], middle[2], w[2][2][WORDS];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int from = r * 8 * PITCH + pair * 2 * BLOCK_BYTES;
            first[r] = word(in.row + from);
            middle[r] = word(in.row + from + BLOCK_BYTES - 2);
            load_pair(w[r], in.row + from, in.own + from, first[r], l);
        }
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            float sum[4];
            begin(sum, in.zeros, pair * 2 + b);
            add_block(sum, w[0][b], w[1][b], x, pair * 4 + b * 2);
            if (b)
                scale(total, sum, f16_high(middle[0]), f16_high(middle[1]));
            else
                scale(total, sum, f16_low(first[0]), f16_low(first[1]));
        }
    }
}
#endif

#if TYPE == IQ4_XS
// Lane 2 r + h leaves d times scales 4 h to 4 h + 3 of row r in float32.
DEVICE void spread_scales(const Places& in, int half) {
    Words2 head = *(const Words2*)in.head;
    u32 low = head.b >> half * 16, high = head.a >> (16 + half * 8);
    u32 scales = permuted(low & 0x0f0fu, low >> 4 & 0x0f0fu, 0x5140);
    scales |= (high & 0x03) << 4 | (high & 0x0c) << 10 | (high & 0x30) << 16 | (high & 0xc0) << 22;
    Floats4 y;
#pragma unroll
    for (int at = 0; at < 4; ++at)
        y.at[at] = (above_32768(scales, at) - 32800.0f) * f16_low(head.a);
    *(Floats4*)in.scales_to = y;
}

template <bool SHIFTED>
DEVICE void add_slice(float (&total)[4], const Places& in, const Inputs& x, const Lane& l) {
    spread_scales(in, l.lane % 2);
    __syncwarp();
#pragma unroll
    for (int group = 0; group < 8; ++group) {
        const u8 *scales = in.scales + group * 4, *own = in.own + 8 + group * 16;
        float sum[4];
        begin(sum, in.zeros, group);
        add_codes(sum, word(own), word(own + 8 * PITCH), x, group * 2);
        scale(total, sum, *(const float*)scales, *(const float*)(scales + 8 * SCALES_PITCH));
    }
}
#endif

#if BLOCK_MINIMA
template <bool SHIFTED>
DEVICE void add_slice(float (&total)[4], const Places& in, const Inputs& x, const Lane& l) {
#pragma unroll
    for (int block = 0; block < 8; ++block) {
        u32 head[2], w[2], bits[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int at = r * 8 * PITCH + block * BLOCK_BYTES;
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
        scale(total, sum, f16_low(head[0]), f16_low(head[1]));
        begin(sum_of_x, in.zeros, block);
        scale(total, sum_of_x, f16_high(head[0]), f16_high(head[1]));
    }
}
#endif

#if SUPER_MINIMA
// Lane 2 r + h reads the header of row r and leaves d times scales 4 h to 4 h + 3 in float32, exactly, the minima and
// minus dmin where all lanes find them.
DEVICE void spread_scales(const Places& in, int h) {
    Words4 head = *(const Words4*)in.head;
    u8* to = in.scales_to;
    float d = f16_low(head.a), from = d * -32768.0f;
    u32 scales = h ? (head.d & 0x0f0f0f0fu) | (head.b >> 2 & 0x30303030u) : head.b & 0x3f3f3f3fu;
    u32 minima = h ? (head.d >> 4 & 0x0f0f0f0fu) | (head.c >> 2 & 0x30303030u) : head.c & 0x3f3f3f3fu;
    Floats4 y;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        y.at[i] = fmaf(above_32768(scales, i), d, from);  // (32768 + scale) d - 32768 d
    *(Floats4*)to = y;
    *(u32*)(to + 32 - h * 12) = minima;
    *(float*)(to + 40 - h * 16) = -f16_high(head.a);
}

template <bool SHIFTED>
DEVICE void add_slice(float (&total)[4], const Places& in, const Inputs& x, const Lane& l) {
    constexpr int QUANTS = TYPE == Q4_K ? 16 : 48;
    spread_scales(in, l.lane % 2);
    __syncwarp();
#if TYPE == Q5_K
    Words2 b0 = *(const Words2*)(in.own + 16), b1 = *(const Words2*)(in.own + 8 * PITCH + 16);
#endif
#pragma unroll
    for (int u = 0; u < 4; ++u) {
        const u8 *upper = in.scales + u * 8, *own = in.own + QUANTS + u * 32;
        Floats2 up = *(const Floats2*)upper, low = *(const Floats2*)(upper + 8 * SCALES_PITCH);
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
            u32 v[4] = {b0.a, b1.a, b0.b, b1.b}, w[4] = {w0.a, w1.a, w0.b, w1.b};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                v[j] = merged(high ? w[j] >> 4 : w[j], from < 4 ? v[j] << (4 - from) : v[j] >> (from - 4), 0x0f0f0f0fu);
            add_fields(sum, v[0], v[1], 0x1f, x, run);
            add_fields(sum, v[2], v[3], 0x1f, x, run + 1);
#endif
            scale(total, sum, high ? up.b : up.a, high ? low.b : low.a);
        }
    }
    const u8 *upper = in.scales, *lower = upper + 8 * SCALES_PITCH;
    float least[4] = {0, 0, 0, 0};
    u32 a0 = permuted(*(const u16*)(upper + 32 + l.c * 2), 0, 0x4140);
    u32 a1 = permuted(*(const u16*)(lower + 32 + l.c * 2), 0, 0x4140);
    mma(least, a0, a1, a0, a1, x.sums[0], x.sums[1]);
    scale(total, least, *(const float*)(upper + 40), *(const float*)(lower + 40));
}
#endif
