// Runs loaders/quant/kernels/cuda/few_rows.cu on a CPU: every thread of a program is a fiber, programs run one after the other, those
// of a cluster together.
//
// A fiber runs until it has to wait for others: at a barrier, or at an instruction that a warp executes together,
// whose operands are gathered from its 32 lanes. Copies are made at once. Shared memory begins as NaN and ends in a
// margin that must stay as it is, and copies are checked to lie within the weight and the ring.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

#define DEVICE static inline
#define __global__
#define __shared__
#define __launch_bounds__(threads, programs)

namespace machine {

struct Warp {
    int arrived = 0, age = 0;
    uint32_t operands[32][10];
    float results[32][4];
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool over = false;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
int current, first_program, threads, cluster_arrived, cluster_age;
int block_arrived[SPLIT], block_age[SPLIT];
int copiers_arrived[SPLIT], copiers_age[SPLIT];
const unsigned char *weight, *weight_end;
constexpr int MARGIN = 4096;
alignas(128) unsigned char shared[SPLIT][SHARED + MARGIN];
std::function<void()> body;

void fail(const char* what) {
    std::fprintf(stderr, "program %d, thread %d: %s\n", first_program + current / threads, current % threads, what);
    std::exit(3);
}

void wait() { swapcontext(&fibers[current]->context, &scheduler); }

template <class Last> void gather(int& arrived, int& age, int expected, Last last) {
    int mine = age;
    if (++arrived == expected) {
        last();
        arrived = 0;
        ++age;
    }
    while (age == mine)
        wait();
}

void entry() {
    body();
    fibers[current]->over = true;
    wait();
}

void run(int programs, int threads_of_a_program, std::function<void()> what) {
    body = what;
    threads = threads_of_a_program;
    for (first_program = 0; first_program < programs; first_program += SPLIT) {
        std::memset(shared, 0xff, sizeof shared);
        warps.assign(SPLIT * threads / 32, Warp());
        fibers.resize(SPLIT * threads);
        for (auto& fiber : fibers) {
            fiber = std::make_unique<Fiber>();
            fiber->stack.resize(64 * 1024);
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.data();
            fiber->context.uc_stack.ss_size = fiber->stack.size();
            fiber->context.uc_link = nullptr;
            makecontext(&fiber->context, entry, 0);
        }
        for (long round = 0, left = fibers.size(); left; ++round) {
            if (round > 2000000)
                fail("waits for ever");
            for (int i = 0, last = (int)fibers.size() - 1; i <= last; ++i) {
                current = round % 2 ? last - i : i;  // no lane is always ahead of another
                if (!fibers[current]->over) {
                    swapcontext(&scheduler, &fibers[current]->context);
                    left -= fibers[current]->over;
                }
            }
        }
        for (auto& own : shared)
            for (int i = 0; i < MARGIN; ++i)
                if (own[SHARED + i] != 0xff)
                    fail("wrote beyond its shared memory");
    }
}

struct Index {
    int x;
};

}  // namespace machine

#define threadIdx (machine::Index{machine::current % machine::threads})
#define blockIdx (machine::Index{machine::first_program + machine::current / machine::threads})

static inline void __syncthreads() {
    int rank = machine::current / machine::threads;
    machine::gather(machine::block_arrived[rank], machine::block_age[rank], machine::threads, [] {});
}

static inline void sync_cluster() {
    machine::gather(machine::cluster_arrived, machine::cluster_age, SPLIT * machine::threads, [] {});
}

static inline unsigned char* shared_memory() { return machine::shared[machine::current / machine::threads]; }

// Where another program of the cluster has what this one has at `p`.
template <class T> static inline T* in(T* p, int rank) {
    return (T*)(machine::shared[rank] + ((unsigned char*)p - shared_memory()));
}

template <class T> static inline T read_in(const T* p, int rank) { return *in(p, rank); }

static inline void __syncwarp() {
    machine::Warp& w = machine::warps[machine::current / 32];
    machine::gather(w.arrived, w.age, 32, [] {});
}

static inline float number(uint32_t bits) {
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

static inline uint32_t bits_of(float y) {
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    return bits;
}

static inline float bf16(uint32_t w, int half) { return number(half ? w & 0xffff0000u : w << 16); }

// Products and their sum are exact in float64, or next to it; the instruction is a little less so.
static inline void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    machine::Warp& w = machine::warps[machine::current / 32];
    int lane = machine::current % 32;
    uint32_t given[10] = {a0, a1, a2, a3, b0, b1, bits_of(sum[0]), bits_of(sum[1]), bits_of(sum[2]), bits_of(sum[3])};
    std::memcpy(w.operands[lane], given, sizeof given);
    machine::gather(w.arrived, w.age, 32, [&w] {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                int row = i / 2, column = lane % 4 * 2 + i % 2;
                double y = number(w.operands[lane][6 + i]);
                for (int c = 0; c < 4; ++c)
                    for (int k = 0; k < 4; ++k)
                        y += (double)bf16(w.operands[lane / 4 * 4 + c][k / 2 * 2 + row], k % 2) *
                             bf16(w.operands[column * 4 + c][4 + k / 2], k % 2);
                w.results[lane][i] = (float)y;
            }
    });
    std::memcpy(sum, w.results[lane], sizeof sum);
}

static inline uint32_t times(uint32_t x, uint32_t by) {  // by powers of two, so that nothing is rounded
    return bits_of(bf16(x, 0) * bf16(by, 0)) >> 16 | (bits_of(bf16(x, 1) * bf16(by, 1)) & 0xffff0000u);
}

static inline int kept(int x) { return x; }

static inline uint32_t flipped(uint32_t w, uint32_t mask, uint32_t flip) { return (w & mask) ^ flip; }

static inline float f16_low(uint32_t w) {
    _Float16 y;
    uint16_t bits = (uint16_t)w;
    std::memcpy(&y, &bits, 2);
    return (float)y;
}

static inline float f16_high(uint32_t w) { return f16_low(w >> 16); }

static inline uint16_t rounded(float y) {
    uint16_t bits;
#if X_IS_F16
    _Float16 half = (_Float16)y;
    std::memcpy(&bits, &half, 2);
#else
    uint32_t w = bits_of(y);
    bits = y != y ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
#endif
    return bits;
}

static inline uint32_t permuted(uint32_t x, uint32_t y, uint32_t bytes) {
    uint64_t both = (uint64_t)y << 32 | x;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (uint32_t)(both >> (bytes >> i * 4 & 7) * 8 & 0xff) << i * 8;
    return result;
}

static inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t by) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> (by & 31));
}

// A barrier: arrivals of a phase, arrivals that are left, and how many phases are over.
struct Barrier {
    uint16_t expected, left;
    uint32_t phases;
};

static inline void barrier_init(unsigned long long* bar, uint32_t arrivals) {
    *(Barrier*)bar = {(uint16_t)arrivals, (uint16_t)arrivals, 0};
}

static inline void barrier_arrive(unsigned long long* bar) {
    Barrier* b = (Barrier*)bar;
    if (--b->left == 0) {
        b->left = b->expected;
        ++b->phases;
    }
}

static inline void barrier_arrive_in(unsigned long long* bar, int rank) { barrier_arrive(in(bar, rank)); }

static inline void barrier_wait(unsigned long long* bar, uint32_t parity) {
    while ((((Barrier*)bar)->phases & 1) == parity)
        machine::wait();
}

static inline bool one_lane() { return machine::current % 32 == 5; }

static inline void sync_copiers() {
    int rank = machine::current / machine::threads;
    machine::gather(machine::copiers_arrived[rank], machine::copiers_age[rank], COPIERS * 32, [] {});
}

static inline void barriers_ready() {}

static inline void let_next_start() {}

static inline void wait_for_previous() {}

static constexpr int COPYING = 16;

static inline void copy_row(unsigned char* to, const unsigned char* from, uint32_t nbytes, unsigned long long* bar,
                            int lane) {
    if (lane >= COPYING)
        return;
    if (nbytes) {
        if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || nbytes % 16)
            machine::fail("copies from or to what is not a multiple of 16");
        if (from < machine::weight || from + nbytes > machine::weight_end)
            machine::fail("copies from beyond the weight");
        if (to < shared_memory() || to + nbytes > shared_memory() + SHARED)
            machine::fail("copies to beyond shared memory");
        std::memcpy(to, from, nbytes);
    }
    barrier_arrive(bar);
}
