// Runs patchify.cu on a CPU, block after block, with CUDA's meaning of __syncthreads.
//
// As a library, the threads of a block are fibers: one runs up to its next barrier, then the next; deterministic and quick.
// As a program (-DTHREADED), they are threads of the system, for the sanitizers: program CASE OUT runs the launch in the file CASE
// and writes the result to OUT. Every argument lies in memory of its exact size, and shared memory ends where the launch says.
#include "cuda_shim.h"

#include <stdlib.h>
#include <string.h>

extern "C" void patchify(const unsigned char*, unsigned char*, const int*, const int*, const int*, const int*,
                         int, int, int, int, int, int, int, int, int);

constexpr size_t SHARED_BYTES = 48 * 1024;
alignas(16) unsigned char shared[SHARED_BYTES];
__thread Index threadIdx, blockIdx;
Index blockDim, gridDim;

struct Arguments {
    const unsigned char* picture;
    unsigned char* out;
    const int* tables[4];
    int scalars[9];
};

static void call(const Arguments& a) {
    const int* s = a.scalars;
    patchify(a.picture, a.out, a.tables[0], a.tables[1], a.tables[2], a.tables[3],
             s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]);
}

#ifndef THREADED

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <vector>

constexpr size_t STACK_BYTES = 32 * 1024;

// Lives on from block to block. ucontext makes its stack; setjmp changes to it ten times as fast, without a system call.
struct Fiber {
    Index index;
    bool begun = false, waiting = false;
    ucontext_t context;
    jmp_buf state;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
};

static std::deque<Fiber> fibers;
static Fiber* running;
static jmp_buf scheduler;
static const Arguments* arguments;

static void leave(bool waiting) {
    running->waiting = waiting;
    if (!_setjmp(running->state)) _longjmp(scheduler, 1);
}

void __syncthreads() { leave(true); }

static void live() {
    for (;;) {
        call(*arguments);
        leave(false);
    }
}

static void enter(Fiber& fiber) {
    running = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.state, 1);
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.context, live, 0);
    setcontext(&fiber.context);
}

// To the next barrier with every thread of a block. 1: all wait there. 0: all are done. -1: some of each.
static int advance(size_t threads) {
    size_t waiting = 0;
    for (size_t i = 0; i < threads; ++i) {
        enter(fibers[i]);
        waiting += fibers[i].waiting;
    }
    return waiting == threads ? 1 : waiting ? -1 : 0;
}

// 0, or 1 where not all threads of a block came to a barrier, which on a GPU would hang or worse; it is of no use afterwards.
extern "C" int launch(const unsigned* grid, const unsigned* block, const Arguments* given) {
    gridDim = {grid[0], grid[1], 1}, blockDim = {block[0], block[1], 1};
    const size_t threads = (size_t)blockDim.x * blockDim.y;
    if (fibers.size() < threads) fibers.resize(threads);
    arguments = given;
    for (unsigned tile = 0; tile < gridDim.x * gridDim.y; ++tile) {
        blockIdx = {tile % gridDim.x, tile / gridDim.x, 0};
        memset(shared, 0xA5, SHARED_BYTES);  // what was never written must not look right
        for (unsigned i = 0; i < threads; ++i) fibers[i].index = {i % blockDim.x, i / blockDim.x, 0};
        int state;
        while ((state = advance(threads)) == 1) {}
        if (state < 0) return 1;
    }
    return 0;
}

#else

#include <pthread.h>
#include <stdio.h>

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) (void)(bytes)
#endif

static pthread_barrier_t barrier;
static std::vector<std::unique_ptr<unsigned char[]>> held;

void __syncthreads() { pthread_barrier_wait(&barrier); }

// The blocks follow one another, since they share what each has to itself on a GPU.
static void run(const Arguments& arguments, unsigned x, unsigned y) {
    threadIdx = {x, y, 0};
    for (unsigned tile = 0; tile < gridDim.x * gridDim.y; ++tile) {
        blockIdx = {tile % gridDim.x, tile / gridDim.x, 0};
        call(arguments);
        __syncthreads();
    }
}

static unsigned number(FILE* file) {
    unsigned value;
    if (fread(&value, sizeof value, 1, file) != 1) exit(2);
    return value;
}

// How many bytes follow, then these.
static unsigned char* bytes(FILE* file, size_t& count) {
    count = number(file);
    held.emplace_back(new unsigned char[count]);
    if (fread(held.back().get(), 1, count, file) != count) exit(2);
    return held.back().get();
}

int main(int, char** words) {
    FILE* file = fopen(words[1], "rb");
    if (!file) return 2;
    gridDim.x = number(file), gridDim.y = number(file), blockDim.x = number(file), blockDim.y = number(file);
    const size_t shared_bytes = number(file);
    Arguments arguments;
    for (int& scalar : arguments.scalars) scalar = (int)number(file);
    size_t count;
    for (const int*& table : arguments.tables) table = reinterpret_cast<int*>(bytes(file, count));
    arguments.picture = bytes(file, count);
    arguments.out = bytes(file, count);
    ASAN_POISON_MEMORY_REGION(shared + shared_bytes, SHARED_BYTES - shared_bytes);

    pthread_barrier_init(&barrier, nullptr, blockDim.x * blockDim.y);
    std::vector<std::thread> threads;
    for (unsigned y = 0; y < blockDim.y; ++y)
        for (unsigned x = 0; x < blockDim.x; ++x) threads.emplace_back(run, std::cref(arguments), x, y);
    for (std::thread& thread : threads) thread.join();

    FILE* result = fopen(words[2], "wb");
    return result && fwrite(arguments.out, 1, count, result) == count && !fclose(result) ? 0 : 2;
}

#endif
