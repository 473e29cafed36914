// A camera's picture in, one row of an engine's input out, in one launch: int8 patches, or the image itself.
//
// The integers are those of vitedge/pixels.py and vitedge/resampling.py, so the result equals vitedge/preprocess.py to the
// bit: each source pixel becomes RGB (or its grey), rows are resampled across and rounded to 8 bits, then columns down.
// vitedge/backends/patchify.py chooses the tiles and says what every parameter is.
//
//     -DPIXELS=RGB|BGR|GREY|YUYV|NV12   how the picture is laid out
//     -DCHANNELS=1|3                    of the model
//     -DPATCH=side                      of a patch in pixels; 0: the input is uint8[height][width][CHANNELS]
//
// A block makes a tile of the result. Its source rows come in bands: a band is converted into shared memory, each pixel once
// though four columns or more will read it, and narrowed from there; when all narrow rows are there, the tile is made of them.

enum Format { RGB, BGR, GREY, YUYV, NV12 };

// Not constexpr int: NVRTC would put these into global memory.
enum Constant {
    PLANES = CHANNELS == 1 || PIXELS == GREY ? 1 : 3,  // the channels of a grey picture are equal: one is resampled
    SIDE = PATCH ? PATCH : 1,                          // patches of one pixel are laid out as the image is
    FLIP = PATCH ? 0x80 : 0,                           // makes an int8 of pixel - 128
    WEIGHT_BITS = 22,
    YUV_BITS = 20,
    THREADS = 256,
    BLOCKS = 4  // on a multiprocessor at once: allows 64 registers; without it ptxas 12.9 spills to have 32
};

// One pixel in shared memory: a word of red, green, blue from the low byte up, so that a tap costs one load, or a grey byte.
template <int planes> struct Stored { typedef unsigned type; };
template <> struct Stored<1> { typedef unsigned char type; };
typedef Stored<PLANES>::type Pixel;

__device__ __forceinline__ int clipped(int value) { return min(max(value, 0), 255); }

__device__ __forceinline__ Pixel packed(int red, int green, int blue) {
    if (PLANES == 3) return red | green << 8 | blue << 16;
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;  // as Pillow's convert("L")
}

// ITU-R BT.601 in video range, as OpenCV's cvtColor rounds it.
__device__ __forceinline__ Pixel from_yuv(int y, int u, int v) {
    const int luma = max(y - 16, 0) * 1220542 + (1 << (YUV_BITS - 1));
    u -= 128, v -= 128;
    return packed(clipped((luma + 1673527 * v) >> YUV_BITS), clipped((luma - 852492 * v - 409993 * u) >> YUV_BITS),
                  clipped((luma + 2116026 * u) >> YUV_BITS));
}

// Single bytes, because a row may begin at any address. Neighbouring threads read neighbouring bytes, so that the loads of a
// warp fall into the same few sectors and all but the first find them in the L1 cache.
__device__ __forceinline__ Pixel loaded(const unsigned char* picture, int height, int pitch, int row, int column) {
    const unsigned char* line = picture + (size_t)row * pitch;
    if (PIXELS == GREY) return __ldg(line + column);
    if (PIXELS == YUYV) {
        const unsigned char* pair = line + column / 2 * 4;
        return from_yuv(__ldg(line + 2 * column), __ldg(pair + 1), __ldg(pair + 3));
    }
    if (PIXELS == NV12) {
        const unsigned char* pair = picture + (size_t)(height + row / 2) * pitch + column / 2 * 2;
        return from_yuv(__ldg(line + column), __ldg(pair), __ldg(pair + 1));
    }
    const unsigned char* pixel = line + 3 * column;
    const int first = __ldg(pixel), green = __ldg(pixel + 1), last = __ldg(pixel + 2);
    return PIXELS == BGR ? packed(last, green, first) : packed(first, green, last);
}

// The sums of one result. 32 bits hold them: the weights of a pixel add up to 1, and their absolute values to under 2.
struct Sums {
    int of[PLANES];

    __device__ __forceinline__ Sums() {
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) of[plane] = 1 << (WEIGHT_BITS - 1);
    }
    __device__ __forceinline__ void add(Pixel pixel, int weight) {
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) of[plane] += (int)(pixel >> (8 * plane) & 0xFF) * weight;
    }
    __device__ __forceinline__ Pixel rounded() const {
        Pixel pixel = 0;
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) pixel |= clipped(of[plane] >> WEIGHT_BITS) << (8 * plane);
        return pixel;
    }
};

// Weights lie [tap][result], so that the threads of a warp read neighbours.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
patchify(const unsigned char* __restrict__ picture, unsigned char* __restrict__ out,
         const int* __restrict__ first_x, const int* __restrict__ weights_x,
         const int* __restrict__ first_y, const int* __restrict__ weights_y,
         int source_height, int pitch, int height, int width, int taps_x, int taps_y,
         int tile_height, int band, int staged_pitch) {
    extern __shared__ Pixel shared[];
    Pixel* const staged = shared;                        // [band][staged_pitch] pixels of the picture
    Pixel* const narrow = shared + band * staged_pitch;  // [rows of the tile][blockDim.x], as wide as the result

    const int tile_x = blockIdx.x * blockDim.x, tile_y = blockIdx.y * tile_height;
    const int end_x = min(tile_x + (int)blockDim.x, width), end_y = min(tile_y + tile_height, height);
    const int left = __ldg(first_x + tile_x), columns = __ldg(first_x + end_x - 1) + taps_x - left;
    const int top = __ldg(first_y + tile_y), rows = __ldg(first_y + end_y - 1) + taps_y - top;
    const int x = tile_x + threadIdx.x, lines = blockDim.y;
    const int start = x < width ? __ldg(first_x + x) - left : 0;

    for (int done = 0; done < rows; done += band) {
        const int count = min(band, rows - done);
        for (int row = threadIdx.y; row < count; row += lines) {
#pragma unroll 4
            for (int column = threadIdx.x; column < columns; column += blockDim.x)
                staged[row * staged_pitch + column] = loaded(picture, source_height, pitch, top + done + row, left + column);
        }
        __syncthreads();
        // Two rows at a time share the load of each weight.
        for (int row = threadIdx.y; row < count && x < width; row += 2 * lines) {
            const int other = min(row + lines, count - 1);
            const Pixel* const one = staged + row * staged_pitch + start;
            const Pixel* const two = staged + other * staged_pitch + start;
            Sums sums, more;
#pragma unroll 4
            for (int tap = 0; tap < taps_x; ++tap) {
                const int weight = __ldg(weights_x + tap * width + x);
                sums.add(one[tap], weight);
                more.add(two[tap], weight);
            }
            narrow[(done + row) * blockDim.x + threadIdx.x] = sums.rounded();
            if (row + lines < count) narrow[(done + other) * blockDim.x + threadIdx.x] = more.rounded();
        }
        __syncthreads();
    }

    for (int y = tile_y + threadIdx.y; y < end_y && x < width; y += lines) {
        const Pixel* const column = narrow + (__ldg(first_y + y) - top) * blockDim.x + threadIdx.x;
        Sums sums;
#pragma unroll 4
        for (int tap = 0; tap < taps_y; ++tap) sums.add(column[tap * blockDim.x], __ldg(weights_y + tap * height + y));
        const unsigned pixel = sums.rounded();
        const int patch = y / SIDE * (width / SIDE) + x / SIDE, within = y % SIDE * SIDE + x % SIDE;
        unsigned char* const place = out + ((size_t)patch * SIDE * SIDE + within) * CHANNELS;
#pragma unroll
        for (int channel = 0; channel < CHANNELS; ++channel) place[channel] = (pixel >> (8 * (channel % PLANES)) & 0xFF) ^ FLIP;
    }
}
