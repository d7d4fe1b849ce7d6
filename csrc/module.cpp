// The Python module metakd._C: says how it was built. Kernels in cpu/ and cuda/ register themselves with
// TORCH_LIBRARY_IMPL when the module is imported, so nothing else is bound here.

#include <pybind11/pybind11.h>
#include <torch/version.h>

#ifdef METAKD_WITH_CUDA
#include <cuda.h>
#endif

#include <string>

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  info["torch"] = TORCH_VERSION;
#ifdef METAKD_WITH_CUDA
  info["cuda"] = std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION % 1000 / 10);
#else
  info["cuda"] = pybind11::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of metakd.";
  m.def("build_info", &build_info,
        "dict: compiler, cpp_standard (__cplusplus), torch (compiled against) and cuda (version or None).");
}
