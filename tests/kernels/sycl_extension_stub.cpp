// What extension.sycl needs of a torch with XPU support, for a build without one: it can be compiled, linked and
// registered, and has no stream to run on.
#include <c10/xpu/XPUStream.h>

#include <stdexcept>

namespace c10::xpu {
XPUStream getCurrentXPUStream(DeviceIndex) { throw std::runtime_error("this build has no XPU"); }
sycl::queue &XPUStream::queue() const { throw std::runtime_error("this build has no XPU"); }
} // namespace c10::xpu
