// The AscendCL operator compiler: compiles nothing; options of the system are remembered, all others ignored.
#include <cstddef>
#include <cstdint>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

extern "C" {

static int64_t options[64];

static int64_t* option(aclSysParamOpt which) {
  const auto index = static_cast<size_t>(which);
  return index < sizeof(options) / sizeof(*options) ? &options[index] : nullptr;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt which, int64_t* value) {
  if (!option(which)) return ACL_ERROR_INVALID_PARAM;
  *value = *option(which);
  return 0;
}

aclError aclrtSetSysParamOpt(aclSysParamOpt which, int64_t value) {
  if (!option(which)) return ACL_ERROR_INVALID_PARAM;
  *option(which) = value;
  return 0;
}

aclError aclSetCompileopt(aclCompileOpt, const char*) { return 0; }
size_t aclGetCompileoptSize(aclCompileOpt) { return 1; }
aclError aclGetCompileopt(aclCompileOpt, char* value, size_t room) {
  if (room) *value = '\0';
  return 0;
}
aclError aclopSetCompileFlag(aclOpCompileFlag) { return 0; }

}  // extern "C"
