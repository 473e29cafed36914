// A CUDA driver without a GPU: libcuda.so.1 for PyCUDA and cuda-bindings, whose real code runs on it.
//
// "Device" memory is memory of the process. What is put into a stream runs at the last moment at which a GPU may run it: when
// somebody waits. So whoever reads a result, or writes into what is still to be copied, without waiting, gets what a GPU would
// give on its worst day. Contexts, captures and handles are as strict as the real ones: no current context, memory that is not
// pinned or freed twice, an allocation or a wait within a capture are errors with the real codes.
//
// fake_* below tell a test what was called, hold the answers that it wants, and let a kernel be a function of Python.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {
enum Status { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
              INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };
using Work = std::function<void()>;
using Callback = void (*)(const char *name, const unsigned *sizes, const void *parameters, size_t bytes);

struct Graph { std::vector<Work> work; };
struct Stream { std::deque<Work> pending; std::unique_ptr<Graph> capture; bool broken = false; std::thread::id by; unsigned flags = 0; };
struct Event { std::shared_ptr<long> reached = std::make_shared<long>(0); Stream *stream = nullptr; unsigned flags = 0; };
struct Module { std::string image; };
struct Function { std::string name; };

std::recursive_mutex turn;
bool initialized = false;
int retained = 0, context_marker = 0, fault = 0;
thread_local std::vector<void *> contexts;
std::vector<std::string> calls;
std::map<std::string, std::pair<int, int>> failures;  // function -> calls that still succeed, then the status
std::map<int, int> attributes = {{16, 8}, {18, 0}, {19, 1}, {75, 8}, {76, 7}};
std::map<char *, size_t> device_memory, pinned_memory;
std::set<void *> streams, events, modules, graphs, executables;
size_t memory = size_t(1) << 32;
long clock_us = 0;
Callback on_launch = nullptr;

template <class T> bool known(const std::set<void *> &all, T *one) { return all.count(one) > 0; }
bool inside(const std::map<char *, size_t> &blocks, const void *address, size_t bytes) {
    auto next = blocks.upper_bound((char *)address);
    if (next == blocks.begin()) return false;
    --next;
    return (char *)address + bytes <= next->first + next->second;
}
size_t used() { size_t sum = 0; for (auto &block : device_memory) sum += block.second; return sum; }
bool capturing_here() {  // a thread-local capture forbids its own thread what would have to happen at once
    for (void *each : streams) { auto *stream = (Stream *)each; if (stream->capture && stream->by == std::this_thread::get_id()) return true; }
    return false;
}
void break_captures() {
    for (void *each : streams) { auto *stream = (Stream *)each; if (stream->capture && stream->by == std::this_thread::get_id()) stream->broken = true; }
}
bool step(Stream *stream) {  // without the lock, since work may be Python's, whose own lock another caller may hold
    if (!known(streams, stream) || stream->pending.empty()) return false;
    auto work = stream->pending.front();
    stream->pending.pop_front();
    turn.unlock();
    work();
    turn.lock();
    return true;
}
void drain(Stream *stream) { while (step(stream)) {} }
int put(Stream *stream, Work work) {
    if (!known(streams, stream)) return INVALID_HANDLE;
    if (stream->broken) return CAPTURE_INVALIDATED;
    if (stream->capture) stream->capture->work.push_back(work); else stream->pending.push_back(work);
    return OK;
}
bool gives_back(const char *function) { return strstr(function, "Destroy") || strstr(function, "Free") || strstr(function, "Unload"); }
int enter(const char *function, bool needs_context) {
    calls.push_back(function);
    auto found = failures.find(function);
    if (found != failures.end() && found->second.first-- <= 0) return found->second.second;
    if (fault && !gives_back(function) && strncmp(function, "cuCtx", 5)) return fault;
    if (!initialized && strcmp(function, "cuInit")) return NOT_INITIALIZED;
    return needs_context && contexts.empty() ? INVALID_CONTEXT : OK;
}
}  // namespace

#define API extern "C" __attribute__((visibility("default")))
#define ENTER(needs_context) std::lock_guard<std::recursive_mutex> hold(turn); if (int status = enter(__func__, needs_context)) return status
#define NOT_WHILE_CAPTURING if (capturing_here()) { break_captures(); return CAPTURE_UNSUPPORTED; }

API int fake_calls() { return (int)calls.size(); }
API const char *fake_call(int index) { return calls[index].c_str(); }
API void fake_forget() { calls.clear(); failures.clear(); fault = 0; }
API void fake_fault(int status) { fault = status; }  // sticky: all fails from here on; what is given back is gone, and fails, too
API void fake_fail(const char *function, int after, int status) { failures[function] = {after, status}; }
API void fake_attribute(int which, int value) { attributes[which] = value; }
API void fake_memory(size_t bytes) { memory = bytes; }
API void fake_on_launch(Callback callback) { on_launch = callback; }
API int fake_flags(Stream *stream) { return (int)stream->flags; }
API int fake_live(int what) {
    size_t live[] = {device_memory.size(), pinned_memory.size(), streams.size(), events.size(), modules.size(), graphs.size() + executables.size()};
    return (int)live[what];
}
API int fake_put(Stream *stream, void (*work)(long), long argument) {  // what TensorRT does: put work into a stream
    std::lock_guard<std::recursive_mutex> hold(turn);
    calls.push_back(stream->capture ? "enqueue captured" : "enqueue");
    return put(stream, [=] { work(argument); });
}

API int cuInit(unsigned) { ENTER(false); initialized = true; return OK; }
API int cuDriverGetVersion(int *version) { ENTER(false); *version = 13000; return OK; }
API int cuDeviceGetCount(int *count) { ENTER(false); *count = 1; return OK; }
API int cuDeviceGet(int *device, int ordinal) { ENTER(false); *device = ordinal; return ordinal ? 101 : OK; }
API int cuDeviceGetName(char *name, int length, int) { ENTER(false); snprintf(name, length, "No GPU"); return OK; }
API int cuDeviceComputeCapability(int *major, int *minor, int) { ENTER(false); *major = attributes[75]; *minor = attributes[76]; return OK; }
API int cuDeviceTotalMem_v2(size_t *bytes, int) { ENTER(false); *bytes = memory; return OK; }
API int cuDeviceGetAttribute(int *value, int which, int) { ENTER(false); *value = attributes[which]; return OK; }
API int cuDevicePrimaryCtxRetain(void **context, int) { ENTER(false); ++retained; *context = &context_marker; return OK; }
API int cuDevicePrimaryCtxRelease_v2(int) { ENTER(false); return --retained < 0 ? INVALID_CONTEXT : OK; }
API int cuCtxPushCurrent_v2(void *context) { ENTER(false); contexts.push_back(context); return OK; }
API int cuCtxPopCurrent_v2(void **context) { ENTER(true); *context = contexts.back(); contexts.pop_back(); return OK; }
API int cuCtxGetCurrent(void **context) { ENTER(false); *context = contexts.empty() ? nullptr : contexts.back(); return OK; }
API int cuCtxGetDevice(int *device) { ENTER(true); *device = 0; return OK; }
API int cuCtxSynchronize() { ENTER(true); NOT_WHILE_CAPTURING; auto all = streams; for (void *each : all) drain((Stream *)each); return OK; }

API int cuStreamCreate(Stream **stream, unsigned flags) { ENTER(true); *stream = new Stream; (*stream)->flags = flags; streams.insert(*stream); return OK; }
API int cuStreamDestroy_v2(Stream *stream) { ENTER(true); if (!known(streams, stream)) return INVALID_HANDLE; if (!fault) drain(stream); streams.erase(stream); delete stream; return fault; }
API int cuStreamSynchronize(Stream *stream) {
    ENTER(true);
    if (!known(streams, stream)) return INVALID_HANDLE;
    if (stream->capture) { stream->broken = true; return CAPTURE_UNSUPPORTED; }
    drain(stream);
    return OK;
}
API int cuStreamQuery(Stream *stream) { ENTER(true); return stream->pending.empty() ? OK : NOT_READY; }
API int cuStreamIsCapturing(Stream *stream, int *status) { ENTER(true); *status = stream->capture ? (stream->broken ? 2 : 1) : 0; return OK; }
API int cuStreamBeginCapture_v2(Stream *stream, int mode) {
    ENTER(true);
    if (!known(streams, stream) || stream->capture || mode != 1) return INVALID_VALUE;
    stream->capture.reset(new Graph);
    stream->by = std::this_thread::get_id();
    return OK;
}
API int cuStreamEndCapture(Stream *stream, Graph **graph) {
    std::lock_guard<std::recursive_mutex> hold(turn);
    *graph = nullptr;
    if (!known(streams, stream) || !stream->capture) return INVALID_VALUE;
    bool broken = stream->broken;
    stream->broken = false;
    auto captured = std::move(stream->capture);  // it ends, whatever the status
    if (int status = enter(__func__, true)) return status;
    if (broken) return CAPTURE_INVALIDATED;
    graphs.insert(*graph = captured.release());
    return OK;
}
API int cuGraphInstantiateWithFlags(Graph **executable, Graph *graph, unsigned long long) {
    ENTER(true);
    if (!known(graphs, graph)) return INVALID_VALUE;
    executables.insert(*executable = new Graph(*graph));
    return OK;
}
API int cuGraphInstantiate(Graph **executable, Graph *graph, unsigned long long flags) { return cuGraphInstantiateWithFlags(executable, graph, flags); }
API int cuGraphLaunch(Graph *executable, Stream *stream) {
    ENTER(true);
    if (!known(executables, executable)) return INVALID_VALUE;
    for (auto &work : executable->work) if (int status = put(stream, work)) return status;
    return OK;
}
API int cuGraphDestroy(Graph *graph) { ENTER(true); if (!graphs.erase(graph)) return INVALID_VALUE; delete graph; return fault; }
API int cuGraphExecDestroy(Graph *executable) { ENTER(true); if (!executables.erase(executable)) return INVALID_VALUE; delete executable; return fault; }

API int cuEventCreate(Event **event, unsigned flags) { ENTER(true); *event = new Event; (*event)->flags = flags; events.insert(*event); return OK; }
API int cuEventDestroy_v2(Event *event) { ENTER(true); if (!events.erase(event)) return INVALID_HANDLE; delete event; return fault; }
API int cuEventRecord(Event *event, Stream *stream) {
    ENTER(true);
    if (!known(events, event)) return INVALID_HANDLE;
    event->stream = stream;
    event->reached = std::make_shared<long>(0);
    auto reached = event->reached;
    return put(stream, [reached] { *reached = clock_us += 250; });
}
API int cuEventSynchronize(Event *event) {
    ENTER(true);
    NOT_WHILE_CAPTURING;
    while (event->stream && !*event->reached && step(event->stream)) {}
    return OK;
}
API int cuEventElapsedTime_v2(float *ms, Event *start, Event *end) {
    ENTER(true);
    if ((start->flags | end->flags) & 2) return INVALID_HANDLE;
    if (!*start->reached || !*end->reached) return NOT_READY;
    *ms = (*end->reached - *start->reached) / 1000.f;
    return OK;
}

API int cuMemAlloc_v2(char **address, size_t bytes) {
    ENTER(true);
    NOT_WHILE_CAPTURING;
    if (!bytes) return INVALID_VALUE;
    if (used() + bytes > memory) return OUT_OF_MEMORY;
    *address = (char *)aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(*address, 0xA5, bytes);  // what was there before is not zero
    device_memory[*address] = bytes;
    return OK;
}
API int cuMemFree_v2(char *address) {
    ENTER(true);
    NOT_WHILE_CAPTURING;
    if (!device_memory.erase(address)) return INVALID_VALUE;
    free(address);
    return fault;
}
API int cuMemHostAlloc(char **address, size_t bytes, unsigned) {
    ENTER(true);
    NOT_WHILE_CAPTURING;
    if (!bytes) return INVALID_VALUE;
    *address = (char *)aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    memset(*address, 0xA5, bytes);
    pinned_memory[*address] = bytes;
    return OK;
}
API int cuMemFreeHost(char *address) {
    ENTER(true);
    NOT_WHILE_CAPTURING;
    if (!pinned_memory.erase(address)) return INVALID_VALUE;
    free(address);
    return fault;
}
API int cuMemHostGetDevicePointer_v2(char **address, char *host, unsigned) {
    ENTER(true);
    if (!inside(pinned_memory, host, 1)) return INVALID_VALUE;
    *address = host;
    return OK;
}
API int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { ENTER(true); *free_bytes = memory - used(); *total = memory; return OK; }
API int cuMemcpyHtoDAsync_v2(char *to, const char *from, size_t bytes, Stream *stream) {
    ENTER(true);
    if (!inside(device_memory, to, bytes) || !inside(pinned_memory, from, bytes)) return INVALID_VALUE;
    return put(stream, [=] { memcpy(to, from, bytes); });
}
API int cuMemcpyDtoHAsync_v2(char *to, const char *from, size_t bytes, Stream *stream) {
    ENTER(true);
    if (!inside(device_memory, from, bytes) || !inside(pinned_memory, to, bytes)) return INVALID_VALUE;
    return put(stream, [=] { memcpy(to, from, bytes); });
}

API int cuModuleLoadDataEx(Module **module, const char *image, unsigned, void *, void **) {
    ENTER(true);
    NOT_WHILE_CAPTURING;
    if (memcmp(image, "\x7f" "ELF", 4)) return INVALID_IMAGE;
    modules.insert(*module = new Module);
    return OK;
}
API int cuModuleLoadData(Module **module, const char *image) { return cuModuleLoadDataEx(module, image, 0, nullptr, nullptr); }
API int cuModuleUnload(Module *module) { ENTER(true); if (!modules.erase(module)) return INVALID_HANDLE; delete module; return fault; }
API int cuModuleGetFunction(Function **function, Module *module, const char *name) {
    ENTER(true);
    if (!known(modules, module) || !strncmp(name, "no_such", 7)) return NOT_FOUND;
    *function = new Function{name};
    return OK;
}
API int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                       Stream *stream, void **each, void **extra) {
    ENTER(true);
    if (!gx || !gy || !gz || !bx || !by || !bz || size_t(bx) * by * bz > 1024 || gy > 65535 || gz > 65535) return INVALID_VALUE;
    std::string parameters;
    if (each)  // the stand-in's kernel in tests/gpu: two addresses and an int
        parameters = std::string((char *)each[0], 8) + std::string((char *)each[1], 8) + std::string((char *)each[2], 4);
    else
        parameters = std::string((const char *)extra[1], *(size_t *)extra[3]);  // CU_LAUNCH_PARAM_BUFFER_POINTER and _SIZE
    std::vector<unsigned> sizes = {gx, gy, gz, bx, by, bz, shared};
    return put(stream, [=] { if (on_launch) on_launch(function->name.c_str(), sizes.data(), parameters.data(), parameters.size()); });
}

API int cuGetErrorString(int status, const char **text) {
    static const std::map<int, const char *> texts = {
        {0, "no error"}, {1, "invalid argument"}, {2, "out of memory"}, {3, "initialization error"}, {200, "device kernel image is invalid"},
        {201, "invalid device context"}, {400, "invalid resource handle"}, {500, "named symbol not found"}, {600, "device not ready"},
        {700, "an illegal memory access was encountered"}, {719, "unspecified launch failure"}, {801, "operation not supported"},
        {900, "operation not permitted when stream is capturing"}, {901, "operation failed due to a previous error during capture"}};
    auto found = texts.find(status);
    *text = found == texts.end() ? nullptr : found->second;
    return found == texts.end() ? INVALID_VALUE : OK;
}
API int cuGetErrorName(int status, const char **text) { return cuGetErrorString(status, text); }
API int cuGetProcAddress_v2(const char *name, void **address, int, uint64_t, int *found) {
    *address = nullptr;
    for (const char *suffix : {"_v2", ""})  // which of an older and a newer form this file has
        if (!*address) *address = dlsym(RTLD_DEFAULT, (std::string(name) + suffix).c_str());
    if (found) *found = *address ? 0 : 1;
    return OK;
}
