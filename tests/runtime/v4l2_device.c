/* A camera at V4L2_PATH for the process that this is preloaded into: what the kernel's driver would answer to OpenCV.

   It offers YUYV in 640x480 and 1280x720, the latter at 10 frames a second, MJPG in both at 30, and GREY in 640x480; of
   anything else it takes what is nearest, without a word, as drivers do. V4L2_JPEG is the picture of MJPG. V4L2_CASE is one
   of "busy" (another program has its buffers), "denied", "metadata" (takes no pictures) and "unplugged" (after 30 frames).
   The handle is that of a timer, so that select() and poll() wait for the next frame. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define BUFFERS 8
#define LENGTH (1280 * 720 * 2)
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static struct { unsigned format, width, height, fps; } offers[] = {
    {V4L2_PIX_FMT_YUYV, 640, 480, 30}, {V4L2_PIX_FMT_YUYV, 1280, 720, 10}, {V4L2_PIX_FMT_MJPEG, 640, 480, 30},
    {V4L2_PIX_FMT_MJPEG, 1280, 720, 30}, {V4L2_PIX_FMT_GREY, 640, 480, 30}};
static const int OFFERS = sizeof offers / sizeof *offers;
static unsigned formats[] = {V4L2_PIX_FMT_YUYV, V4L2_PIX_FMT_MJPEG, V4L2_PIX_FMT_GREY};
static int timer = -1, memory = -1, chosen = 0, waiting = 0, frames = 0;
static unsigned fps = 30, queue[BUFFERS];

static int is_case(const char *name) { return getenv("V4L2_CASE") && !strcmp(getenv("V4L2_CASE"), name); }
static int is_camera(const char *path) { return getenv("V4L2_PATH") && path && !strcmp(getenv("V4L2_PATH"), path); }
static int fails(int number) { errno = number; return -1; }

static int open_camera(void) {
    if (is_case("denied")) return fails(EACCES);
    int handle = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    if (timer < 0) timer = handle, chosen = 0, fps = 30, waiting = frames = 0;
    if (memory < 0) memory = memfd_create("frames", 0), ftruncate(memory, BUFFERS * LENGTH);
    return handle;
}

int open(const char *path, int flags, ...) {
    va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list);
    return is_camera(path) ? open_camera() : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list);
    return is_camera(path) ? open_camera() : REAL(open64)(path, flags, mode);
}
int stat(const char *path, struct stat *found) {
    if (is_camera(path)) { memset(found, 0, sizeof *found); found->st_mode = S_IFCHR | 0660; return 0; }
    return REAL(stat)(path, found);
}
int stat64(const char *path, struct stat64 *found) {
    if (is_camera(path)) { memset(found, 0, sizeof *found); found->st_mode = S_IFCHR | 0660; return 0; }
    return REAL(stat64)(path, found);
}
int close(int handle) {
    if (handle == timer) timer = -1;
    return REAL(close)(handle);
}
void *mmap(void *at, size_t length, int protection, int flags, int handle, off_t offset) {
    return REAL(mmap)(at, length, protection, flags, handle >= 0 && handle == timer ? memory : handle, offset);
}
void *mmap64(void *at, size_t length, int protection, int flags, int handle, off64_t offset) {
    return REAL(mmap64)(at, length, protection, flags, handle >= 0 && handle == timer ? memory : handle, offset);
}

static void choose(struct v4l2_pix_format *pix) {
    int best = 0;
    long least = -1;
    for (int i = 0; i < OFFERS; i++) {
        long away = labs((long)offers[i].width - pix->width) + (offers[i].format != pix->pixelformat) * 100000L;
        if (least < 0 || away < least) least = away, best = i;
    }
    chosen = best;
    if (fps > offers[best].fps) fps = offers[best].fps;
}
static void describe(struct v4l2_pix_format *pix) {
    pix->width = offers[chosen].width, pix->height = offers[chosen].height, pix->pixelformat = offers[chosen].format;
    pix->field = V4L2_FIELD_NONE, pix->sizeimage = LENGTH;
    pix->bytesperline = pix->pixelformat == V4L2_PIX_FMT_YUYV ? 2 * pix->width : pix->width;
}
static unsigned fill(unsigned char *to) {
    unsigned pixels = offers[chosen].width * offers[chosen].height;
    if (offers[chosen].format == V4L2_PIX_FMT_YUYV) {  /* red, as ITU-R BT.601 has it */
        for (unsigned i = 0; i < pixels; i += 2) memcpy(to + 2 * i, "\x51\x5a\x51\xf0", 4);
        return 2 * pixels;
    }
    if (offers[chosen].format == V4L2_PIX_FMT_GREY) { memset(to, 90, pixels); return pixels; }
    FILE *file = fopen(getenv("V4L2_JPEG"), "rb");
    unsigned length = fread(to, 1, LENGTH, file);
    fclose(file);
    return length;
}
static int next_frame(struct v4l2_buffer *buffer) {
    unsigned long long due;
    if (is_case("unplugged") && frames >= 30) return fails(ENODEV);
    if (!waiting || read(timer, &due, sizeof due) != sizeof due) return fails(EAGAIN);
    buffer->index = queue[0], buffer->flags = V4L2_BUF_FLAG_DONE, buffer->length = LENGTH, buffer->sequence = frames++;
    memmove(queue, queue + 1, --waiting * sizeof *queue);
    unsigned char *to = REAL(mmap)(0, LENGTH, PROT_WRITE, MAP_SHARED, memory, (off_t)buffer->index * LENGTH);
    buffer->bytesused = fill(to);
    munmap(to, LENGTH);
    return 0;
}
static int stream(int on) {
    struct itimerspec rate = {{0, on ? 1000000000 / fps : 0}, {0, on ? 1000000000 / fps : 0}};
    waiting = on ? waiting : 0;
    return timerfd_settime(timer, 0, &rate, NULL);
}
static int enumerate_size(struct v4l2_frmsizeenum *size) {
    for (int i = 0, found = 0; i < OFFERS; i++)
        if (offers[i].format == size->pixel_format && found++ == (int)size->index) {
            size->type = V4L2_FRMSIZE_TYPE_DISCRETE;
            size->discrete.width = offers[i].width, size->discrete.height = offers[i].height;
            return 0;
        }
    return fails(EINVAL);
}

static int answer(int handle, unsigned long request, void *to) {
    struct v4l2_capability *capability = to;
    struct v4l2_fmtdesc *description = to;
    struct v4l2_format *format = to;
    struct v4l2_streamparm *rate = to;
    struct v4l2_requestbuffers *buffers = to;
    struct v4l2_buffer *buffer = to;
    switch (request) {
    case VIDIOC_QUERYCAP:
        memset(capability, 0, sizeof *capability);
        strcpy((char *)capability->card, "a camera of our own");
        capability->capabilities = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING | V4L2_CAP_DEVICE_CAPS;
        capability->device_caps = (is_case("metadata") ? V4L2_CAP_META_CAPTURE : V4L2_CAP_VIDEO_CAPTURE) | V4L2_CAP_STREAMING;
        if (is_case("metadata")) capability->capabilities = V4L2_CAP_META_CAPTURE | V4L2_CAP_STREAMING | V4L2_CAP_DEVICE_CAPS;
        return 0;
    case VIDIOC_ENUM_FMT:
        if (description->index >= sizeof formats / sizeof *formats) return fails(EINVAL);
        description->pixelformat = formats[description->index];
        return 0;
    case VIDIOC_ENUM_FRAMESIZES: return enumerate_size(to);
    case VIDIOC_S_FMT: choose(&format->fmt.pix); /* and tell */ __attribute__((fallthrough));
    case VIDIOC_G_FMT: describe(&format->fmt.pix); return 0;
    case VIDIOC_S_PARM:
        fps = rate->parm.capture.timeperframe.denominator / (rate->parm.capture.timeperframe.numerator ?: 1);
        if (fps > offers[chosen].fps) fps = offers[chosen].fps;
        __attribute__((fallthrough));
    case VIDIOC_G_PARM:
        rate->parm.capture.capability = V4L2_CAP_TIMEPERFRAME;
        rate->parm.capture.timeperframe.numerator = 1, rate->parm.capture.timeperframe.denominator = fps;
        return 0;
    case VIDIOC_REQBUFS:
        if (is_case("busy")) return fails(EBUSY);
        if (buffers->count > BUFFERS) buffers->count = BUFFERS;
        return 0;
    case VIDIOC_QUERYBUF:
        buffer->length = LENGTH, buffer->m.offset = buffer->index * LENGTH;
        return 0;
    case VIDIOC_QBUF: queue[waiting++] = buffer->index; return 0;
    case VIDIOC_DQBUF: return next_frame(buffer);
    case VIDIOC_STREAMON: return stream(1);
    case VIDIOC_STREAMOFF: return stream(0);
    default: return fails(ENOTTY);
    }
}

int ioctl(int handle, unsigned long request, ...) {
    va_list list; va_start(list, request); void *to = va_arg(list, void *); va_end(list);
    if (((request >> 8) & 0xff) != 'V') return REAL(ioctl)(handle, request, to);
    request &= 0xffffffff;  /* Python hands it over with its sign */
    return answer(handle, request, to);
}
