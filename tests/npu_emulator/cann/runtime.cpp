// The AscendCL runtime on the host: device memory is host memory, every stream has finished, events hold the host's clock.
//
// Signatures come from the headers in the torch_npu wheel, so that a changed one does not compile. What only has to
// succeed and returns nothing needs no line here: build.py makes a function that returns 0 of every other symbol that
// the wheel links against. Those it looks up at run time instead are listed under "nothing to do".
//
//   NPU_EMULATOR_DEVICES      devices (1)
//   NPU_EMULATOR_MEMORY_GIB   memory of each (64)
//   NPU_EMULATOR_SOC          name of the chip (Ascend910B2)
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "acl/acl_rt.h"
#undef aclopCompileAndExecute

namespace {

constexpr aclError kSuccess = 0;
constexpr aclError kContextMissing = 107002;
constexpr aclError kOutOfMemory = 207001;
constexpr aclError kOperatorMissing = 500002;
constexpr size_t kAlignment = 512;  // of device memory, which torch_npu relies on

int setting(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}

int devices() { return setting("NPU_EMULATOR_DEVICES", 1); }

thread_local int current_device = -1;

double milliseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

template <typename Handle>
aclError create(Handle* handle) {  // a stream needs an address, an event room for a time
  *handle = calloc(1, sizeof(double));
  return kSuccess;
}

aclError destroy(void* handle) {
  free(handle);
  return kSuccess;
}

aclError allocate(void** pointer, size_t bytes) {
  return posix_memalign(pointer, kAlignment, bytes ? bytes : kAlignment) == 0 ? kSuccess : kOutOfMemory;
}

aclError copy(void* to, size_t room, const void* from, size_t bytes) {
  if (bytes > room) return ACL_ERROR_INVALID_PARAM;
  memmove(to, from, bytes);
  return kSuccess;
}

template <typename T, typename Value>
aclError answer(T* where, Value value) {
  *where = static_cast<T>(value);
  return kSuccess;
}

}  // namespace

extern "C" {

// Devices
const char* aclrtGetSocName() {
  const char* name = getenv("NPU_EMULATOR_SOC");
  return name ? name : "Ascend910B2";
}
aclError aclrtGetDeviceCount(uint32_t* count) { return answer(count, devices()); }
aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= devices()) return ACL_ERROR_INVALID_PARAM;
  return answer(&current_device, device);
}
aclError aclrtGetDevice(int32_t* device) { return current_device < 0 ? kContextMissing : answer(device, current_device); }
aclError aclrtGetCurrentContext(aclrtContext* context) {
  *context = &current_device;
  return kSuccess;
}
aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) { return answer(can, 0); }
aclError aclrtGetMemInfo(aclrtMemAttr, size_t* available, size_t* total) {
  *total = static_cast<size_t>(setting("NPU_EMULATOR_MEMORY_GIB", 64)) << 30;
  return answer(available, *total - (size_t{1} << 30));
}
const char* aclGetRecentErrMsg() { return "the emulated CANN keeps no error message"; }

// Streams
aclError aclrtCreateStream(aclrtStream* stream) { return create(stream); }
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return create(stream); }
aclError aclrtDestroyStream(aclrtStream stream) { return destroy(stream); }
aclError aclrtDestroyStreamForce(aclrtStream stream) { return destroy(stream); }
aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus* status) { return answer(status, ACL_STREAM_STATUS_COMPLETE); }
aclError aclrtStreamGetId(aclrtStream, int32_t* id) { return answer(id, 0); }
aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* on) { return answer(on, 0); }

// Events
aclError aclrtCreateEvent(aclrtEvent* event) { return create(event); }
aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) { return create(event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) { return create(event); }
aclError aclrtDestroyEvent(aclrtEvent event) { return destroy(event); }
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream) { return answer(static_cast<double*>(event), milliseconds()); }
aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus* status) {
  return answer(status, ACL_EVENT_RECORDED_STATUS_COMPLETE);
}
aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
  return answer(status, ACL_EVENT_WAIT_STATUS_COMPLETE);
}
aclError aclrtEventElapsedTime(float* elapsed, aclrtEvent start, aclrtEvent end) {
  return answer(elapsed, *static_cast<double*>(end) - *static_cast<double*>(start));
}

// Memory
aclError aclrtMalloc(void** pointer, size_t bytes, aclrtMemMallocPolicy) { return allocate(pointer, bytes); }
aclError aclrtMallocAlign32(void** pointer, size_t bytes, aclrtMemMallocPolicy) { return allocate(pointer, bytes); }
aclError aclrtMallocHost(void** pointer, size_t bytes) { return allocate(pointer, bytes); }
aclError aclrtFree(void* pointer) { return destroy(pointer); }
aclError aclrtFreeHost(void* pointer) { return destroy(pointer); }
aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind) {
  return copy(to, room, from, bytes);
}
aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind, aclrtStream) {
  return copy(to, room, from, bytes);
}
aclError aclrtMemset(void* to, size_t, int32_t value, size_t bytes) {
  memset(to, value, bytes);
  return kSuccess;
}
aclError aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t bytes, aclrtStream) {
  return aclrtMemset(to, room, value, bytes);
}

// An operator without a kernel of the emulator must fail: success would leave its result uninitialised.
aclError aclopCompileAndExecute(const char*, int, const aclTensorDesc* const[], const aclDataBuffer* const[], int,
                                const aclTensorDesc* const[], aclDataBuffer* const[], const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream) {
  return kOperatorMissing;
}

// Nothing to do
aclError aclrtGetLastError(aclrtLastErrLevel) { return kSuccess; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return kSuccess; }
aclError aclrtSynchronizeDevice() { return kSuccess; }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return kSuccess; }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream, int32_t) { return kSuccess; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return kSuccess; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return kSuccess; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return kSuccess; }
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return kSuccess; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return kSuccess; }

}  // extern "C"
