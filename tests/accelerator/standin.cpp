// A stand-in accelerator, the device "accel": torch's PrivateUse1 with memory of its own, computed by the CPU's kernels.
// Its tensors are never the CPU's: kernels see them only through on_device() below, which refuses tensors of the CPU of
// one dimension and more beside them, counts kernels, and reports every time the host waits. README.md says more.
#include <torch/extension.h>
#include <torch/library.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/Allocator.h>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {
constexpr auto D = c10::DeviceType::PrivateUse1;
constexpr int DEVICES = 2;
thread_local int current = 0;
std::mutex lock;
std::map<std::string, int64_t> calls;           // kernels
std::map<std::string, int64_t> views;           // no kernel
std::atomic<int64_t> allocated{0}, peak{0}, allocations{0};
py::object* watcher = nullptr;                  // called (kind, name) whenever the host waits
bool poison = true;                             // fresh memory holds nan
thread_local int quiet = 0;

void note(std::map<std::string, int64_t>& where, const std::string& name) {
  if (quiet) return;
  std::lock_guard<std::mutex> guard(lock);
  ++where[name];
}
void waits(const char* kind, const std::string& name) {
  if (quiet || watcher == nullptr) return;
  py::gil_scoped_acquire gil;
  (*watcher)(kind, name);  // it may raise
}

// A copy to the host that does not block arrives only when an event after it, its stream or its device is waited for.
struct Late { at::Tensor target, source; int device; int64_t number; };
std::vector<Late>* late = new std::vector<Late>();
int64_t issued = 0;
void arrive(int device, int64_t number) {
  std::vector<Late> now;
  {
    std::lock_guard<std::mutex> guard(lock);
    std::vector<Late> rest;
    for (auto& one : *late) (one.device == device && one.number <= number ? now : rest).push_back(one);
    late->swap(rest);
  }
  for (auto& one : now) one.target.copy_(one.source);
}
void arrive_all(int device) { arrive(device, INT64_MAX); }

struct Own final : c10::Allocator {
  static void release(void* context) {
    auto* base = static_cast<int64_t*>(context);
    allocated -= base[0];
    std::free(context);
  }
  c10::DataPtr allocate(size_t n) override {
    auto device = c10::Device(D, static_cast<c10::DeviceIndex>(current));
    if (n == 0) return {nullptr, nullptr, &release_nothing, device};
    auto* base = static_cast<int64_t*>(std::aligned_alloc(64, (n + 127) / 64 * 64));
    base[0] = static_cast<int64_t>(n);
    void* data = reinterpret_cast<char*>(base) + 64;
    if (poison) std::memset(data, 0xff, n);
    allocated += static_cast<int64_t>(n);
    ++allocations;
    int64_t now = allocated, before = peak;
    while (now > before && !peak.compare_exchange_weak(before, now)) {}
    return {data, base, &release, device};
  }
  static void release_nothing(void*) {}
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};
Own own;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return D; }
  c10::Device exchangeDevice(c10::Device d) const override { auto old = getDevice(); setDevice(d); return old; }
  c10::Device getDevice() const override { return {D, static_cast<c10::DeviceIndex>(current)}; }
  void setDevice(c10::Device d) const override { if (d.index() >= 0) current = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { if (d.index() >= 0) current = d.index(); }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, at(d)); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, at(d)); }
  c10::Stream getNewStream(c10::Device d, int) const override { return c10::Stream(c10::Stream::DEFAULT, at(d)); }
  c10::Stream exchangeStream(c10::Stream s) const override { return c10::Stream(c10::Stream::DEFAULT, s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void** e, const c10::Stream& s, c10::DeviceIndex, c10::EventFlag) const override { *e = new std::pair<int, int64_t>(s.device_index(), issued); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& s) const override { arrive_all(s.device_index()); waits("stream", "synchronizeStream"); }
  void synchronizeEvent(void* e) const override { if (e) { auto* at = static_cast<std::pair<int, int64_t>*>(e); arrive(at->first, at->second); } waits("event", "synchronizeEvent"); }
  void synchronizeDevice(c10::DeviceIndex d) const override { arrive_all(d); waits("device", "synchronizeDevice"); }
  static c10::Device at(c10::Device d) { return {D, d.index() < 0 ? static_cast<c10::DeviceIndex>(current) : d.index()}; }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  std::vector<at::Generator> generators;
  Hooks() { for (int i = 0; i < DEVICES; ++i) generators.push_back(at::detail::createCPUGenerator()); }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(c10::DeviceIndex i) const override { current = i; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex i) const override { auto old = current; current = i; return static_cast<c10::DeviceIndex>(old); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex i) const override { return exchangeDevice(i); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override { return generators[i < 0 ? 0 : i]; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Device getDeviceFromPtr(void*) const override { return {D, 0}; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto old = s.unsafeGetStorageImpl();
    c10::DeviceGuard guard(s.device());
    auto fresh = own.allocate(n);
    if (old->nbytes()) std::memcpy(fresh.get(), s.data(), std::min(n, old->nbytes()));
    old->set_data_ptr_noswap(std::move(fresh));
    old->set_nbytes(n);
  }
};

at::Tensor fresh(at::IntArrayRef size, at::IntArrayRef stride, c10::ScalarType dtype, c10::Device device) {
  c10::DeviceGuard guard(Guard::at(device));
  int64_t extent = 1;
  for (size_t i = 0; i < size.size(); ++i) { if (size[i] == 0) { extent = 0; break; } extent += (size[i] - 1) * stride[i]; }
  auto bytes = extent * static_cast<int64_t>(c10::elementSize(dtype));
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, own.allocate(bytes), &own, true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::scalarTypeToTypeMeta(dtype));
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  return fresh(size, stride, dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype())), device.value_or(c10::Device(D)));
}
at::Tensor empty(at::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  auto like = at::empty(size, at::TensorOptions().dtype(dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()))).device(at::kMeta), format);
  return fresh(size, like.strides(), like.scalar_type(), device.value_or(c10::Device(D)));
}

// The same memory as a CPU tensor.
at::Tensor seen(const at::Tensor& t) {
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), at::TensorOptions().dtype(t.dtype()).device(at::kCPU));
}
at::Tensor view_of(const at::Tensor& base, at::IntArrayRef size, at::IntArrayRef stride, int64_t offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), base.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(offset);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}
// A CPU kernel's fresh result, moved to the device.
at::Tensor moved(const at::Tensor& t, c10::Device device) {
  if (!t.defined()) return t;
  auto made = fresh(t.sizes(), t.strides(), t.scalar_type(), device);
  if (t.numel()) seen(made).copy_(t);
  return made;
}

void set_storage(const at::Tensor& self, const c10::Storage& s, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(s);
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, stride);
}
std::vector<int64_t> packed(at::IntArrayRef size) {
  std::vector<int64_t> stride(size.size(), 1);
  for (int64_t i = static_cast<int64_t>(size.size()) - 2; i >= 0; --i) stride[i] = stride[i + 1] * std::max<int64_t>(size[i + 1], 1);
  return stride;
}
const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  if (self.sizes() == size) return self;
  auto like = at::empty(size, at::TensorOptions().dtype(self.dtype()).device(at::kMeta), format);
  size_t need = (self.storage_offset() + like.numel()) * self.element_size();
  if (need > self.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), need);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, like.strides());
  return self;
}
at::Tensor& set_source(at::Tensor& self, c10::Storage s) {
  std::vector<int64_t> size{static_cast<int64_t>(s.nbytes() / self.element_size())};
  set_storage(self, s, 0, size, {1});
  return self;
}
at::Tensor& set_source_offset(at::Tensor& self, c10::Storage s, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto plain = C10_AS_INTARRAYREF_SLOW(size);
  auto given = C10_AS_INTARRAYREF_SLOW(stride);
  auto own_stride = packed(plain);
  set_storage(self, s, offset.expect_int(), plain, stride.empty() ? at::IntArrayRef(own_stride) : given);
  return self;
}
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& o) { set_storage(self, o.storage(), o.storage_offset(), o.sizes(), o.strides()); return self; }
at::Tensor& set_nothing(at::Tensor& self) {
  c10::DeviceGuard guard(self.device());
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), 0, own.allocate(0), &own, true);
  set_storage(self, c10::Storage(storage), 0, {0}, {1});
  return self;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  bool out = from.device().type() == D, in = to.device().type() == D;
  if (out && in) note(calls, "copy_");
  else if (out) { note(calls, "memcpy d2h"); if (!non_blocking) waits("d2h", "copy_"); }
  else { note(calls, "memcpy h2d"); if (!non_blocking) waits("h2d", "copy_"); }
  if (out && !in && non_blocking) {
    std::lock_guard<std::mutex> guard(lock);
    late->push_back({to.detach(), seen(from).clone(), from.device().index(), ++issued});
    return to;
  }
  if (!non_blocking && !(in && out)) arrive_all((out ? from : to).device().index());
  auto target = in ? seen(to) : to;
  target.copy_(out ? seen(from) : from);
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) { to.resize_(from.sizes()); return copy_from(from, to, false); }
at::Scalar local_scalar_dense(const at::Tensor& t) { arrive_all(t.device().index()); waits("item", "_local_scalar_dense"); return seen(t).item(); }

// Kernels after which the host must know a size or a value.
const std::set<std::string> WAITING = {
  "aten::nonzero", "aten::nonzero.out", "aten::masked_select", "aten::masked_select.out", "aten::_unique2", "aten::unique_dim",
  "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount", "aten::repeat_interleave.Tensor", "aten::equal",
  "aten::_linalg_eigh.eigenvalues", "aten::_linalg_svd.U", "aten::linalg_eig", "aten::linalg_eig.out"};
// Kernels of CUDA that take a CPU scalar beside tensors of the device, by sending it there.
const std::set<std::string> SENDING = {"aten::where.self", "aten::where.self_out"};
std::set<std::string> scalars_beside;  // other kernels that got one

// CUDA joins the entries of a list to one kernel only where its fast route can be taken; else it makes one for each.
size_t foreach_launches(const std::vector<c10::IValue>& given, const std::string& name) {
  std::vector<std::vector<at::Tensor>> lists;
  for (const auto& value : given) if (value.isTensorList() && value.toTensorVector().size()) lists.push_back(value.toTensorVector());
  if (lists.empty()) return 1;
  const auto& first = lists[0];
  bool fast = true;
  for (const auto& list : lists) {
    fast = fast && list.size() == first.size();
    for (size_t i = 0; fast && i < list.size(); ++i) {
      const auto &t = list[i], &like = first[i];
      fast = t.device() == first[0].device() && t.layout() == at::kStrided && t.is_non_overlapping_and_dense() && t.sizes() == like.sizes() && t.strides() == like.strides() && (name == "aten::_foreach_copy_" || t.scalar_type() == first[0].scalar_type());
    }
  }
  return fast ? 1 : first.size();
}

void on_device(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const auto count = schema.arguments().size();
  const auto begin = stack->size() - count;
  std::vector<c10::IValue> given(stack->begin() + static_cast<long>(begin), stack->end());
  std::optional<c10::Device> device;
  std::vector<at::Tensor> inputs;
  const bool foreach = name.rfind("aten::_foreach_", 0) == 0;
  std::vector<c10::Device> entries;  // of foreach, where each list entry lies
  auto look = [&](const at::Tensor& t) {
    if (!t.defined() || t.device().type() != D) return;
    TORCH_CHECK(foreach || !device || *device == t.device(), "Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ", t.device(), "! (", name, ")");
    device = t.device();
    inputs.push_back(t);
  };
  for (const auto& value : given) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) {
      size_t entry = 0;
      for (const at::Tensor& t : value.toTensorVector()) {
        look(t);
        if (!foreach) continue;
        if (entry == entries.size()) entries.push_back(t.device());
        TORCH_CHECK(entries[entry] == t.device() || name == "aten::_foreach_copy_", "Expected all tensors to be on the same device, but found at least two devices, ", entries[entry], " and ", t.device(), "! (", name, ")");
        ++entry;
      }
    }
    else if (value.isList()) { for (const auto& e : value.toListRef()) if (e.isTensor()) look(e.toTensor()); }
    else if (value.isDevice() && value.toDevice().type() == D) device = Guard::at(value.toDevice());
  }
  std::vector<std::pair<at::Tensor, at::Tensor>> grown;
  auto turn = [&](const at::Tensor& t, bool written) -> at::Tensor {
    if (!t.defined()) return t;
    if (t.device().type() == D) {
      if (written && t.numel() == 0) {
        auto host = at::empty(t.sizes(), at::TensorOptions().dtype(t.dtype()));
        grown.emplace_back(t, host);
        return host;
      }
      return seen(t);
    }
    TORCH_CHECK(t.dim() == 0 && !written, "Expected all tensors to be on the same device, but found at least two devices, ", device.value_or(c10::Device(D, 0)), " and ", t.device(), "! (", name, ")");
    if (SENDING.count(name)) { note(calls, "memcpy h2d"); waits("h2d", name); }
    else if (!quiet) { std::lock_guard<std::mutex> guard(lock); scalars_beside.insert(name); }
    return t;
  };
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    bool written = alias != nullptr && alias->isWrite();
    const auto& value = given[i];
    auto& slot = (*stack)[begin + i];
    if (value.isTensor()) slot = turn(value.toTensor(), written);
    else if (value.isTensorList()) {
      std::vector<at::Tensor> turned;
      for (const at::Tensor& t : value.toTensorVector()) turned.push_back(foreach && t.device().type() != D ? t : turn(t, written && t.numel() > 0));
      slot = turned;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> turned;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) turned.push_back(t && t->defined() ? std::optional<at::Tensor>(turn(*t, false)) : std::nullopt);
      slot = turned;
    } else if (value.isDevice() && value.toDevice().type() == D) slot = c10::Device(c10::DeviceType::CPU);
    else if (value.isGenerator() && value.toGenerator().defined()) slot = value;
  }
  bool viewing = !schema.returns().empty();
  for (const auto& r : schema.returns()) viewing = viewing && r.alias_info() != nullptr && !r.alias_info()->isWrite();
  const auto launches = foreach ? foreach_launches(given, name) : 1;
  for (size_t i = 0; i < launches; ++i) note(viewing ? views : calls, name.substr(6) + (launches > 1 ? " (slow route)" : ""));
  const bool known = name == "aten::repeat_interleave.Tensor" && count > 1 && !given[1].isNone();  // its size is given
  if (WAITING.count(name) && !known) waits("kernel", name);
  op.callBoxed(stack);
  for (auto& [t, host] : grown) if (host.numel()) { resize_(t, host.sizes(), std::nullopt); seen(t).copy_(host); }
  const auto returned = schema.returns().size();
  const auto first = stack->size() - returned;
  for (size_t r = 0; r < returned; ++r) {
    auto& slot = (*stack)[first + r];
    const auto* alias = schema.returns()[r].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      for (size_t i = 0; i < count; ++i) {
        const auto* other = schema.arguments()[i].alias_info();
        if (other != nullptr && other->isWrite() && *other == *alias) slot = given[i];
      }
      continue;
    }
    auto back = [&](const at::Tensor& t) -> at::Tensor {
      if (!t.defined()) return t;
      if (viewing) for (const auto& base : inputs) {
        auto* start = static_cast<const char*>(base.storage().data());
        auto* mine = static_cast<const char*>(t.data_ptr());
        if (mine >= start && mine <= start + base.storage().nbytes())
          return view_of(base, t.sizes(), t.strides(), (mine - start) / static_cast<int64_t>(t.element_size()));
      }
      return moved(t, device.value_or(c10::Device(D, static_cast<c10::DeviceIndex>(current))));
    };
    if (slot.isTensor()) slot = back(slot.toTensor());
    else if (slot.isTensorList()) {
      std::vector<at::Tensor> turned;
      for (const at::Tensor& t : slot.toTensorVector()) {
        auto entry = turned.size();
        if (foreach && entry < entries.size()) turned.push_back(entries[entry].type() == D ? moved(t, entries[entry]) : t);
        else turned.push_back(back(t));
      }
      slot = turned;
    }
  }
}

at::Tensor as_strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  note(views, "as_strided");
  return view_of(self, size, stride, offset.value_or(self.storage_offset()));
}
void record_stream(at::Tensor&, c10::Stream) {}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  for (const auto& t : {input, weight}) TORCH_CHECK(t.device() == input.device(), "Input type (", input.device(), ") and weight type (", t.device(), ") should be the same");
  note(calls, "convolution");
  auto with = bias && bias->defined() ? std::optional<at::Tensor>(seen(*bias)) : std::nullopt;
  return moved(at::convolution_symint(seen(input), seen(weight), with, stride, padding, dilation, transposed, output_padding, groups), input.device());
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  note(calls, "convolution_backward");
  std::optional<std::vector<c10::SymInt>> bias;
  if (mask[2]) bias = std::vector<c10::SymInt>{weight.sym_size(transposed ? 1 : 0)};
  auto [a, b, c] = at::convolution_backward_symint(seen(grad), seen(input), seen(weight), bias ? c10::OptionalArrayRef<c10::SymInt>(*bias) : c10::OptionalArrayRef<c10::SymInt>(), stride, padding, dilation, transposed, output_padding, groups, mask);
  return {moved(a, input.device()), moved(b, input.device()), moved(c, input.device())};
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_device>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FULL_OUT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_OUT)
  AT_FORALL_PROMOTE(WIDEST)
}

const std::set<std::string> BY_HAND = {
  "empty.memory_format", "empty_strided", "as_strided", "resize_", "set_", "set_.source_Storage", "set_.source_Storage_storage_offset",
  "set_.source_Tensor", "_copy_from", "_copy_from_and_resize", "_local_scalar_dense", "record_stream", "convolution_overrideable", "convolution_backward_overrideable"};

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("resize_", resize_);
  m.impl("set_", set_nothing);
  m.impl("set_.source_Storage", set_source);
  m.impl("set_.source_Storage_storage_offset", set_source_offset);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("record_stream", record_stream);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  // What has a kernel of its own on CUDA has one here, so that the same operations are taken apart, and no others.
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& found : dispatcher.getAllOpNames()) {
    if (found.name.rfind("aten::", 0) != 0) continue;
    auto op = dispatcher.findOp(found);
    if (!op || !op->hasSchema()) continue;
    auto full = found.name.substr(6) + (found.overload_name.empty() ? "" : "." + found.overload_name);
    if (BY_HAND.count(full) || !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    bool taken_apart = op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) || op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
    bool structured = op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional);
    if (taken_apart && !structured) m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_device>());
  }
}
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(D, &own);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("counts", [] { std::lock_guard<std::mutex> guard(lock); return std::make_pair(calls, views); });
  m.def("reset", [] { std::lock_guard<std::mutex> guard(lock); calls.clear(); views.clear(); scalars_beside.clear(); peak = allocated.load(); allocations = 0; });
  m.def("scalars_beside", [] { return scalars_beside; });
  m.def("memory", [] { return std::make_tuple(allocated.load(), peak.load(), allocations.load()); });
  m.def("watch", [](py::object f) { watcher = f.is_none() ? nullptr : new py::object(f); });
  m.def("set_poison", [](bool p) { poison = p; });
  m.def("current_device", [] { return current; });
  m.def("set_device", [](int i) { current = i; });
  m.def("synchronize", [](int i) { arrive_all(i); waits("device", "synchronize"); });
  m.def("data_of", [](const at::Tensor& t) { return seen(t); });  // for tests: the memory itself, unseen by the watcher
}
