// Host work in a stream: launched through the driver, found at run time, so that nothing here needs
// CUDA to be built.
#include <dlfcn.h>

#include <utility>

#include "checks.h"
#include "stream.h"

namespace magicpig {

void FirstError::note(std::exception_ptr error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!error_) error_ = std::move(error);
}

bool FirstError::waiting() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_ != nullptr;
}

void FirstError::raise() {
  std::exception_ptr error;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    error = std::exchange(error_, nullptr);
  }
  if (!error) return;
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    throw std::runtime_error(e.what());
  }
}

LaunchHostFunc find_launch_host_func() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays open
  if (library == nullptr)
    throw std::runtime_error(sentence("libcuda.so.1 cannot be loaded (", dlerror(),
                                      "), but decode in stream order needs NVIDIA's driver; "
                                      "install it or use the CPU platform."));
  void* function = dlsym(library, "cuLaunchHostFunc");
  if (function == nullptr)
    throw std::runtime_error(
        "libcuda.so.1 has no cuLaunchHostFunc, but decode in stream order needs it; install "
        "NVIDIA's driver of CUDA 10 or later.");
  return reinterpret_cast<LaunchHostFunc>(function);
}

struct HostCallbacks::Launched {
  std::shared_ptr<HostCallbacks> callbacks;
  std::unique_ptr<HostJob> job;
};

void HostCallbacks::launch(void* stream, std::unique_ptr<HostJob> job) {
  auto launched = std::make_unique<Launched>(Launched{shared_from_this(), std::move(job)});
  pending_.fetch_add(1);
  const int result = launch_(stream, &HostCallbacks::call, launched.get());
  if (result != 0) {
    launched.reset();
    pending_.fetch_sub(1);
    throw std::runtime_error(sentence("cuLaunchHostFunc failed with CUresult ", result,
                                      ", so this step has no decode; look the code up in cuda.h "
                                      "and restart the engine."));
  }
  launched.release();  // call() may have freed it already
}

void HostCallbacks::call(void* data) noexcept {
  std::unique_ptr<Launched> launched(static_cast<Launched*>(data));
  const std::shared_ptr<HostCallbacks> self = std::move(launched->callbacks);
  HostJob& job = *launched->job;
  try {
    if (self->errors_.waiting())
      job.abandon();
    else
      job.run();
  } catch (...) {
    self->errors_.note(std::current_exception());
    job.abandon();
  }
  launched.reset();
  self->pending_.fetch_sub(1);
}

}  // namespace magicpig
