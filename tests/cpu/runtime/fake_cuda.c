// Stands in for libcuda.so.1: enough for epjit.runtime.driver and Launch. It records the last launch.
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct {
  uint64_t function, stream, count;
  uint32_t grid, block, shared_bytes, starts_early;
  uint8_t record[4096];
} LastLaunch;

EXPORT LastLaunch fake_last;
EXPORT uint32_t fake_record_bytes;
EXPORT uint32_t fake_next_status;  // what the next launch returns
static uint32_t contexts_pushed;

EXPORT int cuInit(unsigned flags) { return 0; }
EXPORT int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)(intptr_t)(0x1000 + device); return 0; }
EXPORT int cuCtxPushCurrent_v2(void* context) { ++contexts_pushed; return 0; }
EXPORT int cuCtxPopCurrent_v2(void** context) { --contexts_pushed; *context = 0; return 0; }
EXPORT int cuGetErrorString(int status, const char** text) { *text = "what the fake driver says"; return 0; }
typedef struct {
  uint32_t id, pad;
  uint32_t value[16];
} Attribute;

typedef struct {
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  uint32_t num_attributes;
} Shape;

EXPORT int cuLaunchKernelEx(const Shape* shape, void* function, void** params, void** extra) {
  if ((fake_next_status == 201 || fake_next_status == 400) && contexts_pushed) fake_next_status = 0;
  if (fake_next_status) return fake_next_status;
  ++fake_last.count;
  fake_last.function = (uint64_t)function;
  fake_last.stream = (uint64_t)shape->stream;
  fake_last.grid = shape->grid[0] * shape->grid[1] * shape->grid[2];
  fake_last.block = shape->block[0] * shape->block[1] * shape->block[2];
  fake_last.shared_bytes = shape->shared_bytes;
  fake_last.starts_early = 0;
  for (unsigned i = 0; i < shape->num_attributes; ++i)  // 6: programmatic stream serialization
    if (shape->attributes[i].id == 6) fake_last.starts_early = shape->attributes[i].value[0];
  memcpy(fake_last.record, params[0], fake_record_bytes);
  return 0;
}

static int missing(void) { return 500; }  // CUDA_ERROR_NOT_FOUND

EXPORT int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, void* status) {
  static const struct { const char* name; void* function; } known[] = {
      {"cuInit", cuInit}, {"cuDeviceGet", cuDeviceGet}, {"cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain},
      {"cuCtxPushCurrent", cuCtxPushCurrent_v2}, {"cuCtxPopCurrent", cuCtxPopCurrent_v2},
      {"cuGetErrorString", cuGetErrorString}, {"cuLaunchKernelEx", cuLaunchKernelEx},
      {"cuGetProcAddress", cuGetProcAddress_v2}};
  *function = (void*)missing;
  for (unsigned i = 0; i < sizeof(known) / sizeof(known[0]); ++i)
    if (strcmp(name, known[i].name) == 0) *function = known[i].function;
  return 0;
}
EXPORT int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
