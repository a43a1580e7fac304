// What few_rows.cu needs of a GPU of compute capability 9.0 or more and C++ has no words for. tests/cuda_on_cpu.h says
// the same of a CPU.

#define DEVICE __device__ __forceinline__

DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void mma(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    float c0 = sum[0], c1 = sum[1], c2 = sum[2], c3 = sum[3];
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

// (w & mask) ^ flip, which the compiler would make two instructions of.
DEVICE u32 flipped(u32 w, u32 mask, u32 flip) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(w), "r"(mask), "r"(flip));
    return y;
}

// Both bfloat16 of `x` times those of `by`.
DEVICE u32 times(u32 x, u32 by) {
    u32 y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(by), "r"(0x80008000u));
    return y;
}

DEVICE float f16_low(u32 w) {
    float y;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(y) : "r"(w));
    return y;
}

DEVICE float f16_high(u32 w) {
    float y;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(y) : "r"(w));
    return y;
}

DEVICE u16 rounded(float y) {  // to the type of x
    u16 bits;
    if (X_IS_F16)
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(y));
    else
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(y));
    return bits;
}

DEVICE float number(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of(float y) { return __float_as_uint(y); }
DEVICE u32 permuted(u32 x, u32 y, u32 bytes) { return __byte_perm(x, y, bytes); }
DEVICE u32 funnel(u32 low, u32 high, u32 by) { return __funnelshift_r(low, high, by); }

// `x`, of which the compiler does not know that it could as well be computed again.
DEVICE int kept(int x) { return __shfl_sync(0xffffffffu, x, threadIdx.x % 32); }

DEVICE void barrier_init(u64* bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(bar)), "r"(arrivals) : "memory");
}

DEVICE void barrier_arrive(u64* bar) {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(address(bar)) : "memory");
}

DEVICE u32 nanoseconds() {
    u32 now;
    asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
    return now;
}

#if SPLIT > 1
#define ACQUIRE ".acquire.cluster.shared::cta"
#else
#define ACQUIRE ".shared::cta"
#endif

DEVICE bool barrier_over(u64* bar, u32 parity) {
    u32 over;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity" ACQUIRE ".b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(address(bar)), "r"(parity)
                 : "memory");
    return over;
}

#if SPLIT > 1
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

DEVICE u32 address_in(const void* p, int rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(p)), "r"(rank));
    return there;
}

DEVICE void barrier_arrive_in(u64* bar, int rank) {
    u32 there = address_in(bar, rank);
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

DEVICE Floats4 read_in(const Floats4* p, int rank) {
    Floats4 y;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(y.at[0]), "=f"(y.at[1]), "=f"(y.at[2]), "=f"(y.at[3])
                 : "r"(address_in(p, rank))
                 : "memory");
    return y;
}
#else
DEVICE void sync_cluster() { __syncthreads(); }
DEVICE void barrier_arrive_in(u64* bar, int) { barrier_arrive(bar); }
DEVICE Floats4 read_in(const Floats4* p, int) { return *p; }
#endif

DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }

DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

DEVICE u8* shared_memory() {
    extern __shared__ __align__(128) u8 shared_begin[];
    return shared_begin;
}

// Wait until the phase of that parity is over. A program that waits for four seconds will wait for ever: it ends the
// stream with an error instead.
DEVICE void barrier_wait(u64* bar, u32 parity) {
    if (barrier_over(bar, parity))
        return;
    u32 since = nanoseconds();
    while (!barrier_over(bar, parity))
        if (nanoseconds() - since > 4000000000u)
            asm volatile("trap;");
}

constexpr int COPYING = TILE;  // lanes that arrive at a stage's barrier when they have started their copies

// Whether the lane is the one of the warp that this is true for.
DEVICE bool one_lane() {
    u32 y;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(y));
    return y;
}

// The warps that copy wait for each other.
DEVICE void sync_copiers() { asm volatile("bar.sync 1, %0;" ::"n"(COPIERS * 32) : "memory"); }

DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Lane i copies row i, of `nbytes`, a multiple of 16 at a multiple of 16; no lane of TILE or more, no row where it is
// 0.
DEVICE void copy_row(u8* to, const u8* from, u32 nbytes, u64* bar, int lane) {
    if (lane < COPYING) {
        asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1; }" ::"r"(address(bar)),
                     "r"(nbytes)
                     : "memory");
        if (nbytes)
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                    address(to)),
                "l"(from), "r"(nbytes), "r"(address(bar))
                : "memory");
    }
}
