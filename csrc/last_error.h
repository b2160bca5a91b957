// Why the last failing call failed: llama_mesa_last_error.

#pragma once

#include <cstdint>
#include <string>

namespace mesa {

// keeps what for llama_mesa_last_error of this thread; returns -1
int32_t fail(const std::string & what);

} // namespace mesa
