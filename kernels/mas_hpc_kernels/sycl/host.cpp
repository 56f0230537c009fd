// C interface to the SYCL run-time compiler for ctypes: opens the CPU device, compiles source text, launches by name.
// Built by plain g++. After a failure mas_hpc_sycl_error() says why.
#define SYCL_DISABLE_FSYCL_SYCLHPP_WARNING
#include <sycl/sycl.hpp>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

namespace experimental = sycl::ext::oneapi::experimental;

namespace {
struct Context {
  std::mutex mutex;
  std::optional<sycl::queue> queue;
  std::string device;
};
// Never destroyed: at exit libsycl and the OpenCL driver may be gone first ("Pure virtual function called!").
Context &context = *new Context;
thread_local std::string error;

struct Program {
  sycl::kernel_bundle<sycl::bundle_state::executable> bundle;
  std::map<std::string, sycl::kernel> kernels;
};

template <typename Action> bool succeeds(Action action) {
  const std::lock_guard<std::mutex> one_at_a_time(context.mutex); // ctypes lets go of Python's lock
  try {
    action();
    return true;
  } catch (const std::exception &exception) {
    error = exception.what();
    return false;
  }
}

// One argument of a kernel in the eight bytes that ctypes passes: pointer 'p', int64 'l', float 'f' or double 'd'.
void set_argument(sycl::handler &handler, int index, char kind, const char *bytes) {
  const auto set = [&](auto value) {
    std::memcpy(&value, bytes, sizeof value);
    handler.set_arg(index, value);
  };
  switch (kind) {
  case 'p': return set(static_cast<void *>(nullptr));
  case 'l': return set(int64_t{});
  case 'f': return set(float{});
  case 'd': return set(double{});
  default: throw std::invalid_argument(std::string("kind of argument: ") + kind);
  }
}
} // namespace

extern "C" {

const char *mas_hpc_sycl_error() { return error.c_str(); }
const char *mas_hpc_sycl_device() { return context.device.c_str(); }

// The runtime reads these variables when the first queue is made; what the user has set stays.
bool mas_hpc_sycl_open(const char *opencl_driver, const char *cache_folder, const char *num_threads) {
  return succeeds([&] {
    setenv("OCL_ICD_FILENAMES", opencl_driver, 0); // the driver list in the PyPI package names a folder of its builder
    setenv("SYCL_CACHE_PERSISTENT", "1", 0);
    setenv("SYCL_CACHE_DIR", cache_folder, 0);
    setenv("DPCPP_CPU_NUM_CUS", num_threads, 0);
    if (context.queue)
      return;
    context.queue.emplace(sycl::cpu_selector_v, sycl::property_list{sycl::property::queue::in_order{}});
    const sycl::device device = context.queue->get_device();
    context.device = device.get_info<sycl::info::device::name>();
    if (!device.has(sycl::aspect::usm_system_allocations))
      throw std::runtime_error(context.device + " cannot read the memory of torch's tensors (no system USM)");
  });
}

// Returns a program that lives as long as the process, or null.
void *mas_hpc_sycl_compile(const char *source, const char *header_name, const char *header, const char *option) {
  Program *program = nullptr;
  succeeds([&] {
    auto bundle = experimental::create_kernel_bundle_from_source(
        context.queue->get_context(), experimental::source_language::sycl, std::string(source),
        experimental::properties{experimental::include_files{header_name, header}});
    const experimental::properties options{experimental::build_options{std::string(option)}};
    program = new Program{experimental::build(bundle, options), {}};
  });
  return program;
}

bool mas_hpc_sycl_launch(void *program_address, const char *name, int64_t num_groups, int64_t group_size, const char *kinds,
                         const char *arguments) {
  return succeeds([&] {
    Program &program = *static_cast<Program *>(program_address);
    auto found = program.kernels.find(name);
    if (found == program.kernels.end())
      found = program.kernels.emplace(name, program.bundle.ext_oneapi_get_kernel(name)).first;
    const auto submit = [&](sycl::handler &handler) {
      for (int index = 0; kinds[index] != '\0'; index++)
        set_argument(handler, index, kinds[index], arguments + 8 * index);
      handler.parallel_for(sycl::nd_range<1>(num_groups * group_size, group_size), found->second);
    };
    context.queue->submit(submit).wait_and_throw();
  });
}
}
