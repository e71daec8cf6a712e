// One boxed kernel for every aten operator: it runs the CPU's kernel on the memory of the device's tensors, which is
// host memory. A second one does so for the collectives of torch.distributed, and refuses what HCCL refuses.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
constexpr auto kCpu = c10::DeviceType::CPU;

std::atomic<int64_t> calls{0};

bool on_npu(const Tensor& t) { return t.defined() && t.device().type() == kNpu; }

// The same memory as a CPU tensor, which keeps the device's storage alive.
Tensor alias_of(const Tensor& t) {
  auto storage = t.storage();
  auto release = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
  c10::DataPtr pointer(storage.mutable_data(), new c10::Storage(storage), release, c10::Device(kCpu));
  c10::Storage memory(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), c10::GetCPUAllocator(),
                      /*resizable=*/false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(std::move(memory), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                        t.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) alias = alias.conj();
  return t.is_neg() ? alias._neg_view() : alias;
}

Tensor to_npu(const Tensor& t, c10::Device device) {
  Tensor made = at::empty_strided(t.sizes(), t.strides(), t.options().device(device));
  alias_of(made).copy_(t);
  return made;
}

// An explicit generator of the device: its seed and offset decide the numbers; each draw moves the offset on. The first
// draw after a seed is the CPU's. The default generator is the CPU's own (kernels.py).
at::Generator generator_of(at::Generator generator) {
  std::lock_guard<std::mutex> lock(generator.mutex());
  const auto offset = generator.get_offset();
  auto own = at::make_generator<at::CPUGeneratorImpl>(generator.current_seed() + offset * 0x9E3779B97F4A7C15ull);
  generator.set_offset(offset + 4);  // Philox counts in fours
  return own;
}

template <typename Change>
IValue change_list(const IValue& list, Change&& change) {
  c10::List<Tensor> changed;
  for (const Tensor& t : list.toTensorList().vec()) changed.push_back(change(t));
  return changed;
}

// Apply a change to every tensor of a value: a tensor, or lists of them as schemas have them.
template <typename Change>
void change_tensors(IValue& value, Change&& change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    value = change_list(value, change);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (std::optional<Tensor> t : value.toOptionalTensorList().vec()) {
      changed.push_back(t ? std::optional<Tensor>(change(*t)) : t);
    }
    value = changed;
  } else if (value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensorList()) {
    c10::impl::GenericList changed(c10::ListType::ofTensors());  // Tensor[][], of collectives
    for (const IValue& list : value.toListRef()) changed.push_back(change_list(list, change));
    value = changed;
  }
}

// The tensors of one call, each with its alias.
class Call {
 public:
  Call() : device_(kNpu, c10::impl::getDeviceGuardImpl(kNpu)->getDevice().index()) {}

  void enter(IValue& value) {
    if (value.isDevice()) {
      const auto asked = value.toDevice();
      stays_on_cpu_ = asked.type() != kNpu;
      if (!stays_on_cpu_) {
        if (asked.has_index()) device_ = asked;
        value = c10::Device(kCpu);
      }
    } else if (value.isGenerator() && value.toGenerator().device().type() == kNpu) {
      value = generator_of(value.toGenerator());
    } else {
      change_tensors(value, [this](const Tensor& t) { return enter(t); });
    }
  }

  void leave(IValue& value) {
    change_tensors(value, [this](const Tensor& t) { return leave(t); });
  }

  // out= arguments that the CPU's kernel has resized, whether or not it returns them
  void resize_outputs() {
    for (auto& [ours, alias] : seen_) {
      if (alias.defined() && ours.sizes() != alias.sizes()) overwrite(ours, alias);
    }
  }

 private:
  Tensor enter(const Tensor& t) {
    if (!on_npu(t)) return t;
    device_ = t.device();
    for (auto& [ours, alias] : seen_) {
      if (ours.is_same(t)) return alias;
    }
    // An empty vector may be an out= argument that is to be resized, which borrowed memory cannot be.
    const bool resizable = t.numel() == 0 && t.dim() == 1;
    seen_.emplace_back(t, resizable ? at::empty({0}, t.options().device(kCpu)) : alias_of(t));
    return seen_.back().second;
  }

  Tensor leave(const Tensor& t) {
    if (!t.defined() || t.device().type() != kCpu) return t;
    for (auto& [ours, alias] : seen_) {
      if (!alias.is_same(t)) continue;
      if (ours.sizes() != t.sizes() || ours.storage().data() != t.storage().data()) overwrite(ours, t);
      return ours;
    }
    for (auto& [ours, alias] : seen_) {  // a view of an argument
      if (t.numel() && alias.storage().data() == t.storage().data()) {
        return at::as_strided(ours, t.sizes(), t.strides(), t.storage_offset());
      }
    }
    return stays_on_cpu_ ? t : to_npu(t, device_);
  }

  static void overwrite(Tensor& ours, const Tensor& result) {
    ours.resize_(result.sizes());
    alias_of(ours).copy_(result);
  }

  c10::Device device_;
  bool stays_on_cpu_ = false;
  std::vector<std::pair<Tensor, Tensor>> seen_;
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  calls++;
  Call call;
  const size_t arguments = op.schema().arguments().size(), results = op.schema().returns().size();
  for (size_t i = stack->size() - arguments; i < stack->size(); i++) call.enter((*stack)[i]);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = stack->size() - results; i < stack->size(); i++) call.leave((*stack)[i]);
  call.resize_outputs();
}

// The argument of a collective that is a given class; null where it has none.
template <typename T>
IValue* find(torch::jit::Stack* stack, size_t first) {
  static const auto type = c10::getCustomClassType<c10::intrusive_ptr<T>>();
  for (size_t i = first; i < stack->size(); i++) {
    if ((*stack)[i].isCustomClass() && *(*stack)[i].type() == *type) return &(*stack)[i];
  }
  return nullptr;
}

// ProcessGroupHCCL reduces these and no others.
bool reducible(at::ScalarType type) {
  for (auto known : {at::kChar, at::kShort, at::kInt, at::kLong, at::kHalf, at::kFloat, at::kBFloat16}) {
    if (type == known) return true;
  }
  return false;
}

// The same members with the device's backend in the CPU's place, where the CPU's kernel of a collective asks for it.
c10::intrusive_ptr<c10d::ProcessGroup> seen_from_cpu(const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  static std::map<c10d::ProcessGroup*, c10::intrusive_ptr<c10d::ProcessGroup>> twins;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  auto& twin = twins[group.get()];
  const auto backend = group->getBackend(kNpu);
  if (!twin || twin->getBackend(kCpu) != backend) {
    twin = c10::make_intrusive<c10d::ProcessGroup>(group->getRank(), group->getSize());
    twin->setBackend(kCpu, c10d::ProcessGroup::BackendType::GLOO, backend);
  }
  return twin;
}

void collective(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  IValue* const at_group = find<c10d::ProcessGroup>(stack, first);
  const auto group = at_group->toCustomClass<c10d::ProcessGroup>();
  *at_group = seen_from_cpu(group);
  if (IValue* const at_reduction = find<c10d::ReduceOp>(stack, first)) {
    const auto kind = at_reduction->toCustomClass<c10d::ReduceOp>()->op_;
    const bool bitwise = kind == c10d::ReduceOp::BAND || kind == c10d::ReduceOp::BOR || kind == c10d::ReduceOp::BXOR;
    TORCH_CHECK(!bitwise, "Cannot use a bitwise ReduceOp with HCCL");
    const bool average = kind == c10d::ReduceOp::AVG;  // torch_npu makes it of a sum
    if (average) *at_reduction = IValue(c10::make_intrusive<c10d::ReduceOp>(c10d::ReduceOp::SUM));
    // The input comes first where it is also the output, else second.
    const bool in_place = op.schema().name().find("reduce_scatter") == std::string::npos;
    change_tensors((*stack)[first + (in_place ? 0 : 1)], [&](const Tensor& t) {
      TORCH_CHECK(reducible(t.scalar_type()), "HCCL: Unsupported data type ", t.scalar_type());
      if (!average) return t;
      return in_place ? t.div_(group->getSize()) : t.div(group->getSize());
    });
  }
  on_cpu(op, stack);
}

template <c10::KernelFunction::BoxedKernelFunction* kernel>
void put_in_place(const char* space, const c10::List<std::string>& names) {
  static torch::Library library(torch::Library::IMPL, space, c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  for (const std::string& name : names) library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<kernel>());
}

void replace_operators(const c10::List<std::string>& names) { put_in_place<&on_cpu>("aten", names); }
void replace_collectives(const c10::List<std::string>& names) { put_in_place<&collective>("c10d", names); }

}  // namespace

TORCH_LIBRARY(npu_emulator, m) {
  m.def("replace_operators(str[] names) -> ()", &replace_operators);
  m.def("replace_collectives(str[] names) -> ()", &replace_collectives);
  m.def("alias(Tensor t) -> Tensor", [](const Tensor& t) { return on_npu(t) ? alias_of(t) : t; });
  m.def("to_npu(Tensor t, Device device) -> Tensor", &to_npu);
  m.def("operator_calls() -> int", [] { return calls.load(); });
}
