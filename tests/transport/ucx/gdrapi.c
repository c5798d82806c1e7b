// Stands in for GDRCopy (libgdrapi.so.2), which maps GPU memory for the CPU. With NVSHMEM_HEAP_KIND=SYSMEM
// the symmetric heap is memory of the host, so a mapping is the address itself, and so is a handle.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  uintptr_t address;
} Handle;

typedef struct {
  uint64_t address, size;
  uint32_t page_size;
  uint64_t timer;
  uint32_t timer_per_ms;
  uint32_t is_mapped : 1, is_write_combining : 1;
} Info;

// Newer versions NVSHMEM 3.8.0 asks for DMA-BUF.
void gdr_runtime_get_version(int* major, int* minor) { *major = 2, *minor = 5; }

int gdr_driver_get_version(void* gdr, int* major, int* minor) {
  *major = 2, *minor = 5;
  return 0;
}

void* gdr_open(void) {
  static int device;
  return &device;
}

int gdr_close(void* gdr) { return 0; }

int gdr_pin_buffer(void* gdr, uintptr_t address, size_t size, uint64_t token, uint32_t space,
                   Handle* handle) {
  handle->address = address;
  return 0;
}

int gdr_unpin_buffer(void* gdr, Handle handle) { return 0; }

// The size is not kept, and NVSHMEM asks only whether it is large enough.
int gdr_get_info(void* gdr, Handle handle, Info* info) {
  *info = (Info){.address = handle.address, .size = 1ull << 40, .page_size = 1 << 16, .is_mapped = 1};
  return 0;
}

int gdr_map(void* gdr, Handle handle, void** mapped, size_t size) {
  *mapped = (void*)handle.address;
  return 0;
}

int gdr_unmap(void* gdr, Handle handle, void* mapped, size_t size) { return 0; }

int gdr_copy_to_mapping(Handle handle, void* mapped, const void* from, size_t size) {
  memcpy(mapped, from, size);
  return 0;
}

int gdr_copy_from_mapping(Handle handle, void* to, const void* mapped, size_t size) {
  memcpy(to, mapped, size);
  return 0;
}
